"""Death and replacement under a running mount: of the worker, the keeper, the zygote, and by upgrade or supervisor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest

from nydusfs.cache.devices import device_key
from nydusfs.daemon.handover import decode
from tests.lab.cases import case as image_case
from tests.lab.cgroups import Group, no_groups
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, reader, wait_until
from tests.lab.drivers import both
from tests.lab.erofs import cannot_mount_erofs
from tests.lab.faulty import faulty_server
from tests.lab.killing import kill_workers
from tests.lab.mounted import check_mount
from tests.lab.process import (
    LabError,
    matching,
    mounts_below,
    processes_mentioning,
    remove_tree,
    unmount_below,
    work_dir,
)
from tests.lab.served import some_file
from tests.lab.tiny import noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]
CASE = "v6-zstd-blake3-1m"


def test_killed_workers_cost_readers_a_pause_and_nothing_else() -> None:
    """Three images, eight readers that verify all they read, prefetch on, a mirror that lies: see `lab.killing`."""
    report = kill_workers(40)
    assert (report.wrong, report.errors, report.stuck, report.said) == (0, 0, 0, [])
    assert report.reads > 1000


@pytest.mark.parametrize("driver", ["fuse", "erofs"])
def test_workers_killed_while_their_threads_fetch_from_a_directory(driver: str) -> None:
    """Cold mounts all the while, each of whose segments the thread that answers its reader decodes and writes."""
    if driver == "erofs" and (reason := cannot_mount_erofs()):
        pytest.skip(reason)
    report = kill_workers(20, fs_driver=driver, local=True)
    assert (report.wrong, report.errors, report.stuck, report.said) == (0, 0, 0, [])
    assert report.reads > 500


def info(daemon: Nydusd) -> dict[str, int]:
    body = daemon.get("daemon").body
    return {name: body[name] for name in ("keeper_pid", "worker_pid")}


def hurried(pid: int) -> bool:
    """Whether one of its threads is of the real-time class."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # some end for want of work
            found.add(os.sched_getscheduler(int(thread)))
    return bool(found - {os.SCHED_OTHER})


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def settled(daemon: Nydusd, before: dict[str, int], *names: str) -> dict[str, int]:
    """Once these have other pids."""
    try:
        wait_until(
            lambda: daemon.running() and all(info(daemon)[name] != before[name] for name in names), 60, "the successor"
        )
    except LabError as error:
        raise LabError(f"{error}; the end of its log:\n{daemon.log_text()[-3000:]}") from None
    return info(daemon)


def test_the_next_worker_needs_no_new_token(tmp_path: Path) -> None:
    """What one worker was given the next ones have, also the one behind a worker that read nothing."""
    image = tiny_image(tmp_path, {name: noise(1 << 20, number) for number, name in enumerate("abc")})
    with (
        faulty_server({image.blob_id: image.blob}, auth="bearer", login="robot:pw") as registry,
        Nydusd() as daemon,
    ):
        backend = {"scheme": "http", "host": registry.netloc, "repo": "a/b", "auth": "cm9ib3Q6cHc="}
        config = {
            "device": {"backend": {"type": "registry", "config": backend}}, "mode": "direct",
            "fs_prefetch": {"enable": False, "learn": False},
        }  # fmt: skip
        assert daemon.mount("/", image.bootstrap, json.dumps(config)).status == 204
        assert (daemon.mnt / "a").read_bytes() == noise(1 << 20, 0)
        given, asked = len(registry.tokens), len(registry.data_requests)
        for _ in range(2):
            before = info(daemon)
            os.kill(before["worker_pid"], signal.SIGKILL)
            settled(daemon, before, "worker_pid")
        assert (daemon.mnt / "b").read_bytes() == noise(1 << 20, 1)
        assert len(registry.tokens) == given
        later = registry.data_requests[asked:]
        assert later and all(request.headers.get("authorization", "").startswith("Bearer ") for request in later)
        registry.valid_tokens.clear()  # taken back: asked for again as ever
        assert (daemon.mnt / "c").read_bytes() == noise(1 << 20, 2)
        assert len(registry.tokens) > given


