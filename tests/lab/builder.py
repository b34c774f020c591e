"""Images built from a Dockerfile by buildah, without a registry: the base is a Debian made here.

Ways of this machine to apt's and pip's registries are mounted into the build, and are in no layer of its result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.process import LabError, run

_ACQUIRE = re.compile(r"Acquire::(?:https?::|Check-)")
_PIP = re.compile(
    r"(?:global|:env:|install)\.(?:default-)?(timeout|index-url|extra-index-url|trusted-host|proxy|cert)='(.*)'"
)
_CA = "/run/lab-ca.crt"


class Builder:
    """Everything it keeps is below `work`. Skips without buildah or mmdebstrap."""

    def __init__(self, work: Path) -> None:
        for program in ("buildah", "mmdebstrap"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        self._work = work
        for name in ("tmp", "lib"):
            (work / name).mkdir(parents=True)
        # as root it has a cache in /var/lib that no option moves
        script = 'mount --bind "$1" /var/lib && shift && exec "$@"'
        self._apart = ["unshare", "--mount", "sh", "-c", script, "sh", work / "lib"]

    def __call__(self, *words: str | Path, seconds: float = 120) -> str:
        # vfs: directories, so that nothing is mounted when this is done
        own = ["--root", self._work / "store", "--runroot", self._work / "run", "--storage-driver", "vfs"]
        env = {**os.environ, "TMPDIR": str(self._work / "tmp")}
        return run([*self._apart, "buildah", *own, *words], timeout=seconds, env=env).stdout.strip()

    def debian(self, name: str, suite: str) -> None:
        """An image of this name: Debian's required packages and apt, from the mirror that this machine uses."""
        kept = [line for line in _lines("apt-config", "dump", "Acquire") if _ACQUIRE.match(line)]
        options, tar = self._work / "apt.conf", self._work / "base.tar"
        options.write_text("".join(f"{line}\n" for line in kept))
        targets = _lines("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
        mirrors = [one for one in targets if one.rstrip("/").endswith("/debian")]
        if not mirrors:
            raise LabError("apt has no mirror of Debian here")
        words = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--aptopt={options}", suite, tar, mirrors[0]]
        # mounts of its own: one that is killed leaves neither /proc nor /sys in its directory
        run(["unshare", "--mount", *words], timeout=400)
        container = self("from", "scratch")
        self("add", container, tar)
        self("commit", container, name)
        self("rm", container)
        tar.unlink()

    def build(self, file: Path, context: Path, name: str) -> None:
        listed = _lines(sys.executable, "-m", "pip", "config", "list")
        found: dict[str, str] = dict(match.group(1, 2) for line in listed if (match := _PIP.fullmatch(line)))
        mounts: list[str | Path] = []
        if cert := found.pop("cert", ""):
            found["cert"] = _CA
            mounts += ["--volume", f"{cert}:{_CA}:ro"]
        settings = self._work / "pip.conf"
        settings.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items()))
        mounts += ["--volume", f"{settings}:/etc/pip.conf:ro"]
        words = ["bud", "--isolation", "chroot", "--pull-never", *mounts, "-f", file, "-t", name, context]
        self(*words, seconds=600)

    def config(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", name))["OCIv1"]["config"]
        return found

    def root(self, name: str) -> Path:
        """The files of a container of this image, which nothing runs in."""
        return Path(self("mount", self("from", "--pull-never", name)))


def _lines(*words: str) -> list[str]:
    return run(words, timeout=60).stdout.splitlines()
