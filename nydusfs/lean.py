"""`import trio` for a process whose start somebody waits for.

Two things of it are left out: DTLS (7 ms of processor time, and used by nobody here), which is imported when somebody
asks for it after all, and a run of ldconfig (12 ms), by which trio looks for the library that names threads.
"""

from __future__ import annotations

import ctypes.util
import importlib
import sys
from types import ModuleType
from typing import Any

_DTLS = "trio._dtls"
_NAMES = ("DTLSChannel", "DTLSChannelStatistics", "DTLSEndpoint")
_THREADS = "libpthread.so.0"  # of every glibc, whose newer ones have it for the sake of its name


def import_trio() -> None:
    """A trio that cannot be had so, because it is put together in another way, is imported as it is."""
    if "trio" in sys.modules:
        return
    find = ctypes.util.find_library
    stub = ModuleType(_DTLS)
    for name in _NAMES:
        setattr(stub, name, type(name, (), {}))
    sys.modules[_DTLS] = stub
    ctypes.util.find_library = lambda name: _THREADS if name == "pthread" else find(name)
    try:
        trio = importlib.import_module("trio")
        _complete(trio)
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trio"]:
            del sys.modules[name]
        ctypes.util.find_library = find
        importlib.import_module("trio")
    finally:
        ctypes.util.find_library = find


def _complete(trio: ModuleType) -> None:
    """Give it what was left out, at its first use."""
    del sys.modules[_DTLS]
    for name in _NAMES:
        delattr(trio, name)
    before = getattr(trio, "__getattr__", None)

    def later(name: str) -> Any:
        if name in _NAMES:
            return getattr(importlib.import_module(_DTLS), name)
        if before is not None:
            return before(name)
        raise AttributeError(f"module 'trio' has no attribute {name!r}")

    trio.__getattr__ = later  # type: ignore[method-assign]
