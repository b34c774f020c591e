"""What a tree must look like by a fixture's manifest: for mounts (`check_tree`) and for readers (`check_image`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bootstrap.blobsource import open_blobs
from bootstrap.reader import Bootstrap
from tests.lab.mounted import _xattr_text, describe, load_manifest

__all__ = ["check_image", "check_tree", "compare", "image_entries", "load_manifest"]

_TYPES = {4: "dir", 8: "file", 10: "symlink", 2: "char", 6: "block", 1: "fifo", 12: "sock"}


def compare(found: list[dict[str, Any]], manifest: dict[str, Any], rules: list[dict[str, Any]]) -> list[str]:
    """Differences, one line each; `rules` are the manifest's `ignore` and, for mounts, `mount_ignore`."""
    have_all = {entry["path"]: entry for entry in found}
    wanted = {entry["path"]: entry for entry in manifest["entries"]}
    lines = [f"{path!r}: missing" for path in sorted(wanted.keys() - have_all.keys())]
    lines += [f"{path!r}: unexpected" for path in sorted(have_all.keys() - wanted.keys())]
    if len(have_all) != len(found):
        lines.append("a path occurs twice")

    def is_ignored(field: str, entry: dict[str, Any]) -> bool:
        return any(
            rule["field"] == field
            and rule.get("type") in (None, entry["type"])
            and rule.get("path") in (None, entry["path"])
            for rule in rules
        )

    for path in sorted(wanted.keys() & have_all.keys()):
        want, have = dict(wanted[path]), dict(have_all[path])
        if is_ignored("mtime_nsec", want):
            want["mtime"], have["mtime"] = want["mtime"][:1], have["mtime"][:1]
        for field in sorted(want.keys() | have.keys()):
            if field == "size" and want["type"] != "file":
                continue
            if want.get(field) != have.get(field) and not is_ignored(field, want):
                lines.append(f"{path!r}: {field} is {have.get(field)!r:.200}, expected {want.get(field)!r:.200}")
    return lines


def check_tree(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Differences between a directory tree and a manifest. May hang on the mount of a broken daemon: see `mounted`."""
    rules = manifest.get("ignore", []) + manifest.get("mount_ignore", [])
    return compare(describe(os.fsencode(root)), manifest, rules)


def check_image(image: Bootstrap, read_file: Callable[[int, int], bytes], manifest: dict[str, Any]) -> list[str]:
    """Differences between an opened bootstrap and a manifest; `read_file(ino, size)` gives the content of a file."""
    return compare(image_entries(image, read_file), manifest, manifest.get("ignore", []))


def image_entries(image: Bootstrap, read_file: Callable[[int, int], bytes]) -> list[dict[str, Any]]:
    """Every path of a bootstrap in the manifest's form."""
    paths = [(b"", image.root, 4)] + [(path, entry.ino, entry.dtype) for path, entry in image.walk()]
    groups: dict[int, bytes] = {}
    found = []
    for path, ino, dtype in sorted(paths):
        attr = image.attr(ino)
        entry: dict[str, Any] = {
            "path": os.fsdecode(b"/" + path),
            "type": _TYPES[dtype],
            "mode": f"{attr.mode & 0o7777:04o}",
            "uid": attr.uid,
            "gid": attr.gid,
            "mtime": [attr.mtime, attr.mtime_nsec],
            "nlink": attr.nlink,
        }
        assert attr.mode >> 12 == dtype, path
        if dtype == 8:
            entry |= {"size": attr.size, "sha256": hashlib.sha256(read_file(ino, attr.size)).hexdigest()}
            if attr.nlink > 1:
                entry["group"] = os.fsdecode(groups.setdefault(ino, b"/" + path))
        elif dtype == 10:
            entry["target"] = os.fsdecode(image.readlink(ino))
        elif dtype in (2, 6):
            entry["rdev"] = [os.major(attr.rdev), os.minor(attr.rdev)]
        xattrs = image.xattrs(ino)
        if xattrs:
            entry["xattrs"] = {os.fsdecode(name): _xattr_text(value) for name, value in xattrs.items()}
        found.append(entry)
    return found


class FolderReader:
    """Content of an image's files from blobs in a folder."""

    def __init__(self, image: Bootstrap, folder: Path) -> None:
        self._blobs = open_blobs(image, folder)

    def __call__(self, ino: int, size: int) -> bytes:
        return b"".join(self._blobs.read_file(ino))
