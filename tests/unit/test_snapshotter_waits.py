"""Nobody waits without a bound: for a nydusd that hangs, for others who wait for it, for trees being deleted."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nydusfs.trees import remove_tree
from snapshotter import daemons, images
from snapshotter.auth.chain import Chain
from snapshotter.controller import Controller
from snapshotter.daemons import Daemon, DaemonSettings
from snapshotter.database import NAME, Database
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.images import Images
from snapshotter.mounting import Wanted, mount_all
from snapshotter.nydusd_api import ApiError, ApiUnreachable, NydusdApi
from snapshotter.nydusd_config import load_template
from snapshotter.records import DaemonRecord, InstanceRecord, Records
from snapshotter.serving import ImageSettings
from snapshotter.store import Store
from snapshotter.supervisor import Supervisor
from snapshotter.system import start_time
from snapshotter.trash import Trash


def daemon(tmp_path: Path) -> Daemon:
    settings = DaemonSettings("/bin/false", tmp_path, tmp_path / "log")
    record = DaemonRecord("d", True, 0, 0, tmp_path / "api.sock", tmp_path / "mnt")
    return Daemon(settings, Records(Database(tmp_path / NAME)), record, list, lambda: None)


def tree(path: Path) -> Path:
    (path / "fs" / "deep").mkdir(parents=True)
    (path / "fs" / "deep" / "file").write_text("x")
    return path


def test_small_trees_are_gone_when_the_call_returns_and_big_ones_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_ = Trash(tmp_path / "trash")
    bin_.put(tree(tmp_path / "7"))
    bin_.empty(60)
    assert list((tmp_path / "trash").iterdir()) == []
    may_delete, real = threading.Event(), remove_tree

    def slow(path: str) -> None:
        assert may_delete.wait(60)
        real(path)

    monkeypatch.setattr("snapshotter.trash.remove_tree", slow)
    bin_.put(tree(tmp_path / "8"))
    began = time.monotonic()
    bin_.empty(0.2)
    assert time.monotonic() - began < 5
    assert not (tmp_path / "8").exists()
    bin_.put(tree(tmp_path / "9"))  # beside the one under way
    bin_.empty(0)
    may_delete.set()
    bin_.empty(60)
    assert list((tmp_path / "trash").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        bin_.put(tmp_path / "9")


def test_what_a_killed_program_left_in_the_trash_goes_with_the_next(tmp_path: Path) -> None:
    Trash(tmp_path / "trash").put(tree(tmp_path / "7"))  # killed here
    Trash(tmp_path / "trash").empty(60)
    assert list((tmp_path / "trash").iterdir()) == []


def test_a_nydusd_busy_for_others_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "LOCK_SECONDS", 0.2)
    one = daemon(tmp_path)
    release, inside = threading.Event(), threading.Event()

    def hold() -> None:
        with one.lock:
            inside.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(20)
        with pytest.raises(Unavailable, match="is busy"):
            one.ensure()
    finally:
        release.set()
        thread.join(10)


@pytest.mark.parametrize("watched", [False, True])
def test_a_dead_nydusd_is_none_before_its_watcher_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """A container that is prepared in that moment gets a new mount. Where that fails, the watcher tries on."""
    one, resumed = daemon(tmp_path), threading.Event()
    monkeypatch.setattr(one, "_resume", resumed.set if watched else lambda: (_ for _ in ()).throw(Unavailable("no")))
    process = subprocess.Popen(["sleep", "100"])
    try:
        one._record = replace(one.record, pid=process.pid, started=start_time(process.pid))
        with one.lock:  # the watcher waits for it
            one._live(process)
            assert one.lives()
            process.kill()
            assert one._life is not None
            assert one._life.ended(10)
            assert one.alive
            assert not one.lives()
            if watched:
                one.ensure()
                assert resumed.is_set()
            else:
                with pytest.raises(Unavailable, match="no"):
                    one.ensure()
                monkeypatch.setattr(one, "_resume", resumed.set)
            assert not one.alive
        assert resumed.wait(10)
    finally:
        process.kill()
        process.wait()
        one.unwatch()


@pytest.mark.parametrize("upstream", [False, True])
def test_a_silent_nydusd_costs_one_timeout_and_not_one_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: bool
) -> None:
    """After a restart all its images are mounted again, under its lock."""
    monkeypatch.setattr("snapshotter.nydusd_api.DIAL_SECONDS", 1.0)
    template = tmp_path / "template.json"
    template.write_text('{"device":{"backend":{"type":"registry","config":{}},"cache":{"type":"blobcache"}}}')
    database = Database(tmp_path / NAME)
    settings = ImageSettings(
        DaemonSettings("/bin/false", tmp_path, tmp_path / "log"), True, load_template(template), tmp_path / "cache"
    )
    all_images = Images(settings, Store(tmp_path, database), Records(database), Chain([]))
    one = all_images._shared_daemon()
    one._alive = True
    asked: list[str] = []

    def silent(method: str, url: str, body: object = None, timeout: float = 0) -> None:
        asked.append(url)
        if upstream and url == "/api/v1/mounts":
            raise ApiError("POST /api/v1/mounts", 404, "NoRoute")
        raise ApiUnreachable(f"POST {url}: timed out")

    monkeypatch.setattr(one.api, "call", silent)
    for number in range(1, 30):
        record = InstanceRecord(number, one.id, "127.0.0.1:5000/a/b:c", tmp_path / "image.boot")
        all_images._instances[record.name] = record
    one._on_start()
    assert asked == ["/api/v1/mounts", *(["/api/v1/mount?mountpoint=/1"] if upstream else [])]


def test_one_image_that_fails_does_not_take_the_others_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one request for all and, where nydusd knows none, by one for each."""
    images = [InstanceRecord(number, "d", f"127.0.0.1:5000/a:{number}", Path("/boot")) for number in range(60)]
    for upstream in (False, True):
        api, sizes = NydusdApi(Path("/none")), list[int]()

        def answer(
            method: str, url: str, body: Any = None, timeout: float = 0, upstream: bool = upstream, sizes: Any = sizes
        ) -> Any:
            if url == "/api/v1/mounts" and not upstream:
                sizes.append(len(body))
                return ["object or filesystem already exists" if one["mountpoint"] == "/9" else
                        "bad" if one["mountpoint"] == "/7" else None for one in body]  # fmt: skip
            status, said = (404, "NoRoute") if url == "/api/v1/mounts" else (500, "bad")
            if status == 404 or url.endswith("=/7"):
                raise ApiError(url, status, said)
            return None

        monkeypatch.setattr(api, "call", answer)
        done: list[int] = []
        mount_all(api, [Wanted(one, "{}") for one in images], lambda one, done=done: done.append(one.snapshot))  # type: ignore[misc]
        assert done == [number for number in range(60) if number != 7]
        assert sizes == ([] if upstream else [25, 25, 10])


