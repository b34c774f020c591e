"""The programs that an image starts with, for its prefetch table: where entrypoint and command lead in its layers.

A daemon that mounts the image for the first time has them and their libraries on the way before the container is set
up. Upstream's conversion has everything fetched ahead instead.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from posixpath import join, normpath
from typing import Any

from bootstrap.base import Bootstrap
from bootstrap.errors import RafsError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_LINKS = 16


def startup_files(config: Mapping[str, Any], layers: Sequence[Path]) -> list[str]:
    """Absolute paths, symbolic links followed; none when nothing is said or found. `config` is the image's, `layers`
    the bootstraps of its layers, lowest first. Never raises for odd images: they start without a list."""
    settings = config.get("config")
    if not isinstance(settings, Mapping):
        return []
    words = [(settings.get(name) or [""])[0] for name in ("Entrypoint", "Cmd")]
    folders = DEFAULT_PATH
    for line in settings.get("Env") or ():
        if isinstance(line, str) and line.startswith("PATH="):
            folders = line[5:]
    found: list[str] = []
    try:
        with ExitStack() as opened:
            images = [opened.enter_context(_open(path)) for path in reversed(layers)]
            for word in words:
                if not isinstance(word, str) or not word:
                    continue
                for folder in [settings.get("WorkingDir") or "/"] if "/" in word else folders.split(":"):
                    path = _follow(images, join("/", folder, word))
                    if path is not None:
                        found.append(path)
                        break
    except (RafsError, OSError, ValueError):
        return []
    return list(dict.fromkeys(found))


def _open(path: Path) -> Bootstrap:
    from bootstrap.reader import open_bootstrap

    return open_bootstrap(path)


def _follow(images: Sequence[Bootstrap], path: str) -> str | None:
    """The regular file at a path of layers over each other (topmost first). Whiteouts are not looked at: a file that a
    higher layer removed is fetched in vain, or rather not at all, since the merged image has no such path."""
    todo = normpath(path).strip("/").split("/")
    done = ""
    links = 0
    while todo:
        name = todo.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            done = done.rpartition("/")[0]
            continue
        here = f"{done}/{name}".encode("utf-8", "surrogateescape")
        for image in images:
            if ino := image.resolve(here):
                break
        else:
            return None
        mode = image.attr(ino).mode
        if stat.S_ISLNK(mode):
            links += 1
            if links > MAX_LINKS:
                return None
            target = image.readlink(ino).decode("utf-8", "surrogateescape")
            if target.startswith("/"):
                done = ""
            todo = [*target.split("/"), *todo]
            continue
        done = f"{done}/{name}"
        if not todo:
            return done if stat.S_ISREG(mode) else None
    return None
