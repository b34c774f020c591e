"""Reading all of a tarfs blob before any byte of it is served, and what is left of a read that fails."""

from __future__ import annotations

import hashlib
import os
import random
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from bootstrap.base import Blob
from bootstrap.errors import DigestMismatch
from bootstrap.layout.common import BlobFeatures, Compressor, Digester
from bootstrap.tarmap import PIECE_SIZE
from nydusfs.cache import CacheStore
from nydusfs.errors import SourceError
from nydusfs.wholetar import PART, read_tar

TAR = random.Random(7).randbytes(2 * PART + 3 * PIECE_SIZE + 512)
PIECES = -(-len(TAR) // PIECE_SIZE)


def blob(content: bytes = TAR) -> Blob:
    size, identity = len(content), hashlib.sha256(content).hexdigest()
    return Blob(0, identity, PIECE_SIZE, 0, Compressor.NONE, Digester.SHA256, BlobFeatures(0), size, size, size)


class Registry:
    """Gives `TAR`, up to `end`."""

    def __init__(self, end: int = len(TAR)) -> None:
        self.end = end

    async def read(self, blob_id: str, offset: int, size: int, priority: object) -> bytes:
        await trio.lowlevel.checkpoint()
        if offset + size > self.end:
            raise SourceError("the rest", [("registry", "connection reset")])
        return TAR[offset : offset + size]


def read(store: CacheStore, wanted: Blob, end: int = len(TAR)) -> bytes:
    source, image = Registry(end), SimpleNamespace(blobs=[wanted])

    async def main() -> bytes:
        with trio.fail_after(60):
            digests: Any = await read_tar(image, wanted, source, store)  # type: ignore[arg-type]
        return bytes(digests)

    return trio.run(main)


def open_segments(store: CacheStore) -> list[str]:
    fds = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    found = (os.readlink(fd) for fd in fds if os.path.exists(fd))
    return [path for path in found if path.startswith(f"{store.path}/") and not path.endswith(".lock")]


def test_pieces_of_a_tar_that_is_right_are_kept(tmp_path: Path) -> None:
    with closing(CacheStore(tmp_path)) as store:
        assert len(read(store, blob())) == PIECES * 32
        assert len(store.blob(blob().id)) == PIECES
        store.sync()
        assert open_segments(store) == []


@pytest.mark.parametrize("fault", ["wrong", "cut"])
def test_a_tar_that_cannot_be_had_leaves_nothing_open(fault: str, tmp_path: Path) -> None:
    """Nor does it count as being on its way to the disk for ever: so many of that have all others wait for it."""
    with closing(CacheStore(tmp_path)) as store:
        wanted = blob(bytes(len(TAR))) if fault == "wrong" else blob()
        with pytest.raises(DigestMismatch if fault == "wrong" else SourceError):
            read(store, wanted, len(TAR) if fault == "wrong" else PART)
        store.sync()
        assert open_segments(store) == []
        assert store.syncer.held == 0
        there = len(os.listdir(store.folder(wanted.id)))
        assert there == (0 if fault == "wrong" else PART // PIECE_SIZE), "what is of no image is gone, the rest is kept"
        if fault == "cut":
            assert len(read(store, wanted)) == PIECES * 32
            assert len(store.blob(wanted.id)) == PIECES
