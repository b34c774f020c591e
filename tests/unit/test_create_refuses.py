"""What `nydus-image create` refuses, in one line; the words are upstream's where callers look for them (nydusd 9.2).

And mistakes of upstream that are not ours: it goes on where it should not, or stops where it need not.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bootstrap import modes
from bootstrap.build import BuildOptions, build_layer
from bootstrap.cli import main
from bootstrap.errors import BuildError
from bootstrap.layout.common import Compressor
from bootstrap.modes import packed
from bootstrap.reader import open_bootstrap
from tests.lab.paths import REPO
from tests.unit.test_build_tar import member, pack

TAR = ["-t", "tar-rafs"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "f").write_bytes(b"f" * 5000)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "layer.tar").write_bytes(pack(member("f", b"f" * 5000)))
    (tmp_path / "text").write_bytes(b"no archive, no image\n" * 1000)
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 3000)[:-20])
    (tmp_path / "config").write_text("{}")
    done = _create("-B", "dict.boot", "-D", "blobs", "src")
    assert done.exit_code == 0, done.output
    return tmp_path


def _create(*arguments: str, stdin: str = "") -> Result:
    """In the folder of `place`."""
    return CliRunner().invoke(main, ["-l", "warn", "create", *arguments], input=stdin)


OUT = ("-B", "boot", "-D", "blobs")
CASES = [
    (2, "give --blob FILE or --blob-dir", ["src"]),
    (2, "give --bootstrap FILE", ["-b", "blob", "src"]),
    (1, "directory to store blobs does not exist", ["-B", "boot", "-D", "nowhere", "src"]),
    (1, "failed to access path", [*OUT, "nothing"]),
    (1, "specified path must be a regular/fifo/char_device file", [*OUT, *TAR, "src"]),
    (1, "specified path must be a directory", [*OUT, "layer.tar"]),
    (2, "'abc' is not a number", [*OUT, "--chunk-size", "abc", "src"]),
    (1, "invalid chunk size: 4097", [*OUT, "--chunk-size", "0x1001", "src"]),
    (1, "invalid chunk size: 2048", [*OUT, "--chunk-size", "2048", "src"]),
    (1, "invalid chunk size: 33554432", [*OUT, "--chunk-size", "0x2000000", "src"]),
    (1, "invalid batch size: 4097", [*OUT, "--batch-size", "0x1001", "src"]),
    (1, "batch size 0x200000 is bigger than chunk size 0x100000", [*OUT, "--batch-size", "0x200000", "src"]),
    (1, "`--batch-size` with non-zero value conflicts with `--fs-version 5`",
     [*OUT, "--batch-size", "4096", "-v", "5", "src"]),
    (1, "`--features blob-toc` can't be used with `--version 5`", [*OUT, "--features", "blob-toc", "-v", "5", "src"]),
    (1, "`--encrypt` conflicts with `--fs-version 5`", [*OUT, "--encrypt", "-v", "5", "src"]),
    (2, "--features", [*OUT, "--features", "foo", "src"]),
    (2, "--compressor", [*OUT, "--compressor", "gzip", "src"]),
    (2, "--digester", [*OUT, "--digester", "md5", "src"]),
    (2, "--fs-version", [*OUT, "-v", "7", "src"]),
    (2, "--type", [*OUT, "-t", "zip", "src"]),
    (2, "--whiteout-spec", [*OUT, "--whiteout-spec", "aufs", "src"]),
    (2, "--prefetch-policy", [*OUT, "--prefetch-policy", "all", "src"]),
    (2, "the argument '--bootstrap <bootstrap>' cannot be used with '--blob-inline-meta'",
     ["-B", "boot", "-b", "blob", "--blob-inline-meta", "src"]),
    (2, "argument '--blob-dir <blob-dir>' cannot be used with '--blob-cache-dir <blob-cache-dir>'",
     [*OUT, "--blob-cache-dir", "cache", "src"]),
    (2, "argument '--blob-cache-dir <blob-cache-dir>' cannot be used with '--blob <blob>'",
     ["-B", "boot", "--blob-cache-dir", "cache", "-b", "blob", "src"]),
    (2, "argument '--blob-cache-dir <blob-cache-dir>' cannot be used with '--compressor <compressor>'",
     ["-B", "boot", "--blob-cache-dir", "cache", "--compressor", "zstd", "src"]),
    (1, "conversion type `tar-tarfs` conflicts with `--blob-cache-dir`",
     ["-B", "boot", "--blob-cache-dir", "cache", "-t", "tar-tarfs", "layer.tar"]),
    (1, "conversion type 'targz-ref' conflicts with '--blob-id'",
     [*OUT, "-t", "targz-ref", "--blob-id", "x", "layer.tar"]),
    (1, "conversion type 'targz-ref' conflicts with '--encrypt'", [*OUT, "-t", "targz-ref", "--encrypt", "layer.tar"]),
    (1, "'--fs-version 5' conflicts with conversion type 'targz-ref', only V6 is supported",
     [*OUT, "-t", "targz-ref", "-v", "5", "layer.tar"]),
    (1, "conversion type 'targz-ref' conflicts with '--prefetch-policy blob'",
     [*OUT, "-t", "targz-ref", "--prefetch-policy", "blob", "layer.tar"]),
    (1, "unsupported ConversionType for batch chunk: targz-ref",
     [*OUT, "-t", "targz-ref", "--batch-size", "4096", "layer.tar"]),
    (1, "blob id is limited to length 255", [*OUT, "--blob-id", "a" * 256, "src"]),
    (1, "blob id length is bigger than 64 bytes", [*OUT, "--blob-id", "a" * 65, "src"]),
    (1, "cannot be the name of a file", [*OUT, "--blob-id", "a/b", "src"]),
    (1, "invalid chunk dict type redis", [*OUT, "--chunk-dict", "redis=x", "src"]),
    (1, "nothing", [*OUT, "--chunk-dict", "bootstrap=nothing", "src"]),
    (1, "chunk dictionary", [*OUT, "--chunk-dict", "bootstrap=text", "src"]),
    (1, "chunk size 0x100000 instead of 0x1000",
     [*OUT, "--chunk-dict", "bootstrap=dict.boot", "--chunk-size", "0x1000", "src"]),
    (1, "RAFS version 6 instead of 5", [*OUT, "--chunk-dict", "bootstrap=dict.boot", "-v", "5", "src"]),
    (1, "explicit owners", [*OUT, "--chunk-dict", "bootstrap=dict.boot", "--repeatable", "src"]),
    (1, "failed to parse configuration information", [*OUT, "-C", "config", "src"]),
    (1, "No such file", [*OUT, "-C", "nothing", "src"]),
    (1, "not a tar", [*OUT, *TAR, "text"]),
    (1, "not a tar: empty", [*OUT, *TAR, "empty.gz"]),
    (1, "ends too early", [*OUT, *TAR, "cut.gz"]),
    (1, "No such file", ["-B", "boot", "-b", "/nowhere/blob", "src"]),
    (1, "No such file", ["-B", "/nowhere/boot", "-D", "blobs", "src"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "text", "arguments"), CASES, ids=range(len(CASES)))
def test_one_clear_error(code: int, text: str, arguments: list[str], place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = _create(*arguments)
    assert done.exit_code == code and text in done.output, done.output
    assert "Traceback" not in done.output and done.output.splitlines()[-1].startswith("Error: ")
    assert code == 2 or done.output.count("\n") == 1
    assert sorted(place.rglob("*")) == before, "something half done was left"


def _tar_error(*members: tuple[tarfile.TarInfo, bytes], **options: object) -> str:
    with pytest.raises(BuildError) as caught:
        build_layer(io.BytesIO(pack(*members)), io.BytesIO(), BuildOptions(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_archives_that_make_no_sense() -> None:
    assert "'../x'" in _tar_error(member("../x", b"1")) and "'..'" in _tar_error(member("a/../../x"))
    assert "which is not in this layer" in _tar_error(member("l", type=tarfile.LNKTYPE, linkname="nothing"))
    assert "is a directory" in _tar_error(
        member("d", type=tarfile.DIRTYPE), member("l", type=tarfile.LNKTYPE, linkname="d")
    )
    assert "not a directory" in _tar_error(member("f", b"1"), member("f/x", b"2"))
    assert "too many symbolic links" in _tar_error(
        member("a", type=tarfile.SYMTYPE, linkname="b"), member("b", type=tarfile.SYMTYPE, linkname="a"), member("a/x")
    )
    assert "at most 65535" in _tar_error(_with_xattr(65536)) and "at most 65536" in _tar_error(
        _with_xattr(65537), fs_version=5
    )
    assert "255" in _tar_error(member("n" * 256, b"1"))
    assert "4095" in _tar_error(member("l", type=tarfile.SYMTYPE, linkname="t" * 4096))
    assert "not supported" in _tar_error(member("c", b"", type=tarfile.CONTTYPE))


def _with_xattr(size: int) -> tuple[tarfile.TarInfo, bytes]:
    info, data = member("f", b"1")
    info.pax_headers = {"SCHILY.xattr.user.a": "v" * size}
    return info, data


def _image(data: bytes, tmp_path: Path, **options: object) -> Path:
    path = tmp_path / "image.boot"
    path.write_bytes(build_layer(io.BytesIO(data), io.BytesIO(), BuildOptions(**options)).bootstrap)  # type: ignore[arg-type]
    return path


def test_what_upstream_gets_wrong_and_what_is_at_the_limit(tmp_path: Path) -> None:
    """Absolute paths, whiteouts of nothing, fifos of Python's tarfile, times outside the header's range, attributes of
    65,535 bytes, parents that are only implied."""
    far, old = (member(name, b"1", mtime=mtime) for name, mtime in (("far", 1 << 34), ("old", -86401)))
    data = pack(
        member("/abs/f", b"1"),
        member("z/f", b"2"),
        member("a/g", b"3"),
        member("abs/.wh.nothing"),
        member("pipe", type=tarfile.FIFOTYPE),
        far,
        old,
        _with_xattr(65535),
    )
    with open_bootstrap(_image(data, tmp_path)) as image:
        names = sorted(name for name, _ in image.walk())
        assert names == [
            b"a",
            b"a/g",
            b"abs",
            b"abs/.wh.nothing",
            b"abs/f",
            b"f",
            b"far",
            b"old",
            b"pipe",
            b"z",
            b"z/f",
        ]
        times = [image.attr(image.resolve(path)).mtime for path in (b"/far", b"/old")]
        assert times == [1 << 34, -86401]
        assert len(image.xattrs(image.resolve(b"/f"))[b"user.a"]) == 65535


def test_patterns_that_match_nothing_are_left_out(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patterns = "relative\n/../up\n\n/f\n/f/below\n/nothing\n"
    done = _create(*OUT, "--prefetch-policy", "fs", "-J", "report.json", "src", stdin=patterns)
    assert done.exit_code == 0 and [word in done.output for word in ("relative", "/../up", "/f/below")] == [True] * 3
    with open_bootstrap(place / "boot") as image:
        assert image.prefetch_inodes() == [image.resolve(b"/f")]
    document = json.loads(Path("report.json").read_text())
    assert document["bootstrap"] == "boot" and document["fs_version"] == "6"
    assert set(document) >= {"version", "blobs", "external_bootstrap", "external_blobs", "trace", "compressor"}


def test_limits_are_said_before_bytes_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [member(str(number), bytes([number]) * 100) for number in range(5)]
    monkeypatch.setattr(modes, "MAX_INDEX", 3)
    for options in ({}, {"batch_size": 0x1000}):
        assert "more than 3 chunks in one layer" in _tar_error(*files, **options)
    monkeypatch.undo()
    limit = packed.MAX_STORED_SIZE
    assert str(limit) in _tar_error(member("f", b"x" * 5000), blob_offset=limit - 4999, compressor=Compressor.NONE)
    raw = member("f", bytes(range(256)) * (16 << 12))
    assert "0x800000 or less" in _tar_error(raw, chunk_size=1 << 24, batch_size=0x1000, compressor=Compressor.NONE)


def test_a_dictionary_of_another_digest_is_said_to_be_of_no_use(place: Path) -> None:
    """Upstream takes it without a word; nothing of it can match."""
    done = _create(*OUT, "--chunk-dict", "bootstrap=dict.boot", "--digester", "sha256", "src")
    assert done.exit_code == 0
    with open_bootstrap(place / "boot") as image, open_bootstrap(place / "dict.boot") as other:
        assert len(image.blobs) == 1 and image.digester != other.digester
    assert "sha256" in done.output and "no chunk" in done.output


def test_data_to_a_file_and_metadata_to_the_folder(place: Path) -> None:
    """--blob and --blob-dir together: the one takes the data, the other the metadata, named by its digest."""
    before = set((place / "blobs").iterdir())
    done = _create("-D", "blobs", "-b", "blob", "src")
    assert done.exit_code == 0, done.output
    (boot,) = {path for path in (place / "blobs").iterdir() if path.suffix != ".external"} - before
    assert hashlib.sha256(boot.read_bytes()).hexdigest() == boot.name
    with open_bootstrap(boot) as image:
        assert image.blobs[0].id == hashlib.sha256((place / "blob").read_bytes()).hexdigest()


def test_place_time_and_hash_seed_change_no_byte(place: Path) -> None:
    """What differs between two machines: where the tree lies, the zone of the clock, the order of sets."""
    for number in range(40):
        (place / "src" / f"{number * 7919 % 97}").write_bytes(bytes([number]) * 3000)
        os.setxattr(place / "src" / f"{number * 7919 % 97}", "user.a", b"1")
        os.setxattr(place / "src" / f"{number * 7919 % 97}", "user.b", b"2")
    subprocess.run(["cp", "-a", "src", "elsewhere"], check=True, timeout=30)
    built = []
    for source, seed, zone in (("src", "1", "UTC"), ("elsewhere", "2", "Asia/Tokyo")):
        out = place / f"out-{seed}"
        out.mkdir()
        command = [
            sys.executable,
            "-c",
            "from bootstrap.cli import main; main()",
            "-l",
            "warn",
            "create",
            "-D",
            str(out),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "PYTHONPATH": str(REPO)}
        subprocess.run([*command, "-D", str(out), source], check=True, timeout=60, env=environment)
        built.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert built[0] == built[1] and len(built[0]) >= 2