@both
def test_the_next_worker_has_the_credentials_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tiny_image(tmp_path, {name: noise(1 << 20, number) for number, name in enumerate("ab")})
    monkeypatch.setenv("IMAGE_PULL_AUTH", "cm9ib3Q6cHc=")
    with faulty_server({image.blob_id: image.blob}, auth="basic", login="robot:pw") as registry:
        backend = {"scheme": "http", "host": registry.netloc, "repo": "a/b"}
        cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
        device = {"backend": {"type": "registry", "config": backend}, "cache": cache}
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"device": device, "mode": "direct"}))
        with Nydusd("-C", config, "-B", image.bootstrap, "-m", "/img/") as daemon:  # as good as /img
            assert (daemon.mnt / "img" / "a").read_bytes() == noise(1 << 20, 0)
            before = info(daemon)
            os.kill(before["worker_pid"], signal.SIGKILL)
            settled(daemon, before, "worker_pid")
            assert (daemon.mnt / "img" / "b").read_bytes() == noise(1 << 20, 1)


def test_any_process_may_die_and_open_files_go_on(tmp_path: Path) -> None:
    case = image_case(CASE)
    with Nydusd() as daemon:
        assert daemon.mount("/a/b", case / "image.boot", localfs_config(case, work_dir=tmp_path)).status == 204
        first = info(daemon)
        assert first["keeper_pid"] == daemon.pid
        hidden = oom_score(daemon.pid)  # -999 where that is allowed
        first_in_line = hurried(daemon.pid)  # where that is, too
        assert not hurried(first["worker_pid"])
        listed = sorted(os.listdir(daemon.mnt / "a" / "b"))
        with subprocess.Popen(["sleep", "60"], cwd=daemon.mnt / "a" / "b") as inside:
            try:
                os.kill(first["worker_pid"], signal.SIGKILL)
                second = settled(daemon, first, "worker_pid")
                assert second["keeper_pid"] == first["keeper_pid"]
                wait_until(lambda: not hurried(second["worker_pid"]), 60, "the end of its haste")
                os.kill(second["keeper_pid"], signal.SIGKILL)
                third = settled(daemon, second, "keeper_pid")
                assert third["worker_pid"] == second["worker_pid"]
                wait_until(lambda: oom_score(third["keeper_pid"]) == hidden, 60, "the new keeper's start")
                assert oom_score(third["worker_pid"]) == 0
                wait_until(lambda: hurried(third["keeper_pid"]) == first_in_line, 60, "its haste")
                assert not hurried(third["worker_pid"])
                # the new keeper keeps as well as the old one; and without its zygote too
                helpers = set(processes_mentioning(str(daemon.sock))) - set(third.values())
                for pid in helpers:
                    with suppress(ProcessLookupError):  # one that made an image has ended
                        os.kill(pid, signal.SIGKILL)
                os.kill(third["worker_pid"], signal.SIGKILL)
                fourth = settled(daemon, third, "worker_pid")
                assert sorted(os.listdir(f"/proc/{inside.pid}/cwd/")) == listed
                assert check_mount(case, daemon.mnt / "a" / "b") == []
                # mounts made and removed after a death are kept like those from before
                assert daemon.mount("/a/c", case / "image.boot", localfs_config(case)).status == 204
                assert daemon.umount("/a/b").status == 204
                os.kill(fourth["worker_pid"], signal.SIGKILL)
                settled(daemon, fourth, "worker_pid")
                assert os.listdir(daemon.mnt / "a") == ["c"]
                assert check_mount(case, daemon.mnt / "a" / "c") == []
            finally:
                inside.kill()
        os.kill(info(daemon)["keeper_pid"], signal.SIGTERM)
        wait_until(lambda: not os.path.ismount(daemon.mnt), 30, "the umount")
        wait_until(lambda: not processes_mentioning(str(daemon.sock)), 30, "the end of all its processes")


