"""A keeper outlives the code of its workers: what it does with messages of a newer one, and with nonsense."""

from __future__ import annotations

import gc
import json
import os
import socket
from pathlib import Path

import pytest

from nydusfs.keeper.keeper import Keeper, Worker
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
