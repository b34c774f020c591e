"""EROFS mounts: the same bytes as by FUSE, nobody needed once they are here, never zeros whoever dies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bootstrap.reader import open_bootstrap
from nydusfs.segments import SEGMENT_SIZE
from tests.integration.test_fuse_lifecycle import silent_config, silent_registry, start_reader
from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, localfs_config, reader, wait_until
from tests.lab.erofs import READ_ALL, cannot_mount_erofs, cpu_seconds, is_erofs, marked_devices, settle
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.killing import kill_everything, kill_workers
from tests.lab.mounted import check_mount
from tests.lab.process import kill_together, processes_mentioning, run
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())]
CASE = "v6-zstd-blake3-1m"
ON = ("--fs-driver", "erofs")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Nydusd]:
    with Nydusd(*ON) as running:
        yield running


def registry_config(server: FaultyServer, work: Path, **extra: object) -> str:
    backend = {"scheme": "http", "host": server.netloc, "repo": "a/b", "timeout": 5, "connect_timeout": 5}
    device = {
        "backend": {"type": "registry", "config": backend},
        "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
    }
    return json.dumps({"device": device, "mode": "direct", "fs_prefetch": {"learn": False}, **extra})


def digests(image: TinyImage) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in image.files.items()}


def read_all(path: Path, timeout: float = 60.0) -> dict[str, str]:
    done = reader(READ_ALL, path, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def is_stopped(pid: int) -> bool:
    """All its threads: they do not stop at one moment."""
    try:
        states = [one.read_text().rpartition(")")[2].split()[0] for one in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # a thread that ends for want of work
        return False
    return set(states) == {"T"}


@contextmanager
def bound(source: Path, target: Path) -> Iterator[Path]:
    """The same mount at another place, reachable without the daemon's own directories: what a container holds."""
    target.mkdir()
    run(["mount", "--bind", source, target])
    try:
        yield target
    finally:
        run(["umount", "-l", target])


def test_an_expected_mount_is_made_before_it_is_asked_for(daemon: Nydusd, tmp_path: Path) -> None:
    """And goes without a trace if it is mounted in another way after all."""
    case = image_case(CASE)
    config = localfs_config(case, work_dir=tmp_path)
    body = {"source": str(case / "image.boot"), "fs_type": "rafs", "config": config}
    disk = tmp_path.stat().st_dev
    assert daemon.mount("/first", case / "image.boot", config).status == 204  # with a mount of the self-test
    assert daemon.umount("/first").status == 204
    for wanted in (config, json.dumps({**json.loads(config), "fs_driver": "fuse"})):
        assert daemon.call("POST", "mount/expected?mountpoint=/soon", body).status == 204
        wait_until(lambda: _unattached(daemon, disk), 60, "a mount attached nowhere")
        (ready,) = _unattached(daemon, disk)
        assert daemon.mount("/soon", case / "image.boot", wanted).status == 204
        assert is_erofs(daemon.mnt / "soon") == (wanted == config)
        assert ((daemon.mnt / "soon").stat().st_dev == ready) == (wanted == config)
        if wanted != config:
            wait_until(lambda: not marked_devices(tmp_path), 60, "no device of it")
        assert not _unattached(daemon, disk)
        assert check_mount(case, daemon.mnt / "soon") == []
        assert daemon.umount("/soon").status == 204
        assert marked_devices(tmp_path) == []


def _unattached(daemon: Nydusd, disk: int) -> set[int]:
    """Device numbers of mounts that the worker holds by a descriptor and that are attached nowhere. `disk`: of its
    caches, whose clones it holds so."""
    found, folder = set(), Path(f"/proc/{daemon.worker_pid}/fd")
    for fd in folder.iterdir():
        try:
            if os.readlink(fd) == "/":
                found.add(fd.stat().st_dev)
        except OSError:
            pass  # closed meanwhile
    return found - {disk}


def test_devices_are_read_directly_once_nothing_is_written(tmp_path: Path) -> None:
    """And through the page cache again while something is. The bytes are right in each state."""
    image = tiny_image(tmp_path, {"a": noise(3 << 20, 1), "b": noise(3 << 20, 2)})

    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as daemon:
        mnt = daemon.mnt / "i"

        def direct() -> bool:
            (line,) = [one for one in Path("/proc/mounts").read_text().splitlines() if f" {mnt} erofs " in one]
            return "directio" in line.split()[3].split(",")

        assert daemon.mount("/i", image.bootstrap, registry_config(server, tmp_path / "cache")).status == 204
        for name in ("a", "b"):
            assert reader(READ_ONE, mnt / name).stdout.strip() == digests(image)[name]
            wait_until(lambda: not direct(), 60, "reads through the page cache")
            wait_until(direct, 60, "direct reads")
            assert reader(READ_ONE, mnt / name).stdout.strip() == digests(image)[name]
        assert daemon.umount("/i").status == 204


