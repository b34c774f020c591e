"""Every form in which data is stored, made by hand: right bytes through tools and daemon, errors and never wrong bytes
from damaged ones, each unit fetched and decoded once."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from bootstrap import blobmeta as meta_module
from bootstrap import chunkmap
from bootstrap.blobmeta import BlobMeta, open_cache_form
from bootstrap.blobsource import local_meta, open_blobs
from bootstrap.check import check_bootstrap
from bootstrap.checkblob import check_blobs
from bootstrap.errors import FormatError, RafsError
from bootstrap.layout import batch, toc, zran
from bootstrap.layout.common import BlobFeatures, ChunkFlags
from bootstrap.reader import open_bootstrap
from nydusfs.config import load_config
from nydusfs.errors import ReadError
from nydusfs.image_reader import ImageReader
from nydusfs.segments import SEGMENT_SIZE, BadChunk, decode, make_segment, runs
from nydusfs.services import open_services
from tests.lab.handmade import CHUNK, FORMS, Made, blobmeta_file, contents, make

TABLED = ["batch", "batch-encrypted", "zran"]  # forms that need the blob's own table


def read_all(made: Made) -> dict[bytes, bytes]:
    with open_bootstrap(made.boot) as image, open_blobs(image, made.folder) as blobs:
        return {name: b"".join(blobs.read_file(image.resolve(name))) for name in made.files}


def serve(made: Made, work: Path, act: Callable[[ImageReader], object], *, validate: bool = False) -> None:
    """Run `act` with a reader of the image, blobs from its folder, cache in `work`."""
    cache = {"type": "blobcache", "validate": validate, "config": {"work_dir": str(work)}}
    backend = {"type": "localfs", "config": {"dir": str(made.folder)}}
    config = load_config(json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"}), "test")

    async def main() -> None:
        async with open_services() as services:
            reader = await services.open_image(str(made.boot), config, name="made")
            try:
                with trio.fail_after(60):
                    await act(reader)  # type: ignore[misc]
            finally:
                reader.close()

    trio.run(main)


@pytest.mark.parametrize("form", FORMS)
def test_every_byte_comes_out(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image")
    assert read_all(made) == made.files
    with open_bootstrap(made.boot) as image:
        assert check_bootstrap(image) == len(made.files) + 1
        assert check_blobs(image, str(made.folder)) == (1 if form == "tarfs" else made.info.chunk_count)
    numbers = random.Random(form)

    async def act(reader: ImageReader) -> None:
        for name, data in made.files.items():
            ino = reader.bootstrap.resolve(name)
            assert await reader.read(ino, 0, len(data) + 5) == data, name
        await reader._scheduler.idle()  # a reader goes on before the fetch that served him is counted
        before = reader.backend_counters.read_count
        for name, data in made.files.items():
            ino = reader.bootstrap.resolve(name)
            for _ in range(4):
                offset, size = numbers.randrange(len(data) + 1), numbers.randrange(1, 2 * CHUNK)
                assert await reader.read(ino, offset, size) == data[offset : offset + size], name
                found = await trio.to_thread.run_sync(reader.read_now, ino, offset, size)
                assert found is None or b"".join(found) == data[offset : offset + size]
        assert reader.backend_counters.read_count == before, "all of it was in the cache"

    serve(made, tmp_path / "cache", act)
    serve(made, tmp_path / "cache", act, validate=True)


@pytest.mark.parametrize("form", TABLED)
def test_units_are_fetched_and_decoded_once(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(form, tmp_path / "image", contents(300))
    decoded: list[tuple[str, int]] = []
    real = BlobMeta.decode

    def count(self: BlobMeta, unit: chunkmap.Unit, stored: memoryview, size: int) -> bytes | bytearray:
        decoded.append((unit.kind, unit.number))
        return real(self, unit, stored, size)

    monkeypatch.setattr(BlobMeta, "decode", count)

    async def act(reader: ImageReader) -> None:
        for name in sorted(made.files):
            assert await reader.read(reader.bootstrap.resolve(name), 0, 1 << 20) == made.files[name]

    serve(made, tmp_path / "cache", act)
    assert made.header is not None
    assert sorted(decoded) == sorted(set(decoded)), "a unit was decoded twice"
    assert len(decoded) == made.header.ci_zran_count
    decoded.clear()
    assert read_all(made) == made.files
    assert len(decoded) == made.header.ci_zran_count


@pytest.mark.parametrize("span", [chunkmap.MAX_SPAN, 8192])
@pytest.mark.parametrize("form", TABLED)
def test_segments_hold_each_chunk_once(form: str, span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a unit spreads over more than a segment may, which then decodes it again."""
    monkeypatch.setattr(chunkmap, "MAX_SPAN", span)
    made = make(form, tmp_path / "image", contents(400))
    with open_bootstrap(made.boot) as image, open_blobs(image, made.folder) as blobs:
        blobs.need_meta(image.blobs[0])
        chunks = blobs.chunks
        numbers = {chunks.anchor(0, row) // SEGMENT_SIZE for row in chunks.blob_rows(0)}
        rows = []
        for number in sorted(numbers):
            segment = make_segment(chunks, image.blobs[0], number)
            rows += list(segment.rows)
            for row in segment.rows:
                member = chunks.member(row)
                assert segment.compressed_start <= member.unit.start < member.unit.end <= segment.compressed_end
                assert member.chunk.uncompressed_offset - segment.start >= 0
                assert member.chunk.uncompressed_offset + member.chunk.uncompressed_size <= segment.start + segment.size
        assert rows == list(chunks.blob_rows(0))


def test_segments_do_not_depend_on_the_chunks_an_image_uses(tmp_path: Path) -> None:
    """Two images of one batched layer, one of which lost the first members of a batch to an upper layer."""
    made = make("batch", tmp_path / "image")
    with open_bootstrap(made.boot) as image, open_blobs(image, made.folder) as blobs:
        blobs.need_meta(image.blobs[0])
        chunks = blobs.chunks
        for row in chunks.blob_rows(0):
            unit = chunks.member(row).unit
            if unit.kind == "batch":
                first = min(
                    chunks.chunk(other).uncompressed_offset
                    for other in chunks.blob_rows(0)
                    if chunks.member(other).unit == unit
                )
                assert chunks.anchor(0, row) == first


@pytest.mark.parametrize("form", TABLED)
def test_the_table_beside_the_bootstrap_is_enough(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image", beside=True)
    if made.info.features & BlobFeatures.SEPARATE:
        (made.folder / made.info.meta_digest.hex()).unlink()
    else:  # what the blob itself has of it is gone
        path = made.folder / made.info.id
        path.write_bytes(made.stored[made.info.id][: made.info.ci_offset])
    assert read_all(made) == made.files

    async def act(reader: ImageReader) -> None:
        for name in made.files:
            assert await reader.read(reader.bootstrap.resolve(name), 0, 1 << 20) == made.files[name]

    serve(made, tmp_path / "cache", act)


@pytest.mark.parametrize("form", TABLED)
def test_a_wrong_table_beside_the_bootstrap_is_replaced(form: str, tmp_path: Path) -> None:
    """One that is another blob's is refused at sight; one that only leads to wrong bytes is once these were seen."""
    made = make(form, tmp_path / "image", beside=True)
    name = made.info.meta_digest.hex() if made.info.features & BlobFeatures.SEPARATE else made.info.id
    path = made.folder / f"{name}.blob.meta"
    assert made.header is not None
    contexts = made.header.ci_zran_offset
    size = batch.CONTEXT.size if form != "zran" else zran.CONTEXT.size
    region = bytearray(made.region)
    for number in range(made.header.ci_zran_count):  # all contexts exchanged
        at, last = contexts + number * size, contexts + (made.header.ci_zran_count - 1 - number) * size
        region[at : at + size] = made.region[last : last + size]
    for bad in (bytes(region), bytes(len(region))):
        path.write_bytes(blobmeta_file(bad, made.header))

        async def act(reader: ImageReader) -> None:
            for name in sorted(made.files):
                assert await reader.read(reader.bootstrap.resolve(name), 0, 1 << 20) == made.files[name]

        serve(made, tmp_path / "cache", act)
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_a_layer_put_beside_the_bootstrap_is_a_file_or_not_opened(kind: str, tmp_path: Path) -> None:
    """Whoever made the layer chose it: no other file of the host is read, nothing is waited for, no device touched."""
    made = make("zran", tmp_path / "image", beside=True)
    path = made.folder / f"{made.info.meta_digest.hex()}.blob.meta"
    if not path.exists():
        path = made.folder / f"{made.info.id}.blob.meta"
    path.rename(tmp_path / "elsewhere")
    with open_bootstrap(made.boot) as image:
        if kind == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        assert local_meta(image, image.blobs[0]) is None
        path.rmdir() if kind == "folder" else path.unlink()
        (tmp_path / "elsewhere").rename(path)
        assert local_meta(image, image.blobs[0]) is not None


@pytest.mark.parametrize("form", FORMS)
def test_damage_gives_errors_and_never_wrong_bytes(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image", contents(30))
    numbers = random.Random(form)
    failed = 0
    for turn in range(60):
        name = numbers.choice(sorted(made.stored))
        bad = bytearray(made.stored[name])
        if turn % 6 == 0:
            del bad[numbers.randrange(len(bad)) :]
        elif turn % 6 == 1:  # in the table and behind it
            for _ in range(3):
                bad[numbers.randrange(max(0, len(bad) - 6000), len(bad))] ^= 1 << numbers.randrange(8)
        else:
            bad[numbers.randrange(len(bad))] ^= 1 << numbers.randrange(8)
        (made.folder / name).write_bytes(bad)
        with open_bootstrap(made.boot) as image, open_blobs(image, made.folder) as blobs:
            for file, data in made.files.items():
                try:
                    assert b"".join(blobs.read_file(image.resolve(file))) == data, (turn, name, file)
                except RafsError as error:
                    failed += 1
                    assert str(error) and "\n" not in str(error)
        (made.folder / name).write_bytes(made.stored[name])
    assert failed
    assert read_all(made) == made.files


def test_small_chunks_that_lie_together_are_decoded_by_one_call(tmp_path: Path) -> None:
    """Compressed ones and plain ones; a wrong one of them is named all the same."""
    made = make("plain", tmp_path / "image", contents(60))
    stored = made.stored[made.info.id]
    with open_bootstrap(made.boot) as image, open_blobs(image, made.folder) as blobs:
        chunks = blobs.chunks
        segment = make_segment(chunks, image.blobs[0], 0)
        ((start, end, units),) = runs(chunks, segment)
        view = memoryview(stored)[start:end]
        found = chunks.decode_together(units, start, view, segment.size)
        assert found is not None
        one_by_one = [chunks.decode(unit, stored[unit[0].unit.start : unit[0].unit.end])[0] for unit in units]
        assert [bytes(part) for part in found] == [bytes(part) for part in one_by_one]
        kinds = {unit[0].chunk.flags & ChunkFlags.COMPRESSED for unit in units}
        assert kinds == {0, ChunkFlags.COMPRESSED}
        assert chunks.decode_together(units, start, view, segment.size // 2) is None, "into so many bytes"
        assert chunks.decode_together(units, start, view[:-1], segment.size) is None
        for member in (units[3][0], units[-2][0]):
            bad = bytearray(view)
            bad[member.unit.end - 1 - start] ^= 1
            assert chunks.decode_together(units, start, memoryview(bad), segment.size) is None
            with pytest.raises(BadChunk, match=f"chunk {member.chunk.index} of blob {made.info.id}"):
                decode(segment, chunks, units, start, memoryview(bad))
        assert bytes(decode(segment, chunks, units, start, view)) != bytes(segment.size)


@pytest.mark.parametrize("form", TABLED)
def test_damage_in_served_images_is_an_error_of_the_file_alone(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image", contents(30))
    data = bytearray(made.stored[made.info.id])
    data[made.info.ci_offset // 2 if made.info.ci_offset else len(data) // 2] ^= 0x10
    (made.folder / made.info.id).write_bytes(data)
    right: list[bytes] = []
    wrong: list[bytes] = []

    async def act(reader: ImageReader) -> None:
        for name, expected in made.files.items():
            try:
                assert await reader.read(reader.bootstrap.resolve(name), 0, 1 << 20) == expected
                right.append(name)
            except ReadError:
                wrong.append(name)
        (made.folder / made.info.id).write_bytes(made.stored[made.info.id])
        for name in wrong:  # and never for good
            assert await reader.read(reader.bootstrap.resolve(name), 0, 1 << 20) == made.files[name]

    serve(made, tmp_path / "cache", act)
    assert right and wrong


@pytest.mark.parametrize("form", TABLED)
def test_hostile_tables_give_format_errors(form: str, tmp_path: Path) -> None:
    """Any lie inside the region, with all digests of the region itself passed by."""
    made = make(form, tmp_path / "image", contents(30))
    assert made.header is not None
    numbers = random.Random(form)
    failed = 0
    for turn in range(150):
        region = bytearray(made.region)
        if turn % 3:
            at = numbers.randrange(0, min(len(region), 24 * len(made.files) * 2), 4)
            region[at : at + 4] = numbers.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"])
        else:
            region[numbers.randrange(len(region))] ^= 1 << numbers.randrange(8)
        with open_bootstrap(made.boot) as image, open_blobs(image, made.folder) as blobs:
            blobs.chunks.attach(0, open_cache_form(image.blobs[0], blobmeta_file(bytes(region), made.header)))
            for name, data in made.files.items():
                try:
                    assert b"".join(blobs.read_file(image.resolve(name))) == data, (turn, name)
                except RafsError:
                    failed += 1
            for row in blobs.chunks.blob_rows(0):
                try:
                    segment = make_segment(blobs.chunks, image.blobs[0], blobs.chunks.anchor(0, row) // SEGMENT_SIZE)
                    assert segment.size <= SEGMENT_SIZE + chunkmap.MAX_SPAN + CHUNK
                except (RafsError, KeyError):
                    failed += 1
    assert failed


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ci_entries", 7, "by the bootstrap"),
        ("ci_compressor", 9, "by the bootstrap"),
        ("ci_zran_offset", 24, "contexts at 0x18"),
        ("ci_zran_count", 1 << 20, "contexts for"),
        ("ci_zran_size", 1 << 40, "hold no"),
        ("magic2", 1, "magics"),
    ],
)
def test_headers_that_contradict_the_bootstrap(field: str, value: int, message: str, tmp_path: Path) -> None:
    made = make("batch", tmp_path / "image")
    assert made.header is not None
    with open_bootstrap(made.boot) as image:
        blob = image.blobs[0]
        open_cache_form(blob, blobmeta_file(made.region, made.header))
        with pytest.raises(FormatError, match=message):
            open_cache_form(blob, blobmeta_file(made.region, made.header._replace(**{field: value})))
        with pytest.raises(FormatError, match="too few"):
            open_cache_form(blob, blobmeta_file(made.region, made.header)[4096:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ci_offset": 1 << 63}, "blob meta at 0x8000000000000000"),
        ({"ci_uncompressed_size": 2 << 30}, "blob meta of 2147483648 bytes"),
        ({"ci_uncompressed_size": 0}, "has no blob meta"),
        ({"ci_compressed_size": 1 << 20}, "blob meta of"),
    ],
)
def test_places_that_cannot_be_are_not_asked_for(fields: dict[str, int], message: str, tmp_path: Path) -> None:
    with open_bootstrap(make("batch", tmp_path / "image").boot) as image, pytest.raises(FormatError, match=message):
        meta_module.meta_range(replace(image.blobs[0], **fields), "")  # type: ignore[arg-type]


def test_a_meta_blob_is_known_by_both_digests_builders_give_it(tmp_path: Path) -> None:
    """The digest of the file, or that without the list of chunk digests (reference 4.10); anything else is refused."""
    made = make("zran", tmp_path / "image")
    meta = made.stored[made.info.meta_digest.hex()]
    digests = bytes(range(32)) * made.info.chunk_count
    entry = toc.TocEntry(toc.BLOB_DIGEST, toc.Compressor.NONE, bytes(32), len(meta), len(digests), len(digests))
    table = toc.pack_toc_entry(entry)
    whole = meta + digests + table + toc.pack_tar_header(toc.BLOB_TOC, len(table))
    with open_bootstrap(made.boot) as image:
        for digest in (sha256(whole), sha256(meta + whole[len(meta) + len(digests) :])):
            blob = replace(image.blobs[0], meta_digest=digest.digest(), meta_size=len(whole))
            where = meta_module.meta_range(blob, "")
            assert where == (digest.hexdigest(), 0, len(whole), True, False)
            assert meta_module.read_meta(blob, where, whole)[0] == made.region
            for bad in (whole[:-1] + b"x", b"x" + whole[1:]):
                with pytest.raises(RafsError, match="SHA-256"):
                    meta_module.read_meta(blob, where, bad)
