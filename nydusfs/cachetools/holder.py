"""Changes of a store beside the process that may have it: told to that process, done here when there is none.

Nobody is kept out by a lock: a nydusd that starts meanwhile would take another directory for its cache. So whether
there is one is looked up again after each change, and it is told then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nydusfs.cache.outside import STAGED, split


class Holder(Protocol):
    """The process a store belongs to. Its methods raise `nydusfs.errors.CacheError` when it does not do what it is
    told."""

    def drop(self, store: Path, blob_id: str, names: Sequence[str], damaged: bool) -> list[str]: ...

    def adopt(self, store: Path, blob_id: str, names: Sequence[str], staged: str) -> tuple[list[str], str]: ...


class FindHolder(Protocol):
    def __call__(self, store: Path) -> Holder | None:
        """None when no process has the store now. Raises `CacheError` when one has it that cannot be told."""


def drop(find: FindHolder, store: Path, blob_id: str, names: Sequence[str], *, damaged: bool) -> int:
    """Delete segments of a blob; how many were there. Raises `CacheError`."""
    gone: set[str] = set()
    holder = find(store)
    if holder is not None:
        gone.update(holder.drop(store, blob_id, names, damaged))
    else:
        for name in names:
            if split(name) is None:
                continue
            for folder in (store / blob_id, store / f"{blob_id}.segments"):
                for path in (folder / name, *folder.glob(f"{name}.*")):
                    try:
                        os.unlink(path)
                        gone.add(name)
                    except OSError:
                        continue
        if gone and (holder := find(store)) is not None:
            holder.drop(store, blob_id, names, damaged)
    return len(gone)


def adopt(find: FindHolder, store: Path, blob_id: str, names: Sequence[str], staged: str) -> tuple[list[str], str]:
    """Move verified, durable segments from `<store>/.staged/<staged>/<blob id>` into the store. Those taken, and why
    there are not more, "" when there is nothing to say. Raises `CacheError`."""
    holder = find(store)
    if holder is not None:
        return holder.adopt(store, blob_id, names, staged)
    taken: list[str] = []
    why = ""
    folder = store / blob_id
    if folder.is_file():
        folder = store / f"{blob_id}.segments"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            os.rename(store / STAGED / staged / blob_id / name, folder / name)
            taken.append(name)
    except OSError as error:
        why = f"{folder}: {error.strerror or error}"
    if taken and (holder := find(store)) is not None:
        # it started meanwhile and may have seen some of them: what it does not know it takes from the staging directory
        for name in taken:
            os.link(folder / name, store / STAGED / staged / blob_id / name)
        return holder.adopt(store, blob_id, taken, staged)
    return taken, why
