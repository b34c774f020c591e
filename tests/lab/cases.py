"""Images with a manifest of what must come out: reference fixtures, else the same kinds built here by our own tools.

Tests of the daemon's and the snapshotter's life need *an* image, not one of a foreign builder: `case(name)` gives a
directory with `image.boot`, its blobs by id and `manifest.json`, whatever is installed beside the checkout.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import random
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from bootstrap.build import build_directory, build_layer
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.options import BuildOptions
from tests.lab.mounted import describe
from tests.lab.paths import shared_dir

TIME = 1_700_000_000


@cache
def case(name: str) -> Path:
    """The directory of a case by its name among the reference fixtures. Skips, loudly, where neither they are here nor
    a builder of ours."""
    shared = shared_dir()
    if shared is not None:
        return shared / "fixtures" / "reference" / name
    if name not in _BUILDERS:
        import pytest  # not of who only makes measurements

        pytest.skip(f"interop: no reference fixture {name} here")
    folder = _scratch() / name
    folder.mkdir()
    _BUILDERS[name](folder)
    return folder


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nydus-cases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _half(size: int, seed: int) -> bytes:
    """Half noise, half zeros: some chunks shrink, others do not."""
    return random.Random(seed).randbytes(size // 2) + bytes(size - size // 2)


def _settle(root: Path, root_time: int = TIME) -> None:
    """One time for everything, directories last: creating an entry changes its directory's."""
    for folder, dirs, files in os.walk(root, topdown=False):
        for name in (*files, *dirs):
            os.utime(os.path.join(folder, name), (TIME, TIME), follow_symlinks=False)
    os.chmod(root, 0o755)
    os.utime(root, (root_time, root_time))


def _save_manifest(folder: Path, root: Path) -> None:
    manifest = {"entries": describe(os.fsencode(root)), "ignore": []}
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=True))


def _from_directory(folder: Path, fill: Callable[[Path], None]) -> None:
    root = folder.parent / f"{folder.name}.tree"
    root.mkdir()
    fill(root)
    _settle(root, root_time=0)  # the builder sets the root's time to 0, as upstream's does
    out = io.BytesIO()
    result = build_directory(str(root), out, BuildOptions())
    (folder / "image.boot").write_bytes(result.bootstrap)
    if out.getvalue():
        (folder / result.blob_id).write_bytes(out.getvalue())
    _save_manifest(folder, root)


def _nasty(root: Path) -> None:
    for name, size in (("plain/large", 3 << 20), ("plain/small", 2500), ("plain/odd", 4097), ("plain/empty", 0)):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_half(size, size))
    os.link(root / "plain/small", root / "plain/link")
    os.symlink("small", root / "plain/symlink")
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mkfifo(root / "fifo", 0o600)
    os.setxattr(root / "plain/small", "user.note", b"kept")
    os.chown(root / "plain/odd", 70_000, 80_000)
    os.chmod(root / "plain/large", 0o4755)
    (root / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"name")


def _no_data(root: Path) -> None:
    (root / "d").mkdir()
    (root / "d/empty").touch()
    os.symlink("d/empty", root / "link")


def _big_directory(root: Path) -> None:
    (root / "many").mkdir()
    for number in range(3000):
        (root / "many" / f"file-{number:04d}").write_bytes(b"%d\n" % number * 50)


# Layers of the merged cases: path -> content (None: a directory), bottom first; whiteouts as OCI writes them.
_LAYERS: tuple[dict[str, bytes | None], ...] = (
    {
        "big1": _half(2_100_000, 1),
        "dir-to-file": None,
        "dir-to-file/lost": b"lost",
        "etc": None,
        "etc/gone": b"gone",
        "etc/keep": b"keep" * 125,
        "etc/replaced": b"old",
        "opaque": None,
        "opaque/hidden": b"hidden",
        "small": None,
        **{f"small/file-{number:02d}": _half(100 + 97 * number, number) for number in range(60)},
        "usr": None,
        "usr/lib": None,
        "usr/lib/l": _half(9000, 2),
    },
    {
        "dir-to-file": b"a file now",
        "etc": None,
        "etc/.wh.gone": b"",
        "etc/replaced": b"new",
        "opaque": None,
        "opaque/.wh..wh..opq": b"",
        "opaque/kept": b"kept here",
    },
    {"big2": _half(1_200_000, 3), "usr": None, "usr/lib": None, "usr/lib/m": _half(5000, 4)},
)
_MERGED_AWAY = ("dir-to-file/lost", "etc/gone", "opaque/hidden")


def _merged(folder: Path, fs_version: int) -> None:
    sources = []
    for layer in _LAYERS:
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for name, data in {".": None, **layer}.items():
                entry = tarfile.TarInfo(name)
                entry.mtime = TIME
                entry.mode = 0o755 if data is None else 0o644
                entry.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
                entry.size = len(data or b"")
                archive.addfile(entry, io.BytesIO(data or b""))
        tar.seek(0)
        out = io.BytesIO()
        options = BuildOptions(fs_version=fs_version, inline_meta=True, blob_toc=fs_version == 6, whiteout_spec="none")
        build_layer(tar, out, options)
        digest = hashlib.sha256(out.getvalue()).hexdigest()
        (folder / digest).write_bytes(out.getvalue())
        sources.append(MergeSource(folder / digest, blob_digest=digest))
    merge_layers(sources, folder / "image.boot")
    root = folder.parent / f"{folder.name}.tree"
    root.mkdir()
    tree = {name: data for layer in _LAYERS for name, data in layer.items() if "/.wh." not in name}
    for name, data in sorted(tree.items()):
        if name in _MERGED_AWAY:
            continue
        if data is None:
            (root / name).mkdir(mode=0o755)
        else:
            (root / name).write_bytes(data)
            (root / name).chmod(0o644)
    _settle(root)
    _save_manifest(folder, root)


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "v5-merged3": lambda folder: _merged(folder, 5),
    "v6-merged3": lambda folder: _merged(folder, 6),
    "v6-zstd-blake3-1m": lambda folder: _from_directory(folder, _nasty),
    "v6-no-data": lambda folder: _from_directory(folder, _no_data),
    "v6-bigdir-prefetch-fs": lambda folder: _from_directory(folder, _big_directory),
}
