"""What mount, umount, signals and sudden death do to whoever reads: an errno in bounded time, never a hang."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import Answer, Nydusd, can_mount_fuse, localfs_config, reader, wait_until
from tests.lab.drivers import both
from tests.lab.mounted import check_mount
from tests.lab.process import mounts_below, unmount_below, work_dir

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

BIG_READ = "import sys; d = open(sys.argv[1], 'rb').read(); print(len(d))"


@contextmanager
def silent_registry() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for connection in kept:
                connection.close()


def silent_config(port: int, work: Path) -> str:
    registry = {"scheme": "http", "host": f"127.0.0.1:{port}", "repo": "a/b", "timeout": 600, "connect_timeout": 600}
    return json.dumps(
        {
            "device": {
                "backend": {"type": "registry", "config": registry},
                "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
            },
            "mode": "direct",
        }
    )


def start_reader(path: Path) -> subprocess.Popen[str]:
    """A process that reads one file and prints the errno it got, or 0."""
    code = "import sys\ntry:\n open(sys.argv[1], 'rb').read(); print(0)\nexcept OSError as e: print(e.errno)"
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


READ = {"x86_64": "0", "aarch64": "63"}[os.uname().machine]  # the number of read(2)


def reads(pid: int, folder: Path) -> bool:
    """Whether a process is in read(2) of a file below a folder."""
    try:
        words = Path(f"/proc/{pid}/syscall").read_text().split()
        return words[0] == READ and os.readlink(f"/proc/{pid}/fd/{int(words[1], 16)}").startswith(f"{folder}/")
    except (OSError, LookupError):
        return False  # it runs, or has just closed what it read


def blocked(daemon: Nydusd, count: int = 1, *readers: subprocess.Popen[str]) -> None:
    """`count` requests wait, and all these processes wait for bytes: several wait for one page."""
    wait_until(lambda: len(daemon.get("metrics/inflight").body or []) >= count, 60, f"{count} blocked readers")
    wait_until(lambda: all(reads(one.pid, daemon.mnt) for one in readers), 60, "readers in read(2)")


def first_file(case: Path) -> str:
    manifest = json.loads((case / "manifest.json").read_text())
    return next(e["path"] for e in manifest["entries"] if e["type"] == "file" and e.get("size", 0) > 1000)


MERGED = "v6-merged3"


@both
def test_nested_mountpoint_comes_goes_and_comes_back_at_once() -> None:
    case, other = image_case(MERGED), image_case("v5-merged3")
    with Nydusd() as daemon:
        where = daemon.mnt / "a" / "b" / "c"
        for round_number in range(3):
            chosen = other if round_number % 2 else case
            assert daemon.mount("/a/b/c", chosen / "image.boot", localfs_config(chosen)).status == 204
            assert check_mount(chosen, where) == []
            again = daemon.mount("/a/b/c", case / "image.boot", localfs_config(case))
            assert again.status == 500
            assert again.message == 'Mount(MountFilesystem(Other("object or filesystem already exists")))'
            below = daemon.mount("/a/b/c/d", case / "image.boot", localfs_config(case))
            assert below.status == 500, "an image below an image cannot be seen"
            assert daemon.umount("/a/b/c").status == 204
            assert not where.exists()
        gone = daemon.umount("/a/b/c")
        assert gone.status == 500
        assert gone.message == 'Mount(MountFilesystem(Other("object or filesystem doesn\'t exist")))'


def test_three_hundred_mounts_and_umounts_of_different_images() -> None:
    """More than upstream's 255 indexes; each image is told from its predecessor at the same place at once."""
    case, other = image_case(MERGED), image_case("v6-zstd-blake3-1m")
    first, second = first_file(case), first_file(other)
    with Nydusd() as daemon:
        configs = {case: localfs_config(case), other: localfs_config(other)}
        for number in range(300):
            chosen, name, foreign = (other, second, first) if number % 2 else (case, first, second)
            at = "/same" if number < 200 else f"/{number}"
            assert daemon.mount(at, chosen / "image.boot", configs[chosen]).status == 204
            root = daemon.mnt / at[1:]
            assert (root / name[1:]).stat().st_size > 1000
            assert not (root / foreign[1:]).exists()
            if number % 50 == 0:
                assert check_mount(chosen, root) == []
            if number < 200:
                assert daemon.umount(at).status == 204
                assert not root.exists()
        assert len(os.listdir(daemon.mnt)) == 100
        grown = daemon.memory()
        for number in range(200, 300):
            assert daemon.umount(f"/{number}").status == 204
        assert os.listdir(daemon.mnt) == []
        assert grown < 64 * 1024, f"{grown} kB after 300 mounts"


