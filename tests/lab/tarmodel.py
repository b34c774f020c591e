"""A tar in the form of the fixtures' manifests, read by Python's tarfile: what an unpacked image is compared with."""

from __future__ import annotations

import hashlib
import os
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.lab.mounted import _xattr_text

_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.LNKTYPE: "file",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.DIRTYPE: "dir",
    tarfile.FIFOTYPE: "fifo",
}
_PREFIX = "SCHILY.xattr."


def tar_entries(path: Path) -> list[dict[str, Any]]:
    """Every entry but the root's, in the order of the tar; links carry what they link to."""
    found: dict[str, dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            name = "/" + member.name
            assert name not in found, f"{name!r} twice"
            assert member.type in _KINDS, (name, member.type)
            entry: dict[str, Any] = {
                "path": name,
                "type": _KINDS[member.type],
                "mode": f"{member.mode:04o}",
                "uid": member.uid,
                "gid": member.gid,
                "mtime": _time(member),
            }
            if not member.isdir():
                entry["nlink"] = 1
            if member.islnk():
                first = "/" + member.linkname
                entry |= {key: found[first][key] for key in ("type", "size", "sha256", "target", "rdev")
                          if key in found[first]}  # fmt: skip
                names.setdefault(first, [first]).append(name)
            elif member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                entry |= {"size": member.size, "sha256": hashlib.sha256(file.read()).hexdigest()}
            elif member.issym():
                entry["target"] = member.linkname
            elif member.isdev() and not member.isfifo():
                entry["rdev"] = [member.devmajor, member.devminor]
            xattrs = {
                key.removeprefix(_PREFIX): _xattr_text(os.fsencode(value))
                for key, value in member.pax_headers.items()
                if key.startswith(_PREFIX)
            }
            if xattrs:
                entry["xattrs"] = xattrs
            found[name] = entry
    for group in names.values():
        for name in group:
            found[name]["nlink"] = len(group)
            if found[name]["type"] == "file":
                found[name]["group"] = min(group, key=os.fsencode)
    return list(found.values())


def _time(member: tarfile.TarInfo) -> list[int]:
    text = member.pax_headers.get("mtime")
    if text is None:
        return [int(member.mtime), 0]
    exact = Decimal(text)
    seconds = int(exact // 1) if exact >= 0 or exact == exact // 1 else int(exact // 1) - 1
    return [seconds, int((exact - seconds) * 1_000_000_000)]


def comparable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what a tar does not hold: the root, sockets, link counts of directories."""
    entries = []
    for entry in manifest["entries"]:
        if entry["path"] == "/" or entry["type"] == "sock":
            continue
        entry = {key: value for key, value in entry.items() if key != "nlink" or entry["type"] != "dir"}
        if entry.get("target") is not None:
            entry.pop("size", None)
        entries.append(entry)
    return {**manifest, "entries": entries}
