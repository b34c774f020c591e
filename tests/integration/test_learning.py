"""A second cold start asks for what the first one read before the reader does. Real daemon, real mount."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusfs.learning import FIRST_REQUESTS
from tests.lab.daemon import Answer, Nydusd, can_mount_fuse, wait_until
from tests.lab.drivers import both
from tests.lab.faulty import FaultyServer, Request, faulty_server
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]
FILES = {f"f{number:02}": noise(300_000, number) for number in range(40)}
READ = [f"f{number:02}" for number in (31, 2, 17, 5, 22, 30, 9)]
_READ = "import sys\nfor path in sys.argv[1:]: print(len(open(path, 'rb').read()))"
_READ_AND_WAIT = """import sys
for path in sys.argv[1:]:
    print(len(open(path, 'rb').read()))
    if path == sys.argv[1]: sys.stdin.readline()"""


def config(server: FaultyServer, work: Path) -> str:
    # what is held up here may not be asked for once more, nor count as a failure of the replay
    backend = {"scheme": "http", "host": server.netloc, "repo": "a/b", "timeout": 100, "connect_timeout": 30}
    device = {
        "backend": {"type": "registry", "config": backend},
        "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
    }
    return json.dumps({"device": device, "mode": "direct"})


def read(daemon: Nydusd, names: list[str]) -> None:
    paths = [str(daemon.mnt / "a" / name) for name in names]
    done = subprocess.run([sys.executable, "-c", _READ, *paths], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["300000"] * len(names), done.stderr


@contextmanager
def begin(daemon: Nydusd, names: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A program with the same arguments at each mount, which has read the first file and waits for a line."""
    with subprocess.Popen(
        [sys.executable, "-c", _READ_AND_WAIT, *names],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=daemon.mnt / "a",
    ) as program:  # fmt: skip
        try:
            yield program
        finally:
            program.kill()


def asked(server: FaultyServer) -> int:
    return sum(last - first + 1 for first, last in (request.span or (0, -1) for request in server.data_requests))


def quiet(server: FaultyServer) -> bool:
    """Nothing was asked for half a second."""
    return time.monotonic() - server.data_requests[-1].when > 0.5


@contextmanager
def start(image: TinyImage, server: FaultyServer, work: Path) -> Iterator[Nydusd]:
    with Nydusd() as daemon:
        assert daemon.mount("/a", image.bootstrap, config(server, work)).status == 204
        yield daemon
        daemon.stop(timeout=60)  # killed, it would save no profile


@contextmanager
def all_but(server: FaultyServer, free: list[Request], *, first: bool = False) -> Iterator[threading.Event]:
    """Answers wait until this is left or the event set, unless they overlap those to `free`: readers are ahead of the
    replay then, however slowly they start. `first`: one that goes alone is answered too."""
    spans = [request.span for request in free if request.span is not None]
    go = threading.Event()

    def choose(request: Request) -> str:
        at, last = request.span or (0, -1)
        alone = first and request is server.data_requests[0]
        if not alone and not any(begin <= last and at <= end for begin, end in spans):
            go.wait(90)
        return "ok"

    server.choose = choose
    try:
        yield go
    finally:
        go.set()


