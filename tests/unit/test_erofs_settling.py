"""What is done about devices once they are on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from nydusfs.drivers.erofs.settling import Settling


def test_a_device_that_comes_again_and_again_is_remembered_once(tmp_path: Path) -> None:
    """With `access_pattern` all reads are of interest, for as long as the image is mounted, and a cache that is too
    small writes its segments anew all the time: the list of them grew without end."""
    (tmp_path / "d").touch()
    opened: list[str] = []

    def look(blob_id: str, name: str, flags: int) -> int:
        opened.append(name)
        return os.open(tmp_path / "d", flags)

    quiet: list[str] = []
    leaving = SimpleNamespace(quiet=lambda device, fd, size: quiet.append(device))
    devices = SimpleNamespace(open=look, leaving=leaving)
    stats = SimpleNamespace(watched=True)
    image: Any = SimpleNamespace(
        reader=SimpleNamespace(recorder=None), volume=SimpleNamespace(stats=stats), devices=devices, files=None,
        segment=lambda device: SimpleNamespace(padded=4096), curious=lambda device: stats.watched,
    )  # fmt: skip

    async def main() -> None:
        settling = Settling({"/i": image}, lambda device: [image], lambda where: where)
        for _ in range(100):
            settling.durable("key/blob/0-aa", -1)
            settling.durable("key/blob/1-bb", -1)
        await settling._settle()
        assert (opened, quiet) == ([], [])
        stats.watched = False
        await settling._settle()
        await settling._settle()
        assert sorted(opened) == ["0-aa", "1-bb"] and len(quiet) == 2

    trio.run(main)
