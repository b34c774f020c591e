"""Metadata images are made by a process of their own; by the worker itself where that cannot be."""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio

from nydusfs.config import load_config
from nydusfs.drivers.erofs.image import PARTIAL, UnsuitableError, fingerprint, write_image
from nydusfs.drivers.erofs.maker import Making, job
from nydusfs.image_reader import ImageReader
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.protocol import pair, receive, send
from nydusfs.keeper.zygote import _end_with
from nydusfs.services import open_services
from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, localfs_config, wait_until
from tests.lab.erofs import cannot_mount_erofs, is_erofs
from tests.lab.mounted import check_mount
from tests.lab.process import parent_of, processes_mentioning

CASE = "v6-zstd-blake3-1m"
needs_mounts = pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())


@pytest.fixture
def daemon() -> Iterator[Nydusd]:
    with Nydusd("--fs-driver", "erofs") as running:
        yield running


def zygote_of(daemon: Nydusd) -> int:
    return parent_of(daemon.worker_pid)


def faults_of_children(pid: int) -> int:
    """Of those that ended, by proc(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[8])


@pytest.mark.root
@needs_mounts
def test_a_fork_of_the_zygote_makes_the_image_that_the_worker_would(daemon: Nydusd, tmp_path: Path) -> None:
    case = image_case(CASE)
    config = localfs_config(case, work_dir=tmp_path / "cache")
    zygote = zygote_of(daemon)
    before = faults_of_children(zygote)
    assert daemon.mount("/1", case / "image.boot", config).status == 204
    assert is_erofs(daemon.mnt / "1")
    wait_until(lambda: faults_of_children(zygote) > before, 60, "the end of the process that made the image")
    assert check_mount(case, daemon.mnt / "1") == []
    (made,) = (tmp_path / "cache" / ".erofs" / "images").iterdir()

    async def own() -> bytes:
        async with open_services() as services:
            reader = await services.open_image(
                str(case / "image.boot"), load_config(localfs_config(case, work_dir=tmp_path / "own"), "t"), name="/"
            )
            mark = fingerprint(reader.bootstrap, True)
            assert made.name == mark.hex()
            write_image(reader, tmp_path / "image", mark, True)
            reader.close()
        return (tmp_path / "image").read_bytes()

    assert made.read_bytes() == trio.run(own)


@pytest.mark.root
@needs_mounts
def test_without_a_zygote_the_worker_makes_it(daemon: Nydusd, tmp_path: Path) -> None:
    case = image_case(CASE)
    os.kill(zygote_of(daemon), signal.SIGKILL)
    assert daemon.mount("/1", case / "image.boot", localfs_config(case, work_dir=tmp_path)).status == 204
    assert is_erofs(daemon.mnt / "1")
    assert check_mount(case, daemon.mnt / "1") == []


@pytest.mark.root
@needs_mounts
def test_a_maker_that_is_killed_costs_nothing_but_time(daemon: Nydusd, tmp_path: Path) -> None:
    """Whatever it was at: SIGKILL to all that the zygote has beside the worker, as long as the mount takes."""
    case = image_case(CASE)
    zygote, worker = zygote_of(daemon), daemon.worker_pid
    children = Path(f"/proc/{zygote}/task/{zygote}/children")
    over, killed, hidden = threading.Event(), set[int](), dict[int, str]()

    def kill() -> None:
        while not over.wait(0.001):
            for pid in set(map(int, children.read_text().split())) - {worker}:
                if pid not in hidden:  # a moment later, when it is what it will be
                    hidden[pid] = ""
                    continue
                with suppress(OSError):  # it has ended
                    hidden[pid] = Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        status = daemon.mount("/1", case / "image.boot", localfs_config(case, work_dir=tmp_path)).status
    finally:
        over.set()
        killer.join(10)
    assert status == 204
    assert killed
    # its keeper and its zygote hide from the kernel's out-of-memory killer; it does not
    assert set(hidden.values()) <= {"0", ""}
    assert is_erofs(daemon.mnt / "1")
    assert check_mount(case, daemon.mnt / "1") == []


def test_a_job_ends_when_nobody_waits_for_it_any_more() -> None:
    for first in (False, True):  # before it looks, and later
        ours, theirs = pair()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                if first:
                    select.select([theirs], [], [], 100)
                _end_with(theirs)
                time.sleep(100)
            finally:
                os._exit(0)
        theirs.close()
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        ours.close()
        ended = 0
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        assert ended == pid
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 1


class Answers(Jobs):
    """A process that says what it likes."""

    def __init__(self, *answers: tuple[str, bytes | None]) -> None:
        self.answers = answers

    def begin(self, module: str, **request: object):  # type: ignore[no-untyped-def]
        ours, theirs = pair()
        with theirs:
            for op, content in self.answers:
                fd = os.memfd_create("x") if content is not None else -1
                if content:
                    os.write(fd, content)
                send(theirs, op, [fd] if fd >= 0 else [], why="too odd")
                if fd >= 0:
                    os.close(fd)
        return ours


def test_what_the_process_says_is_not_believed(tmp_path: Path) -> None:
    case = image_case(CASE)

    async def ask(reader: ImageReader, jobs: Jobs) -> object:
        making = Making.begin(jobs, reader.bootstrap.path, tmp_path, enable_xattr=True)
        assert making is not None
        with closing(making), trio.fail_after(20):
            return await making.finish(tmp_path / "image", fingerprint(reader.bootstrap, True), _nobody)

    async def go() -> None:
        async with open_services() as services:
            config = load_config(localfs_config(case, work_dir=tmp_path / "cache"), "t")
            reader = await services.open_image(str(case / "image.boot"), config, name="/")
            assert Making.begin(Jobs(), reader.bootstrap.path, tmp_path, enable_xattr=True) is None
            assert await ask(reader, Answers()) is None
            assert await ask(reader, Answers(("unknown", None), ("made", None))) is None
            assert await ask(reader, Answers(("listed", b""), ("listed", b"x" * 5000), ("made", None))) is None
            (tmp_path / "image").write_bytes(b"x" * 8192)
            assert await ask(reader, Answers(("made", None))) is None
            with pytest.raises(UnsuitableError, match="too odd"):
                await ask(reader, Answers(("unsuitable", None)))
            reader.close()

    trio.run(go)
    targets = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not any("memfd:x" in target for target in targets)


@pytest.mark.root
@needs_mounts
def test_of_a_bootstrap_that_is_another_one_by_then_nothing_is_mounted(daemon: Nydusd, tmp_path: Path) -> None:
    """The process reads the path anew."""
    first, second = image_case(CASE), image_case("v5-merged3")
    boot = tmp_path / "image.boot"
    shutil.copy(second / "image.boot", boot)
    making, theirs = pair()
    with making:
        with theirs:
            job({"bootstrap": str(boot), "folder": str(tmp_path), "enable_xattr": True}, theirs)
        said = []
        with suppress(EOFError):
            while True:
                message, fds = receive(making)
                said.append(message["op"])
                for fd in fds:
                    os.close(fd)
    assert said[-1] == "made"

    async def go() -> object:
        async with open_services() as services:
            config = load_config(localfs_config(first, work_dir=tmp_path / "cache"), "t")
            reader = await services.open_image(str(first / "image.boot"), config, name="/")
            mark = fingerprint(reader.bootstrap, True)
            found = Making.begin(Answers(("made", None)), str(boot), tmp_path, enable_xattr=True)
            assert found is not None
            with closing(found):
                return await found.finish(tmp_path / mark.hex(), mark, _nobody)

    assert trio.run(go) is None


async def _nobody(_: object) -> None:
    raise AssertionError("no list of devices")


@pytest.mark.root
@needs_mounts
def test_no_process_stays(tmp_path: Path) -> None:
    """A daemon that is told to stop while an image is made."""
    case = image_case(CASE)
    for pause in (0.0, 0.02, 0.05):
        work = tmp_path / f"{pause}"
        with Nydusd("--fs-driver", "erofs") as daemon:
            config = localfs_config(case, work_dir=work)
            body = {"source": str(case / "image.boot"), "fs_type": "rafs", "config": config}
            assert daemon.call("POST", "mount/expected?mountpoint=/soon", body).status == 204
            time.sleep(pause)
            os.kill(daemon.pid, signal.SIGTERM)
            wait_until(lambda sock=str(daemon.sock): not processes_mentioning(sock), 10, "the end of all its processes")  # type: ignore[misc]
        folder = work / ".erofs" / "images"
        assert not folder.exists() or all(
            path.name.startswith(PARTIAL) or len(path.name) == 64 for path in folder.iterdir()
        )
