"""What a worker does with what the last one left to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.daemon import handover
from nydusfs.daemon.handover import KeptMount, KeptState
from nydusfs.daemon.logs import ErrorRing
from nydusfs.daemon.options import Options
from nydusfs.daemon.service import Daemon
from tests.lab.daemon import localfs_config


def test_settings_of_the_last_worker_are_taken_over_with_its_mounts() -> None:
    """A worker that dies while it takes over leaves to the next what it was left."""
    saved: list[KeptState] = []

    class Anything:
        """The driver, the services and the mounts of a daemon that gets no further."""

        loop: Any = None
        mountpoint, numbering = "/m", (0, 0)

        def __getattr__(self, _: str) -> Any:
            return self

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

        def numbers(self) -> tuple[list[tuple[str, int]], int]:
            return [], 2

        def kept(self) -> list[KeptMount]:
            return []

        async def restore(self, *_: Any) -> None:
            raise RuntimeError("killed")

    class Link:
        held: dict[str, int] = {"fuse": 9}  # noqa: RUF012

        def save(self, state: bytes) -> None:
            saved.append(handover.decode(state))

    daemon = Daemon(Options("/m"), ErrorRing(), Link())  # type: ignore[arg-type]
    nothing: Any = Anything()
    daemon._driver = daemon._services = daemon._erofs = daemon.mounts = nothing
    kept = KeptState("/m", [KeptMount("/a", "/b", localfs_config(Path("/")), (), 1, 0, time.time_ns())], runtime={
        "": {"registry_auth": "dTpw"}, "\0log": {"log_level": "info"}})  # fmt: skip

    async def take_over() -> None:
        with pytest.raises(RuntimeError, match="killed"):
            await daemon._restore(kept, 9)

    trio.run(take_over)
    assert saved == []
    assert daemon.runtime_config("") == {"registry_auth": "dTpw"}