def all_images_of(tmp_path: Path) -> Images:
    template = tmp_path / "template.json"
    template.write_text('{"device":{"backend":{"type":"registry","config":{}},"cache":{"type":"blobcache"}}}')
    database = Database(tmp_path / NAME)
    settings = ImageSettings(
        DaemonSettings("/bin/false", tmp_path, tmp_path / "log"), True, load_template(template), tmp_path / "cache"
    )
    return Images(settings, Store(tmp_path, database), Records(database), Chain([]))


def test_after_a_start_a_container_waits_for_its_own_image_alone(tmp_path: Path) -> None:
    all_images = all_images_of(tmp_path)
    one, other = (InstanceRecord(number, "d", "i", tmp_path, None) for number in (1, 2))
    daemon = SimpleNamespace(id="d", alive=True, shared=True, lives=lambda: True)
    all_images._daemons["d"] = daemon  # type: ignore[assignment]
    all_images._instances |= {one.name: one, other.name: other}
    all_images._gates.shut(["d"])
    all_images._gates.recovered.set()
    waiting = {record.name: threading.Thread(target=all_images._wait_recovered, args=(record.snapshot, None))
               for record in (one, other)}  # fmt: skip
    for thread in waiting.values():
        thread.start()
    all_images._served_again(one)
    waiting[one.name].join(10)
    assert [thread.is_alive() for thread in waiting.values()] == [False, True]
    all_images._gates.open("d")
    waiting[other.name].join(10)
    assert not waiting[other.name].is_alive()


