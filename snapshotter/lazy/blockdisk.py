"""tarfs images as block devices for virtual machines: `export_mode` (snapshotter.md 2.7, 3.8).

An EROFS disk of the whole image, or one of each layer, lies in the snapshot's directory, so it goes with it; upstream
keeps them in the blob cache. What dm-verity needs is beside it, and a label of the snapshot, as upstream has it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nydusfs.trees import wait_for_disk
from snapshotter import crowd
from snapshotter.errors import SnapshotterError

EXPORT_SECONDS = 3600.0
IMAGE, LAYER = "image.disk", "layer.disk"
_VERITY = ".verity"
_RUN = "import sys; from bootstrap.cli import main; sys.argv[0] = 'nydus-image'; main()"
_OPTIONS = re.compile(r"--data-blocks (\d+) --hash-offset (\d+) ([0-9a-f]{64})")
_BLOCK, _HASH_BLOCK = 512, 4096


class ExportMode(NamedTuple):
    whole: bool  # one disk for the image, or one for each layer
    disk: bool  # False: only what dm-verity would need
    verity: bool


MODES = {
    "layer_verity_only": ExportMode(False, False, True),
    "image_verity_only": ExportMode(True, False, True),
    "layer_block": ExportMode(False, True, False),
    "layer_block_with_verity": ExportMode(False, True, True),
    "image_block": ExportMode(True, True, False),
    "image_block_with_verity": ExportMode(True, True, True),
}


def export(boot: Path, tars: Sequence[tuple[str, Path]], out: Path, mode: ExportMode) -> str:
    """Makes the disk `out` of a bootstrap and the tars (SHA-256, path) it names, unless it is there.

    Returns `blocks,offset,sha256:HASH`, "" without dm-verity. Raises SnapshotterError.
    """
    verity = out.with_suffix(_VERITY)
    if (not mode.disk or out.exists()) and (not mode.verity or verity.exists()):
        return verity.read_text() if mode.verity else ""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".disk-") as scratch:
        made = Path(scratch, "disk")
        for identity, tar in tars:
            os.symlink(tar, Path(scratch, identity))
        crowd.apart()
        command = [sys.executable, "-P", "-c", _RUN, "export", "--block", "--log-level", "error"]
        command += ["--bootstrap", str(boot), "--localfs-dir", scratch, "--output", str(made)]
        command += ["--verity"] if mode.verity else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=EXPORT_SECONDS, cwd="/", check=False)
        except subprocess.TimeoutExpired:
            raise SnapshotterError(f"{boot}: no block device after {EXPORT_SECONDS:.0f} s") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SnapshotterError(f"{boot} cannot be exported as a block device: {reason}")
        told = ""
        if mode.verity:
            found = _OPTIONS.search(done.stdout)
            if found is None:
                raise SnapshotterError(f"{boot}: nydus-image export told no dm-verity options")
            told = f"{found[1]},{found[2]},sha256:{found[3]}"
            Path(scratch, "verity").write_text(told)
            wait_for_disk(Path(scratch, "verity"))
            os.replace(Path(scratch, "verity"), verity)
        if mode.disk:
            wait_for_disk(made)
            os.replace(made, out)
        return told


def verity_of(disk: Path) -> dict[str, Any] | None:
    """As Kata wants it; None for a disk without."""
    try:
        blocks, offset, digest = disk.with_suffix(_VERITY).read_text().split(",")
    except FileNotFoundError:
        return None
    return {
        "hashtype": "sha256", "hash": digest.removeprefix("sha256:"), "blocknum": int(blocks), "blocksize": _BLOCK,
        "hashsize": _HASH_BLOCK, "offset": int(offset),
    }  # fmt: skip
