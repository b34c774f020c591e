"""EROFS mounts where something is short: room in the cache, memory, processor time. Never a wrong byte, never an error.

Every reader is a process of its own with a deadline: one that hangs in the kernel costs its test and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from nydusfs.drivers.erofs.metadata import MAX_IMAGES
from nydusfs.segments import SEGMENT_SIZE
from tests.integration.test_erofs import ON, bound, digests, marked_devices, read_all, registry_config
from tests.lab.cgroups import Group, no_groups
from tests.lab.daemon import Nydusd, reader, wait_until
from tests.lab.erofs import READ_ALL, cannot_mount_erofs, is_erofs, settle
from tests.lab.faulty import faulty_server
from tests.lab.killing import READER
from tests.lab.process import drop_caches, kill_together, matching, processes_mentioning
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())]


def limited(config: str, limit: int) -> str:
    document = json.loads(config)
    document["device"]["cache"]["config"]["limit"] = limit
    return json.dumps(document)


def patient(config: str) -> str:
    """For a source that is held back: it may take a minute to answer."""
    document = json.loads(config)
    document["device"]["backend"]["config"]["timeout"] = 120
    return json.dumps(document)


def held_bytes(work: Path) -> int:
    """What segments take on the disk, each file once."""
    sizes: dict[int, int] = {}
    for path in [*matching(work, "*/*-*"), *marked_devices(work)]:
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        sizes[facts.st_ino] = facts.st_blocks * 512
    return sum(sizes.values())


@contextmanager
def verifying_readers(folder: Path, image: TinyImage, *roots: Path, count: int = 4) -> Iterator[list[dict[str, Any]]]:
    """Read all files of some mounts in random order, dropping their pages; the reports are there at the end."""
    expected = {
        str(root / name): blake2b(data, digest_size=16).hexdigest()
        for root in roots
        for name, data in image.files.items()
    }
    (folder / "files.json").write_text(json.dumps(expected))
    reports: list[dict[str, Any]] = []
    stop = folder / "stop"
    stop.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, folder / "files.json", stop, str(seed)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(count)
    ]
    try:
        yield reports
    finally:
        stop.touch()
        for process in processes:
            try:
                reports.append(json.loads(process.communicate(timeout=60)[0]))
            finally:
                process.kill()


def assert_all_right(reports: list[dict[str, Any]], reads: int) -> None:
    assert [line for report in reports for line in report["said"]] == []
    assert sum(report["wrong"] + report["errors"] for report in reports) == 0
    assert sum(report["reads"] for report in reports) > reads


def test_a_cache_holds_to_its_limit_under_mounts_that_are_read(tmp_path: Path) -> None:
    """Two mounts of 12 MiB, a limit of 5: data goes and comes back while verifying readers are at it and the worker
    is killed. What is in use by the end stays, unasked."""
    image = tiny_image(tmp_path, {f"f{n}": noise(2 * SEGMENT_SIZE, n) for n in range(24)})
    limit, work, most = 20 * SEGMENT_SIZE, tmp_path / "cache", 0
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        config = limited(registry_config(server, work), limit)
        for where in ("/a", "/b"):
            assert running.mount(where, image.bootstrap, config).status == 204
            assert is_erofs(running.mnt / where[1:])
        with verifying_readers(tmp_path, image, running.mnt / "a", running.mnt / "b") as reports:
            began, fetched = time.monotonic(), 0
            while time.monotonic() - began < (5 if fetched > 3 * len(image.blob) else 90):  # a slow machine has longer
                for _ in range(20):
                    time.sleep(0.1)
                    most = max(most, held_bytes(work))
                worker = running.worker_pid
                kill_together([worker])
                wait_until(lambda w=worker: running.running() and running.worker_pid != w, 60, "the next worker")  # type: ignore[misc]
                fetched = sum(end + 1 - start for start, end in (r.span for r in server.data_requests if r.span))
        assert_all_right(reports, 100)
        assert fetched > 2 * len(image.blob), "nothing was evicted"
        # a segment a reader waits for is written whatever there is, one per reader and some ahead of them
        assert most < limit + 12 * SEGMENT_SIZE, f"{most / SEGMENT_SIZE} segments"
        assert read_all(running.mnt / "a") == read_all(running.mnt / "b") == digests(image)
        assert {running.umount("/a").status, running.umount("/b").status} == {204}
        assert marked_devices(work) == []
        wait_until(lambda: held_bytes(work) <= limit, 30, "a cache within its limit")


def test_a_complete_mount_with_a_limit_asks_nobody_until_its_data_has_to_go(tmp_path: Path) -> None:
    """All of it is there at the mount: nobody is needed. A second image pushes it out of the cache, also below a mount
    of a daemon of which nothing is left; both mounts ask again."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(12)})
    other = tiny_image(tmp_path, {f"g{n}": noise(SEGMENT_SIZE, n + 100) for n in range(12)})
    work = tmp_path / "cache"
    with faulty_server({image.blob_id: image.blob, other.blob_id: other.blob}) as server, Nydusd(*ON) as running:
        config = limited(registry_config(server, work), 16 * SEGMENT_SIZE)
        assert running.mount("/a", image.bootstrap, config).status == 204
        assert read_all(running.mnt / "a") == digests(image)
        settle(work)
        assert running.umount("/a").status == 204
        assert running.mount("/a", image.bootstrap, config).status == 204
        with bound(running.mnt / "a", tmp_path / "held") as held:
            running.kill_all()
            assert read_all(held) == digests(image)
            running.start()
            assert running.mount("/a", image.bootstrap, config).status == 204
            assert running.mount("/b", other.bootstrap, config).status == 204
            before = len(server.data_requests)
            assert read_all(running.mnt / "b") == digests(other)
            # who reads has his bytes before the cache has made room for them
            wait_until(lambda: len([one for one in marked_devices(work) if not one.stat().st_size]) >= 8, 30, "room")
            assert read_all(held) == digests(image)
            assert read_all(running.mnt / "a") == digests(image)
            assert len(server.data_requests) > before
            wait_until(lambda: held_bytes(work) <= 20 * SEGMENT_SIZE, 30, "a cache that holds to its limit")


