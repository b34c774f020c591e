"""What systemd does for a unit with FileDescriptorStoreMax=, as process 1 of a PID namespace of its own:

    unshare --pid --fork --mount-proc python -m tests.lab.fakesystemd DIRECTORY BOOTSTRAP CONFIG FILE OTHER

Starts nydusd, mounts an image, kills every process of it at once, starts it again with the descriptors it had stored,
and prints as JSON what readers of FILE saw before and after, and one of OTHER, which was open all the while but not
read.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

from nydusfs.unixhttp import UnixConnection
from tests.lab.process import wait_until

FIRST = 3  # SD_LISTEN_FDS_START
_NAME, _REMOVE = "FDNAME=", "FDSTOREREMOVE=1"


class Store:
    """The manager's end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.held: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            lines = data.decode().splitlines()
            name = next(line for line in lines if line.startswith(_NAME)).removeprefix(_NAME)
            if _REMOVE in lines and name in self.held:
                os.close(self.held.pop(name))
            elif fds:
                self.held[name] = fds[0]

    def knows(self, text: str) -> bool:
        """Whether the state that is held names this. It comes behind the answer, and after all that belongs to it."""
        try:
            states = [fd for name, fd in list(self.held.items()) if name.startswith("nydusd-state.")]
            return any(text.encode() in os.pread(fd, 1 << 20, 0) for fd in states)
        except OSError:
            return False  # replaced meanwhile


def start(directory: Path, store: Store) -> int:
    """Fork and execute nydusd as systemd would, with what is stored."""
    held = dict(store.held)
    pid = os.fork()
    if pid:
        return pid
    environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify")}
    high = [os.dup2(fd, 100 + number) for number, fd in enumerate(held.values())]
    for number, fd in enumerate(high):
        os.dup2(fd, FIRST + number)
    if held:
        names = {"LISTEN_FDS": str(len(held)), "LISTEN_FDNAMES": ":".join(held)}
        environment |= {"LISTEN_PID": str(os.getpid()), **names}
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    program = [sys.executable, "-m", "nydusfs.daemon.cli", "fuse"]
    os.execve(program[0], [*program, "-M", str(directory / "m"), "-A", str(directory / "s")], environment)
    raise AssertionError


def ask(directory: Path, method: str, target: str, body: str | None = None) -> tuple[int, bytes]:
    connection = UnixConnection(directory / "s", 30)
    connection.request(method, f"/api/v1/{target}", body=body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def wait_running(directory: Path, not_pid: int = 0) -> int:
    """The worker's pid."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            info = json.loads(ask(directory, "GET", "daemon")[1])
            if info["state"] == "RUNNING" and info["worker_pid"] != not_pid:
                return int(info["worker_pid"])
        except OSError:
            pass
        time.sleep(0.02)
    raise TimeoutError("nydusd")


def main() -> None:
    directory, bootstrap, config, name = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_text(), sys.argv[4]
    other = directory / "m" / "a" / sys.argv[5]
    store = Store(directory / "notify")
    start(directory, store)
    first = wait_running(directory)
    body = json.dumps({"source": bootstrap, "fs_type": "rafs", "config": config})
    status, _ = ask(directory, "POST", "mount?mountpoint=/a", body)
    wait_until(lambda: store.knows(bootstrap), 60, "the state in the store")
    path = directory / "m" / "a" / name
    seen = {
        "mount": status,
        "stored": sorted({name.partition(".")[0] for name in store.held}),
        "before": sha256(path.read_bytes()).hexdigest(),
    }
    with other.open("rb") as held:
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.kill(-1, signal.SIGKILL)  # everything in this namespace but us
        while True:
            try:
                if os.waitpid(-1, 0)[0] == 0:
                    break
            except ChildProcessError:
                break
        start(directory, store)
        wait_running(directory, not_pid=first)
        seen["open file"] = sha256(held.read()).hexdigest()
    seen["after"] = sha256(path.read_bytes()).hexdigest()
    seen["umount"] = ask(directory, "DELETE", "mount?mountpoint=/a")[0]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