READ_ONE = """
import hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
print(hashlib.sha256(open(fd, "rb").read()).hexdigest())
"""


def test_a_second_mount_needs_no_new_image_and_shares_the_cache(daemon: Nydusd, tmp_path: Path) -> None:
    """Damaged derived files are made again; what FUSE cached is served by EROFS and the other way round."""
    case = image_case(CASE)
    config = localfs_config(case, work_dir=tmp_path)
    fuse = json.dumps({**json.loads(config), "fs_driver": "fuse"})
    assert daemon.mount("/f", case / "image.boot", fuse).status == 204
    assert not is_erofs(daemon.mnt / "f")
    assert check_mount(case, daemon.mnt / "f") == []
    settle(tmp_path)
    assert daemon.mount("/e", case / "image.boot", config).status == 204
    assert is_erofs(daemon.mnt / "e")
    assert marked_devices(tmp_path) == []  # all of it was here
    assert check_mount(case, daemon.mnt / "e") == []
    [image] = (tmp_path / ".erofs" / "images").iterdir()
    assert daemon.umount("/e").status == 204
    first = image.read_bytes()
    made = image.stat().st_ino
    assert daemon.mount("/e", case / "image.boot", config).status == 204
    assert image.stat().st_ino == made
    assert daemon.umount("/e").status == 204
    image.write_bytes(first[:5000] + bytes([first[5000] ^ 1]) + first[5001:])
    assert daemon.mount("/e", case / "image.boot", config).status == 204
    assert image.read_bytes() == first
    assert check_mount(case, daemon.mnt / "e") == []
    assert {daemon.umount("/e").status, daemon.umount("/f").status} == {204}


def test_one_image_at_the_root_and_a_stop_that_leaves_nothing(tmp_path: Path) -> None:
    case = image_case(CASE)
    blobs = tmp_path / "blobs"
    shutil.copytree(case, blobs)
    with Nydusd(*ON, "-B", blobs / "image.boot", "-D", blobs) as running:
        assert is_erofs(running.mnt)
        assert check_mount(case, running.mnt) == []
        first = running.worker_pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: running.running() and running.worker_pid != first, 20, "the next worker")
        assert is_erofs(running.mnt)
        assert running.stop()[0] == 0
        assert not os.path.ismount(running.mnt)
        assert marked_devices(blobs / ".nydusd-cache") == []


def test_what_cannot_be_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """No cache directory: `erofs` refuses the mount, `auto` serves it by FUSE; a bad value is named."""
    case = image_case(CASE)
    with Nydusd(*ON) as running:
        answer = running.mount("/a", case / "image.boot", localfs_config(case))
        assert answer.status == 500
        assert "fs_driver erofs is not possible for /a: it has no cache directory" in answer.message
        assert os.listdir(running.mnt) == []
        config = json.loads(localfs_config(case))
        assert running.mount("/a", case / "image.boot", json.dumps({**config, "fs_driver": "auto"})).status == 204
        assert check_mount(case, running.mnt / "a") == []
        answer = running.mount("/b", case / "image.boot", json.dumps({**config, "fs_driver": "ext4"}))
        assert answer.status == 500
        assert "fs_driver" in answer.message


def mount_options(path: Path) -> str:
    return run(["findmnt", "-n", "-t", "erofs", "-o", "OPTIONS", path]).stdout


@pytest.mark.parametrize("again", [False, True])
def test_complete_images_need_no_process(tmp_path: Path, again: bool) -> None:
    """All three processes are stopped, pages dropped: everything reads, through overlayfs as well."""
    case = image_case(CASE)
    with Nydusd(*ON) as running:
        config = localfs_config(case, work_dir=tmp_path / "cache")
        assert running.mount("/a", case / "image.boot", config).status == 204
        assert "directio" not in mount_options(running.mnt / "a")  # whose data is still to be written
        assert check_mount(case, running.mnt / "a") == []
        settle(tmp_path / "cache")
        if again:
            assert running.umount("/a").status == 204
            assert running.mount("/a", case / "image.boot", config).status == 204
            assert "directio" in mount_options(running.mnt / "a")
        with bound(running.mnt / "a", tmp_path / "held") as held:
            pids = processes_mentioning(str(running.sock))
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                wait_until(lambda: all(is_stopped(pid) for pid in pids), 60, "the stop of all")
                before = sum(map(cpu_seconds, pids))
                expected = read_all(held)
                assert expected
                assert not any(len(value) != 64 for value in expected.values())
                overlay = tmp_path / "overlay"
                for name in ("upper", "work", "merged"):
                    (overlay / name).mkdir(parents=True)
                layers = f"lowerdir={held},upperdir={overlay}/upper,workdir={overlay}/work"
                run(["mount", "-t", "overlay", "overlay", "-o", layers, overlay / "merged"])
                try:
                    above = read_all(overlay / "merged")
                    # one file carries the attribute that makes it a whiteout there
                    assert above.items() <= expected.items()
                    assert len(above) >= len(expected) - 1
                finally:
                    run(["umount", "-l", overlay / "merged"])
                assert sum(map(cpu_seconds, pids)) == before
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)


