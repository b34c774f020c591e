"""External files: split off by an attributes file, joined again by a merge, the bytes upstream writes."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from crc32c import crc32c

from bootstrap.build import BuildOptions, build_directory
from bootstrap.cli.create import create
from bootstrap.errors import BuildError
from bootstrap.external import ExternalFile, parse_attributes
from bootstrap.layout.common import BlobFeatures
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.reader import open_bootstrap
from tests.lab.paths import ref_bin

A, B = "a" * 64, "b" * 64
BIG = bytes(range(256)) * 400  # 102,400 bytes: four chunks of 32 KiB
COMMON = f"type=external blob_index=0 blob_id={A} chunk_size=32KiB compressed_size=1000000"
BIG_LINE = f"/big {COMMON} chunk_0_compressed_offset=4096 crcs=0x11,0x22,0x33,0x44\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    top = tmp_path / "src"
    (top / "d" / "e").mkdir(parents=True)
    (top / "big").write_bytes(BIG)
    (top / "d" / "kept").write_bytes(b"k" * 5000)
    (top / "d" / "e" / "empty").write_bytes(b"")
    (top / "link").symlink_to("big")
    return top


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(create, ["-l", "warn", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_two_images_make_one(source: Path, tmp_path: Path) -> None:
    placeholder = f"d/e/empty {COMMON} chunk_0_compressed_offset=200001 file_size=70000 crcs=5,6,7"
    other = f'"/d/ke\\160t" type=external blob_index=4 blob_id={B} chunk_size=32768 chunk_0_compressed_offset=0 '
    attributes = f"# comment\n\n/d/e text\n/big {COMMON} chunk_0_compressed_offset=4096\n{placeholder}\n"
    attributes += other + "compressed_size=5000\n"
    blob = io.BytesIO()
    result = build_directory(source, blob, BuildOptions(chunk_size=0x8000), external=parse_attributes(attributes))
    assert result.external_blobs == [A, B] and result.external_bootstrap is not None
    main, external = tmp_path / "main.boot", tmp_path / "main.external"
    main.write_bytes(result.bootstrap)
    external.write_bytes(result.external_bootstrap)
    with open_bootstrap(str(main)) as image:
        assert [name for name, _ in image.walk()] == [b"link"] and not image.blobs
    with open_bootstrap(str(external)) as image:
        assert sorted(name for name, _ in image.walk()) == [b"big", b"d", b"d/e", b"d/e/empty", b"d/kept"]
        assert all(blob.features & BlobFeatures.EXTERNAL for blob in image.blobs)
        crcs = sorted(record[9] for record in image.chunk_records())
        own = [crc32c(BIG[at : at + 0x8000]) for at in range(0, len(BIG), 0x8000)]
        assert crcs == sorted([*own, 5, 6, 7, crc32c(b"k" * 5000)])
        (extent,) = image.extents(image.resolve(b"/d/e/empty"), 0x10000, 100)
        assert (extent.blob_index, extent.blob_offset, extent.size) == (0, 200001 + 0x10000, 100)
    result = build_directory(source, blob, BuildOptions(chunk_size=0x8000), external=parse_attributes(BIG_LINE))
    assert result.external_bootstrap is not None
    external.write_bytes(result.external_bootstrap)
    main.write_bytes(result.bootstrap)
    ids = [result.blob_id, A]
    sources = [MergeSource(path, original_blob_id=name) for path, name in zip((main, external), ids, strict=True)]
    assert sorted(merge_layers(sources, tmp_path / "merged").blobs) == sorted(ids)
    with open_bootstrap(str(tmp_path / "merged")) as image:
        assert sorted(name for name, _ in image.walk()) == [
            b"big", b"d", b"d/e", b"d/e/empty", b"d/kept", b"link",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (BIG_LINE.replace("blob_index=0", ""), "line 1: blob_index is missing"),
        (BIG_LINE.replace("32KiB", "0x8000"), "chunk_size=0x8000 is not a power of two"),
        (BIG_LINE.replace("32KiB", "33KiB"), "chunk_size=33KiB is not a power of two"),
        (BIG_LINE.replace("=4096", "=-1"), "chunk_0_compressed_offset=-1 is not a number"),
        (BIG_LINE.replace(A, ""), "blob_id='' is no text of 1 to 64 bytes"),
        (BIG_LINE.replace(A, "\udcff"), "is no text"),
        (BIG_LINE.replace(",0x44", ",x"), "are not numbers separated by commas"),
        (BIG_LINE.replace("0x44", "0x144444444"), "do not fit 32 bits"),
        ('"/big' + BIG_LINE[4:], "quotation does not end"),
        (BIG_LINE.replace(",0x44", ""), "invalid crc index 3 for file /big: it has 4 chunks"),
        (BIG_LINE.replace("=1000000", "=1000"), "do not lie in a blob of 1000"),
        (BIG_LINE + "file_size=7", "/big has 102400 bytes, the attributes give it 7"),
        (BIG_LINE.replace("/big", "/none"), "'/none' is not in the source"),
        (BIG_LINE.replace("/big", "/d"), "'/d' is no regular file"),
        (
            f"/d/e/empty {COMMON} chunk_0_compressed_offset=0 file_size=9",
            "only a placeholder: its attributes need crcs",
        ),
        (BIG_LINE + f"/d/kept {COMMON.replace(A, B)} chunk_0_compressed_offset=0", "external blob 0 is aaa"),
        (BIG_LINE + f"/d/kept {COMMON.replace('index=0', 'index=1')} chunk_0_compressed_offset=0", "the same blob_id"),
        (BIG_LINE + f"/d/kept {COMMON.replace('32K', '64K')} chunk_0_compressed_offset=0", "has one chunk size"),
    ],
)
def test_wrong_attributes_are_named(source: Path, line: str, message: str) -> None:
    line = line.replace("\nfile_size", " file_size")
    with pytest.raises(BuildError, match=message):
        build_directory(source, io.BytesIO(), BuildOptions(chunk_size=0x8000), external=parse_attributes(line))


def test_the_command(source: Path, tmp_path: Path) -> None:
    attributes = tmp_path / "attributes"
    attributes.write_text(BIG_LINE)
    common = ("--chunk-size", "0x8000", "--attributes", attributes)
    assert run(*common, "-B", tmp_path / "image.boot", "-D", tmp_path, source) == (0, "")
    assert (tmp_path / "image.external").stat().st_size == 20480
    blob, external = tmp_path / "blob", tmp_path / "blob.external"
    inline = (*common, "-b", blob, "--blob-inline-meta")
    assert run(*inline, "--external-blob", external, source) == (0, "")
    assert external.read_bytes()[:20480] == (tmp_path / "image.external").read_bytes()
    for arguments, code, message in (
        (inline, 2, "give --external-blob FILE"),
        ((*common, "-t", "tar-rafs", "-B", blob, "-D", tmp_path), 1, "only directories have those"),
        (("--attributes", tmp_path / "none", "-B", blob, "-D", tmp_path), 1, "none: No such file"),
    ):
        found, text = run(*arguments, source)
        assert (found, message in text, text.count("\n")) == (code, True, 1), text


def test_one_file_as_parsed() -> None:
    assert parse_attributes(BIG_LINE)[b"/big"] == ExternalFile(
        0, A, 0x8000, 4096, 1000000, None, (0x11, 0x22, 0x33, 0x44)
    )


@pytest.mark.interop
@pytest.mark.skipif(ref_bin("nydus-image") is None, reason="interop: the reference nydus-image is not here")
@pytest.mark.parametrize("version", ["5", "6"])
def test_equal_to_upstream(source: Path, tmp_path: Path, version: str) -> None:
    attributes = tmp_path / "attributes"
    attributes.write_text(BIG_LINE + f"/d/e/empty {COMMON} chunk_0_compressed_offset=204800 file_size=9 crcs=0x5")
    (source / "d" / "kept").unlink()  # upstream would lose it
    common = ["-v", version, "--compressor", "none", "--chunk-size", "0x8000", "--attributes", str(attributes)]
    ours, theirs = tmp_path / "ours.boot", tmp_path / "theirs.boot"
    assert run(*common, "-B", ours, "-D", tmp_path, source) == (0, "")
    command = [str(ref_bin("nydus-image")), "create", "-l", "warn", *common, "-B", str(theirs), "-D", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=60)
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.with_suffix(".external").read_bytes() == theirs.with_suffix(".external").read_bytes()