WAITS = ("fanotify", "folio", "filemap")
HASH = """
import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""


def waits(process: subprocess.Popen[str]) -> bool:
    # the second reader of a page waits for the page
    return any(word in Path(f"/proc/{process.pid}/wchan").read_text() for word in WAITS)


@contextmanager
def waiting_readers(*paths: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """One process per file that hashes it; in the block all of them wait for the daemon. Whoever holds back what they
    wait for has to do so until they are all here: a machine may take seconds to start them."""
    processes = [
        subprocess.Popen([sys.executable, "-c", HASH, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for path in paths
    ]
    try:
        wait_until(lambda: all(map(waits, processes)), 60, "readers to wait")
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


def results(processes: list[subprocess.Popen[str]]) -> list[str]:
    return ["".join(process.communicate(timeout=60)).strip() for process in processes]


@pytest.mark.skipif(no_groups("memory") != "", reason=no_groups("memory"))
def test_little_memory_for_readers_and_for_the_daemon(tmp_path: Path) -> None:
    """An image of 72 MiB: readers who may have 24, then a daemon that may have little more than it needs idle."""
    image = tiny_image(tmp_path, {f"f{n}": noise(24 * SEGMENT_SIZE, n) for n in range(12)})
    code = f"""
import os, sys
open(sys.argv[2] + "/cgroup.procs", "w").write(str(os.getpid()))
sys.argv[1:] = sys.argv[1:2]
{READ_ALL}
"""
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running, Group("memory") as group:
        work = tmp_path / "cache"
        assert running.mount("/a", image.bootstrap, registry_config(server, work)).status == 204
        group.limit_memory(24 << 20)
        for _ in range(2):  # cold, then with the backing files out of memory
            done = reader(code, running.mnt / "a", group.path, timeout=60)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == digests(image)
            settle(work)
            drop_caches()
        assert group.memory_peak() > 20 << 20, "the limit was never felt"
        # What it had before it was moved there is not counted. It holds 24 MiB of what was verified last, and what is
        # on its way to a sequential reader; files of the cache have to make room for that.
        group.limit_memory(64 << 20)
        group.add(pids := processes_mentioning(str(running.sock)))
        worker = running.worker_pid
        other = tmp_path / "other"
        assert running.mount("/b", image.bootstrap, registry_config(server, other)).status == 204
        assert read_all(running.mnt / "b", timeout=60) == digests(image)
        assert group.memory_peak() > 60 << 20, "the limit was never felt"
        assert running.worker_pid == worker, "killed for its memory"
        assert set(pids) == set(processes_mentioning(str(running.sock)))


def test_pages_are_dropped_below_readers_who_wait(tmp_path: Path) -> None:
    """The kernel takes back what it can of pages, dentries and inodes all the time; a mark that went with it would give
    errors."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE + 4096 * n, n) for n in range(8)})
    gate = threading.Event()
    with (
        faulty_server({image.blob_id: image.blob}, choose=lambda _: "ok" if gate.wait(60) else "503") as server,
        Nydusd(*ON) as running,
    ):
        config = patient(registry_config(server, tmp_path / "cache"))
        assert running.mount("/a", image.bootstrap, config).status == 204
        paths = [running.mnt / "a" / name for name in image.files]
        with ThreadPoolExecutor(1) as pool, waiting_readers(*paths[:6]) as processes:
            drops = [pool.submit(drop_caches) for _ in range(12)]
            drops[3].result(60)
            server.latency = 1.0  # of what they wait for next
            gate.set()
            assert results(processes) == list(digests(image).values())[:6]
            for drop in drops:
                drop.result(60)
        server.latency = 0
        for _ in range(2):
            drop_caches()
            assert read_all(running.mnt / "a") == digests(image)


