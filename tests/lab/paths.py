"""Where the optional interop material is: fixtures and prebuilt reference programs.

The product and its own tests never need them; tests that do ask here and skip loudly when the answer is None.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


@cache
def shared_dir() -> Path | None:
    """The folder that holds `fixtures/` and `bin/`: $NYDUS_SHARED, else `shared` beside the checkout."""
    named = os.environ.get("NYDUS_SHARED")
    for candidate in [Path(named)] if named else [REPO.parent / "shared"]:
        if (candidate / "fixtures").is_dir():
            return candidate
    return None


@cache
def reference_cases() -> list[str]:
    """Names of the images upstream's builder wrote; one, for tests that then skip, when the material is not here."""
    shared = shared_dir()
    folder = shared / "fixtures" / "reference" if shared else Path("/nonexistent")
    return [path.name for path in sorted(folder.glob("v[56]-*"))] or ["v6-zstd-blake3-1m"]


@cache
def ref_bin(name: str) -> Path | None:
    """An executable of the reference stack, unpacked once per user; None when the material is not here.

    $NYDUS_REF_BIN names a folder of already unpacked programs.
    """
    named = os.environ.get("NYDUS_REF_BIN")
    if named:
        path = Path(named) / name
        return path if path.exists() else None
    shared = shared_dir()
    if shared is None or not (shared / "bin" / f"{name}.xz").exists() or shutil.which("xz") is None:
        return None
    target = Path(tempfile.gettempdir()) / f"nydus-ref-bin-{os.getuid()}"
    target.mkdir(exist_ok=True)
    subprocess.run(["sh", str(shared / "bin" / "unpack"), str(target), name], check=True, timeout=120)
    return target / name
