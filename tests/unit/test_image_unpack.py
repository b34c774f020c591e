"""nydus-image unpack: every form of image becomes the tar its manifest describes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bootstrap import tarwrite
from bootstrap.blobsource import open_blobs
from bootstrap.build import build_layer
from bootstrap.cli import main
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.tarwrite import Member, pack_member
from bootstrap.unpack import unpack
from tests.lab.faulty import faulty_server
from tests.lab.manifest import compare, load_manifest
from tests.lab.paths import ref_bin, reference_cases, shared_dir
from tests.lab.tarmodel import comparable, tar_entries
from tests.lab.tiny import TinyImage, noise, tiny_image

REFERENCE = (shared_dir() or Path("/nonexistent")) / "fixtures" / "reference"


def ours(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def unpacked(path: Path, folder: Path, threads: int) -> bytes:
    out = io.BytesIO()
    with open_bootstrap(path) as image, open_blobs(image, folder) as blobs:
        unpack(blobs, out, threads=threads)
    return out.getvalue()


@pytest.mark.interop
@pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here")
@pytest.mark.parametrize("case", reference_cases())
def test_every_form_becomes_the_tar_its_manifest_describes(case: str, tmp_path: Path) -> None:
    folder = REFERENCE / case
    boot = folder / "image.boot"
    data = ["-D", folder] if boot.exists() else ["--blob", folder / "layer"]
    if not boot.exists():
        boot = folder / "layer"
    done = ours("unpack", *data, "--output", tmp_path / "out.tar", boot)
    assert done.exit_code == 0, done.output
    manifest = load_manifest(folder)
    rules = manifest.get("ignore", [])
    assert compare(tar_entries(tmp_path / "out.tar"), comparable(manifest), rules) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]


def layer(folder: Path, name: str, tar: io.BytesIO, **options: int) -> Path:
    path = folder / name
    tar.seek(0)
    with open(path, "wb") as out:
        build_layer(tar, out, BuildOptions(inline_meta=True, blob_toc=True, chunk_size=0x2000, **options))
    return path


def test_a_layer_blob_gives_its_tar_and_the_tar_the_same_layer(tmp_path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in (("implied/by/file", noise(20_000)), ("b", b"x" * 70_000), ("a", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.LNKTYPE, "b"
        archive.addfile(link)
    first = layer(tmp_path, "first", tar)
    assert ours("unpack", "--blob", first, "--output", tmp_path / "1.tar", first).exit_code == 0
    names = [entry["path"] for entry in tar_entries(tmp_path / "1.tar")]
    assert names == ["/a", "/b", "/implied/by/file", "/link"]  # no made-up directories that would cover a lower layer's
    again = layer(tmp_path, "again", io.BytesIO((tmp_path / "1.tar").read_bytes()))
    assert unpacked(again, tmp_path, 1) == unpacked(first, tmp_path, 4) == (tmp_path / "1.tar").read_bytes()
    merge_layers([MergeSource(first)], tmp_path / "image.boot")
    (tmp_path / "2.tar").write_bytes(unpacked(tmp_path / "image.boot", tmp_path, 2))
    assert "/implied/by" in [entry["path"] for entry in tar_entries(tmp_path / "2.tar")]


def test_what_ustar_cannot_hold() -> None:
    long = b"\xff\xfe" + b"d" * 90 + b"/" + b"\xe9" * 200
    member = Member(
        long, tarwrite.FILE, 0o104755, 3_000_000_000, 2_097_152, 1 << 33, -5, 250_000_000,
        xattrs={b"user.b": b"\x00\xff\n=", b"security.a": b""},
    )  # fmt: skip
    raw = pack_member(member)
    assert len(raw) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(raw), encoding="utf-8", errors="surrogateescape") as archive:
        read = archive.next()
    assert read is not None
    assert os.fsencode(read.name) == long and read.mode == 0o4755
    assert (read.uid, read.gid, read.size) == (3_000_000_000, 2_097_152, 1 << 33)
    assert read.pax_headers["mtime"] == "-4.75"
    assert os.fsencode(read.pax_headers["SCHILY.xattr.user.b"]) == b"\x00\xff\n="
    # A record's length counts its own digits, also where they become more.
    for size in (93, 94, 95, 992, 993):
        record = tarwrite._record(b"path", b"x" * (size - 8))
        assert int(record.split(b" ")[0]) == len(record)


@pytest.fixture
def image(tmp_path: Path) -> TinyImage:
    found = tiny_image(tmp_path, {"f": noise(50_000), "g": noise(200_000, 2)}, BuildOptions(chunk_size=0x4000))
    (tmp_path / found.blob_id).write_bytes(found.blob)
    return found


def test_wrong_bytes_and_missing_data_leave_no_tar(image: TinyImage, tmp_path: Path) -> None:
    target = tmp_path / "out.tar"
    blob = tmp_path / image.blob_id
    bad = bytearray(image.blob)
    bad[70_000] ^= 1
    blob.write_bytes(bad)
    for arguments, text in (
        (["-D", tmp_path], "digest is wrong"),
        (["--blob", tmp_path / "nowhere"], "cannot read blob"),
        (["-D", tmp_path / "nowhere"], "is not a directory"),
        ([], "invalid backend configuration, --blob, --blob-dir or --backend-type must be specified"),
        (["--backend-type", "registry"], "--backend-config or --backend-config-file must be specified"),
        (["--backend-type", "tape", "--backend-config", "{}"], "tape"),
        (["--backend-type", "localfs", "--backend-config", "{"], "is not valid JSON"),
        (["--backend-type", "localfs", "--backend-config-file", tmp_path / "nowhere"], "fail to read backend config"),
    ):
        done = ours("unpack", *arguments, "--output", target, image.bootstrap)
        assert done.exit_code == 1 and text in done.output, done.output
        assert len(done.output.splitlines()) == 1
        assert {path.name for path in tmp_path.iterdir()} == {image.bootstrap.name, image.blob_id}
    blob.write_bytes(image.blob)
    done = ours("unpack", "-D", tmp_path, "--output", "/dev/full", image.bootstrap)
    assert done.exit_code == 1 and "/dev/full: No space left on device" in done.output
    done = ours("unpack", "-D", tmp_path, "--output", tmp_path / "no" / "tar", image.bootstrap)
    assert done.exit_code == 1 and f"{tmp_path}/no/tar: No such file or directory" in done.output
    assert "invalid empty --output option" in ours("unpack", "-D", tmp_path, "--output", "", image.bootstrap).output
    assert "missing parameter `bootstrap`" in ours("unpack", "-D", tmp_path, "--output", target).output


def test_a_backend_is_read_through_nydusfs(image: TinyImage, tmp_path: Path) -> None:
    expected = unpacked(image.bootstrap, tmp_path, 1)
    (tmp_path / "config").write_text(json.dumps({"dir": str(tmp_path)}))
    for number, given in enumerate((["--backend-config", (tmp_path / "config").read_text()],
                                    ["--backend-config-file", tmp_path / "config"])):  # fmt: skip
        target = tmp_path / f"{number}.tar"
        done = ours("unpack", "--backend-type", "localfs", *given, "--output", target, image.bootstrap)
        assert done.exit_code == 0, done.output
        assert target.read_bytes() == expected
    with faulty_server({image.blob_id: image.blob}) as server:
        config = json.dumps({"host": server.netloc, "repo": "lab/x", "scheme": "http"})
        target = tmp_path / "registry.tar"
        given = ["--backend-type", "registry", "--backend-config", config]
        done = ours("unpack", *given, "--output", target, image.bootstrap)
        assert done.exit_code == 0, done.output
        assert target.read_bytes() == expected
        assert len(server.data_requests) == 1  # of 17 chunks
        server.blobs = {}
        done = ours("unpack", *given, "--output", tmp_path / "none.tar", image.bootstrap)
        assert done.exit_code == 1 and server.netloc in done.output and not (tmp_path / "none.tar").exists()


def test_pipes(image: TinyImage, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    assert ours("unpack", "-D", tmp_path, "--output", fifo, image.bootstrap).exit_code == 0
    reader.join(20)
    assert got == [unpacked(image.bootstrap, tmp_path, 1)]
    # A reader that goes away ends it at once, with one line.
    program = [sys.executable, "-c", "from bootstrap.cli import main; main(prog_name='nydus-image')"]
    writer = subprocess.Popen(
        [*program, "unpack", "-D", tmp_path, "--output", "/dev/stdout", image.bootstrap],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert writer.stdout is not None and writer.stderr is not None
    assert writer.stdout.read(512)[257:262] == b"ustar"
    writer.stdout.close()
    text = writer.stderr.read().decode()
    assert writer.wait(20) == 1 and len(text.splitlines()) == 1 and "went away" in text
    writer.stderr.close()


@pytest.mark.interop
@pytest.mark.skipif(
    shared_dir() is None or ref_bin("nydus-image") is None,
    reason="interop: reference fixtures or the reference nydus-image are not here",
)
@pytest.mark.parametrize("case", ["v5-merged3", "v6-merged3", "v6-tar-ref", "v6-tar-tarfs"])
def test_the_tar_is_upstreams(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"  # upstream leaves files of its own in a directory it is given
    shutil.copytree(REFERENCE / case, folder)
    boot = folder / "image.boot"
    for name, program in (("theirs", [ref_bin("nydus-image")]), ("ours", None)):
        arguments = ["unpack", "-D", folder, "--output", tmp_path / name, boot]
        if program is None:
            assert ours(*arguments).exit_code == 0
        else:
            subprocess.run([str(word) for word in program + arguments], check=True, capture_output=True, timeout=60)
    # Theirs has the names of this machine's users and groups, and with them other checksums.
    blank = {"uname": "", "gname": ""}
    found = []
    for name in ("theirs", "ours"):
        with tarfile.open(tmp_path / name, encoding="utf-8", errors="surrogateescape") as archive:
            infos = [{**member.get_info(), **blank, "chksum": 0} for member in archive]
        for info in infos:
            if info["type"] == tarfile.LNKTYPE:  # theirs are absolute, which careful programs refuse to follow
                info["linkname"] = info["linkname"].lstrip("/")
        found.append(infos)
    assert found[0] == found[1]
    theirs, mine = ((tmp_path / name).read_bytes() for name in ("theirs", "ours"))
    assert len(theirs) == len(mine)
    # Their builder takes it back.
    subprocess.run(
        [str(ref_bin("nydus-image")), "create", "-t", "tar-rafs", "-D", str(tmp_path), "-B", str(tmp_path / "again"),
         "--whiteout-spec", "none", str(tmp_path / "ours")],
        check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    with open_bootstrap(tmp_path / "again") as again, open_bootstrap(boot) as image:
        assert [path for path, _ in again.walk()] == [path for path, _ in image.walk()]