def test_a_thousand_images_at_once() -> None:
    case = image_case("v6-no-data")
    with Nydusd() as daemon:
        config = localfs_config(case)
        for number in range(1000):
            assert daemon.mount(f"/{number}", case / "image.boot", config).status == 204
        assert len(os.listdir(daemon.mnt)) == 1000
        for number in (0, 254, 255, 256, 999):
            assert check_mount(case, daemon.mnt / str(number)) == []


@both
def test_open_files_of_an_unmounted_image_never_show_the_next_one() -> None:
    case, other = image_case(MERGED), image_case("v6-zstd-blake3-1m")
    with Nydusd() as daemon:
        erofs = daemon.driver == "erofs"
        assert daemon.mount("/x", other / "image.boot", localfs_config(other)).status == 204
        path = daemon.mnt / "x" / first_file(other)[1:]
        before = os.open(path, os.O_RDONLY)
        cwd = os.open(daemon.mnt / "x", os.O_RDONLY | os.O_DIRECTORY)
        names = os.listdir(daemon.mnt / "x") if erofs else []  # FUSE's listing must come from the daemon
        try:
            assert daemon.umount("/x").status == 204
            assert daemon.mount("/x", case / "image.boot", localfs_config(case)).status == 204
            # In processes of their own: the file's pages were never read, so the answer must come from the daemon.
            for fd, code in ((before, f"os.pread({before}, 4096, 0)"), (cwd, f"os.listdir({cwd})")):
                done = subprocess.run(
                    [sys.executable, "-c", f"import os\ntry:\n print({code})\nexcept OSError as e: print(e.errno)"],
                    capture_output=True, text=True, timeout=20, pass_fds=[fd],
                )  # fmt: skip
                if not erofs:
                    assert done.stdout.strip() == str(errno.ESTALE), done
                elif fd == before:  # its mount is there until it is closed, and nobody who fetches for it
                    assert done.stdout.strip() == str(errno.EIO), done
                else:
                    assert sorted(ast.literal_eval(done.stdout)) == sorted(names), done
        finally:
            os.close(before)
            os.close(cwd)
        assert check_mount(case, daemon.mnt / "x") == []


@both
def test_root_image_replaced_through_the_api_leaves_nothing_of_the_old_one() -> None:
    """Names that were absent in the old root must be found in the new one: the kernel remembers absences for good."""
    case, other = image_case(MERGED), image_case("v6-zstd-blake3-1m")
    with Nydusd() as daemon:
        assert daemon.mount("/", other / "image.boot", localfs_config(other)).status == 204
        top = {entry.name for entry in os.scandir(daemon.mnt)}
        assert check_mount(other, daemon.mnt) == []
        wanted = {e["path"][1:] for e in json.loads((case / "manifest.json").read_text())["entries"]} - {""}
        assert not any((daemon.mnt / name).exists() for name in wanted - top if "/" not in name)
        assert daemon.umount("/").status == 204
        assert os.listdir(daemon.mnt) == []
        assert daemon.mount("/", case / "image.boot", localfs_config(case)).status == 204
        assert check_mount(case, daemon.mnt) == []
        assert daemon.remount("/", other / "image.boot", localfs_config(other)).status == 204
        assert check_mount(other, daemon.mnt) == []


@both
def test_failed_mounts_leave_nothing_and_name_the_cause(tmp_path: Path) -> None:
    case = image_case(MERGED)
    cut = tmp_path / "cut.boot"
    cut.write_bytes((case / "image.boot").read_bytes()[:5000])
    with Nydusd() as daemon:
        for source, config, word in [
            (tmp_path / "nope.boot", localfs_config(case), "nope.boot"),
            (cut, localfs_config(case), "cut.boot"),
            (case / "image.boot", "{}", "device"),
            (case / "image.boot", "not json", "JSON"),
            (case / "manifest.json", localfs_config(case), "manifest.json"),
        ]:
            answer = daemon.mount("/x", source, config)
            assert answer.status == 500
            assert answer.message.startswith("Mount(MountFilesystem(Other(")
            assert word in answer.message, answer.message
            assert "Traceback" not in daemon.log_text()
        assert os.listdir(daemon.mnt) == []
        assert daemon.mount("/x", case / "image.boot", localfs_config(case)).status == 204
        assert check_mount(case, daemon.mnt / "x") == []


