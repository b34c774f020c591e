"""`nydusctl cache` on caches that a real nydusd wrote, beside it and without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nydusfs.cachetools.images import open_image
from snapshotter.cachectl.ctl import command
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.process import drop_caches, remove_tree, wait_until, work_dir
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]

MIB = 1 << 20
FILES = {f"{name}{size}": noise(size, seed) for seed, name in enumerate("abc") for size in (2 * MIB, 30_000)}
CTL = [sys.executable, "-m", "snapshotter.nydusctl", "cache"]
OLD = time.time() - 7200


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return tiny_image(tmp_path_factory.mktemp("image"), FILES)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for a snapshotter's root, whose path may have 70 characters."""
    folder = work_dir()
    yield folder
    remove_tree(folder)


@pytest.fixture
def server(image: TinyImage) -> Iterator[FaultyServer]:
    with faulty_server({image.blob_id: image.blob}) as server:
        yield server


def ctl(*words: object, status: int = 0) -> dict[str, Any]:
    """The object that a command prints with --json. In this process: starting a program takes longer than its work."""
    done = CliRunner().invoke(command, [*map(str, words), "--json"])
    assert done.exit_code == status, (done.exit_code, done.stdout, done.stderr, done.exception)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def mount(daemon: Nydusd, image: TinyImage, netloc: str, work: Path, at: str = "/i", **cache: Any) -> None:
    # no request is sent again: they are counted
    backend = {"scheme": "http", "host": netloc, "repo": "a/b", "timeout": 30, "connect_timeout": 30}
    device = {
        "backend": {"type": "registry", "config": backend},
        "cache": {"type": "blobcache", "config": {"work_dir": str(work), **cache}},
    }
    document = {"device": device, "mode": "direct", "fs_prefetch": {"enable": False, "learn": False}}
    answer = daemon.mount(at, image.bootstrap, json.dumps(document))
    assert answer.status == 204, (answer, daemon.log_text())


def wrong(daemon: Nydusd, image: TinyImage, at: str = "i") -> list[str]:
    """Files whose bytes are not the image's."""
    return [name for name, data in image.files.items() if (daemon.mnt / at / name).read_bytes() != data]


def durable(work: Path, image: TinyImage) -> list[Path]:
    """All segments of an image that was read, once every one of them has its plain name."""
    folder = work / image.blob_id
    with open_image(image.bootstrap, []) as known:
        names = {segment.name for blob in known.bootstrap.blobs for segment in known.segments(blob)}
    wait_until(lambda: set(os.listdir(folder)) >= names, 60, "the cache on the disk")
    wait_until(lambda: all("." not in name for name in os.listdir(folder)), 60, "the rest of it")
    return sorted(folder.iterdir(), key=lambda path: int(path.name.partition("-")[0]))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
        os.fsync(file.fileno())


