"""A small program at rest: what only its start needs is not imported, or given back.

It runs on every node for years and mostly waits. Of 48 MB after a start, 7 MB were asyncio and gRPC's own side of it,
which nobody here calls, and 20 MB pages of libraries that were read once, while they were loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_UNUSED = ("asyncio", "grpc.aio")


def import_grpc() -> None:
    """gRPC without asyncio. Whoever asks a part of that for anything later gets the real one."""
    if "grpc" in sys.modules:
        return
    stand_ins = {name: _stand_in(name) for name in _UNUSED if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("grpc")
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)

    def found(attribute: str) -> Any:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    module.__dict__["__getattr__"] = found
    return module


def share_heap() -> None:
    """64 threads of gRPC otherwise spread over 8 heaps a CPU: 6 MB of 60 that nobody uses twice. One is enough where
    one thread runs at a time."""
    try:
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX of glibc
    except AttributeError:
        pass


class Libraries:
    """Pages of the files that are mapped now, by code that is loaded and never unloaded.

    Make it while no other thread may be loading a library: the loader first maps all of one read-only, and parts of
    that hold data later. What is listed here is finished.
    """

    def __init__(self) -> None:
        self._ranges: set[str] = set()
        try:
            with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
                for line in maps:
                    words = line.split(maxsplit=5)
                    if words[1] in ("r-xp", "r--p") and words[4] != "0":
                        self._ranges.add(words[0])
        except OSError:
            pass  # no /proc: nothing is given back

    def give_back(self) -> None:
        """What is read again comes from the kernel's page cache, some microseconds for 64 KiB. So does free memory of
        the heap go. Raises nothing."""
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            for begin, end in self._clean():
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
            libc.malloc_trim(0)
        except (OSError, AttributeError, ValueError):
            pass

    def _clean(self) -> Iterator[tuple[int, int]]:
        """Of the ranges those without a page of our own, such as one with addresses that were filled in."""
        name = ""
        with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as smaps:
            for line in smaps:
                first, _, rest = line.partition(" ")
                if not first.endswith(":"):
                    name = first if rest[:4] in ("r-xp", "r--p") else ""
                elif first == "Anonymous:" and name in self._ranges and rest.split()[0] == "0":
                    begin, _, end = name.partition("-")
                    yield int(begin, 16), int(end, 16)


__all__ = ["Libraries", "import_grpc", "share_heap"]