def test_a_worker_that_dies_before_its_new_keeper_is_there_is_followed_too(tmp_path: Path) -> None:
    """Keeper, zygote and worker die one after the other, each as early as the last death can be answered for."""
    case = image_case(CASE)
    with Nydusd() as daemon:
        assert daemon.mount("/a", case / "image.boot", localfs_config(case, work_dir=tmp_path)).status == 204
        for pause in (0.0, 0.01, 0.03, 0.1, 0.3):
            before = info(daemon)
            helpers = set(processes_mentioning(str(daemon.sock))) - set(before.values())
            os.kill(before["keeper_pid"], signal.SIGKILL)
            for pid in helpers:
                with suppress(ProcessLookupError):  # it ends with its keeper
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda before=before: info(daemon)["keeper_pid"] != before["keeper_pid"], 60, "a keeper's start")
            time.sleep(pause)
            os.kill(before["worker_pid"], signal.SIGKILL)
            settled(daemon, before, "worker_pid", "keeper_pid")
            assert check_mount(case, daemon.mnt / "a") == []


@pytest.mark.parametrize("which", ["first", "next"])
def test_a_signal_at_any_moment_of_a_workers_start_ends_all_processes(tmp_path: Path, which: str) -> None:
    """A second one, too, which has a mount to remove."""
    image = tiny_image(tmp_path, {"f": b"content"})
    for number in range(8):
        daemon = Nydusd()
        try:
            if which == "first":
                daemon.start(ready=False)
                wait_until(lambda daemon=daemon: len(processes_mentioning(str(daemon.sock))) >= 2, 60, "the zygote")
                time.sleep(number * 0.04)
            else:
                daemon.start()
                assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path)).status == 204
                os.kill(daemon.worker_pid, signal.SIGKILL)
                time.sleep(number * 0.008)
            assert daemon.stop((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[number % 3])[0] == 0
            wait_until(lambda daemon=daemon: not processes_mentioning(str(daemon.sock)), 60, "the end of all")
            assert mounts_below(daemon.dir) == []
        finally:
            daemon.__exit__()


@pytest.mark.skipif(no_groups("pids") != "", reason=no_groups("pids"))
@pytest.mark.parametrize("who", ["worker", "zygote"])
def test_a_node_without_room_for_a_process_has_its_readers_wait_and_not_for_ever(tmp_path: Path, who: str) -> None:
    """As long as no worker can be started; the keeper tries again."""
    image = tiny_image(tmp_path, {"f": b"content"})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    with Group("pids") as group, Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path)).status == 204
        before = info(daemon)
        pids = processes_mentioning(str(daemon.sock))
        group.add(pids)
        group.limit_processes(1)
        if who == "zygote":
            for pid in {*pids} - {*before.values()}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
        os.kill(before["worker_pid"], signal.SIGKILL)
        time.sleep(1)
        group.limit_processes(None)
        code = "import sys; print(open(sys.argv[1]).read())"
        assert reader(code, daemon.mnt / "a" / "f", timeout=60).stdout == "content\n"
        assert settled(daemon, before, "worker_pid")["keeper_pid"] == before["keeper_pid"]


@pytest.mark.skipif(no_groups("pids") != "", reason=no_groups("pids"))
def test_a_node_without_room_for_a_process_gets_its_next_keeper_later(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, {"f": b"content"})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    with Group("pids") as group, Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path)).status == 204
        before = info(daemon)
        group.add(processes_mentioning(str(daemon.sock)))
        group.limit_processes(1)
        os.kill(before["keeper_pid"], signal.SIGKILL)
        wait_until(lambda: "no new keeper" in daemon.log.read_text(), 60, "the first attempt")
        group.limit_processes(None)
        after = settled(daemon, before, "keeper_pid")
        os.kill(after["worker_pid"], signal.SIGKILL)
        assert (daemon.mnt / "a" / "f").read_bytes() == b"content"