def test_a_flipped_byte_is_found_beside_a_nydusd_that_has_it_open(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    work = tmp_path / "cache"
    with Nydusd() as daemon:
        mount(daemon, image, server.netloc, work)
        assert wrong(daemon, image) == []
        damaged = durable(work, image)[2]
    with Nydusd() as daemon:  # one that reads from the disk what it has not fetched itself
        mount(daemon, image, server.netloc, work)
        assert wrong(daemon, image) == []
        assert ctl("verify", "--cache-dir", work)["damaged"] == []
        drop_caches()
        flip(damaged)
        assert len(wrong(daemon, image)) == 1, "the kernel has the wrong byte in its pages now, nydusd the file open"

        kept = ctl("verify", "--cache-dir", work, "--keep", status=1)
        (found,) = kept["damaged"]
        assert (found["file"], found["blob"], found["deleted"]) == (str(damaged), image.blob_id, False)
        assert "digest is wrong" in found["what"]
        assert damaged.exists()

        (found,) = ctl("verify", "--cache-dir", work, status=1)["damaged"]
        assert found["deleted"]
        before = len(server.data_requests)
        assert wrong(daemon, image) == [], "fetched again, and no page of the wrong bytes is left"
        assert len(server.data_requests) == before + 1
        durable(work, image)
        assert ctl("verify", "--cache-dir", work)["damaged"] == []
        assert "1 damaged segments of blob" in daemon.log_text()


def test_verify_without_a_nydusd(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    work = tmp_path / "cache"
    with Nydusd() as daemon:
        mount(daemon, image, server.netloc, work)
        assert wrong(daemon, image) == []
        segments = durable(work, image)
    flip(segments[0])
    segments[1].write_bytes(segments[1].read_bytes()[:-1])
    unsure = ctl("verify", "--cache-dir", work)
    (one,) = unsure["unsure"]
    assert (one["blob"], one["segments"], one["why"]) == (image.blob_id, len(segments), "no bootstrap here names it")
    assert unsure["segments"] == 0
    ctl("verify", "--cache-dir", work, "--strict", status=1)
    found = ctl("verify", "--cache-dir", work, "-B", image.bootstrap, status=1)
    assert {one["file"] for one in found["damaged"]} == {str(path) for path in segments[:2]}
    assert found["segments"] == len(segments)
    assert not any(path.exists() for path in segments[:2])
    assert ctl("verify", "--cache-dir", work, "-B", image.bootstrap)["segments"] == len(segments) - 2
    for words, said in (
        (("verify", "ffff"), "nothing of a blob ffff"),
        (("gc",), "which images use it is not known"),
        (("verify", "--bootstrap", tmp_path / "none.boot"), "no such file"),
    ):
        told = CliRunner().invoke(command, [*map(str, words), "--cache-dir", str(work)])
        assert (told.exit_code, said in told.stderr) == (1, True), (words, told.stderr)
    told = CliRunner().invoke(command, ["verify", "--cache-dir", str(tmp_path / "none")])
    assert (told.exit_code, "no such directory" in told.stderr) == (1, True)
    with Nydusd() as daemon:
        mount(daemon, image, server.netloc, work)
        assert wrong(daemon, image) == []


def node(folder: Path, *images: TinyImage) -> Path:
    """The root of a snapshotter that does not run."""
    (folder / "snapshots").mkdir()
    for number, image in enumerate(images, 1):
        place = folder / "snapshots" / str(number) / "fs" / "image"
        place.mkdir(parents=True)
        (place / "image.boot").write_bytes(image.bootstrap.read_bytes())
    return folder


def age(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            os.utime(path, (OLD, OLD))


def test_gc_beside_a_reader(image: TinyImage, tmp_path: Path, short: Path) -> None:
    """What no image uses goes, whole blobs and parts; who reads notices nothing; what is not known stays."""
    other = tiny_image(tmp_path, {"o": noise(MIB, 50)})
    root = node(short, image, other)
    work = root / "cache"
    with faulty_server({image.blob_id: image.blob, other.blob_id: other.blob}) as server, Nydusd() as daemon:
        mounted = replace(image, bootstrap=tmp_path / "mounted.boot")
        mounted.bootstrap.write_bytes(image.bootstrap.read_bytes())
        mount(daemon, mounted, server.netloc, work)
        mount(daemon, other, server.netloc, work, "/o")
        assert wrong(daemon, image) == wrong(daemon, other, "o") == []
        durable(work, image)
        durable(work, other)
        where = ("--root", root)
        age(work)
        assert ctl("gc", *where)["freed"] == 0

        listed = ctl("ls", *where)
        assert {one["blob"] for one in listed["blobs"]} == {image.blob_id, other.blob_id}
        (mine,) = [one for one in listed["blobs"] if one["blob"] == image.blob_id]
        assert mine["mounted"]
        assert mine["cached"] == sum(map(len, FILES.values())), "without gaps between chunks"
        assert mine["cached"] <= mine["size"] < mine["cached"] + 4096 * 20
        assert mine["last_use"] > time.time() - 100, "as nydusd says: the files are old"

        daemon.umount("/o")
        (root / "snapshots" / "2" / "fs" / "image" / "image.boot").unlink()
        part = work / image.blob_id / f"3-{'ab' * 12}"  # of an image that is gone and had other chunks of this blob
        part.write_bytes(noise(1000))
        (work / image.blob_id / "9-00.part").write_bytes(b"x")
        (work / image.blob_id / f"7-{'cd' * 12}.part").write_bytes(b"left by a killed writer")
        (work / "notes.txt").write_text("an operator's")
        (work / f"{'d' * 64}.blob.data").write_bytes(bytes(5000))
        age(work)
        (work / f"{'e' * 64}").mkdir()  # of a pull that is under way
        before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        planned = ctl("gc", *where, "--dry-run")
        assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
        asked = len(server.data_requests)
        drop_caches()
        reader = subprocess.Popen(["cat", *[daemon.mnt / "i" / name for name in FILES]], stdout=subprocess.DEVNULL)
        done = ctl("gc", *where)
        assert reader.wait(60) == 0
        assert {**planned, "dry_run": False} == done
        assert {one["blob"] for one in done["blobs"]} == {other.blob_id, "d" * 64}
        assert [one["segments"] for one in done["segments"]] == [[part.name]]
        assert done["unknown"] == [str(work / image.blob_id / "9-00.part"), str(work / "notes.txt")]
        assert done["freed"] >= MIB
        gone = [other.blob_id, f"{'d' * 64}.blob.data", f"{image.blob_id}/{part.name}"]
        assert not any((work / name).exists() for name in gone)
        assert not list((work / image.blob_id).glob("7-*.part"))
        assert (work / ("e" * 64)).exists()
        assert (work / "notes.txt").exists()
        drop_caches()
        assert wrong(daemon, image) == []
        assert len(server.data_requests) == asked

        (root / "snapshots" / "1" / "fs" / "image" / "image.boot").unlink()
        assert ctl("gc", *where)["freed"] == 0, "it is mounted, though of no snapshot"
        (tmp_path / "damaged").write_bytes(image.bootstrap.read_bytes()[:2000])
        os.replace(tmp_path / "damaged", mounted.bootstrap)
        refused = ctl("gc", *where, status=1)
        assert (str(mounted.bootstrap) in refused["problems"][0], refused["freed"]) == (True, 0)


def nothing_there() -> str:
    """An address where nobody answers."""
    return "127.0.0.1:1"


@pytest.mark.parametrize(("form", "running"), [("cache", False), ("cache", True), ("blobs", True), ("layout", False)])
def test_what_was_imported_needs_no_registry(
    form: str, running: bool, image: TinyImage, server: FaultyServer, tmp_path: Path, short: Path
) -> None:
    source, work = tmp_path / "source", tmp_path / "cache"
    if form == "cache":
        with Nydusd() as daemon:
            mount(daemon, image, server.netloc, source)
            assert wrong(daemon, image) == []
            durable(source, image)
    else:
        folder = source / "blobs" / "sha256" if form == "layout" else source
        folder.mkdir(parents=True)
        name = image.blob_id if form == "layout" else f"sha256:{image.blob_id}"
        (folder / name).write_bytes(image.blob)
    assert ctl("import", source, "--cache-dir", work, status=1)["unclaimed"] == [image.blob_id]
    with Nydusd() as daemon:
        if running:
            mount(daemon, image, nothing_there(), work)
        found = ctl("import", source, "--cache-dir", work, "-B", image.bootstrap)
        (blob,) = found["blobs"]
        assert (blob["absent"], blob["damaged"], blob["problem"]) == (0, [], "")
        again = ctl("import", source, "--cache-dir", work, "-B", image.bootstrap)
        assert (again["blobs"][0]["taken"], again["blobs"][0]["there"]) == (0, blob["taken"])
        if not running:
            mount(daemon, image, nothing_there(), work)
        assert wrong(daemon, image) == []
    # The next clean-up knows what it is for, although no snapshot names it.
    root = node(short)
    age(work)
    ours = ("--root", root, "--cache-dir", work)
    kept = ctl("gc", *ours)
    assert kept["blobs"] == kept["segments"] == [], kept
    assert ctl("verify", *ours)["segments"] == blob["taken"]
    assert ctl("gc", *ours, "--imported")["blobs"][0]["blob"] == image.blob_id


def test_an_import_leaves_out_what_is_damaged_and_ends_at_the_limit(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    source, work = tmp_path / "source", tmp_path / "cache"
    with Nydusd() as daemon:
        mount(daemon, image, server.netloc, source)
        assert wrong(daemon, image) == []
        segments = durable(source, image)
    flip(segments[1])
    with Nydusd() as daemon:
        limit = 3 * MIB
        mount(daemon, image, server.netloc, work, limit=limit)
        found = ctl("import", source, "--cache-dir", work, status=1)
        assert "limit is reached" in found["problems"][0]
        (blob,) = found["blobs"]
        assert str(segments[1]) in blob["damaged"][0]
        size = sum(path.stat().st_blocks * 512 for path in (work / image.blob_id).iterdir())
        assert limit - 2 * MIB < size <= limit, "the next segment has up to 1.25 MiB"
        listed = ctl("ls", "--cache-dir", work)
        assert (listed["limit"], listed["blobs"][0]["segments"]) == (limit, blob["taken"])
        assert wrong(daemon, image) == []


@pytest.mark.parametrize("running", [False, True])
def test_an_import_killed_at_any_moment_leaves_no_wrong_byte(
    running: bool, image: TinyImage, server: FaultyServer, tmp_path: Path, short: Path
) -> None:
    source, work = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    (source / image.blob_id).write_bytes(image.blob)
    words = [*CTL, "import", str(source), "--cache-dir", str(work), "-B", str(image.bootstrap), "--threads", "1"]
    with Nydusd() as daemon:
        if running:
            mount(daemon, image, server.netloc, work)
        counts = []
        for fraction in (0.0, 0.1, 0.3):
            child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            staged = work / ".staged"
            wait_until(lambda: staged.exists() or child.poll() is not None, 60, "the import")  # noqa: B023
            time.sleep(fraction)
            child.send_signal(signal.SIGKILL)
            child.wait(10)
            found = ctl("verify", "--cache-dir", work, "-B", image.bootstrap)
            assert found["damaged"] == []
            counts.append(found["segments"])
        assert counts == sorted(counts)
        if not running:
            mount(daemon, image, server.netloc, work)
        assert wrong(daemon, image) == []
    age(work)
    root = node(short, image)
    ctl("gc", "--root", root, "--cache-dir", work)
    assert not staged.exists() or not os.listdir(staged)
