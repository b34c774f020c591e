"""Power cuts at any moment of a daemon's run: never a wrong byte after it, at worst a segment that is fetched again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nydusfs.registry.reference import Reference
from snapshotter.labels import LAYER_DIGEST, TWIN
from snapshotter.lazy.estargz import TABLE, Table
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.lazy.tarfs import BOOT, Tarfs
from snapshotter.store import Kind, Snapshot
from tests.lab.daemon import can_mount_fuse
from tests.lab.erofs import cannot_mount_erofs
from tests.lab.powercut import DISK_SIZE, FileStates, mount_as_at_boot
from tests.lab.process import run
from tests.lab.recordfs import LoopDisk, RecordFs

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]


def cut(folder: Path, *options: str, timeout: float = 280.0) -> dict[str, Any]:
    for seed in range(3):  # a slow disk has next to nothing when its power goes
        (at := folder / str(seed)).mkdir()
        words = [sys.executable, "-m", "tests.lab.powercut", *options, "--seed", str(seed), str(at)]
        report: dict[str, Any] = json.loads(run(words, timeout=timeout).stdout)
        assert (report["wrong"], report["failed"]) == (0, 0), report
        if report["segments_found"] > report["states"] / 4:
            break
    assert report["segments_found"] > report["states"] / 4, "nothing survived: nothing was looked at"
    assert report["segments_lost"] > report["states"], "everything survived: nothing was cut"
    return report


@pytest.mark.timeout(900)  # each state a file system: on a busy machine 2 s instead of 0.2, and up to three runs
def test_file_systems_that_promise_nothing_but_fsync(tmp_path: Path) -> None:
    cut(tmp_path, "--disk", "files", "--states", "80")


@pytest.mark.timeout(900)  # each state a file system: on a busy machine 2 s instead of 0.2, and up to three runs
def test_ext4_on_a_disk_that_reorders_its_writes(tmp_path: Path) -> None:
    if cannot_mount_erofs():
        cut(tmp_path, "--disk", "ext4", "--states", "20", "--daemons", "1")
    else:
        cut(tmp_path, "--disk", "ext4", "--driver", "erofs", "--states", "20", "--daemons", "1")


def test_a_superblock_of_which_one_sector_got_to_the_disk(tmp_path: Path) -> None:
    """Its checksum is in the other one. A boot's fsck mends that from the second superblock, which a disk as small as
    the harness's has only if made so: without, 6 of 1,500 states could never be mounted again."""
    disk = LoopDisk(tmp_path, DISK_SIZE)
    try:
        (disk.mountpoint / "file").write_bytes(b"there" * 1000)
        disk.write_out()
        run(["sync", "-f", disk.mountpoint])
        content = bytearray(disk.fs.content())
    finally:
        disk.close()
    place = 1024 + 0x88  # where it was mounted last
    content[place : place + 8] = b"/another"
    (tmp_path / "after").write_bytes(content)
    where = tmp_path / "where"
    where.mkdir()
    try:
        assert mount_as_at_boot("ext4", tmp_path / "after", where) is True
        assert (where / "file").read_bytes() == b"there" * 1000
    finally:
        run(["umount", where], check=False)


@pytest.mark.long
@pytest.mark.parametrize("seed", ["1", "2", "3"])  # each with other mount options
@pytest.mark.parametrize("driver", ["fuse", "erofs"])
def test_thousands_of_states(driver: str, seed: str, tmp_path: Path) -> None:
    if driver == "erofs" and (reason := cannot_mount_erofs()):
        pytest.skip(reason)
    options = ("--driver", driver, "--states", "1500", "--daemons", "40", "--seed", seed)
    cut(tmp_path, "--disk", "ext4", *options, timeout=1700)


@pytest.mark.long
def test_thousands_of_states_of_files(tmp_path: Path) -> None:
    cut(tmp_path, "--disk", "files", "--states", "5000", "--daemons", "20", timeout=1700)


def readied(folder: Path, make: Callable[[Path], None], names: set[str]) -> None:
    """What `make` made in a folder is whole after a power cut at any moment, as far as it has these names."""
    files = RecordFs(folder / "record")
    try:
        make(files.mountpoint)
        wanted = {name: (files.mountpoint / name).read_bytes() for name in names}
        states = FileStates(files.log())
    finally:
        files.close()
    whole = 0
    for number, state in enumerate(states.choose(random.Random(1), 400)):
        where = folder / f"state-{number}"
        states.write(where, state)
        for name in names:
            if (where / name).exists():
                assert (where / name).read_bytes() == wanted[name], f"{name} after {state[0]} steps"
                whole += 1
    assert whole > 50, "nothing was ever there: nothing was looked at"


def test_a_tarfs_layer_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody compares it with its digest once it has its name: the kernel reads it."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for number in range(3):
            member = tarfile.TarInfo(f"file-{number}")
            member.size = 100_000
            archive.addfile(member, io.BytesIO(random.Random(number).randbytes(member.size)))
    none: Any = None
    layers = Tarfs(none, 1)
    identity = hashlib.sha256(plain.getvalue()).hexdigest()

    def fetch(image: Reference, labels: dict[str, str], out: Path) -> str:
        out.write_bytes(plain.getvalue())
        return identity

    monkeypatch.setattr(layers, "_fetch", fetch)
    labels = {LAYER_DIGEST: f"sha256:{identity}"}
    image = Reference.parse("r.example/a:b")
    tar = f"layer-{identity}.tar"
    readied(tmp_path, lambda folder: layers._convert(image, labels, folder, ""), {tar, BOOT})
    layers.close()


def test_the_table_of_an_estargz_layer_is_whole_or_not_there(tmp_path: Path) -> None:
    """Else the image is unpacked for ever, for a table that could be fetched again."""
    table = Table("00", "", 100_000, 20_000, random.Random(1).randbytes(80_000))
    readied(tmp_path, lambda folder: table.save(folder / TABLE), {TABLE})


def test_the_bootstrap_of_an_image_that_was_found_is_whole_or_not_there(tmp_path: Path) -> None:
    """Else no container of it starts until somebody removes it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        member = tarfile.TarInfo("image/image.boot")
        member.size = 100_000
        archive.addfile(member, io.BytesIO(random.Random(1).randbytes(member.size)))
    layer.seek(0)
    client: Any = SimpleNamespace(open_blob=lambda *of: contextlib.nullcontext(layer))
    registries: Any = SimpleNamespace(open=lambda *of: contextlib.nullcontext(client))
    made = Snapshot(1, "a", "", Kind.COMMITTED, 0, 0, 0, 0, {TWIN: "sha256:00"})

    def fetch(folder: Path) -> None:
        (folder / "fs").mkdir()
        store: Any = SimpleNamespace(upper=lambda identity: folder / "fs")
        finder = LazyFinder(LazySettings(), registries, store)
        finder._fetch_bootstrap(Reference.parse("r.example/a:b"), made, ("sha256:01", 1))

    readied(tmp_path, fetch, {"fs/image/image.boot"})