def test_what_a_worker_showed_and_did_not_save_is_taken_for_no_other_image(tmp_path: Path) -> None:
    """The kernel knows its names for good: the next image under their numbers would have been shown by its pages."""
    one, two = (tiny_image(tmp_path, {"f": text * 9, "d/f": text}) for text in (b"one", b"two"))
    for image in (one, two):
        (tmp_path / image.blob_id).write_bytes(image.blob)
    config = localfs_config(tmp_path)
    mounts = [
        {"mountpoint": at, "source": str(one.bootstrap), "fs_type": "rafs", "config": config}
        for at in ["/a", *(f"/n{number}" for number in range(400))]
    ]
    with Nydusd("--fs-driver", "fuse") as daemon:
        before = info(daemon)

        def mount() -> None:
            with suppress(OSError):
                daemon.call("POST", "mounts", mounts)

        thread = threading.Thread(target=mount)
        thread.start()
        wait_until(lambda: (daemon.mnt / "a" / "f").exists(), 60, "the first image")
        assert (daemon.mnt / "a" / "f").read_bytes() == b"one" * 9
        os.kill(before["worker_pid"], signal.SIGKILL)
        thread.join()
        settled(daemon, before, "worker_pid")
        places = [daemon.mnt / f"b{number}" for number in range(10)]  # several are opened at a time, in any order
        for place in places:
            assert daemon.mount(f"/{place.name}", two.bootstrap, config).status == 204
        assert [(place / "f").read_bytes() for place in places] == [b"two" * 9] * 10
        assert [(place / "d" / "f").read_bytes() for place in places] == [b"two"] * 10
        with suppress(OSError):  # it is not mounted, or is itself
            assert (daemon.mnt / "a" / "d" / "f").read_bytes() == b"one"


@both
def test_upgrade_replaces_the_worker_under_the_mount(tmp_path: Path) -> None:
    case = image_case(CASE)
    with Nydusd() as daemon:
        assert daemon.mount("/a", case / "image.boot", localfs_config(case, work_dir=tmp_path)).status == 204
        before = info(daemon)
        with (daemon.mnt / "a" / some_file(CASE)).open("rb") as held:
            expected = held.read()
            # who asks while another's is under way gets that one's answer
            os.kill(before["keeper_pid"], signal.SIGSTOP)
            with ThreadPoolExecutor(3) as pool:
                try:
                    asked = [pool.submit(daemon.call, "PUT", "daemon/upgrade") for _ in range(3)]
                    time.sleep(2)
                finally:
                    os.kill(before["keeper_pid"], signal.SIGCONT)
            assert [answer.result().status for answer in asked] == [204] * 3
            after = settled(daemon, before, "worker_pid")
            assert after["keeper_pid"] == before["keeper_pid"]
            # of the process that forked the old worker nothing is left
            children = Path(f"/proc/{after['keeper_pid']}/task/{after['keeper_pid']}/children")
            wait_until(lambda: len(children.read_text().split()) == 1, 30, "the end of the old zygote")
            held.seek(0)
            assert held.read() == expected
        assert check_mount(case, daemon.mnt / "a") == []


@pytest.mark.parametrize("how", ["killed", "upgraded"])
def test_what_the_last_worker_cached_can_be_removed_although_nothing_is_mounted(tmp_path: Path, how: str) -> None:
    """The cache directory is claimed still, so that nobody else may delete what is in it."""
    image = tiny_image(tmp_path, {"f": noise(600_000)})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    cache = tmp_path / "cache"
    with Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path, work_dir=cache)).status == 204
        assert (daemon.mnt / "a" / "f").read_bytes() == image.files["f"]
        assert daemon.umount("/a").status == 204
        before = info(daemon)
        if how == "killed":
            os.kill(before["worker_pid"], signal.SIGKILL)
        else:
            assert daemon.call("PUT", "daemon/upgrade").status == 204
        settled(daemon, before, "worker_pid")
        assert (cache / image.blob_id).is_dir()
        assert daemon.call("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}").body is None
        assert not (cache / image.blob_id).exists()
        assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path, work_dir=cache)).status == 204
        assert (daemon.mnt / "a" / "f").read_bytes() == image.files["f"]
        assert [store["path"] for store in daemon.get("cache").body["stores"]] == [str(cache)]


