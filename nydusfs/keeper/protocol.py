"""What keeper, zygote and worker say to each other: one JSON object per datagram, descriptors beside it.

    keeper -> zygote   start {spec, held: [name...], state: bool, last}   fds: control socket, held..., state
    zygote -> keeper   hello {version} · started {pid} · exited {pid, status}; pid 0: it was not started
    worker -> keeper   hold {name} fd · drop {name} · state fd (memfd) · ready · stopping · upgrade
    keeper -> worker   retire · refused {why}
    worker -> zygote   job {module, request}   fd: the job's socket (`jobs`)
    worker -> keeper   inherit {spec, pid, held: [name...], state: bool}   fds as above: only to a new keeper

Every message carries `v`. A worker may be newer or older than its keeper, which lives on through upgrades: new
messages get new names, unknown names are ignored, the meaning of a known name never changes.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

VERSION = 1
MAX_MESSAGE = 64 << 10
MAX_FDS = 64
FUSE, API = "fuse", "api"  # names of held descriptors


def say(text: str) -> None:
    try:
        os.write(2, f"nydusd keeper: {text}\n".encode())
    except OSError:
        pass


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def send(sock: socket.socket, op: str, fds: Sequence[int] = (), **fields: Any) -> None:
    """Raises OSError: EPIPE, ECONNRESET when the other side is gone."""
    data = json.dumps({"v": VERSION, "op": op, **fields}).encode()
    socket.send_fds(sock, [data], list(fds), socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and its descriptors (close-on-exec), without waiting.

    Raises EOFError when the other side is gone, BlockingIOError when there is no message.
    """
    try:
        data, ancillary, _, _ = sock.recvmsg(
            MAX_MESSAGE,
            socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize),
            socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT,
        )
    except ConnectionError:
        raise EOFError from None
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        raise EOFError
    return json.loads(data), list(fds)


def name_tag(spec: dict[str, Any]) -> list[str]:
    """Words for the command line of helpers, by which an operator, and the snapshotter, tell whose they are."""
    socket_path = spec.get("options", {}).get("apisock")
    return ["--apisock", socket_path] if socket_path else []


def memory_file(content: bytes) -> int:
    """A descriptor of an anonymous file with this content: in no file system, but memory that may be swapped."""
    fd = os.memfd_create("nydusd-state", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def read_memory_file(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0)
