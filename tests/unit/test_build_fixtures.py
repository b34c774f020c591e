"""What we write is what upstream's builder wrote, byte for byte, over the reference images."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bootstrap.build import BuildOptions, build_layer
from bootstrap.layout.common import Compressor, Digester, SuperFlags
from bootstrap.load import blob_info, load_tree
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.overlay import overlay
from bootstrap.reader import open_bootstrap
from bootstrap.tar import open_layer
from bootstrap.tree import clean_patterns
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6
from tests.lab.paths import shared_dir

SHARED = shared_dir()
REFERENCE = SHARED / "fixtures" / "reference" if SHARED else None

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(REFERENCE is None, reason="interop: the reference fixtures are not here"),
]

DERIVED = SuperFlags.HAS_XATTR | SuperFlags.INLINED_CHUNK_DIGEST


def _bootstraps() -> list[Path]:
    if REFERENCE is None:
        return []
    names = ("image.boot", "parent.boot", "dict.boot")
    found = [p for case in sorted(REFERENCE.iterdir()) for p in map(case.joinpath, names) if p.exists()]
    return [p for p in found if "tarfs" not in p.parent.name]


def _manifest(case: Path) -> dict[str, Any]:
    packed = case / "manifest.json.gz"
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else (case / "manifest.json").read_bytes()
    return dict(json.loads(text))


def _patterns(command: dict[str, Any]) -> list[bytes]:
    if "fs" not in command["args"]:
        return []
    return clean_patterns((command.get("stdin") or "").encode().splitlines())[0]


def rewrite(path: Path, prefetch: list[bytes], *, sort_xattrs: bool = False) -> bytes:
    """A bootstrap taken apart into a tree and written again."""
    with open_bootstrap(path) as image:
        blobs = [blob_info(blob) for blob in image.blobs]
        tree = overlay([(load_tree(image, blobs), "none")])
        if sort_xattrs:  # their order is the only thing upstream leaves to chance
            tree.xattrs = [dict(sorted(xattrs.items())) for xattrs in tree.xattrs]
        write = write_v6 if image.version == 6 else write_v5
        return write(tree, chunk_size=image.chunk_size, flags=image.flags & ~DERIVED, prefetch=prefetch)


def make_tree() -> ModuleType:
    assert REFERENCE is not None
    spec = importlib.util.spec_from_file_location("make_tree", REFERENCE / "make_tree.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_tree"] = module
    spec.loader.exec_module(module)
    return module


def tree_tar(name: str, chunk: int) -> bytes:
    """The tar a reference image was made from."""
    module = make_tree()
    out = io.BytesIO()
    module.write_tar(module.TREES[name](chunk), out)
    return out.getvalue()


@pytest.mark.parametrize("path", _bootstraps(), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_bootstraps_survive_being_taken_apart(path: Path) -> None:
    command = _manifest(path.parent)["commands"][0 if path.name != "image.boot" else -1]
    assert rewrite(path, _patterns(command)) == path.read_bytes()


@pytest.mark.parametrize("version", [5, 6])
def test_tar_build_equals_upstream(version: int) -> None:
    assert REFERENCE is not None
    case = REFERENCE / f"v{version}-tar-rafs"
    out = io.BytesIO()
    result = build_layer(
        io.BytesIO(tree_tar("nasty-tar", 0x10000)),
        out,
        BuildOptions(fs_version=version, chunk_size=0x10000, digester=Digester.SHA256),
    )
    assert (case / result.blob_id).read_bytes() == out.getvalue()
    assert result.blobs == [result.blob_id] and result.blob_sha256 == hashlib.sha256(out.getvalue()).hexdigest()
    assert result.bootstrap == rewrite(case / "image.boot", [], sort_xattrs=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", ["v5-inline", "v6-inline-notoc"])
def test_inline_layer_equals_upstream(case: str, threads: int) -> None:
    assert REFERENCE is not None
    out = io.BytesIO()
    result = build_layer(
        io.BytesIO(tree_tar("layer1", 0x8000)),
        out,
        BuildOptions(
            fs_version=int(case[1]),
            chunk_size=0x8000,
            compressor=Compressor.LZ4_BLOCK,
            inline_meta=True,
            threads=threads,
        ),
    )
    (layer,) = (name for name in _manifest(REFERENCE / case)["files"] if name != "manifest.json")
    assert (REFERENCE / case / layer).read_bytes() == out.getvalue()
    assert result.blob_size == len(out.getvalue())


@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("case", ["v5-merged3", "v6-merged3"])
def test_merged_image_equals_upstream(case: str, packing: str, tmp_path: Path) -> None:
    assert REFERENCE is not None
    if case.startswith("v6"):
        options = BuildOptions(
            chunk_size=0x8000, inline_meta=True, blob_toc=True, prefetch=[b"/"], prefetch_policy="fs"
        )
    else:
        options = BuildOptions(
            fs_version=5,
            chunk_size=0x8000,
            inline_meta=True,
            compressor=Compressor.LZ4_BLOCK,
            digester=Digester.SHA256,
            prefetch=[b"/"],
            prefetch_policy="fs",
        )
    sources = []
    for number_of_layer in (1, 2, 3):
        data = tree_tar(f"layer{number_of_layer}", 0x8000)
        if packing == "gzip":
            data = gzip.compress(data[:5000], 1) + gzip.compress(data[5000:], 1)
        elif packing == "zstd":
            import zstandard

            data = zstandard.compress(data[:5000]) + zstandard.compress(data[5000:])
        out = io.BytesIO()
        with open_layer(io.BytesIO(data)) as layer:
            result = build_layer(layer, out, options)
        assert (REFERENCE / case / result.blob_sha256).read_bytes() == out.getvalue()
        path = tmp_path / result.blob_sha256
        path.write_bytes(out.getvalue())
        sources.append(MergeSource(path))
    merged = merge_layers(sources, tmp_path / "image.boot", prefetch=[b"/"])
    assert (tmp_path / "image.boot").read_bytes() == (REFERENCE / case / "image.boot").read_bytes()
    assert merged.blobs == [source.path.name for source in sources]


def test_estargz_landmarks_are_left_out() -> None:
    assert REFERENCE is not None
    case = REFERENCE / "v6-estargz-ref"
    original = next(p for p in case.iterdir() if len(p.name) == 64 and p.read_bytes()[:2] == b"\x1f\x8b")
    out = io.BytesIO()
    with original.open("rb") as file, open_layer(file) as layer:
        result = build_layer(layer, out, BuildOptions(chunk_size=0x8000))
    expected = REFERENCE / "v6-estargz-rafs"
    assert (expected / result.blob_id).read_bytes() == out.getvalue()
    assert result.bootstrap == rewrite(expected / "image.boot", [], sort_xattrs=True)


def test_merge_in_oci_ref_mode_equals_upstream(tmp_path: Path) -> None:
    """Layers that refer to the original gzip: digests and sizes of the lists go to the meta blob fields."""
    assert REFERENCE is not None
    case = REFERENCE / "v6-zran-merged3"
    arguments = _manifest(case)["commands"][-1]["args"]
    lists = {name: arguments[arguments.index(name) + 1].split(",") for name in ("--blob-digests", "--blob-sizes")}
    originals = arguments[arguments.index("--original-blob-ids") + 1].split(",")
    sources = [
        MergeSource(case / digest, digest, original, int(size))
        for digest, original, size in zip(lists["--blob-digests"], originals, lists["--blob-sizes"], strict=True)
    ]
    if not all(source.path.exists() for source in sources):
        pytest.skip("interop: the meta blobs are not in the fixture")
    merge_layers(sources, tmp_path / "image.boot", prefetch=[b"/"])
    assert (tmp_path / "image.boot").read_bytes() == (case / "image.boot").read_bytes()