def test_reads_are_known_by_file(daemon: Nydusd, tmp_path: Path) -> None:
    """Of an image whose figures are wanted, and of those who wait. Inode numbers are the bootstrap's."""
    case, mask = image_case(CASE), (1 << 48) - 1
    image = open_bootstrap(str(case / "image.boot"))
    config = localfs_config(case, work_dir=tmp_path / "cache")
    assert daemon.mount("/k", case / "image.boot", config).status == 204
    assert check_mount(case, daemon.mnt / "k") == []
    settle(tmp_path / "cache")
    assert daemon.umount("/k").status == 204
    counted = json.dumps({**json.loads(config), "iostats_files": True})
    assert daemon.mount("/k", case / "image.boot", counted).status == 204
    assert is_erofs(daemon.mnt / "k")
    entries = json.loads((case / "manifest.json").read_text())["entries"]
    alone = [e for e in entries if e["type"] == "file" and not e["path"].startswith(("/dup/", "/holes/"))]
    wanted = [e for e in alone if e["size"] > 5000][:3]
    for entry in wanted:
        path = daemon.mnt / "k" / entry["path"][1:]
        assert reader("import sys; open(sys.argv[1], 'rb').read()", path).returncode == 0
        ino = str(image.resolve(entry["path"].encode()))

        def counted(ino: str = ino) -> int:
            return int(daemon.get("metrics/files?id=/k").body.get(ino, {}).get("data_read", 0))

        # who waits for data has it a moment before it is counted
        wait_until(lambda size=entry["size"]: counted() >= size, 60, "the count")  # type: ignore[misc]
        assert counted() == entry["size"]
    assert daemon.umount("/k").status == 204
    with silent_registry() as port:
        assert daemon.mount("/s", case / "image.boot", silent_config(port, tmp_path / "other")).status == 204
        path = daemon.mnt / "s" / wanted[0]["path"][1:]
        waiting = start_reader(path)
        wait_until(lambda: daemon.get("metrics/inflight").body, 30, "the blocked reader")
        ino = image.resolve(wanted[0]["path"].encode())
        assert {one["inode"] & mask for one in daemon.get("metrics/inflight").body} == {ino}
        assert daemon.umount("/s").status == 204
        assert waiting.communicate(timeout=60)[0].strip() == "5"
    image.close()


_WAYS = """
import ctypes, errno, mmap, os, socket, subprocess, sys
base, want = sys.argv[1:3]
def check(what, data):
    if data != expected: sys.exit(f"{what}: {len(data)} bytes differ")
def load(name):
    global expected
    with open(f"{want}/{name}", "rb") as file: expected = file.read()
load("mapped")
with open(f"{base}/mapped", "rb") as file:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map: check("mmap", map[:])
load("sent")
with open(f"{base}/sent", "rb") as file, open(f"{want}/out", "w+b") as out:
    at = 0
    while at < len(expected): at += os.sendfile(out.fileno(), file.fileno(), at, len(expected) - at)
    out.seek(0); check("sendfile", out.read())
load("spliced")
with open(f"{base}/spliced", "rb") as file:
    reading, writing = os.pipe(); data = b""
    while n := os.splice(file.fileno(), writing, 1 << 16): data += os.read(reading, n)
    check("splice", data)
load("direct")
try:
    fd = os.open(f"{base}/direct", os.O_RDONLY | os.O_DIRECT)
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    buffer = mmap.mmap(-1, -(-len(expected) // 4096) * 4096)
    check("O_DIRECT", buffer[: os.preadv(fd, [buffer], 0)]); print("read")
load("ahead")
with open(f"{base}/ahead", "rb") as file:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.readahead(file.fileno(), ctypes.c_int64(0), ctypes.c_size_t(len(expected))): sys.exit("readahead")
    check("after readahead", file.read())
load("random")
fd = os.open(f"{base}/random", os.O_RDONLY)
for at in range(len(expected) // 4096 * 4096, -1, -40960):
    if os.pread(fd, 4096, at) != expected[at : at + 4096]: sys.exit(f"pread at {at}")
print(subprocess.run([f"{base}/program", "ran"], capture_output=True, text=True, timeout=20).stdout, end="")
"""