def test_callers_for_one_image_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IMAGE_SECONDS", 0.2)
    all_images = all_images_of(tmp_path)
    release, inside = threading.Event(), threading.Event()

    def hold() -> None:
        with all_images._one(5):
            inside.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(10)
        with pytest.raises(Unavailable, match="being mounted"), all_images._one(5):
            pass
        with all_images._one(6):
            pass
    finally:
        release.set()
        thread.join(10)


def test_a_socket_that_accepts_and_never_answers(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(SnapshotterError):
            NydusdApi(path).umount("/1", timeout=0.3)
        assert time.monotonic() - began < 5


def test_the_list_of_daemons_costs_one_timeout_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_images = all_images_of(tmp_path)
    one = all_images._shared_daemon()
    asked: list[str] = []

    def silent(method: str, url: str, body: object = None, timeout: float = 0) -> None:
        asked.append(url)
        raise ApiUnreachable(f"{method} {url}: timed out")

    monkeypatch.setattr(one.api, "call", silent)
    for number in range(1, 30):
        record = InstanceRecord(number, one.id, "127.0.0.1:5000/a/b:c", tmp_path / "image.boot")
        all_images._instances[record.name] = record
    none: Any = None
    described = Controller(none, all_images, none)._describe(one)
    assert (len(described["instances"]), described["read_data_kb"]) == (29, 0)
    assert len(asked) == 1


def test_a_state_without_an_answer_leaves_no_descriptor(tmp_path: Path) -> None:
    """nydusd sent it and died, or hung: an open connection to the kernel would keep its mount and all readers."""
    kept, device = Supervisor(tmp_path / "s.sock"), tmp_path / "fuse"
    device.touch()

    def open_here() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{one}") == str(device) for one in os.listdir("/proc/self/fd"))

    def send(then: Exception | None) -> None:
        with socket.socket(socket.AF_UNIX) as client, device.open() as file:
            client.connect(str(kept.path))
            socket.send_fds(client, [b"state"], [file.fileno()])
        time.sleep(0.2)
        if then is not None:
            raise then

    with pytest.raises(ApiUnreachable):
        kept.save(lambda: send(ApiUnreachable("no answer")))
    assert not kept.has_state
    assert open_here() == 0
    kept.save(lambda: send(None))
    assert kept.has_state and open_here() == 1
    kept.close()
    assert open_here() == 0


def test_a_nydusd_that_dies_while_it_is_adopted_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, resumed = daemon(tmp_path), threading.Event()
    process = subprocess.Popen(["true"])
    process.wait()  # nobody has its number now
    monkeypatch.setattr(one.api, "info", lambda timeout=0: {"state": "RUNNING", "keeper_pid": process.pid})
    monkeypatch.setattr(daemons, "mountpoints", lambda: [str(one.mountpoint)])
    monkeypatch.setattr(one, "_resume", resumed.set)
    with pytest.raises(ProcessLookupError):
        one.adopt()
    assert not one.alive
    one.ensure()
    assert resumed.is_set()
    one.unwatch()


def test_a_keeper_that_dies_right_behind_the_last_one_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the watcher ends with an error, and nobody starts nydusd again before it is asked for."""
    one, resumed = daemon(tmp_path), threading.Event()
    monkeypatch.setattr(daemons, "KEEPER_SECONDS", 0.3)
    other = subprocess.Popen(["true"])
    other.wait()  # nobody has its number now
    monkeypatch.setattr(one.api, "info", lambda timeout=0: {"state": "RUNNING", "keeper_pid": other.pid})
    monkeypatch.setattr(one, "_resume", resumed.set)
    process = subprocess.Popen(["sleep", "100"])
    try:
        one._record = replace(one.record, pid=process.pid, started=start_time(process.pid))
        one._live(process)
        process.kill()
        assert resumed.wait(10)
    finally:
        process.kill()
        process.wait()
        one.unwatch()


def test_a_process_that_has_the_number_and_start_of_a_nydusd_before_the_reboot_lives_on(tmp_path: Path) -> None:
    """Boots of one machine are alike to the hundredth of a second; such times count from the boot."""
    one = daemon(tmp_path)
    process = subprocess.Popen(["sleep", "100"])
    try:
        one._record = replace(one.record, pid=process.pid, started=start_time(process.pid))
        assert one.memory_kb() == 0
        one.stop()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
