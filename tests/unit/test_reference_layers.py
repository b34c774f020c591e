"""Layers that stay what they are: every chunk of every kind of gzip is found again, upstream's bytes are met."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bootstrap import blobfile, spool, zlibstream
from bootstrap.build import BuildOptions, BuildResult, build_layer
from bootstrap.cli.create import create
from bootstrap.codec import decompress
from bootstrap.errors import BuildError
from bootstrap.kinds import KINDS
from bootstrap.layout import blobmeta
from bootstrap.layout.common import BlobFeatures, Compressor
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.reader import open_bootstrap
from bootstrap.zran import Contexts, decode_slice
from tests.lab.paths import shared_dir

SHARED = shared_dir()
REFERENCE = SHARED / "fixtures" / "reference" if SHARED else None


def build(layer: bytes, kind: str = "targz-ref", **options: object) -> tuple[BuildResult, bytes]:
    out = io.BytesIO()
    chosen = KINDS[kind]
    with chosen.open(io.BytesIO(layer)) as tar:
        result = build_layer(tar, out, BuildOptions(**options), kind=chosen)  # type: ignore[arg-type]
    return result, out.getvalue()


def content(seed: int, size: int) -> bytes:
    """Runs of noise, of zeros and of words: blocks of every kind and length."""
    choose = random.Random(seed)
    words = [choose.randbytes(choose.randint(2, 9)) for _ in range(300)]
    found = bytearray()
    while len(found) < size:
        kind = choose.random()
        if kind < 0.3:
            found += choose.randbytes(choose.randint(1, 20_000))
        elif kind < 0.4:
            found += bytes(choose.randint(1, 60_000))
        else:
            found += b" ".join(choose.choices(words, k=choose.randint(1, 3000)))
    return bytes(found[:size])


def tar_pieces(files: dict[str, bytes]) -> list[bytes]:
    """A tar in pieces: header, content with its padding, ... , end."""
    pieces = []
    for name, data in files.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        pieces.append(entry.tobuf(tarfile.GNU_FORMAT))
        pieces.append(data + bytes(-len(data) % 512))
    return [*pieces, bytes(10240)]


def member(data: bytes, level: int = 6) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def read_back(result: BuildResult, meta: bytes, layer: bytes, folder: Path) -> dict[str, bytes]:
    """All files by the way a reader takes: chunk address, entry, slice. Needs a build with separate metadata."""
    path = folder / "image.boot"
    path.write_bytes(result.bootstrap)
    header = blobmeta.Header._make(blobmeta.HEADER.unpack_from(meta, len(meta) - blobmeta.HEADER_SIZE))
    region = decompress(
        Compressor(header.ci_compressor), meta[: header.ci_compressed_size], header.ci_uncompressed_size
    )
    files = {}
    with open_bootstrap(str(path)) as image:
        (blob,) = image.blobs
        assert (blob.id, blob.compressed_size) == (hashlib.sha256(layer).hexdigest(), len(layer))
        assert (blob.chunk_count, blob.meta_digest.hex()) == (header.ci_entries, hashlib.sha256(meta).hexdigest())
        contexts = Contexts(
            region, header.ci_zran_offset, header.ci_zran_size, header.ci_zran_count, blob.compressed_size
        )
        records = {record[8]: record for record in image.chunk_records()}
        for name, entry in image.walk():
            pieces = []
            for _, index, _ in image.chunk_refs(entry.ino) if entry.dtype == 8 else []:
                chunk = blobmeta.unpack_v2(region, 24 * index)
                if blob.features & BlobFeatures.ZRAN:
                    context = contexts[chunk.data >> 32]
                    stored = layer[context.in_offset : context.in_offset + context.in_len]
                    start = chunk.data & 0xFFFFFFFF
                    size = start + chunk.uncompressed_size
                    data = bytes(decode_slice(context, contexts.dictionary(context), stored, size)[start:])
                else:
                    data = layer[chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
                assert hashlib.sha256(data).digest() == records[index][0]
                pieces.append(data)
            files[name.decode().lstrip("/")] = b"".join(pieces)
    return files


def pack(kind: str, pieces: list[bytes]) -> bytes:
    tar = b"".join(pieces)
    if kind == "plain tar":
        return tar
    if kind == "one member":
        return member(tar)
    if kind == "members of 50 kB":
        return b"".join(member(tar[at : at + 50_000], 1) for at in range(0, len(tar), 50_000)) + bytes(1024)
    if kind == "a member per piece":  # files begin right behind the end of a member, which has one single block
        return b"".join(map(member, pieces))
    if kind == "flushed":  # pigz: empty stored blocks, windows reset
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        found = bytearray()
        for at in range(0, len(tar), 70_001):
            found += packer.compress(tar[at : at + 70_001])
            found += packer.flush(zlib.Z_FULL_FLUSH if at % 2 else zlib.Z_SYNC_FLUSH)
        return bytes(found + packer.flush())
    assert kind == "stored"
    return member(tar, 0)


KINDS_OF_GZIP = ("plain tar", "one member", "members of 50 kB", "a member per piece", "flushed", "stored")


@pytest.mark.parametrize("kind", KINDS_OF_GZIP)
def test_every_chunk_is_found_again(kind: str, tmp_path: Path) -> None:
    files = {f"f{i:03}": content(i, size) for i, size in enumerate([3, 1_800_000, 40_000, 1, 2_500_000, 700, 512] * 2)}
    layer = pack(kind, tar_pieces(files))
    result, meta = build(layer, chunk_size=0x10000)
    assert read_back(result, meta, layer, tmp_path) == files
    again, same = build(layer, chunk_size=0x10000, threads=1)
    assert (again.bootstrap, same) == (result.bootstrap, meta)


@pytest.mark.parametrize("kind", KINDS_OF_GZIP[1:])
def test_every_zlib_gives_the_same_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"f{i:03}": content(i + 9, size) for i, size in enumerate([3, 700_000, 40_000, 1, 900_000, 70_001])}
    layer = pack(kind, tar_pieces(files))
    found = {}
    for engine in zlibstream.engines():
        monkeypatch.setattr(zlibstream, "_engine", lambda engine=engine: engine)
        result, meta = build(layer, chunk_size=0x10000)
        found[engine.name] = (bytes(result.bootstrap), meta)
    assert len(found) >= 2 and len(set(found.values())) == 1, list(found)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from([1, 100, 511, 4096, 5000, 65536, 300_000]), min_size=1, max_size=12),
    kind=st.sampled_from(KINDS_OF_GZIP),
    chunk_size=st.sampled_from([0x1000, 0x8000, 0x100000]),
    seed=st.integers(0, 1000),
)
def test_any_layer_is_found_again(tmp_path: Path, sizes: list[int], kind: str, chunk_size: int, seed: int) -> None:
    files = {f"f{i}": content(seed + i, size) for i, size in enumerate(sizes)}
    layer = pack(kind, tar_pieces(files))
    result, meta = build(layer, chunk_size=chunk_size)
    assert read_back(result, meta, layer, tmp_path) == files


def test_a_large_blob_meta_is_written_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"f{i}": content(i, 1_500_000) for i in range(4)}
    layer = member(b"".join(tar_pieces(files)))
    _, whole = build(layer)
    monkeypatch.setattr(blobfile, "IN_ONE_PIECE", 1000)
    monkeypatch.setattr(spool, "IN_MEMORY", 1000)
    result, meta = build(layer)
    assert read_back(result, meta, layer, tmp_path) == files
    assert abs(len(meta) - len(whole)) < 2000


def test_a_layer_without_data_has_no_blob() -> None:
    result, meta = build(member(b"".join(tar_pieces({"empty": b""}))))
    assert (meta, result.blobs, result.blob_id, result.chunk_count) == (b"", [], "", 0)


def test_what_cannot_be_referred_to_is_refused() -> None:
    files = {"a": content(1, 200_000)}
    layer = member(b"".join(tar_pieces(files)))
    with pytest.raises(BuildError, match="ends too early"):
        build(layer[:-20])
    with pytest.raises(BuildError, match="damaged at"):
        build(layer[:10] + b"\xff" * 50 + layer[60:])
    with pytest.raises(BuildError, match="damaged at"):
        build(layer[:-8] + bytes(8))  # the checksum of the member
    with pytest.raises(BuildError, match="compressed with zstd, which has no random access"):
        build(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(BuildError, match="not a tar"):
        build(member(b"x" * 2000))
    with pytest.raises(BuildError, match="not a tar"):
        build(b"")
    zeros = member(b"".join(tar_pieces({"zeros": bytes(40 << 20)})))
    with pytest.raises(BuildError, match="use a smaller --chunk-size"):
        build(zeros, chunk_size=0x1000000)


def test_options_that_make_no_sense_are_refused() -> None:
    layer = member(b"".join(tar_pieces({"a": b"a"})))
    for options, message in (
        ({"fs_version": 5}, "only V6 is supported"),
        ({"blob_id": "abc"}, "conflicts with '--blob-id'"),
        ({"batch_size": 0x1000}, "unsupported ConversionType for batch chunk"),
        ({"prefetch_policy": "blob"}, "conflicts with '--prefetch-policy blob'"),
    ):
        with pytest.raises(BuildError, match=message):
            build(layer, **options)  # type: ignore[arg-type]
    forced, _ = build(layer, compressor=Compressor.LZ4_BLOCK)
    assert forced.bootstrap == build(layer)[0].bootstrap


@pytest.mark.interop
@pytest.mark.skipif(REFERENCE is None, reason="interop: the reference fixtures are not here")
class TestReferenceFixtures:
    @pytest.mark.parametrize(
        ("case", "kind", "chunk_size"),
        [
            ("v6-zran-slices", "targz-ref", 0x40000),
            ("v6-zran-multimember", "targz-ref", 0x8000),
            ("v6-estargz-ref", "estargz-ref", 0x8000),
            ("v6-tar-ref", "targz-ref", 0x8000),
        ],
    )
    def test_separate(self, case: str, kind: str, chunk_size: int) -> None:
        assert REFERENCE is not None
        folder = REFERENCE / case
        blob = json.loads((folder / "manifest.json").read_bytes())["blobs"][0]["id"]
        result, meta = build((folder / blob).read_bytes(), kind, chunk_size=chunk_size)
        assert result.bootstrap == (folder / "image.boot").read_bytes()
        assert (folder / result.blob_id).read_bytes() == meta and result.blobs == [blob]

    def test_tarfs(self) -> None:
        assert REFERENCE is not None
        folder = REFERENCE / "v6-tar-tarfs"
        blob = json.loads((folder / "manifest.json").read_bytes())["blobs"][0]["id"]
        result, _ = build((folder / blob).read_bytes(), "tar-tarfs", chunk_size=0x8000)
        assert result.bootstrap == (folder / "image.boot").read_bytes()

    def test_layers_of_an_image(self) -> None:
        assert REFERENCE is not None
        folder = REFERENCE / "v6-zran-merged3"
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for layer, original in zip(manifest["layers"], manifest["original_layers"], strict=True):
            result, blob = build(
                (folder / original).read_bytes(),
                chunk_size=0x8000,
                inline_meta=True,
                blob_toc=True,
                prefetch=[b"/"],
                prefetch_policy="fs",
            )
            assert result.blob_sha256 == layer and (folder / layer).read_bytes() == blob
            assert result.blobs == [original]

    def test_upstreams_archives(self, tmp_path: Path) -> None:
        assert SHARED is not None
        folder = SHARED / "fixtures" / "upstream" / "nydus" / "zran"
        for name, members in (("zran-two-streams", 2), ("bgzip", 0), ("zran-zero-file", 1)):
            layer = (folder / f"{name}.tar.gz").read_bytes()
            result, meta = build(layer, chunk_size=0x4000)
            found = read_back(result, meta, layer, tmp_path)
            plain = io.BytesIO(gzip.decompress(layer))
            with tarfile.open(fileobj=plain, ignore_zeros=members > 1) as archive:
                for entry in archive:
                    if entry.isreg() and entry.size:
                        file = archive.extractfile(entry)
                        assert file is not None and found[entry.name.removeprefix("./")] == file.read()


def test_tarfs_places_are_those_in_the_tar(tmp_path: Path) -> None:
    files = {"a": content(1, 10_000), "empty": b"", "exact": content(2, 0x4000), "z": b"zz"}
    layer = b"".join(tar_pieces(files))
    result, written = build(layer, "tar-tarfs", chunk_size=0x1000)
    assert written == b"" and result.blobs == [hashlib.sha256(layer).hexdigest()] and result.blob_id == ""
    path = tmp_path / "image.boot"
    path.write_bytes(result.bootstrap)
    with open_bootstrap(str(path)) as image:
        for name, data in files.items():
            extents = image.extents(image.resolve(b"/" + name.encode()), 0, len(data))
            found = b"".join(layer[extent.blob_offset : extent.blob_offset + extent.size] for extent in extents)
            assert found == data
    named, _ = build(layer, "tar-tarfs", blob_id="given")
    assert named.blobs == ["given"]
    with pytest.raises(BuildError, match="decompress it first"):
        build(member(layer), "tar-tarfs")
    with pytest.raises(BuildError, match="conflicts with '--blob-inline-meta'"):
        build(layer, "tar-tarfs", inline_meta=True)


def test_tarfs_layers_merge(tmp_path: Path) -> None:
    """A layer over another: two tars, one image, one record each in the chunk table."""
    sources = []
    for number, files in enumerate(({"a": b"1" * 700, "gone": b"x"}, {"b": b"2" * 9000, ".wh.gone": b""})):
        result, _ = build(b"".join(tar_pieces(files)), "tar-tarfs")
        path = tmp_path / f"{result.blobs[0]}.{number}"
        path.write_bytes(result.bootstrap)
        sources.append(MergeSource(path))
    merged = merge_layers(sources, tmp_path / "image.boot")
    with open_bootstrap(str(tmp_path / "image.boot")) as image:
        assert merged.blobs == [source.path.name.split(".")[0] for source in sources]
        assert sorted(name for name, _ in image.walk()) == [b"a", b"b"]
        assert [extent[:3] for extent in image.extents(image.resolve(b"/b"), 0, 9000)] == [(1, 512, 9000)]


def nydus_image(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(create, ["-l", "warn", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command(tmp_path: Path) -> None:
    plain = b"".join(tar_pieces({"a": b"a"}))
    layer, tar, blobs, boot = tmp_path / "layer", tmp_path / "tar", tmp_path / "blobs", tmp_path / "boot"
    layer.write_bytes(member(plain))
    tar.write_bytes(plain)
    blobs.mkdir()
    report = tmp_path / "report.json"
    assert nydus_image("-t", "targz-ref", "-B", boot, "-D", blobs, "-J", report, layer) == (0, "")
    (meta,) = blobs.iterdir()
    assert meta.name == hashlib.sha256(meta.read_bytes()).hexdigest()
    document = json.loads(report.read_text())
    assert document["blobs"] == [hashlib.sha256(member(plain)).hexdigest()] and document["compressor"] == "gzip"
    assert nydus_image("-t", "tar-tarfs", "-B", boot, "-D", blobs, "-J", report, tar) == (0, "")
    assert json.loads(report.read_text())["blobs"] == [hashlib.sha256(plain).hexdigest()]
    assert list(blobs.iterdir()) == [meta]
    for arguments, code, message in (
        (("-t", "tar-tarfs", "-b", boot), 1, "conversion type `tar-tarfs` conflicts with `--blob`"),
        (("-t", "tar-tarfs", "-D", blobs, "--chunk-dict", "bootstrap=x"), 1, "conflicts with '--chunk-dict'"),
        (("-t", "targz-ref", "-D", blobs, "--encrypt"), 1, "conflicts with '--encrypt'"),
        (("-t", "targz-ref", "-D", blobs, "--blob-id", "x"), 1, "conflicts with '--blob-id'"),
        (("-t", "targz-ref", "-D", blobs, "-v", "5"), 1, "only V6 is supported"),
        (("-t", "targz-ref", "-D", blobs, "--blob-data-size", "1"), 1, "conflicts with '--blob-data-size'"),
        (("-t", "estargztoc-ref", "-D", blobs), 2, "--blob-id"),
        (("-t", "stargz_index", "-D", blobs, "--blob-id", "x"), 1, "no value specified for '--blob-data-size'"),
        (("-t", "stargz_index", "-D", blobs, "--blob-id", "x", "--blob-data-size", "z"), 1, "a hexadecimal number"),
        (
            ("-t", "stargz_index", "-D", blobs, "--blob-id", "x", "--blob-data-size", "9"),
            1,
            "eStargz table of contents",
        ),
    ):
        found, text = nydus_image(*arguments, "-B", boot, layer)
        assert (found, text.count("\n"), message in text) == (code, 1, True), (arguments, text)
