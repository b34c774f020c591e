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

from nydusfs.drivers import connection as connections
from nydusfs.drivers.erofs import fanotify
from nydusfs.drivers.erofs.events import Events, Question
from nydusfs.drivers.erofs.journal import Journal

VICTIMS = 40


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


@pytest.mark.parametrize("order", ["caller closes", "only stopped"])
def test_an_event_that_is_answered_after_the_end_reaches_no_other_file(order: str, tmp_path: Path) -> None:
    asked, let_go = threading.Event(), threading.Event()

    class Server:
        def ready(self, _: Question) -> bool:
            asked.set()
            let_go.wait(20)
            return True

        async def fill(self, _: Question) -> bool:
            return False

    group, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = group.detach()
    device = os.open(tmp_path, os.O_RDONLY)
    journal = Journal(Journal.create())
    before = set(threading.enumerate())
    event = fanotify.EVENT_METADATA.pack(
        fanotify.EVENT_METADATA.size, fanotify.FANOTIFY_METADATA_VERSION, 0, fanotify.EVENT_METADATA.size,
        fanotify.FAN_PRE_ACCESS, device, 1,
    )  # fmt: skip

    async def serve() -> None:
        events = Events(number, journal, Server())
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(events.run)
                kernel.send(event)
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
