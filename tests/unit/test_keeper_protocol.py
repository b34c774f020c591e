"""A keeper outlives the code of its workers: what it does with messages of a newer one, and with nonsense."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from nydusfs.keeper.keeper import Keeper, Worker, Zygote
from nydusfs.keeper.protocol import pair, receive, send


def open_files() -> int:
    gc.collect()  # other tests' garbage is not to be closed between two countings
    return len(os.listdir("/proc/self/fd"))


def test_a_newer_workers_unknown_messages_and_fields_are_ignored_and_their_descriptors_closed(tmp_path: Path) -> None:
    ours, theirs = pair()
    with ours, theirs, (tmp_path / "f").open("w+b") as file:
        keeper = Keeper({})
        keeper.worker = Worker(ours)
        before = open_files()
        send(theirs, "from the future", [file.fileno(), file.fileno()], depth=7)
        keeper._from_worker(ours)
        assert open_files() == before
        assert keeper.held == {}
        socket.send_fds(
            theirs,
            [json.dumps({"v": 99, "op": "hold", "name": "fuse", "colour": "red"}).encode()],
            [file.fileno(), file.fileno()],  # one more than today's keepers know
        )
        keeper._from_worker(ours)
        assert list(keeper.held) == ["fuse"]
        assert open_files() == before + 1
        send(theirs, "drop", name="fuse")
        send(theirs, "drop", name="never held")
        keeper._from_worker(ours)
        keeper._from_worker(ours)
        assert keeper.held == {}
        assert open_files() == before


def test_the_end_of_the_other_side_and_silence_are_told_apart() -> None:
    ours, theirs = pair()
    with ours:
        with pytest.raises(BlockingIOError):
            receive(ours)
        theirs.close()
        with pytest.raises(EOFError):
            receive(ours)


def test_the_end_of_the_last_worker_is_not_taken_for_that_of_the_next() -> None:
    """A busy zygote tells of it after the keeper has asked for the next one, whose number it does not know yet."""
    ours, zygote = pair()
    with ours, zygote:
        keeper = Keeper({})
        keeper.served = True
        keeper.worker, other = Worker(pair()[0]), Worker(pair()[0])
        keeper.worker.pid = 5
        keeper._worker_died(None)
        keeper.worker = other
        send(zygote, "exited", pid=5, status=9)
        keeper._from_zygote(ours)
        assert keeper.worker is other and other.status is None
        send(zygote, "exited", pid=0, status=1 << 8)  # it could not be started
        keeper._from_zygote(ours)
        assert keeper.worker is None


def test_code_that_hangs_while_it_is_imported_is_not_left_running() -> None:
    ours, theirs = pair()
    with theirs, subprocess.Popen(["sleep", "600"]) as hanging:
        zygote = Zygote(ours, hanging.pid)
        try:
            assert not zygote.wait_hello(0)
            zygote.end()
            assert hanging.wait(30) == -9
        finally:
            hanging.kill()