@both
def test_who_asks_for_a_mountpoint_that_is_being_changed_waits_and_is_told_the_truth(tmp_path: Path) -> None:
    case = image_case(MERGED)
    slow = tmp_path / "slow.boot"  # is opened when somebody writes it, and then holds nothing
    os.mkfifo(slow)
    config = localfs_config(case)
    with Nydusd() as daemon, ThreadPoolExecutor(2) as pool:

        def under_way(ask: Callable[[], Answer], where: str) -> Future[Answer]:
            asked = pool.submit(ask)
            wait_until(lambda: asked.done() or where in str(daemon.get("daemon/stacks").body), 60, where)
            return asked

        def go_on() -> None:
            os.close(os.open(slow, os.O_WRONLY | os.O_NONBLOCK))

        failing = under_way(lambda: daemon.mount("/x", slow, config), " open_bootstrap")
        second = under_way(lambda: daemon.mount("/x", case / "image.boot", config), " _claim")
        go_on()
        assert "slow.boot" in failing.result(60).message
        assert second.result(60).status == 204
        assert check_mount(case, daemon.mnt / "x") == []
        assert daemon.umount("/x").status == 204
        failing = under_way(lambda: daemon.mount("/x", slow, config), " open_bootstrap")
        removal = under_way(lambda: daemon.umount("/x"), " _claim")
        go_on()
        assert failing.result(60).status == 500
        assert removal.result(60).message == 'Mount(MountFilesystem(Other("object or filesystem doesn\'t exist")))'


@both
def test_umount_ends_blocked_readers_with_an_error_and_spares_the_others(tmp_path: Path) -> None:
    case = image_case(MERGED)
    with silent_registry() as port, Nydusd() as daemon:
        config = silent_config(port, tmp_path / "cache")
        began = time.monotonic()
        assert daemon.mount("/dead", case / "image.boot", config).status == 204
        assert time.monotonic() - began < 60, "a mount does not wait for the network"
        assert daemon.mount("/good", case / "image.boot", localfs_config(case)).status == 204
        readers = [start_reader(daemon.mnt / "dead" / first_file(case)[1:]) for _ in range(4)]
        blocked(daemon, 1, *readers)
        assert check_mount(case, daemon.mnt / "good") == []
        began = time.monotonic()
        assert daemon.umount("/dead").status == 204
        assert time.monotonic() - began < 60, "nor does a umount"
        for waiting in readers:
            output, _ = waiting.communicate(timeout=60)
            assert int(output) in (errno.EIO, errno.ESTALE)
        assert check_mount(case, daemon.mnt / "good") == []
        assert daemon.get("metrics/inflight").status == 204


@both
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "exit", "SIGKILL"])
def test_the_end_of_the_daemon_ends_blocked_readers(tmp_path: Path, how: str) -> None:
    case = image_case(MERGED)
    with silent_registry() as port, Nydusd() as daemon:
        erofs = daemon.driver == "erofs"
        assert daemon.mount("/dead", case / "image.boot", silent_config(port, tmp_path / "cache")).status == 204
        readers = [start_reader(daemon.mnt / "dead" / first_file(case)[1:]) for _ in range(3)]
        blocked(daemon, 1, *readers)
        began = time.monotonic()
        if how == "exit":
            assert daemon.call("PUT", "daemon/exit").status == 204
            assert daemon.child is not None
            assert daemon.child.process.wait(60) == 0
        elif how == "SIGKILL":
            daemon.kill_all()
        else:
            assert daemon.stop(getattr(signal, how), 60)[0] == 0
        seen = {int(waiting.communicate(timeout=60)[0]) for waiting in readers}
        dead = {errno.ENOTCONN, errno.ECONNABORTED}
        if erofs or how != "SIGKILL":
            assert errno.EIO in seen
            seen.remove(errno.EIO)
        # who waited for a page that another one had asked for asks himself then, perhaps when nobody is there any more
        assert seen <= (set() if erofs else dead), seen
        assert time.monotonic() - began < 60
        left = mounts_below(daemon.mnt)
        if how in ("exit", "SIGKILL"):  # the kernel keeps the mount, for a successor
            kept = [str(daemon.mnt)]
            if erofs:
                kept.append(f"{daemon.mnt}/dead")
            assert sorted(left) == kept
            done = reader("import os, sys; os.listdir(sys.argv[1])", daemon.mnt)
            assert "Transport endpoint" in done.stderr
        else:
            assert left == []
        assert daemon.sock.exists() == (how == "SIGKILL")


@both
def test_a_new_daemon_serves_where_a_killed_one_left_its_mount() -> None:
    case = image_case(MERGED)
    with Nydusd() as daemon:
        for _ in range(2):
            assert daemon.mount("/x", case / "image.boot", localfs_config(case)).status == 204
            daemon.kill_all()
            assert daemon.sock.exists()
            daemon.start()
            assert os.listdir(daemon.mnt) == []
            assert mounts_below(daemon.mnt) == [str(daemon.mnt)]
        assert "a dead daemon's mount at" in daemon.log_text()


