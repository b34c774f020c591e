"""containerd's configuration, put together from a file and what it imports as each release of containerd does it.

Rules: `LoadConfig`, `resolveImports` and `mergeConfig` of containerd 1.6.0 to 2.3.4, and what `containerd config dump`
of 1.6.20 and 2.3.4 shows. Imported files come after the one that names them and win:

- a section of `plugins` is replaced as a whole by 1.x; 2.x goes on into its tables, and replaces values and lists
- entries of `proxy_plugins`, `stream_processors` and `timeouts` are replaced as a whole
- lists at the top are joined, by 2.x without what is in them already
- elsewhere a value wins unless it is empty, 0 or false
- a relative pattern (a name with `*`) is looked for beside the file that has it; by 1.6 before 1.6.29 and 1.7 before
  1.7.16 in the directory that containerd runs in
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Release = tuple[int, ...]

SOCKETS = ("/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock")
"""Where containerd is usually found: its own place, and that of k3s and rke2."""

VERSION_SECONDS = 10
_WHOLE = ("proxy_plugins", "stream_processors", "timeouts")
_NEWEST: Release = (2, 3)
_KINDS: tuple[Release, ...] = ((1, 6, 0), (1, 7, 16), _NEWEST)  # one release of each set of rules


def release_of(text: str) -> Release:
    """Of what `containerd --version` says; () where it says none."""
    found = re.search(r"\bv?(\d+)\.(\d+)\.(\d+)", text) if text.startswith("containerd ") else None
    return tuple(int(part) for part in found.groups()) if found else ()


def release_of_program(program: str) -> Release:
    """() where it does not say: it is not there, or is no containerd."""
    try:
        # k3s is many programs in one file, and this one by the name it is called by
        done = subprocess.run(
            ["containerd", "--version"], executable=program, capture_output=True, text=True, timeout=VERSION_SECONDS,
            cwd="/", check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ()
    return release_of(done.stdout)


def installed_release() -> Release:
    """Of the containerd in PATH, () without one."""
    program = shutil.which("containerd")
    return release_of_program(program) if program else ()


def read_config(
    file: Path, release: Callable[[], Release] = installed_release, directory: str = "/"
) -> tuple[dict[str, Any], str]:
    """The configuration and what is wrong with it. `release`, asked only where it matters, is that of the containerd
    that will read it, and `directory` where it runs; () counts as the newest."""
    found, problem = _read(file, _NEWEST, directory)
    if "imports" in found and any(_read(file, kind, directory) != (found, problem) for kind in _KINDS):
        found, problem = _read(file, release() or _NEWEST, directory)
    found.pop("imports", None)
    return found, problem


def _read(file: Path, release: Release, directory: str) -> tuple[dict[str, Any], str]:
    merged: dict[str, Any] = {}
    problem = ""
    waiting = [os.path.abspath(file)]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.add(path)
        try:
            found = tomllib.loads(Path(path).read_text())
        except FileNotFoundError:
            problem = problem or f"{path} does not exist"
            continue
        except (OSError, ValueError) as failure:
            problem = problem or f"{path}: {failure}"
            continue
        _merge(merged, found, release)
        names = found.get("imports", [])
        for name in names if isinstance(names, list) else []:
            waiting += _resolved(path, str(name), release, directory)
    return merged, problem


def _resolved(parent: str, name: str, release: Release, directory: str) -> list[str]:
    if "*" not in name:
        return [os.path.normpath(os.path.join(os.path.dirname(parent), name))]
    beside = release >= (1, 7, 16) or (1, 6, 29) <= release < (1, 7)
    base = os.path.dirname(parent) if beside else directory
    return [os.path.normpath(one) for one in sorted(glob.glob(os.path.join(base, name), include_hidden=True))]


def _merge(into: dict[str, Any], more: dict[str, Any], release: Release) -> None:
    for key, value in more.items():
        old = into.get(key)
        if not isinstance(old, type(value)):  # none, or what containerd does not take
            into[key] = value
        elif isinstance(value, dict):
            if key in _WHOLE or (key == "plugins" and release < (2,)):
                old.update(value)
            elif key == "plugins":
                _deepen(old, value)
            else:
                old.update({name: one for name, one in value.items() if one or name not in old})
        elif isinstance(value, list):
            old += [one for one in value if release < (2,) or one not in old]
        elif value:
            into[key] = value


def _deepen(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _deepen(into[key], value)
        else:
            into[key] = value