def test_an_image_that_must_be_erofs_and_cannot_be_costs_the_others_nothing(tmp_path: Path) -> None:
    """FUSE shows it until it is umounted. The next worker cannot make that mount either."""
    image = tiny_image(tmp_path, {"f": b"content"})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    config = {**json.loads(localfs_config(tmp_path)), "fs_driver": "erofs"}
    config["device"]["cache"] = {"type": "dummycache"}
    body = {"source": str(image.bootstrap), "fs_type": "rafs", "config": json.dumps(config)}
    with Nydusd() as daemon:
        assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path)).status == 204
        assert daemon.call("POST", "mount?mountpoint=/b&attach=later", body).status == 204
        refused = daemon.call("POST", "mount/attached?mountpoint=/b")
        assert (refused.status, "has no cache directory" in refused.message) == (500, True)
        before = info(daemon)
        os.kill(before["worker_pid"], signal.SIGKILL)
        settled(daemon, before, "worker_pid")
        for where in ("a", "b"):
            read = reader("import sys; print(open(sys.argv[1]).read())", daemon.mnt / where / "f")
            assert (read.stdout, read.stderr) == ("content\n", "")
        assert daemon.call("POST", "mount/attached?mountpoint=/b") == refused
        assert daemon.umount("/b").status == 204


def test_devices_of_a_mount_that_never_came_go_with_their_blob(tmp_path: Path) -> None:
    """They are links to what the cache has: as long as they are there no byte is freed."""
    if reason := cannot_mount_erofs():
        pytest.skip(reason)
    image = tiny_image(tmp_path, {"f": noise(600_000)})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    cache = tmp_path / "cache"
    config = localfs_config(tmp_path, work_dir=cache)
    body = {"source": str(image.bootstrap), "fs_type": "rafs", "config": config}

    def devices() -> list[Path]:
        return matching(cache, f".erofs/files.*/*/{image.blob_id}/*")

    with Nydusd("--fs-driver", "erofs") as daemon:
        assert daemon.call("POST", "mount/expected?mountpoint=/a", body).status == 204
        wait_until(lambda: bool(devices()), 60, "devices of the mount to come")
        before = info(daemon)
        os.kill(before["worker_pid"], signal.SIGKILL)
        settled(daemon, before, "worker_pid")
        assert devices()
        assert daemon.call("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}").body is None
        assert devices() == []


def test_code_that_does_not_start_leaves_the_old_worker_in_place(tmp_path: Path) -> None:
    """The installed code is broken at the moment of the upgrade."""
    code = tmp_path / "code"
    source = Path(__file__).resolve().parents[2]
    code.mkdir()
    for name in ("bootstrap", "nydusfs", "protos"):
        (code / name).symlink_to(source / name)
    program = tmp_path / "nydusd"
    program.write_text(
        f"#!{sys.executable}\nimport sys, os\nsys.path.insert(0, {str(code)!r})\n"
        f"os.environ['PYTHONPATH'] = {str(code)!r}\nfrom nydusfs.daemon.cli import main\nmain()\n"
    )
    program.chmod(0o755)
    image = tiny_image(tmp_path, {"f": b"content"})
    with Nydusd(binary=program) as daemon:
        assert daemon.mount("/a", image.bootstrap, localfs_config(tmp_path)).status == 204
        before = info(daemon)
        (code / "nydusfs").unlink()
        (code / "nydusfs").mkdir()
        (code / "nydusfs" / "__init__.py").write_text("raise SystemExit(3)")
        answer = daemon.call("PUT", "daemon/upgrade")
        assert (answer.status, answer.message) == (500, "Upgrade(DaemonAbnormal(Upgrade))")
        assert info(daemon) == before
        assert os.listdir(daemon.mnt / "a") == ["f"]


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@contextmanager
def supervisor(path: Path) -> Iterator[list[tuple[bytes, list[int]]]]:
    """What upstream's snapshotter has: keeps what a daemon sends, gives it to the next that connects in silence."""
    kept: list[tuple[bytes, list[int]]] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(1)
                    try:
                        data, fds, _, _ = socket.recv_fds(client, 1 << 20, 16)
                    except TimeoutError:
                        data, fds = b"", []
                    if fds:
                        while piece := client.recv(1 << 20):
                            data += piece
                        for _, old in kept:
                            close(old)
                        kept[:] = [(data, fds)]
                    elif kept:
                        socket.send_fds(client, [kept[0][0]], kept[0][1])

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield kept
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for _, fds in kept:
                close(fds)


