"""Threads that outlive what they serve must not write to it: its descriptor's number may be another file's by then."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nydusfs.drivers import connection as connections
from nydusfs.drivers.erofs import events as event_threads
from nydusfs.drivers.erofs import fanotify
from nydusfs.drivers.erofs.events import Events, Question
from nydusfs.drivers.erofs.journal import Journal

VICTIMS = 40


@pytest.fixture(autouse=True)
def _any_file_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root can make the clone that devices are opened through."""
    monkeypatch.setattr(
        event_threads, "_device", lambda fd: "/".join(os.readlink(f"/proc/self/fd/{fd}").split("/")[-3:])
    )


@contextmanager
def victims(folder: Path) -> Iterator[None]:
    """Files that get whatever numbers are free: at the end nothing was written to them."""
    files = [open(folder / str(number), "wb", buffering=0) for number in range(VICTIMS)]  # noqa: SIM115
    try:
        yield
        assert [file.name for file in files if os.fstat(file.fileno()).st_size] == []
    finally:
        for file in files:
            file.close()


def event_of(number: int) -> bytes:
    """As the kernel tells about a file."""
    return fanotify.EVENT_METADATA.pack(
        fanotify.EVENT_METADATA.size, fanotify.FANOTIFY_METADATA_VERSION, 0, fanotify.EVENT_METADATA.size,
        fanotify.FAN_PRE_ACCESS, number, 1,
    )  # fmt: skip


@pytest.mark.parametrize("order", ["caller closes", "only stopped"])
def test_an_event_that_is_answered_after_the_end_reaches_no_other_file(order: str, tmp_path: Path) -> None:
    asked, let_go = threading.Event(), threading.Event()

    class Server:
        def ready(self, _: Question) -> bool:
            asked.set()
            let_go.wait(20)
            return True

        def simple(self, _: Question) -> bool:
            return False

        def fill_now(self, _: Question) -> bool:
            raise AssertionError

        async def fill(self, _: Question) -> bool:
            return False

    group, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group.setblocking(False)  # as a group is: both threads may see the one event
    number = group.detach()
    device = os.open(tmp_path, os.O_RDONLY)
    journal = Journal(Journal.create())
    before = set(threading.enumerate())

    async def serve() -> None:
        events = Events(number, journal, Server())
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(events.run)
                kernel.send(event_of(device))
                await trio.to_thread.run_sync(asked.wait, 10)
                events.stop(successor=False)

    trio.run(serve)
    if order == "caller closes":
        os.close(number)
    with victims(tmp_path):
        let_go.set()
        for thread in set(threading.enumerate()) - before:
            if "_read" in thread.name:
                thread.join(10)
                assert not thread.is_alive()
    kernel.setblocking(False)
    with (
        pytest.raises(BlockingIOError) if order == "only stopped" else pytest.raises((BlockingIOError, ConnectionError))
    ):
        assert kernel.recv(100) == b""  # closed: nobody has it any more
        raise ConnectionError
    kernel.close()


def test_an_answer_that_is_sent_while_the_connection_is_closed_reaches_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about_to, let_go = threading.Event(), threading.Event()
    real = os.writev

    def slowly(fd: int, parts: Any) -> int:
        about_to.set()
        let_go.wait(20)
        return real(fd, parts)

    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = connections.Connection(ours.detach())
    monkeypatch.setattr(connections.os, "writev", slowly)
    thread = threading.Thread(target=connection.send, args=(1, b"answer"))
    thread.start()
    assert about_to.wait(10)
    connection.close()
    with victims(tmp_path):
        let_go.set()
        thread.join(10)
        assert not thread.is_alive()
    assert kernel.recv(100) == b""
    kernel.close()


def test_who_writes_a_device_answers_once_and_the_task_that_waits_does_not(tmp_path: Path) -> None:
    """And the number stays taken until that task is done: no new event may get it before."""
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(b"x")
    group, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group.setblocking(False)
    kernel.settimeout(10)
    done = trio.Event()
    asked = trio.Semaphore(0)

    class Server:
        def ready(self, _: Question) -> bool:
            return False

        def simple(self, question: Question) -> bool:
            return question.name.endswith("/b")

        def fill_now(self, question: Question) -> bool:
            return False

        async def fill(self, question: Question) -> bool:
            asked.release()
            await done.wait()
            return question.name.endswith("/a")

    def answer() -> tuple[int, int]:
        return fanotify.RESPONSE.unpack(kernel.recv(100))

    async def go() -> None:
        journal = Journal(Journal.create())
        events = Events(group.fileno(), journal, Server())
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(events.run)
                numbers = [os.open(path, os.O_RDONLY) for path in paths]
                for number in numbers:
                    kernel.send(event_of(number))
                for _ in numbers:
                    await asked.acquire()
                first, second = (f"{tmp_path.parent.name}/{tmp_path.name}/{path.name}" for path in paths)
                events.filled(first, lambda _: False)
                events.filled(first, lambda question: question.fd == numbers[0])
                assert await trio.to_thread.run_sync(answer) == (numbers[0], fanotify.FAN_ALLOW)
                events.filled(first, lambda _: True)
                assert [entry.number for entry in Journal(journal.fd).left()] == [numbers[1]]
                assert all(os.fstat(number) for number in numbers)
                assert [one.question.name for one in events.waiting.values()] == [second]
                done.set()
                assert await trio.to_thread.run_sync(answer) == (numbers[1], fanotify.FAN_DENY)
                await trio.testing.wait_all_tasks_blocked(0.05)
                for number in numbers:
                    with pytest.raises(OSError, match="descriptor"):
                        os.fstat(number)
                events.stop(successor=False)
        kernel.setblocking(False)
        with pytest.raises(BlockingIOError):
            kernel.recv(100)

    trio.run(go)
    group.close()
    kernel.close()
