"""systemd's file descriptor store (sd_notify(3), FDSTORE=1): what survives even the end of the keeper.

Used only by a nydusd that systemd itself started, in a unit with FileDescriptorStoreMax=: the descriptors come back to
the unit's next process as LISTEN_FDS.
"""

from __future__ import annotations

import os
import socket

PREFIX = "nydusd-"
FIRST = 3  # SD_LISTEN_FDS_START
# The last number of each name: a new copy is stored under the next one before the last is removed, so that there is
# one at every moment.
_serials: dict[str, int] = {}


def _address() -> str | None:
    path = os.environ.get("NOTIFY_SOCKET")
    if not path or os.getppid() != 1:
        return None
    return "\0" + path[1:] if path.startswith("@") else path


def push(name: str, fd: int) -> None:
    """Give systemd a copy, in place of the last one of this name. Failure costs nothing that was there before."""
    address = _address()
    if address is None:
        return
    last = _serials.get(name, 0)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            socket.send_fds(sock, [f"FDSTORE=1\nFDNAME={PREFIX}{name}.{last + 1}".encode()], [fd])
            _serials[name] = last + 1
            if last:
                sock.send(f"FDSTOREREMOVE=1\nFDNAME={PREFIX}{name}.{last}".encode())
    except OSError:
        pass


def take() -> tuple[dict[str, int], int]:
    """The descriptors of an earlier life by name, and its state (-1: none)."""
    held: dict[str, int] = {}
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return held, -1
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    os.environ.pop("LISTEN_PID")
    for fd, name in zip(range(FIRST, FIRST + count), names, strict=False):
        os.set_inheritable(fd, False)
        short, _, serial = name.removeprefix(PREFIX).rpartition(".")
        if not name.startswith(PREFIX) or not serial.isdecimal() or int(serial) <= _serials.get(short, 0):
            os.close(fd)  # not ours, or older than one we have
            continue
        if short in held:
            os.close(held[short])
        held[short], _serials[short] = fd, int(serial)
    return held, held.pop("state", -1)
