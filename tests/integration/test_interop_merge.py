"""`merge` beside upstream's, on layers upstream made: every option, the same bytes and the same exit code."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from bootstrap.cli.merge import merge
from bootstrap.inlined import extract_bootstrap
from tests.lab.forms import upstream_program
from tests.lab.paths import ref_bin, shared_dir
from tests.unit.test_build_fixtures import tree_tar

NYDUS_IMAGE = ref_bin("nydus-image")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        shared_dir() is None or NYDUS_IMAGE is None, reason="interop: fixtures and reference nydus-image are not here"
    ),
]

TOC = ("--features", "blob-toc")
DICTIONARY = "bootstrap=dictionary"
BUILDS = {
    "v6": TOC,
    "v5": ("--fs-version", "5"),
    "lz4": (*TOC, "--compressor", "lz4_block"),
    "sha": (*TOC, "--digester", "sha256"),
    "v5sha": ("--fs-version", "5", "--digester", "sha256"),
    "v5lz4": ("--fs-version", "5", "--compressor", "lz4_block"),
    "64k": (*TOC, "--chunk-size", "0x10000"),
    "owners": (*TOC, "--repeatable"),
    "batch": (*TOC, "--batch-size", "0x4000"),
    "encrypted": (*TOC, "--encrypt"),
    "dict": (*TOC, "--chunk-dict", DICTIONARY),
    "zran": (*TOC, "--type", "targz-ref"),
    "tarref": (*TOC, "--type", "targz-ref"),
    "tarfs": ("--type", "tar-tarfs"),
}


class Layers:
    """Layers by names as "2:v6": the tree layer2 built by BUILDS["v6"]. Made when first asked for."""

    def __init__(self, folder: Path) -> None:
        assert NYDUS_IMAGE is not None
        self.folder = folder
        self.upstream = upstream_program(NYDUS_IMAGE)
        self._made: dict[str, Path] = {}

    def tar(self, number: str, packed: bool) -> Path:
        path = self.folder / f"{number}.tar{'.gz' if packed else ''}"
        if not path.exists():
            data = tree_tar(f"layer{number}", 0x8000)
            path.write_bytes(gzip.compress(data, 6, mtime=0) if packed else data)
        return path

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Path:
        if name == "dictionary" or name == "image":
            path = self.folder / name
            layers = [self["1:v6"]] if name == "dictionary" else [self["1:v6"], self["2:v6"]]
            self.upstream("merge", "-l", "warn", "-B", path, *layers)
            return path
        number, build = name.split(":")
        tar = self.tar(number, build == "zran")
        flags = [f"bootstrap={self['dictionary']}" if flag == DICTIONARY else flag for flag in BUILDS[build]]
        kind = [] if "--type" in flags else ["--type", "tar-rafs"]
        size = [] if "--chunk-size" in flags else ["--chunk-size", "0x8000"]
        create = partial(self.upstream, "create", "-l", "warn", "--whiteout-spec", "none", *kind, *size, *flags)
        if build == "tarfs":
            folder = self.folder / "tarfs"
            folder.mkdir(exist_ok=True)
            boot = self.folder / f"{hashlib.sha256(tar.read_bytes()).hexdigest()}.tarfs"
            create("-B", boot, "-D", folder, tar)
            return boot
        blob = self.folder / "blob"
        create("--blob-inline-meta", "--blob", blob, tar)
        boot = self.folder / hashlib.sha256(blob.read_bytes()).hexdigest()
        with blob.open("rb") as file:
            boot.write_bytes(extract_bootstrap(file, os.fstat(file.fileno()).st_size))
        return boot


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Layers:
    return Layers(tmp_path_factory.mktemp("layers"))


DIGESTS = ("--blob-digests", f"{'a' * 64},{'b' * 64}")
SOUND: dict[str, tuple[str, tuple[str, ...], bytes]] = {
    "three": ("1:v6 2:v6 3:v6", (), b""),
    "three, v5": ("1:v5 2:v5 3:v5", (), b""),
    "one layer twice": ("1:v6 1:v6", (), b""),
    "one layer twice, v5": ("1:v5 1:v5", (), b""),
    "another compressor": ("1:v6 2:lz4", (), b""),
    "another compressor, v5": ("1:v5 2:v5lz4", (), b""),
    "another digester": ("1:v6 2:sha", (), b""),
    "one is encrypted": ("1:v6 2:encrypted", (), b""),
    "batches": ("1:batch 2:batch 3:batch", (), b""),
    "digests": ("1:v6 2:v6", DIGESTS, b""),
    "original ids": ("1:v6 2:v6", ("--original-blob-ids", "x,y"), b""),
    "original ids and digests": ("1:v6 2:v6", ("--original-blob-ids", "x,y", *DIGESTS), b""),
    "sizes": ("1:v6 2:v6", ("--blob-sizes", "100000,200000"), b""),
    "toc": ("1:v6 2:v6", ("--blob-toc-digests", DIGESTS[1], "--blob-toc-sizes", "1,2"), b""),
    "zran": ("1:zran 2:zran 3:zran", (), b""),
    "zran lists": (
        "1:zran 2:zran",
        ("--original-blob-ids", "c,d", *DIGESTS, "--blob-sizes", "7,8", "--blob-toc-digests", DIGESTS[1]),
        b"",
    ),
    "tar-ref": ("1:tarref 2:tarref", (), b""),
    "zran on plain": ("1:v6 2:zran", (), b""),
    "tarfs": ("1:tarfs 2:tarfs 3:tarfs", (), b""),
    "parent": ("3:v6", ("--parent-bootstrap", "image"), b""),
    "parent with a layer's blob": ("1:v6 3:v6", ("--parent-bootstrap", "image"), b""),
    "layer as parent": ("2:v6 3:v6", ("--parent-bootstrap", "1:v6"), b""),
    "dictionary": ("1:v6 2:dict 3:dict", ("--chunk-dict", DICTIONARY), b""),
    "dictionary nobody needs": ("1:v6 2:v6", ("--chunk-dict", "dictionary"), b""),
    "dictionary and digests": ("1:v6 2:dict", ("--chunk-dict", DICTIONARY, *DIGESTS), b""),
    "dictionary and parent": ("2:dict 3:dict", ("--chunk-dict", DICTIONARY, "--parent-bootstrap", "image"), b""),
    "prefetch all": ("1:v6 2:v6", ("--prefetch-policy", "fs"), b"/\n"),
    "prefetch": (
        "1:v6 2:v6",
        ("--prefetch-policy", "fs"),
        b"etc\n/etc\n\n  /usr  \n/etc/../usr\n/nowhere\n/etc/keep\n//opaque/./new1\n/symlink-to-dir/",
    ),
    "prefetch, v5": ("1:v5 2:v5", ("--prefetch-policy", "fs"), b"/etc\n/usr/bin/tool\n"),
    "prefetch by blob": ("1:v5 2:v5", ("--prefetch-policy", "blob"), b"/etc\n"),
    "prefetch none": ("1:v6 2:v6", ("--prefetch-policy", "none"), b"/\n"),
}  # fmt: skip


def _arguments(layers: Layers, sources: str, options: tuple[str, ...]) -> list[str]:
    def file(word: str) -> str:
        head, sep, name = word.rpartition("=")
        return head + sep + str(layers[name]) if name in ("image", "dictionary", "1:v6", "1:v5", "1:64k") else word

    return [*map(file, options), *(str(layers[name]) for name in sources.split())]


@pytest.mark.parametrize("name", SOUND)
def test_the_same_bytes(name: str, layers: Layers, tmp_path: Path) -> None:
    sources, options, stdin = SOUND[name]
    arguments = _arguments(layers, sources, options)
    ours, theirs, reports = tmp_path / "ours", tmp_path / "theirs", [tmp_path / "1.json", tmp_path / "2.json"]
    layers.upstream("merge", "-l", "warn", "-B", theirs, "-J", reports[0], *arguments, stdin=stdin)
    done = CliRunner().invoke(merge, ["-l", "warn", "-B", str(ours), "-J", str(reports[1]), *arguments], input=stdin)
    assert done.exit_code == 0, done.output
    assert ours.read_bytes() == theirs.read_bytes()
    upstreams, own = (json.loads(report.read_text()) for report in reports)
    assert own.keys() == upstreams.keys()
    for key in ("blobs", "fs_version", "compressor", "external_bootstrap", "external_blobs"):
        assert own[key] == upstreams[key]


BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "version": ("1:v6 2:v5", ()),
    "chunk size": ("1:v6 2:64k", ()),
    "owners": ("1:v6 2:owners", ()),
    "tarfs": ("1:tarfs 2:v6", ()),
    "digester, v5": ("1:v5 2:v5sha", ()),
    "dictionary of another version": ("1:v6", ("--chunk-dict", "bootstrap=1:v5")),
    "dictionary of another chunk size": ("1:v6", ("--chunk-dict", "bootstrap=1:64k")),
    "no dictionary": ("1:v6 2:dict", ()),
    "dictionary of no type": ("1:v6", ("--chunk-dict", "local=dictionary")),
    "too few digests": ("1:v6 2:v6", ("--blob-digests", "a" * 64)),
    "digest of another length": ("1:v6 2:v6", ("--blob-digests", "zz,yy")),
    "too few sizes": ("1:v6 2:v6", ("--blob-sizes", "1")),
    "too few toc digests": ("1:v6 2:v6", ("--blob-toc-digests", "1")),
    "odd toc digest": ("1:v6 2:v6", ("--blob-toc-digests", "1,2")),
    "too few toc sizes": ("1:v6 2:v6", ("--blob-toc-sizes", "1")),
    "too few ids": ("1:v6 2:v6", ("--original-blob-ids", "1")),
    "no source": ("", ()),
    "policy": ("1:v6", ("--prefetch-policy", "all")),
    "configuration": ("1:v6", ("-C", "/nonexistent")),
}


@pytest.mark.parametrize("name", BAD)
def test_the_same_exit_code(name: str, layers: Layers, tmp_path: Path) -> None:
    arguments = ["-l", "warn", "-B", str(tmp_path / "out"), *_arguments(layers, *BAD[name])]
    theirs = subprocess.run(
        [str(NYDUS_IMAGE), "merge", *arguments], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
    )
    ours = CliRunner().invoke(merge, arguments)
    assert ours.exit_code == theirs.returncode != 0
    assert "Error: " in ours.output and isinstance(ours.exception, SystemExit)


def test_five_layers(layers: Layers, tmp_path: Path) -> None:
    """Opaque directories over opaque ones, a device, a fifo: whatever the stack, the same bytes."""
    sources = [str(layers[f"{number}:v6"]) for number in range(1, 6)]
    for first in range(5):
        for last in range(first + 1, 6):
            if first in (1, 2, 4):  # begins with whiteouts, which upstream keeps
                continue
            chosen = sources[first:last]
            layers.upstream("merge", "-l", "warn", "-B", tmp_path / "theirs", *chosen)
            assert CliRunner().invoke(merge, ["-l", "warn", "-B", str(tmp_path / "ours"), *chosen]).exit_code == 0
            assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
