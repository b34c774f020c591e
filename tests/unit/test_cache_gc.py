"""Which blobs of the cache nobody needs, and that removing one leaves the others as they are."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import trio

from nydusfs.cache import CacheStore
from nydusfs.cachetools.gather import BATCH, Gatherer, Source, remember
from nydusfs.cachetools.inventory import Inventory, take
from nydusfs.config import Config, load_config
from nydusfs.services import Services, open_services
from snapshotter.cachectl import importing
from snapshotter.cachectl.place import Place
from snapshotter.cachegc import KEPT, Collector, look, orphans, remove
from snapshotter.nydusd_api import ApiUnreachable
from tests.integration.test_sources_faults import config_text
from tests.lab.faulty import faulty_server
from tests.lab.tiny import noise, tiny_image


def test_only_blobs_that_no_bootstrap_names_are_orphans(tmp_path: Path) -> None:
    cache, snapshots = tmp_path / "cache", tmp_path / "snapshots"
    images = [tiny_image(tmp_path, {"f": noise(5000, seed)}) for seed in range(3)]
    for number, image in enumerate(images[:2]):
        place = snapshots / str(number) / "fs" / ("image" if number else "")
        place.mkdir(parents=True)
        (place / "image.boot").write_bytes(image.bootstrap.read_bytes())
    for name in (*(image.blob_id for image in images), ".maps", "not-ours", "c" * 64):
        (cache / name).mkdir(parents=True)
    (cache / f"{'d' * 64}.blob.data").touch()
    assert orphans(cache, snapshots) == [], "all of it is young"
    assert 50 < look(cache, snapshots)[1] <= 60
    old = time.time() - 3600
    for path in cache.iterdir():
        os.utime(path, (old, old))
    assert look(cache, snapshots) == (sorted([images[2].blob_id, "c" * 64, "d" * 64]), 0)
    assert orphans(tmp_path / "none", snapshots) == []


def test_bootstraps_that_cannot_be_read(tmp_path: Path) -> None:
    """Damage of a running image keeps its cache; a layer that looks like an image must not keep it full."""
    cache, snapshots = tmp_path / "cache", tmp_path / "snapshots"
    image = tiny_image(tmp_path, {"f": noise(5000)})
    damaged, linked, strange, pipe, good = (snapshots / name / "fs" / "image" for name in "12345")
    for place in (damaged, linked, strange, pipe, good, cache / ("c" * 64), cache / image.blob_id):
        place.mkdir(parents=True)
    whole = image.bootstrap.read_bytes()
    (damaged / "image.boot").write_bytes(whole[:4000])
    (linked / "image.boot").symlink_to(image.bootstrap)
    (strange / "image.boot").write_bytes(b"the init script of somebody's boot loader")
    os.mkfifo(pipe / "image.boot")
    (good / "image.boot").write_bytes(whole)
    old = time.time() - 3600
    for path in cache.iterdir():
        os.utime(path, (old, old))
    assert orphans(cache, snapshots) == ["c" * 64]
    assert orphans(cache, snapshots, {damaged / "image.boot"}) == []
    (good / "image.boot").unlink()  # a link to it does not count: nydusd would not follow it
    assert orphans(cache, snapshots) == sorted(["c" * 64, image.blob_id])


def test_a_removed_blob_is_fetched_again_when_it_is_needed(tmp_path: Path) -> None:
    one, two = (tiny_image(tmp_path, {"f": noise(300_000, seed)}) for seed in (1, 2))
    work = tmp_path / "cache"

    async def run() -> None:
        async with open_services() as services:
            config = load_config(config_text(work, server.netloc), "t")
            readers = [await services.open_image(str(i.bootstrap), config, name="i") for i in (one, two)]
            for reader, image in zip(readers, (one, two), strict=True):
                assert await reader.read(reader.bootstrap.resolve(b"f"), 0, 300_000) == image.files["f"]
            assert not await services.drop_blob(one.blob_id), "an image is open that has it"
            assert (work / one.blob_id).exists()
            readers[0].close()
            assert await services.drop_blob(one.blob_id)
            assert not (work / one.blob_id).exists()
            assert (work / two.blob_id).exists()
            await services.drop_blob("../" + two.blob_id)
            await services.drop_blob(".maps")
            again = await services.open_image(str(one.bootstrap), config, name="again")
            before = len(server.data_requests)
            assert await again.read(again.bootstrap.resolve(b"f"), 0, 300_000) == one.files["f"]
            assert len(server.data_requests) > before
            for reader in (*readers, again):
                reader.close()
            await opened_while_it_goes(services, config)

    async def opened_while_it_goes(services: Services, config: Config) -> None:
        """Whoever opens an image while a blob of it is deleted waits for that, and has a cache that can be written."""
        (store,) = services.stores()
        removing, go_on, order = threading.Event(), threading.Event(), []

        def slow(blob_id: str) -> None:
            removing.set()
            go_on.wait(20)
            order.append("removed")
            CacheStore.remove_blob(store, blob_id)

        async def drop() -> None:
            assert await services.drop_blob(one.blob_id)

        async def open_it() -> None:
            reader = await services.open_image(str(one.bootstrap), config, name="meanwhile")
            order.append("opened")
            assert await reader.read(reader.bootstrap.resolve(b"f"), 0, 300_000) == one.files["f"]
            assert not await services.drop_blob(one.blob_id)
            reader.close()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "remove_blob", slow)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drop)
                await trio.to_thread.run_sync(removing.wait, 20)
                nursery.start_soon(open_it)
                await trio.sleep(0.2)
                go_on.set()
        assert order == ["removed", "opened"]

    with faulty_server({one.blob_id: one.blob, two.blob_id: two.blob}) as server:
        trio.run(run)


def test_what_further_processes_keep_and_what_waits_for_its_image(tmp_path: Path) -> None:
    """`.worker-N` is a dedicated daemon's; imported data is kept until its image came and went, or for a month."""
    cache, snapshots = tmp_path / "cache", tmp_path / "snapshots"
    image = tiny_image(tmp_path, {"f": noise(5000)})
    (snapshots / "1" / "fs").mkdir(parents=True)
    own, aside = cache / image.blob_id, cache / ".worker-2" / ("a" * 64)
    for folder in (own, aside):
        folder.mkdir(parents=True)
        (folder / f"0-{'00' * 12}").touch()
        os.utime(folder, (0, 0))
    assert orphans(cache, snapshots) == sorted([image.blob_id, "a" * 64])
    kept = remember(cache, image.bootstrap)
    assert orphans(cache, snapshots) == ["a" * 64]
    devices = cache / ".worker-2" / ".erofs" / "files.0a1b2c3d" / "01234567"
    for blob in ("a" * 64, "b" * 64):
        (devices / blob).mkdir(parents=True)
    os.link(aside / f"0-{'00' * 12}", devices / ("a" * 64) / f"0-{'00' * 12}")  # of a daemon that was killed
    remove(cache, "a" * 64)
    assert (aside.exists(), own.exists()) == (False, True)
    assert os.listdir(devices) == ["b" * 64]
    pulled = snapshots / "1" / "fs" / "image.boot"
    pulled.write_bytes(image.bootstrap.read_bytes())
    assert orphans(cache, snapshots) == []
    assert not kept.exists(), "its image is here"
    pulled.unlink()
    assert orphans(cache, snapshots) == [image.blob_id]
    os.utime(remember(cache, image.bootstrap), (0, 0))
    assert orphans(cache, snapshots) == [image.blob_id], "it never came"