def test_umount_from_outside_ends_the_daemon_also_when_idle() -> None:
    with Nydusd() as daemon:
        subprocess.run(["umount", "-l", str(daemon.mnt)], check=True, timeout=10)
        assert daemon.child is not None
        assert daemon.child.process.wait(60) == 0
        assert not daemon.sock.exists()


def test_a_second_daemon_is_refused_and_the_first_goes_on() -> None:
    case = image_case(MERGED)
    with Nydusd() as daemon:
        assert daemon.mount("/x", case / "image.boot", localfs_config(case)).status == 204
        other = work_dir()
        try:
            for arguments, word in [
                (["-M", str(other), "-A", str(daemon.sock)], f"served by a living instance (pid {daemon.worker_pid})"),
                (["-M", str(daemon.mnt), "-A", str(other / "b.sock")], "a living process already serves"),
            ]:
                done = run_nydusd(*arguments)
                assert done.returncode == 1
                assert word in done.stderr
                assert len(done.stderr.splitlines()) == 1
        finally:
            os.rmdir(other)
        assert check_mount(case, daemon.mnt / "x") == []


def run_nydusd(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "nydusfs.daemon.cli", "fuse", *arguments],
        capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip


def test_every_refusal_to_start_is_one_line_and_status_one(tmp_path: Path) -> None:
    case = image_case(MERGED)
    mnt = tmp_path / "m"
    mnt.mkdir()
    plain = tmp_path / "file"
    plain.write_text("x")
    bad = tmp_path / "bad.json"
    bad.write_text('{"device": {"backend": {"type": 7}}}')
    cut = tmp_path / "cut.boot"
    cut.write_bytes((case / "image.boot").read_bytes()[:9000])
    boot = str(case / "image.boot")
    for arguments, word in [
        (["-M", str(tmp_path / "nope")], "does not exist"),
        (["-M", str(plain)], "is not a directory"),
        (["-M", str(mnt), "-B", boot], "--config and --localfs-dir are missing"),
        (["-M", str(mnt), "-B", boot, "-C", str(tmp_path / "no.json")], "no.json"),
        (["-M", str(mnt), "-B", boot, "-C", str(bad)], "device.backend.type"),
        (["-M", str(mnt), "-B", str(cut), "-D", str(tmp_path)], "cut.boot"),
        (["-M", str(mnt), "-A", str(plain)], "not a socket"),
        (["-M", str(mnt), "-A", str(tmp_path / "no" / "dir.sock")], "dir.sock"),
    ]:
        done = run_nydusd(*arguments)
        assert done.returncode == 1, (arguments, done)
        assert word in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert mounts_below(mnt) == []


