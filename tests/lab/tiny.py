"""A small image from a dictionary of files, built by our own builder: real blobs, quickly."""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bootstrap.build import build_layer
from bootstrap.options import BuildOptions


@dataclass(frozen=True)
class TinyImage:
    bootstrap: Path
    blob_id: str
    blob: bytes
    files: dict[str, bytes]


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that no codec makes smaller: offsets in the blob stay easy to reason about."""
    return random.Random(seed).randbytes(size)


def tiny_image(
    folder: Path, files: dict[str, bytes], options: BuildOptions | None = None, mode: int = 0o644
) -> TinyImage:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(data))
    tar.seek(0)
    out = io.BytesIO()
    result = build_layer(tar, out, options or BuildOptions())
    path = folder / f"image-{result.blob_id[:12]}.boot"
    path.write_bytes(result.bootstrap)
    return TinyImage(path, result.blob_id, out.getvalue(), files)
