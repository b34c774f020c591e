"""What a conversion shows while it runs: bars on a terminal, one line per step elsewhere. All of it on stderr."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import rich.progress


def elapsed_text(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.2f}s"


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


class Progress:
    """Thread-safe. Base class: plain lines; bars are ignored."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:7.2f}s] {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line for those who see no bars."""
        self.say(text)

    def start(self, key: str, text: str, total: int) -> None:
        """A piece of work of `total` bytes begins."""

    def advance(self, key: str, count: int) -> None: ...

    def finish(self, key: str) -> None: ...


class Quiet(Progress):
    def say(self, text: str) -> None:
        return None


class Bars(Progress):
    def __init__(self) -> None:
        super().__init__()
        import rich.console
        import rich.progress as bars

        self._lock = threading.Lock()
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._logging: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=28),
            bars.DownloadColumn(binary_units=True),
            bars.TransferSpeedColumn(),
            console=rich.console.Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        # log lines go above the bars, through what stands for stderr while they are shown
        self._logging = [
            (handler, handler.setStream(sys.stderr))
            for handler in logging.getLogger().handlers
            if type(handler) is logging.StreamHandler
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        for handler, stream in self._logging:
            if stream is not None:
                handler.setStream(stream)

    def say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def note(self, text: str) -> None:
        return None

    def start(self, key: str, text: str, total: int) -> None:
        with self._lock:
            self._tasks[key] = self._bars.add_task(text, total=total)

    def advance(self, key: str, count: int) -> None:
        with self._lock:
            if (task := self._tasks.get(key)) is not None:
                self._bars.advance(task, count)

    def finish(self, key: str) -> None:
        with self._lock:
            if (task := self._tasks.pop(key, None)) is not None:
                self._bars.remove_task(task)


def make_progress() -> Progress:
    """Nothing is shown when even information is too much to log."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        return Quiet()
    return Bars() if sys.stderr.isatty() else Progress()