def test_missing_fuse_device_and_missing_root_are_said(tmp_path: Path) -> None:
    mnt = tmp_path / "m"
    mnt.mkdir()
    program = f"{sys.executable} -m nydusfs.daemon.cli fuse -M {mnt}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec {program}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "/dev/fuse does not exist" in done.stderr
    # Everything is imported before the privileges go: the interpreter may lie where only root can read.
    code = "\n".join([
        f"import os, sys; sys.argv[1:] = ['-M', {str(mnt)!r}]",
        "import difflib, nydusfs.daemon.logs, nydusfs.daemon.service, nydusfs.daemon.version",
        "from nydusfs.daemon.cli import main",
        "os.setgid(65534); os.setuid(65534); main()",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    assert "must run as root" in done.stderr


@both
def test_sigterm_under_load_is_quick_and_clean() -> None:
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd() as daemon:
        for number in range(4):
            assert daemon.mount(f"/{number}", case / "image.boot", localfs_config(case)).status == 204
        walkers = [
            subprocess.Popen(
                ["sh", "-c", "while tar cf - . | cat >/dev/null; do [ -e . ] || exit; done"],
                cwd=daemon.mnt / str(number), stderr=subprocess.DEVNULL, start_new_session=True,
            )
            for number in range(4)
        ]  # fmt: skip
        try:
            time.sleep(1.5)
            code, seconds = daemon.stop()
            assert code == 0
            assert seconds < 10
            assert mounts_below(daemon.mnt) == []
            assert "unexpected" not in daemon.log_text()
            assert "internal error" not in daemon.log_text()
        finally:
            for walker in walkers:
                os.killpg(walker.pid, signal.SIGKILL)
                walker.wait(10)


@both
def test_a_container_root_on_top_keeps_set_uid_programs_and_devices_working(tmp_path: Path) -> None:
    """Our mount is nosuid and nodev; overlayfs above it judges by its own flags."""
    case = image_case("v6-zstd-blake3-1m")
    entries = json.loads((case / "manifest.json").read_text())["entries"]
    device = next(e for e in entries if e["type"] == "char" and e["rdev"] == [1, 3])
    with Nydusd() as daemon:
        assert daemon.mount("/x", case / "image.boot", localfs_config(case)).status == 204
        for name in ("u", "w", "o"):
            (daemon.dir / name).mkdir()
        merged = daemon.dir / "o"
        options = f"lowerdir={daemon.mnt}/x,upperdir={daemon.dir}/u,workdir={daemon.dir}/w"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True, timeout=20)
        try:
            done = reader("import sys; open(sys.argv[1], 'wb').write(b'x'); print('ok')", merged / device["path"][1:])
            assert done.stdout == "ok\n", done.stderr
            done = reader("import sys; open(sys.argv[1], 'wb').write(b'x')", daemon.mnt / "x" / device["path"][1:])
            assert "Permission denied" in done.stderr or "Read-only" in done.stderr
            assert reader("import sys; print(open(sys.argv[1]+'/new','w').write('x'))", merged).stdout == "1\n"
        finally:
            unmount_below(merged)


MANY_READERS = """
import collections, os, sys, threading
names = [os.path.join(a, f) for a, _, files in os.walk(sys.argv[1]) for f in files]
names = [n for n in names if not os.path.islink(n) and os.path.isfile(n) and os.stat(n).st_size][:400]
outcome = []
def read(name):
    try:
        outcome.append(len(open(name, 'rb').read()))
    except OSError as error:
        outcome.append(-error.errno)
threads = [threading.Thread(target=read, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(names), *collections.Counter(outcome))
"""


@both
def test_four_hundred_blocked_readers_of_one_image_do_not_slow_another(tmp_path: Path) -> None:
    """Upstream's daemon stands still with as many blocked reads as it has threads (4)."""
    case, other = image_case("v6-bigdir-prefetch-fs"), image_case(MERGED)
    with silent_registry() as port, Nydusd() as daemon:
        assert daemon.mount("/dead", case / "image.boot", silent_config(port, tmp_path / "cache")).status == 204
        crowd = subprocess.Popen(
            [sys.executable, "-c", MANY_READERS, str(daemon.mnt / "dead")], stdout=subprocess.PIPE, text=True
        )
        blocked(daemon, 400)
        began = time.monotonic()
        assert daemon.mount("/good", other / "image.boot", localfs_config(other)).status == 204
        assert check_mount(other, daemon.mnt / "good") == []
        assert time.monotonic() - began < 60
        assert daemon.umount("/dead").status == 204
        output, _ = crowd.communicate(timeout=60)
        count, *errors = map(int, output.split())
        assert count == 400
        assert set(errors) <= {-errno.EIO, -errno.ESTALE}


@both
def test_everything_on_the_command_line(tmp_path: Path) -> None:
    """A version 2 TOML configuration, a place inside the tree, a prefetch list, a rotated log file, a cache kept."""
    case = image_case(MERGED)
    config = tmp_path / "c.toml"
    config.write_text(
        f'version = 2\nid = "boot"\n[backend]\ntype = "localfs"\n[backend.localfs]\ndir = "{case}"\n'
        f'[cache]\ntype = "filecache"\n[cache.filecache]\nwork_dir = "{tmp_path}/cache"\n'
        "[rafs.prefetch]\nenable = true\nthreads = 2\n"
    )
    wanted = tmp_path / "list"
    wanted.write_text("\n/\n\n")
    log = tmp_path / "logs" / "nydusd"
    arguments = [
        *("-B", str(case / "image.boot"), "-C", str(config), "-m", "/in/side", "--prefetch-files", str(wanted)),
        *("-L", str(log), "--log-rotation-size", "1", "--log-level", "debug", "--fuse-threads", "2"),
        *("--failover-policy", "flush", "--id", "boot-1"),
    ]
    with Nydusd(*arguments) as daemon:
        assert check_mount(case, daemon.mnt / "in" / "side") == []
        assert daemon.get("daemon").body["id"] == "boot-1"
        wait_until(lambda: daemon.get("metrics/blobcache?id=boot").body["prefetch_requests_count"] > 0, 30, "prefetch")
        assert daemon.log_text() == "", "nothing on stdout when there is a log file"
        text = log.with_suffix(".log").read_text()
        assert "Rafs filesystem mounted at /in/side" in text
        assert any((tmp_path / "cache").rglob("*"))