@both
def test_the_next_cold_start_is_fetched_ahead(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server:
        with start(image, server, work) as daemon:
            read(daemon, READ)
            needed = asked(server)
        (saved,) = (tmp_path / "cache.profiles").glob("*.json")
        for _ in range(2):
            shutil.rmtree(work)
            server.requests.clear()
            with start(image, server, work) as daemon:
                wait_until(lambda: "of its profile fetched ahead" in daemon.log_text(), 60, "the replay")
                ahead, requests = asked(server), len(server.data_requests)
                assert needed * 0.95 <= ahead <= needed * 1.1
                read(daemon, READ)
                assert len(server.data_requests) == requests, "the reader had to wait for nothing"
                value = daemon.get("profile?id=/a").body
                assert [path for path in value["files"] if path[1:] in READ] == value["files"]
        # carried to another node
        exported = json.dumps(value)
        shutil.rmtree(work)
        saved.unlink()
        server.requests.clear()
        with start(image, server, work) as daemon:
            assert daemon.call("PUT", "profile?id=/a", exported).status == 204
            assert daemon.umount("/a").status == 204
            assert daemon.mount("/a", image.bootstrap, config(server, work)).status == 204
            wait_until(lambda: "of its profile fetched ahead" in daemon.log_text(), 60, "the replay")
            assert daemon.call("PUT", "profile?id=/a", '{"version": 7}').status == 400


@both
def test_an_image_that_is_expected_is_fetched_ahead_of_its_mount(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server:
        with start(image, server, work) as daemon:
            read(daemon, READ)
        shutil.rmtree(work)
        server.requests.clear()
        body = {"fs_type": "rafs", "source": str(image.bootstrap), "config": config(server, work)}
        with Nydusd() as daemon:
            broken = {**body, "source": str(tmp_path / "none")}
            for expected in (body, broken, body):
                answer = daemon.call("POST", "mount/expected?mountpoint=/a", json.dumps(expected))
                assert answer.status == 204, answer
            wait_until(lambda: "of its profile fetched ahead" in daemon.log_text(), 60, "the replay")
            requests = len(server.data_requests)
            # what a collector of removed images' caches asks: it may have looked before this image was pulled again
            assert daemon.call("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}") == Answer(200, {"kept": True})
            assert daemon.get("daemon").body["backend_collection"] == {}
            assert daemon.call("POST", "mount?mountpoint=/b", json.dumps(broken)).status == 500
            assert daemon.mount("/a", image.bootstrap, config(server, work)).status == 204
            read(daemon, READ)
            assert len(server.data_requests) == requests
            # with other settings than were expected: they count, and the other is let go
            assert daemon.umount("/a").status == 204
            answer = daemon.call("POST", "mount/expected?mountpoint=/a", json.dumps(body))
            assert answer.status == 204
            assert daemon.mount("/a", image.bootstrap, config(server, tmp_path / "other")).status == 204
            read(daemon, READ)
            assert (tmp_path / "other").is_dir()
            assert daemon.call("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}") == Answer(200, {"kept": True})
            assert daemon.umount("/a").status == 204
            assert daemon.call("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}").status == 204
            assert not (work / image.blob_id).exists()
            daemon.stop()


def test_what_a_reader_had_fetched_first_is_not_fetched_again(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    names = [f"f{number:02}" for number in range(0, 24, 3)]  # so few that all are planned at once
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server:
        with start(image, server, work) as daemon:
            read(daemon, names[:-1])
            before = len(server.data_requests)
            read(daemon, names[-1:])
            last = server.data_requests[before:]
        shutil.rmtree(work)
        server.requests.clear()
        with all_but(server, last, first=True) as go, start(image, server, work) as daemon:
            wait_until(lambda: len(server.data_requests) > FIRST_REQUESTS, 60, "the replay to be held up")
            read(daemon, names[-1:])
            go.set()
            wait_until(lambda: "of its profile fetched ahead" in daemon.log_text(), 60, "the replay")
    spans = sorted(request.span for request in server.data_requests if request.span is not None)
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spans)), spans


def test_each_command_has_what_it_reads_fetched_ahead(tmp_path: Path) -> None:
    """Two programs of one image that share their first file, in turn."""
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    names = sorted(FILES)
    commands = [[*names[:1], *names[10:16]], [*names[:1], *names[24:34]]]
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server:
        for command in commands:
            with start(image, server, work) as daemon, begin(daemon, command) as program:
                program.communicate("go on\n", timeout=60)
            shutil.rmtree(work)
            server.requests.clear()
        for number in (0, 1, 0):
            with start(image, server, work) as daemon:
                with begin(daemon, commands[number]) as program:
                    needed = 300_000 * len(commands[number])
                    wait_until(lambda n=needed: asked(server) >= n * 0.95 and quiet(server), 60, "what it reads")
                    requests = len(server.data_requests)
                    output, errors = program.communicate("go on\n", timeout=60)
                assert output.split() == ["300000"] * len(commands[number]), errors
                assert len(server.data_requests) == requests, "the reader had to wait for nothing"
                assert asked(server) <= needed * 1.1, "nothing of the other command's"
            shutil.rmtree(work)
            server.requests.clear()


def test_a_profile_of_something_else_is_given_up(tmp_path: Path) -> None:
    names, others = sorted(FILES)[:8], sorted(FILES)[20:]
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    with faulty_server({image.blob_id: image.blob}) as server:
        with start(image, server, work) as daemon:
            read(daemon, others)
        (saved,) = (tmp_path / "cache.profiles").glob("*.json")
        saved.rename(tmp_path / "kept")
        shutil.rmtree(work)
        server.requests.clear()
        with start(image, server, work) as daemon:
            read(daemon, names)
        free = server.data_requests
        (tmp_path / "kept").rename(saved)
        shutil.rmtree(work)
        with all_but(server, free) as go, start(image, server, work) as daemon:
            with ThreadPoolExecutor(8) as readers:
                list(readers.map(lambda name: read(daemon, [name]), names))
            go.set()
            wait_until(lambda: "does not follow its profile" in daemon.log_text(), 60, "the end of the replay")


def test_learning_can_be_switched_off(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, FILES)
    with faulty_server({image.blob_id: image.blob}) as server:
        text = json.loads(config(server, tmp_path / "cache"))
        text["fs_prefetch"] = {"enable": False, "learn": False}
        with Nydusd() as daemon:
            assert daemon.mount("/a", image.bootstrap, json.dumps(text)).status == 204
            read(daemon, READ)
            assert daemon.get("profile?id=/a").status == 404
        assert not (tmp_path / "cache.profiles").exists()


def test_a_hostile_profile_is_given_up_and_costs_little(tmp_path: Path) -> None:
    """It names all of the image, what the program reads last."""
    names = sorted(FILES)[1::3]
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server:
        with start(image, server, work) as daemon:
            read(daemon, names)
            needed, free = asked(server), server.data_requests
            value = daemon.get("profile?id=/a").body
        (saved,) = (tmp_path / "cache.profiles").glob("*.json")
        shutil.rmtree(work)
        server.requests.clear()
        wanted = [(blob, number) for blob, number, _ in json.loads(saved.read_bytes())["segments"]]
        everything = [(image.blob_id, number) for number in range(64)]  # not all of them exist
        listed = [key for key in everything if key not in wanted] + wanted
        value |= {"segments": [[blob, number, 2.5] for blob, number in listed], "inodes": [1, 2, 1 << 40]}
        saved.write_text(json.dumps(value))
        with all_but(server, free) as go, start(image, server, work) as daemon:
            read(daemon, names)
            go.set()
            wait_until(lambda: "does not follow its profile" in daemon.log_text(), 60, "the end of the replay")
            assert asked(server) <= needed + 5 * 512 * 1024, "what was on its way when readers went elsewhere"
