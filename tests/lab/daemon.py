"""A nydusd process (ours or upstream's) with its mountpoint and API socket, for tests and benchmarks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from nydusfs.cache.names import NAME
from nydusfs.unixhttp import UnixConnection
from tests.lab.process import (
    Child,
    kill_together,
    matching,
    mounts_below,
    processes_mentioning,
    remove_tree,
    tail,
    unmount_below,
    wait_until,
    work_dir,
)

DRIVER = os.environ.get("NYDUS_TEST_FS_DRIVER", "")
"""fuse, erofs or auto: for every daemon of ours for which a test does not choose; see `drivers`."""


class Answer(NamedTuple):
    status: int
    body: Any

    @property
    def message(self) -> str:
        return str(self.body["message"]) if isinstance(self.body, dict) else ""


def localfs_config(blobs: Path, *, config_id: str = "", work_dir: Path | None = None, **extra: Any) -> str:
    """A version 1 configuration for a directory of blobs."""
    device: dict[str, Any] = {"id": config_id, "backend": {"type": "localfs", "config": {"dir": str(blobs)}}}
    if work_dir is not None:
        device["cache"] = {"type": "blobcache", "config": {"work_dir": str(work_dir)}}
    return json.dumps({"device": device, "mode": "direct", **extra})


def all_durable(cache: Path) -> bool:
    """Whether the segments of a cache have their final names, which they get about a second after they came."""
    found = [match for path in matching(cache, "*/*-*") if (match := NAME.fullmatch(path.name))]
    return bool(found) and all(match[3] is None for match in found)


class Nydusd:
    """Use as a context manager; leaving it ends the process and removes mount and directory."""

    def __init__(self, *args: str | Path, binary: Path | None = None, directory: Path | None = None) -> None:
        self.dir = directory or work_dir()
        self.mnt = self.dir / "m"
        self.sock = self.dir / "a.sock"
        self.log = self.dir / "log"
        self.args = args
        self.binary = binary
        # --localfs-dir is the form without a cache directory, which EROFS needs
        chosen = binary is not None or "--fs-driver" in args or "-D" in args
        self.driver = "" if chosen else DRIVER
        self.child: Child | None = None
        self.ready_seconds = 0.0

    def start(self, *, ready: bool = True) -> Nydusd:
        if not mounts_below(self.mnt):
            self.mnt.mkdir(exist_ok=True)
        program = [self.binary] if self.binary else [sys.executable, "-m", "nydusfs.daemon.cli"]
        extra = ["--rlimit-nofile", "0"] if self.binary else ["--fs-driver", self.driver] if self.driver else []
        self.child = Child("nydusd", [*program, "fuse", "-M", self.mnt, "-A", self.sock, *extra, *self.args], self.log)
        if ready:
            self.ready_seconds = self.child.wait_ready(self.running)
        return self

    def running(self) -> bool:
        try:
            return bool(self.get("daemon").body["state"] == "RUNNING")
        except OSError:
            return False

    @property
    def pid(self) -> int:
        """Of the process that was started: our keeper."""
        assert self.child is not None
        return self.child.pid

    @property
    def worker_pid(self) -> int:
        """Of the process that serves."""
        return int(self.get("daemon").body.get("worker_pid", self.pid))

    def kill_all(self) -> None:
        """SIGKILL to every process of this daemon at one moment, so that none sees the others die."""
        kill_together(processes_mentioning(str(self.sock)))
        assert self.child is not None
        self.child.process.wait(60)

    def call(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> Answer:
        """`path`: below /api/v1/, or a whole one."""
        path = path if path.startswith("/") else f"/api/v1/{path}"
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        connection = UnixConnection(self.sock, timeout)
        try:
            connection.request(method, path, body=data)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        return Answer(answer.status, json.loads(text) if text else None)

    def get(self, path: str) -> Answer:
        return self.call("GET", path)

    def mount(self, at: str, source: Path, config: str, **extra: Any) -> Answer:
        return self._mount("POST", at, source, config, **extra)

    def remount(self, at: str, source: Path, config: str) -> Answer:
        return self._mount("PUT", at, source, config)

    def _mount(self, method: str, at: str, source: Path, config: str, **extra: Any) -> Answer:
        body = {"source": str(source), "fs_type": "rafs", "config": self._with_cache(config), **extra}
        path = f"mount?mountpoint={quote(at, safe='')}"
        answer = self.call(method, path, body)
        if self.driver == "erofs" and "its data is a plain tar" in answer.message:  # by design no EROFS mount
            body["config"] = json.dumps({**json.loads(body["config"]), "fs_driver": "auto"})
            answer = self.call(method, path, body)
        return answer

    def _with_cache(self, config: str) -> str:
        """EROFS mounts need a cache directory: tests that do not care have one below this daemon's directory."""
        if self.driver in ("", "fuse"):
            return config
        try:
            value = json.loads(config)
            value["device"].setdefault("cache", {"type": "blobcache", "config": {"work_dir": str(self.dir / "cache")}})
        except (ValueError, KeyError, TypeError, AttributeError):
            return config  # one that is to be refused
        return json.dumps(value)

    def umount(self, at: str) -> Answer:
        return self.call("DELETE", f"mount?mountpoint={quote(at, safe='')}")

    def memory(self, field: str = "RssAnon") -> int:
        """A size of `/proc/PID/status` in kB."""
        for line in Path(f"/proc/{self.worker_pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)

    def log_text(self) -> str:
        return tail(self.log, 1 << 20)

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 30.0) -> tuple[int, float]:
        """Exit status and the seconds it took."""
        assert self.child is not None
        began = time.monotonic()
        code = self.child.stop(timeout, sig)
        return code, time.monotonic() - began

    def __enter__(self) -> Nydusd:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self.child is not None:
            if self.child.alive():
                self.child.stop(10)
            if processes_mentioning(str(self.sock)):
                self.kill_all()
        unmount_below(self.dir)
        remove_tree(self.dir)


def can_mount_fuse() -> str:
    """ "" when a test may mount here, else the reason why not."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    if shutil.which("umount") is None:
        return "needs umount"
    return ""


def reader(code: str, *args: str | Path, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run Python code that touches a mount, in a process that can be left behind."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=timeout
    )


__all__ = ["Answer", "Nydusd", "can_mount_fuse", "localfs_config", "reader", "wait_until"]