@pytest.mark.parametrize("overlay", [False, True])
def test_every_way_to_read_a_cold_image(tmp_path: Path, overlay: bool) -> None:
    """mmap, sendfile, splice, readahead, O_DIRECT (refused by this kernel on every file-backed EROFS), execve."""
    data = noise(700_000)
    program = Path("/bin/echo").resolve().read_bytes()
    names = ("mapped", "sent", "spliced", "direct", "ahead", "random")
    files = {name: data[:-4] + n.to_bytes(4, "big") for n, name in enumerate(names)} | {"program": program}
    image = tiny_image(tmp_path, files, mode=0o755)
    want = tmp_path / "want"
    want.mkdir()
    for name, content in files.items():
        (want / name).write_bytes(content)
    with faulty_server({image.blob_id: image.blob}, latency=0.005) as server, Nydusd(*ON) as running:
        assert running.mount("/a", image.bootstrap, registry_config(server, tmp_path / "cache")).status == 204
        base = running.mnt / "a"
        if overlay:
            for name in ("upper", "work", "merged"):
                (tmp_path / name).mkdir()
            layers = f"lowerdir={base},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
            run(["mount", "-t", "overlay", "overlay", "-o", layers, tmp_path / "merged"])
            base = tmp_path / "merged"
            os.chmod(base / "program", 0o700)  # copies it up, through events
        try:
            done = reader(_WAYS, base, want)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines() in (["EINVAL", "ran"], ["read", "ran"])
        finally:
            if overlay:
                run(["umount", "-l", base])


@pytest.mark.parametrize("driver", ["erofs", "auto"])
def test_killed_workers_cost_readers_a_pause_and_nothing_else(driver: str) -> None:
    """As for FUSE, see `lab.killing`, but each image many times with a cold cache."""
    report = kill_workers(12, fs_driver=driver)
    assert (report.wrong, report.errors, report.stuck, report.said) == (0, 0, 0, [])
    assert report.reads > 100
    assert driver != "auto" or report.replaced


def test_killed_daemons_leave_no_wrong_byte_and_the_next_one_heals_the_mount() -> None:
    report = kill_everything(3)
    assert (report.wrong, report.errors, report.said) == (0, 0, [])