def test_removing_an_image_frees_what_nothing_else_uses(tmp_path: Path) -> None:
    """Every nydusd is told, of a dedicated one's own directory too; what another image shares stays."""
    cache, snapshots = tmp_path / "cache", tmp_path / "snapshots"
    own = tiny_image(tmp_path, {"f": noise(5000, 1)})
    shared = tiny_image(tmp_path, {"f": noise(5000, 2)})
    for number, images in enumerate(((shared,), (shared, own))):
        for part, image in enumerate(images):
            place = snapshots / f"{number}{part}" / "fs" / "image"
            place.mkdir(parents=True)
            (place / "image.boot").write_bytes(image.bootstrap.read_bytes())
    told: list[str] = []
    pulled_again = True

    class Nydusd:
        def drop_blob(self, blob_id: str) -> bool:
            told.append(blob_id)
            return not pulled_again

    for folder in (cache / own.blob_id, cache / shared.blob_id, cache / ".worker-2" / own.blob_id):
        folder.mkdir(parents=True)
        (folder / f"0-{'00' * 12}").write_bytes(b"x")
        os.utime(folder, (0, 0))
    collector = Collector(cache, snapshots, lambda: [Nydusd()], set, enabled=True, period=0)
    assert (collector._collect(), told) == (0, [])
    shutil.rmtree(snapshots / "10")
    shutil.rmtree(snapshots / "11")
    assert (collector._collect(), told) == (KEPT, [own.blob_id]), "asked again soon"
    assert (cache / own.blob_id).exists() and (cache / ".worker-2" / own.blob_id).exists()
    pulled_again = False
    with open(cache / ".worker-2" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a living nydusd's: it was told, and does what is to be done
        assert collector._collect() == 0
        assert (cache / ".worker-2" / own.blob_id).exists()
    assert collector._collect() == 0
    assert sorted(path.name for path in cache.rglob("*") if len(path.name) == 64) == [shared.blob_id]


@pytest.mark.parametrize("hangs", [False, True])
def test_what_cannot_be_removed_ends_no_clean_up_but_a_nydusd_that_hangs_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """The one at an interval goes on; and nobody waits half a minute for each of a thousand blobs."""
    cache, snapshots = tmp_path / "cache", tmp_path / "snapshots"
    snapshots.mkdir()
    blobs = [digit * 64 for digit in "abc"]
    old = time.time() - 3600
    for blob in blobs:
        (cache / blob).mkdir(parents=True)
        os.utime(cache / blob, (old, old))
    asked: list[str] = []

    class Nydusd:
        def drop_blob(self, blob_id: str) -> bool:
            asked.append(blob_id)
            if hangs:
                raise ApiUnreachable("DELETE /api/v2/blobs: timed out")
            return True

    def refuse(cache: Path, blob: str) -> None:
        if blob == blobs[0]:
            raise PermissionError(1, "Operation not permitted", str(cache / blob))
        remove(cache, blob)

    monkeypatch.setattr("snapshotter.cachegc.remove", refuse)
    again = Collector(cache, snapshots, lambda: [Nydusd()], set, enabled=True, period=0)._collect()
    assert (again > 0) == hangs
    assert asked == (blobs[:1] if hangs else blobs)
    assert sorted(path.name for path in cache.iterdir()) == (blobs if hangs else blobs[:1])


def test_an_import_that_fills_the_disk_ends_with_what_was_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = tmp_path / "cache", tmp_path / "source"
    source.mkdir()
    images = [tiny_image(tmp_path, {f"{n}": noise(400_000, seed + n) for n in range(30)}) for seed in (0, 100)]
    for image in images:
        (source / image.blob_id).write_bytes(image.blob)
    synced: list[int] = []
    sync = os.fdatasync

    def fill_up(fd: int) -> None:
        if len(synced) >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced.append(fd)
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fill_up)
    with_disk_full = Gatherer(store, lambda _: None, threads=1).run(Source(source), [one.bootstrap for one in images])
    monkeypatch.undo()
    assert with_disk_full.full == f"{store}: No space left on device"
    assert [(blob.taken, blob.problem) for blob in with_disk_full.blobs] == [(20, "")], "the next blob is not tried"
    assert len(list(store.glob("*/*"))) == 20, "and nothing is left that was under way"
    rest = Gatherer(store, lambda _: None, threads=4).run(Source(source), [one.bootstrap for one in images])
    assert rest.full == "" and [blob.problem for blob in rest.blobs] == ["", ""]


def test_an_import_counts_what_is_in_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a nydusd, which would count for itself: it held to the limit by looking at all files every 4 MiB."""
    cache, source = tmp_path / "cache", tmp_path / "source"
    source.mkdir()
    image = tiny_image(tmp_path, {f"{n}": noise(400_000, n) for n in range(120)})
    (source / image.blob_id).write_bytes(image.blob)
    counted: list[Path] = []

    def count(store: Path) -> Inventory:
        counted.append(store)
        return take(store)

    monkeypatch.setattr("snapshotter.cachectl.place.take", count)
    monkeypatch.setattr(Place, "limits", lambda self: (40 << 20, 0))
    found = importing.run(Place(None, str(cache), [image.bootstrap]), source, threads=2, quiet=True)
    assert found["problems"] == ["ended early: the cache's limit is reached"]
    size = sum(path.stat().st_size for path in (cache / image.blob_id).iterdir())
    assert (40 << 20) - BATCH * (1 << 20) < size <= 40 << 20
    assert counted == [cache]