@contextmanager
def frozen(group: Group, pids: Iterable[int]) -> Iterator[None]:
    group.add(pids)
    group.freeze()
    try:
        yield
    finally:
        group.thaw()


@pytest.mark.skipif(no_groups("freezer") != "", reason=no_groups("freezer"))
def test_frozen_readers_and_a_frozen_daemon(tmp_path: Path) -> None:
    """A frozen reader's data comes meanwhile; who waits for the same pages may have to wait for the thaw (version 1 of
    control groups freezes a reader who has pages locked), nobody else. A frozen daemon is a pause."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(40)})
    expected, gate = digests(image), threading.Event()
    with (
        faulty_server({image.blob_id: image.blob}, choose=lambda _: "ok" if gate.wait(60) else "503") as server,
        Nydusd(*ON) as running,
        Group("freezer") as group,
        ExitStack() as stack,
    ):
        config = patient(registry_config(server, tmp_path / "cache"))
        assert running.mount("/a", image.bootstrap, config).status == 204
        base = stack.enter_context(bound(running.mnt / "a", tmp_path / "held"))
        with waiting_readers(base / "f0", base / "f0") as processes:
            threading.Timer(0.6, gate.set).start()  # some kernels freeze him when he has it, not before
            with frozen(group, [processes[0].pid]):
                assert reader(HASH, base / "f10").stdout.strip() == expected["f10"]
                assert processes[0].poll() is None
            assert results(processes) == [expected["f0"]] * 2
        with (
            frozen(group, processes_mentioning(str(running.sock))),
            waiting_readers(base / "f20", base / "f35") as processes,
        ):
            time.sleep(0.5)
            assert [process.poll() for process in processes] == [None, None]
            processes[1].kill()  # whoever waits can be killed, whatever the daemon does
            processes[1].wait(20)
            group.thaw()
            assert results(processes[:1]) == [expected["f20"]]
        assert read_all(base) == expected


def test_what_the_daemon_does_to_devices_is_not_announced_to_itself(tmp_path: Path) -> None:
    """By the plain path nothing raises an event, though the kernel asks about the same file through its mount."""
    done = reader(_OWN_WAYS, tmp_path, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["silent", "asked"]), done.stderr


_OWN_WAYS = """
import mmap, os, select, sys, threading
from pathlib import Path
from nydusfs.drivers import mountapi
from nydusfs.drivers.erofs import fanotify, mount, selftest
base = Path(sys.argv[1])
files = base / "files"; files.mkdir()
(base / "image").write_bytes(selftest.tiny_image())
device = files / "d"; device.touch()
group, tree = fanotify.init(), mountapi.clone_tree(files)
fanotify.mark_mount(group, tree)
mounted = mount.open_erofs(str(base / "image"), [f"/proc/self/fd/{tree}/d"])
fd = os.open(device, os.O_RDWR)
os.pwrite(fd, b"x" * 8192, 0); os.fdatasync(fd); os.pread(fd, 4096, 0); os.preadv(fd, [bytearray(10)], 5)
os.truncate(device, 4096); os.posix_fallocate(fd, 0, 8192); os.ftruncate(fd, 8192)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.link(device, base / "link"); (base / "link").read_bytes()
os.sendfile(os.open(base / "out", os.O_RDWR | os.O_CREAT), fd, 0, 8192)
with mmap.mmap(fd, 0) as view: bytes(view)
if select.select([group], [], [], 0.2)[0]: sys.exit("own access raised an event")
print("silent")
reading = threading.Thread(target=lambda: os.pread(os.open("f", os.O_RDONLY, dir_fd=mounted), 4096, 0), daemon=True)
reading.start()
if not select.select([group], [], [], 10)[0]: sys.exit("a read through the mount raised none")
event = fanotify.read_event(group)
fanotify.answer(group, event.fd, fanotify.FAN_ALLOW)
reading.join(10)
print("asked")
"""


def test_hundreds_of_mounts_share_one_group_and_leave_nothing(tmp_path: Path) -> None:
    """Mounts of one image with one cache, and of another; what one has fetched the others read without asking."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(3)})
    count, work = 150, tmp_path / "cache"

    def open_files(kind: str) -> int:
        found = []
        for path in Path(f"/proc/{running.worker_pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # others are closed meanwhile
                found.append(os.readlink(path))
        return sum(kind in target for target in found)

    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        config = registry_config(server, work)
        for number in range(count):
            assert running.mount(f"/{number}", image.bootstrap, config).status == 204
        assert sum(is_erofs(running.mnt / str(number)) for number in (0, 1, count - 1)) == 3
        for number in (0, 77, count - 1):
            assert read_all(running.mnt / str(number)) == digests(image)
        assert len({request.span for request in server.data_requests}) == len(server.data_requests), "fetched twice"
        assert open_files("[fanotify]") == 2, "one group, and the copy that its threads have"
        worker = running.worker_pid
        kill_together([worker])
        wait_until(lambda: running.running() and running.worker_pid != worker, 60, "the next worker")
        assert read_all(running.mnt / "5") == digests(image)
        for number in range(count):
            assert running.umount(f"/{number}").status == 204
        assert marked_devices(work) == []
        assert os.listdir(running.mnt) == []


def test_more_images_than_are_kept_and_the_death_of_their_worker(tmp_path: Path) -> None:
    """What an old mount's devices are is still known when many images came after it: others let go of theirs."""
    files = {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(2)}
    images = []
    for number in range(MAX_IMAGES + 4):
        (tmp_path / f"i{number}").mkdir()
        images.append(tiny_image(tmp_path / f"i{number}", {**files, f"only-in-{number}": b""}))
    first, work = images[0], tmp_path / "cache"
    assert {image.blob_id for image in images} == {first.blob_id}, "they share their devices"
    with faulty_server({first.blob_id: first.blob}) as server, Nydusd(*ON) as running:
        config = registry_config(server, work)
        for number, image in enumerate(images):
            assert running.mount(f"/{number}", image.bootstrap, config).status == 204
        worker = running.worker_pid
        kill_together([worker])
        wait_until(lambda: running.running() and running.worker_pid != worker, 60, "the next worker")
        for number in range(1, len(images)):
            assert running.umount(f"/{number}").status == 204
        assert marked_devices(work), "the devices of the mount that stays"
        assert read_all(running.mnt / "0") == digests(first)
        assert running.umount("/0").status == 204
        assert marked_devices(work) == []
