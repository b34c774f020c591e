"""Bars on a terminal, one line per downloaded layer elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from snapshotter.client.plan import Descriptor
from snapshotter.client.pull import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextmanager
def make_progress(stream: TextIO) -> Iterator[Progress]:
    if not stream.isatty():
        yield _Lines(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, console=Console(file=stream), transient=True) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[int, TaskID] = {}
        self._lock = threading.Lock()

    def layer(self, number: int, layer: Descriptor, state: str) -> None:
        with self._lock:
            if number not in self._tasks:
                self._tasks[number] = self._bars.add_task("", total=layer.size)
        full = {"completed": layer.size} if state in ("done", "present", "unpacking") else {}
        self._bars.update(self._tasks[number], description=f"{layer.digest[7:19]} {state:<11}", **full)  # type: ignore[arg-type]

    def received(self, number: int, count: int) -> None:
        self._bars.advance(self._tasks[number], count)


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def layer(self, number: int, layer: Descriptor, state: str) -> None:
        if state == "done":
            self._stream.write(f"layer {number + 1} {layer.digest} {layer.size} bytes: unpacked\n")

    def received(self, number: int, count: int) -> None:
        pass
