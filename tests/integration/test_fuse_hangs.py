"""What once stopped, or could stop, the whole daemon: each of these must cost one caller an error at most."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, reader, wait_until
from tests.lab.faulty import faulty_server
from tests.lab.process import unmount_below
from tests.lab.tiny import noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]


def test_files_below_the_own_mountpoint_are_refused(tmp_path: Path) -> None:
    """The daemon would wait for itself: for its cache's directory, its bootstrap's pages, its blobs."""
    image = tiny_image(tmp_path, {"small": b"hello\n"})
    with Nydusd() as daemon:
        link = tmp_path / "link"
        link.symlink_to(daemon.mnt)

        def config(blobs: Path, work: Path) -> str:
            device = {
                "backend": {"type": "localfs", "config": {"dir": str(blobs)}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
            }
            return json.dumps({"device": device, "mode": "direct"})

        good = config(image.bootstrap.parent, daemon.dir / "cache")
        assert daemon.mount("/good", image.bootstrap, good).status == 204
        for source, text in (
            (image.bootstrap, config(image.bootstrap.parent, daemon.mnt / "cache")),
            (image.bootstrap, config(image.bootstrap.parent, link / "good" / "cache")),
            (image.bootstrap, config(daemon.mnt / "good", daemon.dir / "cache")),
            (daemon.mnt / "good" / "small", good),
        ):
            answer = daemon.mount("/bad", source, text)
            assert answer.status == 500
            assert "own mountpoint" in answer.message
        listed = reader("import os, sys; print(os.listdir(sys.argv[1]))", daemon.mnt)
        assert listed.stdout == "['good']\n"
        code, seconds = daemon.stop()
        assert (code, seconds < 10) == (0, True)


@pytest.mark.parametrize("name", ["/\0", "/\ud800"])
def test_paths_that_no_file_can_have_are_refused_one_by_one(tmp_path: Path, name: str) -> None:
    """An image that was said to come under such a name ended the daemon, and beside it no other could be mounted."""
    image = tiny_image(tmp_path, {"f": b"hello\n"})
    (tmp_path / image.blob_id).write_bytes(image.blob)

    def body(source: str, blobs: str, work: str, **more: object) -> dict[str, object]:
        config = localfs_config(Path(blobs), work_dir=Path(work))
        return {"source": source, "fs_type": "rafs", "config": config, **more}

    boot, folder, work = str(image.bootstrap), str(tmp_path), str(tmp_path / "c")
    bad = [body(name, folder, work), body(boot, name, work), body(boot, folder, name)]
    with Nydusd("--fs-driver", "auto") as daemon:
        worker = daemon.worker_pid
        # a configuration is read at once; its image is opened behind the answer
        said = [daemon.call("POST", "mount/expected?mountpoint=/a", each) for each in bad]
        assert [answer.status for answer in said] == [204, 500, 500]
        assert "device.backend.config.dir: has a NUL or half a character" in said[1].message
        assert "work_dir: has a NUL or half a character" in said[2].message
        bad.append(body(boot, folder, work, prefetch_files=["/\ud800"]))
        mounts = [{"mountpoint": f"/{at}", **each} for at, each in enumerate([*bad, body(boot, folder, work)])]
        answer = daemon.call("POST", "mounts", mounts)
        assert answer.status == 200
        assert [said is None for said in answer.body] == [False, False, False, False, True]
        assert (daemon.mnt / "4" / "f").read_bytes() == b"hello\n"
        assert daemon.worker_pid == worker


def test_stacks_of_all_threads_and_tasks_by_signal_and_api() -> None:
    with Nydusd() as daemon:
        os.kill(daemon.worker_pid, signal.SIGUSR1)
        # faulthandler writes piece by piece, the innermost frame first; tasks come after it
        wait_until(lambda: "most recent call first" in daemon.log_text(), 60, "stacks in the log")
        wait_until(lambda: "_watch_signals" in daemon.log_text(), 60, "tasks in the log")
        assert daemon.running()
        told = daemon.get("daemon/stacks").body
        assert told["pid"] == daemon.worker_pid
        assert any("MainThread" in thread["name"] for thread in told["threads"])
        assert any(line.endswith(" _watch_signals") for task in told["tasks"] for line in task["stack"])
        command = [sys.executable, "-m", "nydusfs.daemon.ctl", "--sock", str(daemon.sock), "stacks"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        assert "thread MainThread" in shown
        assert "_watch_signals" in shown


def test_a_log_level_set_at_run_time_outlives_the_worker() -> None:
    with Nydusd() as daemon:
        assert daemon.log_text().count("Fuse daemon started!") == 1
        assert daemon.call("PUT", "daemon", {"log_level": "error"}).status == 204
        first = daemon.worker_pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: daemon.running() and daemon.worker_pid != first, 60, "another worker")
        assert daemon.log_text().count("Fuse daemon started!") == 1
        assert "died" in daemon.log_text() or "killed" in daemon.log_text()


def test_stop_ends_although_nobody_reads_the_log(tmp_path: Path) -> None:
    """stdout is a full pipe: the line that a stop writes blocks for ever, and so did the watchdog's own."""
    mountpoint = tmp_path / "m"
    mountpoint.mkdir()
    receiving, sending = os.pipe()
    daemon = subprocess.Popen(
        [sys.executable, "-m", "nydusfs.daemon.cli", "-M", str(mountpoint), "--rlimit-nofile", "0"],
        stdout=sending,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: os.path.ismount(mountpoint), 60, "the mount")
        os.set_blocking(sending, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(sending, b"x" * 65536)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(sending, b"x")
        os.set_blocking(sending, True)
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
        assert not os.path.ismount(mountpoint)
    finally:
        daemon.kill()
        daemon.wait(10)
        os.close(receiving)
        os.close(sending)
        unmount_below(tmp_path)


_PAGE = """
import hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
for chunk in map(int, sys.argv[2:]):
    print(hashlib.sha256(os.pread(fd, 4096, (chunk << 20) + 4096)).hexdigest(), flush=True)
"""


def test_a_registry_that_hangs_holds_up_nobody_but_who_waits_for_it(tmp_path: Path) -> None:
    """Readers' threads ask it by themselves; the others go on, who is killed ends, and who waits gets right bytes."""
    data = noise(24 << 20)
    image = tiny_image(tmp_path, {"a": data})

    def page(chunk: int) -> str:
        return hashlib.sha256(data[(chunk << 20) + 4096 : (chunk << 20) + 8192]).hexdigest()

    settings = {"scheme": "http", "repo": "a/b", "timeout": 5, "retry_limit": 4}
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd() as daemon:
        backend = {"type": "registry", "config": {**settings, "host": server.netloc}}
        cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
        text = json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"})
        assert daemon.mount("/x", image.bootstrap, text).status == 204
        file = daemon.mnt / "x" / "a"
        known = list(range(0, 24, 2))
        assert reader(_PAGE, file, *map(str, known)).stdout.split() == [page(chunk) for chunk in known]
        server.mode = "hang-headers"
        waiting = [
            subprocess.Popen([sys.executable, "-c", _PAGE, str(file), str(chunk)], stdout=subprocess.PIPE, text=True)
            for chunk in (1, 5, 9, 13)
        ]
        try:
            wait_until(lambda: len(server.data_requests) >= len(known) + 2, 60, "requests that hang")
            # other pages of what is cached: these come to the daemon
            code = _PAGE.replace("+ 4096)", "+ 8192)")
            assert len(reader(code, file, *map(str, known)).stdout.split()) == len(known)
            waiting[0].kill()
            waiting[0].wait(20)
            server.mode = "ok"
            for chunk, process in zip((5, 9, 13), waiting[1:], strict=True):
                output, _ = process.communicate(timeout=60)
                assert output.split() == [page(chunk)]
        finally:
            for process in waiting:
                process.kill()
                process.wait(20)
        assert reader(_PAGE, file, "1").stdout.split() == [page(1)]