@both
def test_a_supervisor_moves_the_mount_to_another_daemon(tmp_path: Path) -> None:
    """The sequence of upstream's smoke test (reference 8.4), and its failover: save, exit or crash, take over."""
    case = image_case(CASE)
    with Nydusd() as first:
        path = first.dir / "s.sock"
        with supervisor(path) as kept:
            first.stop()
            first.args = ("--supervisor", path, "--id", "d1")
            first.start()
            assert first.mount("/a", case / "image.boot", localfs_config(case, work_dir=tmp_path)).status == 204
            with subprocess.Popen(["sleep", "60"], cwd=first.mnt / "a") as inside:
                try:
                    assert first.call("PUT", "daemon/fuse/sendfd").status == 204
                    wait_until(lambda: bool(kept), 60, "the state at the supervisor")
                    second = Nydusd("--supervisor", path, "--id", "d1", "--upgrade", directory=first.dir)
                    second.sock = first.dir / "b.sock"
                    second.start(ready=False)
                    wait_until(lambda: state(second) == "INIT", 60, "the second daemon")
                    assert second.call("PUT", "daemon/start").status == 400
                    assert first.call("PUT", "daemon/exit").status == 204
                    assert first.child is not None
                    assert first.child.process.wait(60) == 0
                    assert second.call("PUT", "daemon/fuse/takeover").status == 204
                    assert state(second) == "READY"
                    assert second.call("PUT", "daemon/fuse/sendfd").status == 204
                    assert second.call("PUT", "daemon/start").status == 204
                    assert state(second) == "RUNNING"
                    assert os.listdir(f"/proc/{inside.pid}/cwd/")
                    assert check_mount(case, second.mnt / "a") == []
                    second.kill_all()
                    third = Nydusd("--supervisor", path, "--id", "d1", "--upgrade", directory=first.dir)
                    third.sock = first.dir / "c.sock"
                    third.start(ready=False)
                    wait_until(lambda: state(third) == "INIT", 60, "the third daemon")
                    assert third.call("PUT", "daemon/fuse/takeover").status == 204
                    assert third.call("PUT", "daemon/start").status == 204
                    assert check_mount(case, third.mnt / "a") == []
                finally:
                    inside.kill()
            assert third.stop()[0] == 0
            assert not os.path.ismount(third.mnt)


@pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())
def test_what_is_mounted_in_a_moment_is_complete_at_the_supervisor(tmp_path: Path) -> None:
    """Who keeps the state asks when the mount was asked for. What the kernel's mount will hang on is there by then:
    else the death of all processes leaves whoever reads it with EIO."""
    image = tiny_image(tmp_path, {"f": noise(5000)})
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / image.blob_id).write_bytes(image.blob)
    config = localfs_config(tmp_path / "blobs", work_dir=tmp_path)
    with Nydusd("--fs-driver", "erofs") as daemon:
        path = daemon.dir / "s.sock"
        with supervisor(path) as kept:
            daemon.stop()
            daemon.args += ("--supervisor", path, "--id", "d1")
            daemon.start()
            wanted = {"source": str(image.bootstrap), "fs_type": "rafs", "config": config}
            assert daemon.call("POST", "mount?mountpoint=/0&attach=later", wanted).status == 204
            assert daemon.call("PUT", "daemon/fuse/sendfd").status == 204
            wait_until(lambda: bool(kept), 60, "the state at the supervisor")
            data, fds = kept[0]
            held = decode(data).held
            assert {"fuse", "fanotify", "journal"} <= set(held) and len(held) == len(fds)


def state(daemon: Nydusd) -> str:
    try:
        return str(daemon.get("daemon").body["state"])
    except OSError:
        return ""


@both
def test_systemds_store_outlives_every_process(tmp_path: Path, fs_driver: str) -> None:
    """All processes of the unit killed at once: the next start has the mount's descriptors back, files open go on."""
    image = tiny_image(tmp_path, {"f": noise(2 << 20), "g": noise(2 << 20, 2)})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    config = localfs_config(tmp_path, work_dir=tmp_path / "cache", fs_driver=fs_driver, fs_prefetch={"learn": False})
    (tmp_path / "config").write_text(config)
    directory = work_dir()
    try:
        (directory / "m").mkdir()
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m"]
        done = subprocess.run(
            [*command, "tests.lab.fakesystemd", directory, image.bootstrap, tmp_path / "config", "f", "g"],
            capture_output=True, text=True, timeout=115,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + (directory / "log").read_text()
        seen = json.loads(done.stdout)
        first, other = (sha256(image.files[name]).hexdigest() for name in "fg")
        asked = ["fanotify", "journal"] if fs_driver == "erofs" else []
        names = ["api", f"cache-{device_key(tmp_path / 'cache')}", "fuse", "state", *asked]
        assert seen == {
            "mount": 204, "umount": 204, "before": first, "open file": other, "after": first,
            "stored": sorted(f"nydusd-{name}" for name in names),
        }, (directory / "log").read_text()  # fmt: skip
    finally:
        unmount_below(directory)
        remove_tree(directory)


def test_secrets_of_configurations_stay_out_of_files_and_logs(tmp_path: Path) -> None:
    case = image_case(CASE)
    secret = "cGxhbnRlZDpzZWNyZXQ="  # base64 of user:password
    config = (
        '{"device": {"id": "c", "backend": {"type": "registry", "config": {"host": "127.0.0.1:1", "repo": "a/b", '
        f'"scheme": "http", "auth": "{secret}"}}}}, "cache": {{"type": "blobcache", "config": {{"work_dir": '
        f'"{tmp_path}"}}}}}}, "mode": "direct"}}'
    )
    with Nydusd("-l", "trace") as daemon:
        assert daemon.mount("/a", case / "image.boot", config).status == 204
        before = info(daemon)
        os.kill(before["worker_pid"], signal.SIGKILL)
        after = settled(daemon, before, "worker_pid")
        planted = (secret, "planted:secret", "cGxhbnRlZDpzZWNyZXQ")
        answers = [str(daemon.get(path).body) for path in ("daemon", "metrics/backend", "daemon/events", "config?id=c")]
        texts = [daemon.log_text(), *answers]
        for pid in (*after.values(), *processes_mentioning(str(daemon.sock))):
            texts += [content(Path(f"/proc/{pid}/{name}")) for name in ("cmdline", "environ")]
        for top in (tmp_path, daemon.dir):
            for folder, folders, files in os.walk(top):
                if Path(folder) == daemon.dir:
                    folders.remove(daemon.mnt.name)
                paths = [Path(folder, name) for name in files]
                texts += [content(path) for path in paths if path.is_file()]
        for text in texts:
            assert not any(word in text for word in planted)


def content(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it is at work: temporary files, short-lived processes
        return ""
