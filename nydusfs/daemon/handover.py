"""What one worker leaves to the next so that a running mount goes on: through the keeper, or through a supervisor
(`nydusd.md` 8) as upstream's snapshotter has one.

The kernel remembers node numbers, so images and the directories above them keep theirs. The text holds configurations
with their credentials: it lives in memory and in sockets only.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from nydusfs.errors import NydusError
from nydusfs.keeper.protocol import FUSE

VERSION = 1
SUPERVISOR_SECONDS = 10.0
MAX_FDS = 16  # of one message; upstream's snapshotter passes on what came


@dataclass(frozen=True)
class KeptMount:
    mountpoint: str
    source: str
    config: str
    prefetch_files: tuple[str, ...]
    index: int
    generation: int
    mounted_ns: int

    @cached_property
    def text(self) -> str:
        """As JSON. Kept: the state of a thousand mounts is written at each change of one."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, slots=True)
class KeptState:
    """`mountpoint`: canonical; to resolve it again would be to ask ourselves. `tree`: path of each directory above the
    images and its node number; `next_node`: the first unused one; `held`: descriptors that came with it."""

    mountpoint: str
    mounts: list[KeptMount] = field(default_factory=list)
    numbering: tuple[int, int] = (0, 0)
    tree: list[tuple[str, int]] = field(default_factory=list)
    next_node: int = 2
    runtime: dict[str, dict[str, str]] = field(default_factory=dict)
    held: tuple[str, ...] = ()


def encode(state: KeptState, held: Sequence[str] = ()) -> bytes:
    """`held`: names of the descriptors that go with it."""
    rest = json.dumps(
        {
            "version": VERSION,
            "held": held,
            "mountpoint": state.mountpoint,
            "numbering": state.numbering,
            "tree": state.tree,
            "next_node": state.next_node,
            "runtime": state.runtime,
        }
    )
    mounts = ", ".join(mount.text for mount in state.mounts)
    return f'{rest[:-1]}, "mounts": [{mounts}]}}'.encode()


def decode(data: bytes) -> KeptState:
    """Raises `NydusError` for what no nydusd of this kind wrote."""
    try:
        value: dict[str, Any] = json.loads(data)
        if value["version"] != VERSION:
            raise NydusError(f"state of version {value['version']}: this nydusd reads version {VERSION}")
        mounts = [KeptMount(**{**mount, "prefetch_files": tuple(mount["prefetch_files"])}) for mount in value["mounts"]]
        index, generation = value["numbering"]
        tree = [(str(path), int(number)) for path, number in value["tree"]]
        where, next_node = str(value["mountpoint"]), int(value["next_node"])
        held = tuple(map(str, value.get("held", ())))
        return KeptState(where, mounts, (index, generation), tree, next_node, value["runtime"], held)
    except (ValueError, KeyError, TypeError) as error:
        raise NydusError(f"state of another daemon cannot be read: it is not of this nydusd ({error})") from None


def send_to_supervisor(path: str, state: KeptState, fds: Mapping[str, int]) -> None:
    """`fds` by name, that of /dev/fuse first: an old one may take that alone. Raises `NydusError`. For a worker
    thread."""
    data = encode(state, tuple(fds))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(SUPERVISOR_SECONDS)
            sock.connect(path)
            sent = socket.send_fds(sock, [data], list(fds.values()))
            if rest := data[sent:]:  # else none: who has it all may have closed, a broken pipe
                sock.sendall(rest)
    except OSError as error:
        raise NydusError(f"supervisor {path}: {error.strerror or error}") from None


def receive_from_supervisor(path: str) -> tuple[KeptState, dict[str, int]]:
    """State, and descriptors by name. Raises `NydusError`. For a worker thread."""
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(SUPERVISOR_SECONDS)
            sock.connect(path)
            data, fds, _, _ = socket.recv_fds(sock, 32 << 10, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            while piece := sock.recv(256 << 10):
                data += piece
        if not fds:
            raise NydusError(f"supervisor {path} sent no descriptor")
        state = decode(data)
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise NydusError(f"supervisor {path}: {error.strerror or error}") from None
        raise
    names = state.held or (FUSE,)
    for fd in fds[len(names) :]:
        os.close(fd)
    return state, dict(zip(names, fds, strict=False))
