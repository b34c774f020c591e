"""systemd as process 1 of a container of its own (PID, mount and cgroup namespaces), with units of ours alone.

The file system is the machine's, so files and unix sockets are the same inside and outside; mounts are not. Ends with
everything that was started in it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.lab.process import Child, LabError, run, wait_until

SYSTEMD = Path("/lib/systemd/systemd")
# What every unit wants by default; the distribution's own would start half a machine.
TARGETS = ("sysinit", "basic", "shutdown", "lab")
_V1 = Path("/sys/fs/cgroup/systemd")
_START = """
echo $$ > {group}/cgroup.procs
exec unshare --mount --pid --fork --cgroup --uts --ipc --kill-child --mount-proc sh -c '
mount --make-rprivate / && mount -t tmpfs tmpfs /run && {mount_groups} &&
exec env -i container=lab SYSTEMD_UNIT_PATH={units} PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    {systemd} --system --unit=lab.target --log-target=console --show-status=no'
"""
_MOUNT_V1 = (
    "mount -t tmpfs tmpfs /sys/fs/cgroup && mkdir /sys/fs/cgroup/systemd && "
    "mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd"
)
_MOUNT_V2 = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"


def missing() -> str:
    """What this machine lacks, "" if nothing."""
    if os.geteuid() != 0:
        return "root: systemd as process 1 needs root"
    return "" if SYSTEMD.exists() else f"end to end: not installed: systemd ({SYSTEMD})"


class Systemd:
    def __init__(self, work: Path) -> None:
        self.units = work / "units"
        self.units.mkdir(parents=True)
        self._log = work / "systemd.log"
        self._group = (_V1 if _V1.is_dir() else Path("/sys/fs/cgroup")) / f"ny{secrets.token_hex(4)}"
        for name in TARGETS:
            (self.units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")

    def __enter__(self) -> Systemd:
        self._group.mkdir()
        mount_groups = _MOUNT_V1 if _V1.is_dir() else _MOUNT_V2
        script = _START.format(group=self._group, mount_groups=mount_groups, units=self.units, systemd=SYSTEMD)
        self._child = Child("systemd", ["sh", "-c", script], self._log)
        try:
            self._child.wait_ready(lambda: self.pid > 0 and self.ctl("is-system-running") == "running", 90)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def pid(self) -> int:
        """Process 1, as the machine numbers it; 0 before there is one."""
        try:
            children = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children").read_text().split()
        except OSError:
            return 0
        return int(children[0]) if children else 0

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """The same in there."""
        return ["nsenter", "-t", str(self.pid), "-a", "--", *map(str, words)]

    def ctl(self, *words: str) -> str:
        """systemctl; its output. Raises LabError, not for a state that is asked for."""
        asks = words[0].startswith(("is-", "show"))
        return run(self.command(["systemctl", *words]), timeout=60, check=not asks).stdout.strip()

    def main_pid(self, unit: str) -> int:
        """As the container numbers it; 0 when it does not run."""
        return int(self.ctl("show", "-p", "MainPID", "--value", unit) or 0)

    def processes(self) -> list[int]:
        """All of the container's, as the machine numbers them."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    found.append(int(name))
            except OSError:
                continue
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, 9)  # and with process 1 the kernel ends all of its namespace
        self._child.stop()

        def gone() -> bool:
            for folder in sorted(self._group.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
                subprocess.run(["rmdir", folder], capture_output=True, check=False, timeout=10)
            return subprocess.run(["rmdir", self._group], capture_output=True, check=False, timeout=10).returncode == 0

        try:
            wait_until(gone, 60, f"the removal of {self._group}")
        except LabError as failure:
            if error is None:
                raise failure from None
