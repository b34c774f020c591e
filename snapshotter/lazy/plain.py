"""Layers that were not unpacked as their image runs lazily, unpacked after all: another image was built on them.

containerd takes a layer with the same chain id for there and downloads nothing; the directory must then hold it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from nydusfs.errors import NydusError
from nydusfs.registry.reference import SHA256_DIGEST, Reference
from nydusfs.trees import disk_usage, remove_tree
from snapshotter import crowd
from snapshotter.directories import FS_MODE
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.labels import LAYER_DIGEST
from snapshotter.lazy import content
from snapshotter.lazy.registries import Registries

DONE = "unpacked"  # in the snapshot's directory, beside `fs`
APPLY_SECONDS = 3600.0
_PIECE = 1 << 20


def unpack(
    registries: Registries,
    image: Reference,
    labels: Mapping[str, str],
    folder: Path,
    below: Sequence[str],
    tar: Path | None = None,
    *,
    chain: str | None = None,
) -> None:
    """Downloads the layer and makes `folder`/fs of it, which nobody has used so far. `below`: directories of the layers
    under it, nearest first; `chain`: their chain id, as for `content.check`. `tar`: the layer, where it is on
    this node.

    `folder`/DONE tells that it is complete, and bytes and inodes of `fs`. Raises Unavailable, SnapshotterError.
    """
    layer = labels.get(LAYER_DIGEST, "")
    if not SHA256_DIGEST.fullmatch(layer):
        raise SnapshotterError(
            f"image {image}: a layer of it was not unpacked and has no label {LAYER_DIGEST}: remove it, pull again"
        )
    for left in folder.glob(".unpack-*"):
        remove_tree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".unpack-"))
    try:
        for name in ("fs", "work", "merged"):
            (scratch / name).mkdir()
        owner = (folder / "fs").stat()
        os.chown(scratch / "fs", owner.st_uid, owner.st_gid)
        os.chmod(scratch / "fs", FS_MODE)
        content.check(image, labels, chain, _apply(registries, image, labels, layer, [str(scratch), *below], tar))
        for entry in (folder / "fs").iterdir():  # of an attempt that was cut short here, or of the lazy way
            remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        os.rename(scratch / "fs", folder / "fs")
        size, inodes = disk_usage(folder / "fs")
        (folder / DONE).write_text(f"{size} {inodes}")
    finally:
        remove_tree(scratch, ignore_errors=True)


def _apply(
    registries: Registries,
    image: Reference,
    labels: Mapping[str, str],
    layer: str,
    places: Sequence[str],
    tar: Path | None,
) -> str:
    """Its diff id."""
    from bootstrap.errors import RafsError

    crowd.apart()
    command = [sys.executable, "-P", "-m", "snapshotter.lazy.apply", *places]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    assert child.stdin is not None
    digest = hashlib.sha256()
    try:
        with _open(registries, image, labels, layer, tar) as plain:
            while piece := plain.read(_PIECE):
                digest.update(piece)
                child.stdin.write(piece)
    except BrokenPipeError:
        pass  # it says why
    except (NydusError, RafsError) as error:
        child.kill()
        child.communicate()
        raise Unavailable(f"image {image}: layer {layer} cannot be fetched: {error}") from None
    except BaseException:
        child.kill()
        child.communicate()
        raise
    _, said = child.communicate(timeout=APPLY_SECONDS)
    if child.returncode:
        reason = (said.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise SnapshotterError(f"image {image}: layer {layer} cannot be unpacked: {reason}")
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def _open(
    registries: Registries, image: Reference, labels: Mapping[str, str], layer: str, tar: Path | None
) -> Iterator[BinaryIO]:
    """Raises NydusError, RafsError, OSError, also at the end: when the bytes are not those of the digest."""
    from bootstrap.decompress import open_layer

    if tar is not None:
        with tar.open("rb") as file:
            yield file
        return
    with (
        registries.open(image, labels) as client,
        client.open_blob(image.repository, layer) as stored,
        open_layer(cast(BinaryIO, stored)) as plain,
    ):
        yield plain
        while stored.read(_PIECE):
            pass
