"""Where things are below a cache directory, and which process has it. Imports nothing: for programs that stay small."""

from __future__ import annotations

import os
import re
from pathlib import Path

IMPORTED = ".imported"  # bootstraps of images whose data was imported before they were pulled
WORKER = re.compile(r"\.worker-[0-9]{1,3}")


def stores(cache: Path) -> list[Path]:
    """The directory and those of further processes below it. Empty when there is none."""
    try:
        names = sorted(os.listdir(cache))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [cache, *(cache / name for name in names if WORKER.fullmatch(name) and (cache / name).is_dir())]


def device_folders(store: Path, blob_id: str) -> list[Path]:
    """Where segments of a blob are devices of kernel mounts, also of processes that died: `nydusfs.cache.devices`."""
    return [folder for key in (store / ".erofs").glob("files.*/*") if (folder := key / blob_id).is_dir()]


def remembered(cache: Path) -> list[Path]:
    """Bootstraps of images that were imported and not pulled."""
    return sorted((cache / IMPORTED).glob("*.boot"))


def lock_holder(store: Path) -> int | None:
    """The process that has a store, as the kernel's table of locks says; nobody is disturbed by looking."""
    wanted = set()
    for path in (store / ".lock", store):
        try:
            facts = path.stat()
        except OSError:
            continue
        wanted.add(facts.st_ino)
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    devices = _devices(store)
    for line in lines:
        words = line.split()
        if len(words) < 8 or words[1] != "FLOCK":
            continue
        major, minor, inode = words[5].split(":")
        if int(inode) in wanted and (int(major, 16), int(minor, 16)) in devices:
            return int(words[4])
    return None


def _devices(store: Path) -> set[tuple[int, int]]:
    """Numbers that the kernel may have for the file system of a path: stat's, and the mount table's, which differ on
    btrfs and overlayfs."""
    found = set()
    try:
        device = (store / ".lock").stat().st_dev
        found.add((os.major(device), os.minor(device)))
        best = ""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            point = words[4].replace("\\040", " ")
            if len(point) >= len(best) and (f"{store}/".startswith(point.rstrip("/") + "/")):
                best, numbers = point, words[2]
        if best:
            major, _, minor = numbers.partition(":")
            found.add((int(major), int(minor)))
    except (OSError, ValueError):
        pass
    return found
