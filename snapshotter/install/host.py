"""The machine that is changed: this one, or the tree of another below a directory (`--root`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.errors import InstallError

RUN_SECONDS = 90.0  # systemd's own patience with a stop
FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
CONTAINERD = "containerd.service"


@dataclass(frozen=True)
class Host:
    """Paths are those of the machine itself. With a `root` nothing is started or stopped: it does not run."""

    root: Path = Path("/")

    @property
    def here(self) -> bool:
        return self.root == Path("/")

    def path(self, path: str | Path) -> Path:
        """Where it is from here."""
        return self.root / str(path).lstrip("/")

    def program(self, name: str) -> str:
        """Its path on that machine, "" if it has none."""
        if self.here:
            return shutil.which(name) or ""
        return next((f"{one}/{name}" for one in FOLDERS if os.access(self.path(f"{one}/{name}"), os.X_OK)), "")

    def run(self, words: Sequence[str], check: bool = True, timeout: float = RUN_SECONDS) -> tuple[int, str, str]:
        """A program of that machine: status, stdout, stderr. Raises InstallError when it cannot be started or fails."""
        command = list(words) if self.here else ["chroot", str(self.root), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
        except subprocess.TimeoutExpired:
            raise InstallError(f"{' '.join(words)}: no end after {timeout:.0f} s") from None
        except OSError as failure:
            raise InstallError(f"{command[0]}: {failure.strerror}") from None
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise InstallError(f"{' '.join(words)}: status {done.returncode}: {' '.join(said[-3:])}")
        return done.returncode, done.stdout, done.stderr

    # ---- files

    def read(self, path: str | Path) -> str | None:
        """None where no file is. Raises InstallError."""
        try:
            return self.path(path).read_bytes().decode()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as failure:
            raise InstallError(f"{path}: {getattr(failure, 'strerror', None) or 'not text in UTF-8'}") from None

    def write(self, path: str | Path, text: str) -> None:
        """Whole or not at all; mode and owner of a file that is there stay. Raises InstallError."""
        # a link stays one; of another machine's tree it would lead into ours
        place = Path(os.path.realpath(self.path(path))) if self.here else self.path(path)
        new = place.with_name(f"{place.name}.nydus-new")
        try:
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with open(new, "wb") as file:
                file.write(text.encode())
                with contextlib.suppress(FileNotFoundError):
                    known = place.stat()
                    os.fchmod(file.fileno(), known.st_mode & 0o7777)
                    os.fchown(file.fileno(), known.st_uid, known.st_gid)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, place)
        except OSError as failure:
            new.unlink(missing_ok=True)
            raise InstallError(f"{path} cannot be written: {failure.strerror}") from None

    def remove(self, path: str | Path) -> None:
        """And the directories above that are empty then, below /etc."""
        place = self.path(path)
        place.unlink(missing_ok=True)
        if place.parent in (self.path("/etc/nydus"), self.path("/etc/containerd")):
            with contextlib.suppress(OSError):
                place.parent.rmdir()

    # ---- systemd

    @property
    def systemd(self) -> bool:
        """Whether services can be started and stopped: systemd is at work here."""
        return self.here and Path("/run/systemd/system").is_dir() and bool(self.program("systemctl"))

    def systemctl(self, *words: str, check: bool = True) -> tuple[int, str, str]:
        return self.run(["systemctl", *words], check=check)

    def is_active(self, unit: str) -> bool:
        return self.systemctl("is-active", "--quiet", unit, check=False)[0] == 0

    def enabled(self, unit: str) -> bool:
        return os.path.lexists(self.path(f"/etc/systemd/system/multi-user.target.wants/{unit}"))
