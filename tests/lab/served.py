"""A snapshotter without containerd, and one image in a directory beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.cases import case
from tests.lab.mounted import load_manifest
from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.stack import Snapshotter

IMAGE = "127.0.0.1:1/lab/merged:v6"
CASE = "v6-merged3"


def template(**more: object) -> dict[str, object]:
    """nydusd's configuration for it."""
    backend = {"type": "localfs", "config": {"dir": str(case(CASE))}}
    device = {"backend": backend, "cache": {"type": "blobcache"}}
    return {"device": device, "mode": "direct", "enable_xattr": True, **more}


@contextmanager
def snapshotter(*arguments: str, upstream: Path | None = None, **more: object) -> Iterator[Snapshotter]:
    """One at work in a directory of its own. `upstream`: its nydusd, to be used in place of ours; `more` of the
    template."""
    work = work_dir()
    if upstream is not None:
        program = work / "nydusd"
        # upstream dies where RLIMIT_NOFILE cannot be raised
        program.write_text(f'#!/bin/sh\nshift\nexec {upstream} fuse --rlimit-nofile 0 "$@"\n')
        program.chmod(0o755)
        arguments += ("--nydusd", str(program))
        more = {"fs_driver": "fuse", **more}  # it has no other
    try:
        with Snapshotter(work / "s", template(**more), arguments=arguments) as running:
            yield running
    finally:
        unmount_below(work)
        remove_tree(work)


def some_file(name: str = CASE) -> str:
    """The path in the image of a regular file with content."""
    for entry in load_manifest(case(name))["entries"]:
        if entry["type"] == "file" and entry.get("size", 0) > 10 and entry["path"].isascii():
            return str(entry["path"].lstrip("/"))
    raise AssertionError("no file")
