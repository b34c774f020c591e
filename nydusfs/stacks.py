"""Where every thread and every trio task of this process is: for `GET .../stacks` and for SIGUSR1."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio  # the snapshotter has stacks too and no trio: 60 ms of its start, 4 MB

_root: trio.lowlevel.Task | None = None


def watch_tasks() -> None:
    """Call it inside of `trio.run`: its tasks are then shown as well."""
    import trio

    global _root
    _root = trio.lowlevel.current_root_task()


def on_signal() -> None:
    """SIGUSR1 writes all stacks to stderr. Threads at once, also while the interpreter is held up in C code; tasks when
    the main thread comes back to Python."""
    try:
        signal.signal(signal.SIGUSR1, _tasks_to_stderr)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=True)
    except (OSError, ValueError, AttributeError):
        pass  # no stderr, or not the main thread


def _tasks_to_stderr(_number: int, _frame: FrameType | None) -> None:
    try:
        for task in tasks():
            sys.stderr.write(f"\nTask {task['name']}:\n" + "".join(f"  {line}\n" for line in task["stack"]))
        sys.stderr.flush()
    except (OSError, RuntimeError):
        pass


def report() -> dict[str, list[dict[str, Any]]]:
    """`threads` and `tasks`, each with `name` and `stack`, the outermost call first."""
    return {"threads": threads(), "tasks": tasks()}


def threads() -> list[dict[str, Any]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [
        {"name": names.get(ident, f"thread {ident}"), "stack": _lines(traceback.walk_stack(frame), newest_first=True)}
        for ident, frame in sys._current_frames().items()
    ]


def tasks() -> list[dict[str, Any]]:
    """Of the trio run that `watch_tasks` was called in; none without one. From any thread: a task that moves on at this
    moment may show a stack that is half old."""
    return [{"name": f"{'  ' * depth}{task.name}", "stack": _lines(task.iter_await_frames())}
            for depth, task in _tree(_root, 0)] if _root is not None else []  # fmt: skip


def _tree(task: trio.lowlevel.Task, depth: int) -> Iterator[tuple[int, trio.lowlevel.Task]]:
    yield depth, task
    for nursery in list(task.child_nurseries):
        for child in list(nursery.child_tasks):
            yield from _tree(child, depth + 1)


def _lines(frames: Iterator[tuple[FrameType, int]], *, newest_first: bool = False) -> list[str]:
    summary = traceback.StackSummary.extract(frames, lookup_lines=False)
    found = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in summary]
    return found[::-1] if newest_first else found


def as_text(value: dict[str, list[dict[str, Any]]]) -> str:
    """Threads and tasks as a person reads them; the same stack is shown once."""
    out: list[str] = []
    for kind, found in value.items():
        same: dict[tuple[str, ...], list[str]] = {}
        for entry in found:
            same.setdefault(tuple(entry["stack"]), []).append(entry["name"].strip())
        out.append(f"{len(found)} {kind}")
        for stack, names in same.items():
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            out += ["", f"{kind[:-1]} {shown}:", *(f"    {line}" for line in stack)]
        out.append("")
    return "\n".join(out)


def sample(seconds: float, interval: float = 0.01) -> str:
    """What the threads of this process do for a while, as folded stacks (`a;b;c COUNT`), the input of flame graphs.
    Threads that wait count too."""
    counts: Counter[str] = Counter()
    own = threading.get_ident()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for ident, frame in sys._current_frames().items():
            if ident != own:
                names = [f"{f.f_code.co_filename.rpartition('/')[2]}:{f.f_code.co_name}" for f, _ in
                         traceback.walk_stack(frame)]  # fmt: skip
                counts[";".join(reversed(names))] += 1
        time.sleep(interval)
    return "".join(f"{stack} {count}\n" for stack, count in counts.most_common())