def test_what_was_asked_about_once_is_read_by_its_plain_path(tmp_path: Path) -> None:
    """A device that two mounts had before it was complete has a mark of its own, which outlives both in memory: the
    next mount opens the same file as the cache's."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(4)})
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        config = registry_config(server, tmp_path / "cache")
        for where in ("/a", "/b"):
            assert running.mount(where, image.bootstrap, config).status == 204
        assert read_all(running.mnt / "a") == digests(image)
        for where in ("/a", "/b"):  # before the data is on the disk, after which nothing would be asked
            assert running.umount(where).status == 204
        settle(tmp_path / "cache")
        assert running.mount("/c", image.bootstrap, config).status == 204
        assert list((tmp_path / "cache").glob(".erofs/files.*/.opened/*"))
        assert read_all(running.mnt / "c") == digests(image)


def test_death_of_every_process_gives_errors_and_never_zeros(tmp_path: Path) -> None:
    """A mount that a container still holds: what was fetched stays right, the rest is EIO, also the reader that waits
    at that moment. The next daemon, with the same image, heals that mount too."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE + 5000, n) for n in range(24)})
    expected = digests(image)
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        config = registry_config(server, tmp_path / "cache")
        assert running.mount("/a", image.bootstrap, config).status == 204
        with bound(running.mnt / "a", tmp_path / "held") as held:
            for name in ("f0", "f1"):
                assert hashlib.sha256((held / name).read_bytes()).hexdigest() == expected[name]
            settle(tmp_path / "cache")
            server.mode = "hang-headers"
            for name in ("f20", "f21", "f22"):  # a fetch may fail at once on a connection that just went
                with subprocess.Popen(
                    [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb').read()", held / name],
                    stderr=subprocess.PIPE,
                ) as waiting:
                    time.sleep(0.5)
                    if waiting.poll() is not None:
                        assert b"Input/output error" in waiting.communicate(timeout=60)[1]
                        continue
                    running.kill_all()
                    assert b"Input/output error" in waiting.communicate(timeout=60)[1]
                    break
            else:
                raise AssertionError(f"no reader waits for a source that hangs: {running.log_text()[-3000:]}")
            found = read_all(held)
            assert {found[name] for name in ("f20", "f21", "f22", "f23")} == {"EIO"}  # far from the read-ahead
            assert all(found[name] in ("EIO", expected[name]) for name in expected)
            assert found["f0"] == expected["f0"]
            server.mode = "ok"
            running.start()
            answer = running.mount("/a", image.bootstrap, config)
            assert answer.status == 204, running.log_text()[-3000:]
            assert read_all(held) == expected  # the old mount asks the new daemon
            assert read_all(running.mnt / "a") == expected


def test_cut_readers_errors_that_pass_and_umount(tmp_path: Path) -> None:
    """SIGKILL of a waiting reader ends it at once; a failed fetch is EIO and is tried again; umount ends who waits."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(4)})
    with faulty_server({image.blob_id: image.blob}, mode="hang-headers") as server, Nydusd(*ON) as running:
        assert running.mount("/a", image.bootstrap, registry_config(server, tmp_path / "cache")).status == 204
        code = "import sys; open(sys.argv[1], 'rb').read()"

        def start(name: str) -> subprocess.Popen[bytes]:
            path = running.mnt / "a" / name
            process = subprocess.Popen([sys.executable, "-c", code, path], stderr=subprocess.PIPE)
            wait_until(lambda: "fanotify" in Path(f"/proc/{process.pid}/wchan").read_text(), 60, "the reader to wait")
            return process

        with start("f0") as process:
            process.kill()
            process.wait(20)
        with start("f2") as process:
            assert running.umount("/a").status == 204
            assert b"Input/output error" in process.communicate(timeout=60)[1]
        server.mode = "500"
        assert running.mount("/a", image.bootstrap, registry_config(server, tmp_path / "cache")).status == 204
        assert set(read_all(running.mnt / "a").values()) == {"EIO"}
        server.mode = "wrong-bytes"
        assert set(read_all(running.mnt / "a").values()) == {"EIO"}
        server.mode = "ok"
        assert read_all(running.mnt / "a") == digests(image)


def test_prefetched_and_followed_segments_raise_no_events(tmp_path: Path) -> None:
    """After a prefetch of everything no read of a mounted image asks anybody: all processes may be stopped."""
    image = tiny_image(tmp_path, {f"f{n}": noise(3 * SEGMENT_SIZE, n) for n in range(3)})
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        extra = {"fs_prefetch": {"enable": True, "prefetch_all": True, "learn": False}}
        work = tmp_path / "cache"
        assert running.mount("/a", image.bootstrap, registry_config(server, work, **extra)).status == 204
        devices = marked_devices(work)
        assert devices
        wait_until(lambda: all(path.stat().st_size for path in devices), 60, "the prefetch")
        settle(work)
        with bound(running.mnt / "a", tmp_path / "held") as held:
            time.sleep(0.2)  # the mark goes at the sync
            pids = processes_mentioning(str(running.sock))
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                assert read_all(held) == digests(image)
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)


def test_upgrade_and_keepers_death_under_a_cold_mount(tmp_path: Path) -> None:
    """The group goes from worker to worker and from keeper to keeper."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(6)})
    expected = digests(image)

    def right(name: str) -> bool:
        code = "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
        return reader(code, running.mnt / "a" / name).stdout.strip() == expected[name]

    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        assert running.mount("/a", image.bootstrap, registry_config(server, tmp_path / "cache")).status == 204
        assert right("f0")
        worker = running.worker_pid
        assert running.call("PUT", "daemon/upgrade").status == 204
        wait_until(lambda: running.running() and running.worker_pid != worker, 20, "the upgraded worker")
        assert right("f2")
        keeper = running.get("daemon").body["keeper_pid"]
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: running.get("daemon").body["keeper_pid"] != keeper, 20, "the next keeper")
        worker = running.worker_pid
        kill_together([worker])
        wait_until(lambda: running.running() and running.worker_pid != worker, 20, "the next worker")
        assert right("f4")
        assert is_erofs(running.mnt / "a")
        assert read_all(running.mnt / "a") == expected
        os.kill(running.get("daemon").body["keeper_pid"], signal.SIGTERM)
        wait_until(lambda: not os.path.ismount(running.mnt), 60, "the umount")
        wait_until(lambda: not processes_mentioning(str(running.sock)), 60, "the end of all its processes")
