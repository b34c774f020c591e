"""What nydusd is asked to mount, one image or many at once, and what people are told when it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from snapshotter.errors import SnapshotterError
from snapshotter.nydusd_api import ApiError, ApiUnreachable, NydusdApi
from snapshotter.records import InstanceRecord

log = logging.getLogger(__name__)

TOGETHER, TOGETHER_BYTES = 25, 1 << 20  # of one request: readers of the first images need not wait for the last


@dataclass(frozen=True)
class Wanted:
    """`config` is JSON text and may hold secrets; `prefetch`: absolute paths in the image."""

    record: InstanceRecord
    config: str
    prefetch: Sequence[str] = ()


def mount(api: NydusdApi, wanted: Wanted, *, later: bool = False) -> None:
    """Raises ApiUnreachable; SnapshotterError where this image cannot be mounted. `later`: `attached` follows."""
    record = wanted.record
    try:
        api.mount(f"/{record.name}", record.bootstrap, wanted.config, wanted.prefetch, later=later)
    except ApiError as error:
        _judge(record, error)


def attached(api: NydusdApi, record: InstanceRecord) -> None:
    """Until an image that was mounted `later` is as it will be. Raises ApiUnreachable; SnapshotterError where it is not
    as it must be."""
    try:
        api.attached(f"/{record.name}")
    except ApiError as error:
        _judge(record, error)


def mount_all(api: NydusdApi, wanted: Sequence[Wanted], mounted: Callable[[InstanceRecord], None]) -> None:
    """After a start: a hundred images one by one take a second. `mounted` is told of each. One that fails does not take
    the others down, it is logged. Raises ApiUnreachable: those not told of are not mounted."""
    for some in _parts(wanted):
        asked = [(f"/{one.record.name}", one.record.bootstrap, one.config, one.prefetch) for one in some]
        answers = api.mount_all(asked) if len(asked) > 1 else None
        for number, one in enumerate(some):
            try:
                if answers is None:  # upstream's knows no such request
                    mount(api, one)
                elif (said := answers[number]) is not None:
                    _judge(one.record, ApiError("mount", 500, said))
            except ApiUnreachable:
                raise
            except SnapshotterError as error:
                log.warning("image %s is not mounted again: %s", one.record.image, error)
                continue
            mounted(one.record)


def _parts(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    part: list[Wanted] = []
    size = 0
    for one in wanted:
        if part and (len(part) == TOGETHER or size + len(one.config) > TOGETHER_BYTES):
            yield part
            part, size = [], 0
        part.append(one)
        size += len(one.config)
    if part:
        yield part


def _judge(record: InstanceRecord, error: ApiError) -> None:
    """Raises SnapshotterError, unless what is there is what was wanted."""
    # ids are never given out twice: what is mounted there is this very image
    if "already exists" in error.message:
        return
    hint = ""
    if f"bootstrap {record.bootstrap}: " in error.reason:
        hint = " (damaged? remove the image in containerd and pull it again)"
    raise SnapshotterError(f"image {record.image} cannot be mounted: {error.reason}{hint}") from None
