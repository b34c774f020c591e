"""Every form of image, made by the same command lines with our nydus-image or upstream's: for the interop matrix.

Needs the shared material: the sources are trees of the fixtures' `make_tree.py`.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import itertools
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootstrap.inlined import extract_bootstrap
from tests.lab.manifest import compare
from tests.lab.mounted import _xattr_text
from tests.unit.test_build_fixtures import make_tree

UNIT = 0x4000
"""Sizes of the files are around multiples of this."""
STACK = ("base", "layer1", "layer2")
PREFETCH = b"/sizes\n/etc\n"

Program = Callable[..., str]


@dataclass(frozen=True)
class Case:
    """One cell of the matrix. Compressor and digester are empty where the form decides them."""

    version: int
    compressor: str
    digester: str
    chunk_size: int
    form: str

    @property
    def label(self) -> str:
        words = (f"v{self.version}", self.form, self.compressor, self.digester, f"{self.chunk_size:x}")
        return "-".join(filter(None, words))

    @property
    def encrypted(self) -> bool:
        return self.form.startswith("encrypt")


_ANY = ("plain", "inline", "merged", "dictionary")
_ONLY_V6 = ("batch", "encrypted", "encrypted-batch")
_ORIGINAL = ("zran", "tar-ref", "tarfs")


def all_cases(compressors: Sequence[str], digesters: Sequence[str], chunk_sizes: Sequence[int]) -> list[Case]:
    """The whole product of what can be combined."""
    found = []
    for version, form in [*itertools.product((5, 6), _ANY), *itertools.product((6,), _ONLY_V6)]:
        for kinds in itertools.product(compressors, digesters, chunk_sizes):
            found.append(Case(version, *kinds, form))
    for form, chunk_size in itertools.product(_ORIGINAL, chunk_sizes):
        found.append(Case(6, "", "", chunk_size, form))
    return found


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """A few cases in which every pair of values occurs that occurs in any of them. Always the same ones."""
    left = list(cases)

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(sorted(dataclasses.asdict(case).items()), 2))

    missing = set().union(*map(pairs, left)) if left else set()
    found = []
    while missing:
        best = max(left, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        found.append(best)
    return found


class Sources:
    """The layers as files, and what must be seen: manifests by the names of the layers they consist of.

    `simple`: what upstream does right in every form, so that all bytes can be compared. No devices and fifos (its
    unpack panics), one attribute on an inode at most (it stores several in an order of chance), no link targets above
    511 bytes (in tarfs mode it writes what lies in whole blocks to the wrong place).
    """

    def __init__(self, folder: Path, *, simple: bool) -> None:
        self._module = make_tree()
        self._trees: dict[str, list[Any]] = {name: self._module.TREES[name](UNIT) for name in STACK[1:]}
        self._trees["base"] = self._module.nasty_tar(UNIT)
        if simple:
            for name, tree in self._trees.items():
                self._trees[name] = kept = [node for node in tree if _is_simple(node)]
                for node in kept:
                    node.xattrs = dict(sorted(node.xattrs.items())[:1])
        self.folder = folder
        self.digests: dict[str, str] = {}
        for name, tree in self._trees.items():
            out = io.BytesIO()
            self._module.write_tar(tree, out)
            self._put(f"{name}.tar", out.getvalue())
            self._put(f"{name}.tar.gz", gzip.compress(out.getvalue(), 6, mtime=0))

    def _put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.digests[name] = hashlib.sha256(data).hexdigest()

    def manifest(self, layers: Sequence[str]) -> dict[str, Any]:
        """What an image of these layers shows."""
        tree = self._module.overlay([self._trees[name] for name in layers])
        return {"entries": self._module.entries(tree), "ignore": [{"field": "mtime_nsec"}]}


def _is_simple(node: Any) -> bool:
    return node.kind in ("dir", "file") or (node.kind == "symlink" and len(node.target) < 512)


def upstream_program(binary: Path) -> Program:
    def run(*arguments: object, stdin: bytes = b"") -> str:
        done = subprocess.run([str(binary), *map(str, arguments)], input=stdin, capture_output=True, timeout=60)
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode == 0, f"upstream's nydus-image {arguments[0]}: {done.returncode}\n{said[:2000]}"
        return said

    return run


def our_program(*arguments: object, stdin: bytes = b"") -> str:
    """`nydus-image` in this process: the matrix has hundreds of cases and an interpreter takes 0.2 s to start."""
    from click.testing import CliRunner

    from bootstrap.cli import main

    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"our nydus-image {arguments[0]}: {done.exit_code}\n{done.output[:2000]}"
    return done.output


@dataclass(frozen=True)
class Image:
    """`blobs`: a folder as a localfs backend wants it. `layers`: names in STACK."""

    boot: Path
    blobs: Path
    layers: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        """The bootstrap and all blobs, to be compared."""
        return {"": self.boot.read_bytes()} | {path.name: path.read_bytes() for path in self.blobs.iterdir()}


def make(program: Program, case: Case, sources: Sources, folder: Path) -> Image:
    """Build the image of a case below `folder`, as nydusify and the snapshotter would."""
    blobs = folder / "blobs"
    blobs.mkdir(parents=True)
    boot = folder / "image.boot"
    maker = _Maker(program, case, sources, folder)
    if case.form == "plain":
        program(*maker.flags, "-B", boot, "-D", blobs, sources.folder / "base.tar")
        return Image(boot, blobs, ("base",))
    if case.form == "inline":
        made = maker.layer("base")
        boot.write_bytes(made.read_bytes())
        return Image(boot.rename(folder / f"{made.name}.image.boot"), blobs, ("base",))
    if case.form == "tarfs":
        layers = [maker.tarfs(name) for name in STACK]
        program("merge", "-l", "warn", "-B", boot, *layers)
        return Image(boot, blobs, STACK)
    extra: list[object] = []
    layers = []
    for name in STACK:
        if case.form == "dictionary" and name == STACK[-1]:
            dictionary = folder / "dictionary.boot"
            program("merge", "-l", "warn", "-B", dictionary, *layers)
            extra = ["--chunk-dict", f"bootstrap={dictionary}"]
        layers.append(maker.layer(name, *extra))
    if case.form in ("zran", "tar-ref"):
        lists = {
            "--original-blob-ids": maker.originals,
            "--blob-digests": maker.digests,
            "--blob-sizes": [str((blobs / digest).stat().st_size) for digest in maker.digests],
        }
        extra = [word for name, items in lists.items() for word in (name, ",".join(items))]
    arguments = ["merge", "-l", "warn", "--prefetch-policy", "fs", *extra, "-B", boot, *layers]
    program(*arguments, stdin=PREFETCH)
    return Image(boot, blobs, STACK)


class _Maker:
    def __init__(self, program: Program, case: Case, sources: Sources, folder: Path) -> None:
        self._program = program
        self._case = case
        self._sources = sources
        self._folder = folder
        self.originals: list[str] = []
        self.digests: list[str] = []
        kind = {"zran": "targz-ref", "tar-ref": "targz-ref", "tarfs": "tar-tarfs"}.get(case.form, "tar-rafs")
        flags = ["create", "-l", "warn", "--type", kind, "--fs-version", str(case.version), "--whiteout-spec", "none"]
        flags += ["--chunk-size", hex(case.chunk_size)]
        if kind == "tar-rafs":
            flags += ["--compressor", case.compressor, "--digester", case.digester]
        if case.form.endswith("batch"):
            flags += ["--batch-size", hex(min(case.chunk_size, UNIT))]
        if case.encrypted:
            flags += ["--encrypt"]
        self.flags = flags

    def layer(self, name: str, *extra: object) -> Path:
        """A layer blob with its bootstrap inside goes to the blobs; the bootstrap apart, named as merge wants it."""
        case, folder = self._case, self._folder
        source = self._sources.folder / f"{name}.tar{'.gz' if case.form == 'zran' else ''}"
        blob = folder / "layer"
        toc = ["--features", "blob-toc"] if case.version == 6 and case.form != "inline" else []
        self._program(*self.flags, "--blob-inline-meta", *toc, *extra, "--blob", blob, source)
        digest = hashlib.sha256(blob.read_bytes()).hexdigest()
        blob.rename(folder / "blobs" / digest)
        self.digests.append(digest)
        named = digest
        if case.form in ("zran", "tar-ref"):
            named = self._sources.digests[source.name]
            self.originals.append(named)
            os.link(source, folder / "blobs" / named)
        boots = folder / "boots"
        boots.mkdir(exist_ok=True)
        with open(folder / "blobs" / digest, "rb") as file:
            (boots / named).write_bytes(extract_bootstrap(file, os.fstat(file.fileno()).st_size))
        return boots / named

    def tarfs(self, name: str) -> Path:
        source = self._sources.folder / f"{name}.tar"
        digest = self._sources.digests[source.name]
        scratch = self._folder / "scratch"
        scratch.mkdir(exist_ok=True)
        boot = self._folder / f"{digest}.boot"
        self._program(*self.flags, "-B", boot, "-D", scratch, source)
        os.link(source, self._folder / "blobs" / digest)
        return boot


def check_tar(data: bytes, manifest: dict[str, Any]) -> list[str]:
    """Differences between an unpacked image and a manifest; of links an archive knows those of files."""
    rules = [*manifest["ignore"], {"field": "nlink", "type": "dir"}, {"field": "nlink", "type": "symlink"}]
    wanted = {"entries": [entry for entry in manifest["entries"] if entry["path"] != "/"]}
    return compare([entry for entry in _tar_entries(data) if entry["path"] != "/"], wanted, rules)


def _tar_entries(data: bytes) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    kinds = {tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink", tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block"}
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape", encoding="utf-8") as archive:
        for member in archive:
            path = os.path.normpath("/" + member.name.lstrip("/"))
            if member.islnk():
                target = os.path.normpath("/" + member.linkname.lstrip("/"))
                found[path] = found[target] | {"path": path}
                names.setdefault(target, [target]).append(path)
                continue
            kind = kinds.get(member.type, "fifo" if member.isfifo() else "file")
            entry: dict[str, Any] = {"path": path, "type": kind, "mode": f"{member.mode:04o}"}
            entry |= {"uid": member.uid, "gid": member.gid, "mtime": [int(member.mtime), 0]}
            if kind == "file":
                content = archive.extractfile(member)
                assert content is not None
                entry |= {"nlink": 1, "size": member.size, "sha256": hashlib.sha256(content.read()).hexdigest()}
            elif kind == "symlink":
                entry["target"] = member.linkname
            elif kind in ("char", "block"):
                entry["rdev"] = [member.devmajor, member.devminor]
            prefix = "SCHILY.xattr."
            xattrs = {
                key.removeprefix(prefix): _xattr_text(os.fsencode(value))
                for key, value in member.pax_headers.items()
                if key.startswith(prefix)
            }
            found[path] = entry | ({"xattrs": xattrs} if xattrs else {})
    for group in names.values():
        for path in group:
            found[path] |= {"nlink": len(group), "group": min(group)}
    return list(found.values())
