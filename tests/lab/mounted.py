"""Compare a mounted tree with a fixture's manifest, path by path.

Always run as a process of its own (`check_mount`): whoever reads a mount of a broken daemon may hang, and a test that
only waits with a timeout must not.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

_TYPES = {
    stat.S_IFDIR: "dir",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "sock",
}


def load_manifest(case: Path) -> dict[str, Any]:
    plain = case / "manifest.json"
    if plain.exists():
        return json.loads(plain.read_text())  # type: ignore[no-any-return]
    with gzip.open(case / "manifest.json.gz", "rt") as file:
        return json.load(file)  # type: ignore[no-any-return]


def _xattr_text(value: bytes) -> str:
    if len(value) > 256:
        return f"sha256:{hashlib.sha256(value).hexdigest()}:{len(value)}"
    return base64.b64encode(value).decode()


def describe(root: bytes) -> list[dict[str, Any]]:
    """Every entry below `root` in the manifest's form. `group` is the smallest path of a hard link group."""
    paths = [b"/"]
    for directory, dirs, files in os.walk(root):
        for name in (*dirs, *files):
            paths.append((directory + b"/" + name)[len(root) :])
    entries, groups = [], {}
    for path in sorted(paths):
        full = root + (b"" if path == b"/" else path)
        info = os.lstat(full)
        kind = _TYPES[stat.S_IFMT(info.st_mode)]
        entry: dict[str, Any] = {
            "path": os.fsdecode(path),
            "type": kind,
            "mode": f"{stat.S_IMODE(info.st_mode):04o}",
            "uid": info.st_uid,
            "gid": info.st_gid,
            "mtime": [info.st_mtime_ns // 10**9, info.st_mtime_ns % 10**9],
            "nlink": info.st_nlink,
        }
        if kind == "file":
            hasher = hashlib.sha256()
            with open(full, "rb") as file:
                while block := file.read(1 << 20):
                    hasher.update(block)
            entry |= {"size": info.st_size, "sha256": hasher.hexdigest()}
        elif kind == "symlink":
            entry["target"] = os.fsdecode(os.readlink(full))
        elif kind in ("char", "block"):
            entry["rdev"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
        if kind == "file" and info.st_nlink > 1:  # the format links regular files only
            entry["group"] = os.fsdecode(groups.setdefault(info.st_ino, path))
        names = os.listxattr(full, follow_symlinks=False)
        if names:
            entry["xattrs"] = {n: _xattr_text(os.getxattr(full, n, follow_symlinks=False)) for n in names}
        entries.append(entry)
    return entries


def differences(manifest: dict[str, Any], root: Path) -> list[str]:
    """What differs, one line each; the manifest's `ignore` list is honoured, its `mount_ignore` is not."""
    found = {entry["path"]: entry for entry in describe(os.fsencode(root))}
    wanted = {entry["path"]: entry for entry in manifest["entries"]}
    lines = [f"{path!r}: missing" for path in wanted.keys() - found.keys()]
    lines += [f"{path!r}: unexpected" for path in found.keys() - wanted.keys()]
    ignored = {(rule["field"], rule.get("type"), rule.get("path")) for rule in manifest.get("ignore", [])}

    def is_ignored(field: str, entry: dict[str, Any]) -> bool:
        return any(
            rule == field and kind in (None, entry["type"]) and path in (None, entry["path"])
            for rule, kind, path in ignored
        )

    for path in sorted(wanted.keys() & found.keys()):
        want, have = dict(wanted[path]), dict(found[path])
        if is_ignored("mtime_nsec", want):
            want["mtime"], have["mtime"] = want["mtime"][:1], have["mtime"][:1]
        for field in sorted(want.keys() | have.keys()):
            if field == "size" and want["type"] != "file":
                continue
            if want.get(field) != have.get(field) and not is_ignored(field, want):
                lines.append(f"{path!r}: {field} is {have.get(field)!r:.200}, expected {want.get(field)!r:.200}")
    return lines


def check_mount(case: Path, root: Path, timeout: float = 60.0) -> list[str]:
    """`differences` in a process of its own; subprocess.TimeoutExpired when the mount hangs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.lab.mounted", str(case), str(root)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).resolve().parents[2],
        errors="replace",
    )
    return done.stdout.splitlines() if done.returncode == 0 else [done.stderr.strip().splitlines()[-1]]


if __name__ == "__main__":
    for line in differences(load_manifest(Path(sys.argv[1])), Path(sys.argv[2])):
        print(line.encode("utf-8", "backslashreplace").decode())
