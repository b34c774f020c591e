"""What containerd is told to mount: bind and overlay forms (snapshotter.md 1.9 and 2.7), order of options included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from snapshotter.labels import GID_MAPPING, UID_MAPPING, VOLATILE
from snapshotter.store import Kind, Snapshot


class Mount(NamedTuple):
    type: str
    source: str
    options: list[str]


class Layout:
    """Builds mounts for snapshots below one directory; `volatile` asks for it everywhere.

    `helper`: mount type with options for runtimes. `userxattr`: overlayfs keeps its marks in user.* attributes, as it
    must where this program's user namespace may not set trusted.* ones.
    """

    def __init__(self, snapshots: Path, *, volatile: bool = False, helper: str = "", userxattr: bool = False) -> None:
        self._snapshots = snapshots
        self._volatile = volatile
        self._helper = helper
        self._userxattr = userxattr

    def ordinary(self, chain: Sequence[Snapshot]) -> list[Mount]:
        """For `chain[0]` on the layers `chain[1:]`, nearest first, exactly as containerd's overlayfs snapshotter."""
        own, parents = chain[0], chain[1:]
        readonly = own.kind is not Kind.ACTIVE
        if not parents:
            return [Mount("bind", self._fs(own), ["ro" if readonly else "rw", "rbind"])]
        if readonly and len(parents) == 1:
            return [Mount("bind", self._fs(parents[0]), ["ro", "rbind"])]
        return [self._overlay(own, [self._fs(parent) for parent in parents])]

    def lazy(
        self,
        own: Snapshot,
        between: Sequence[str],
        image: Path,
        volumes: Sequence[str] = (),
        *,
        mapped: bool = False,
    ) -> list[Mount]:
        """For a snapshot over a mounted Nydus image; `between`: unpacked layers above the image, nearest first.

        Upstream drops those layers unless a detection flag is on (images built on Nydus images lose files); here they
        are always stacked. A view brings its own empty directory, as overlay wants two lower directories then.
        `volumes`: options for a runtime that mounts the image itself; their type has them taken out elsewhere.
        `mapped`: all of these show their owners as the snapshot's user namespace has them already.
        """
        lower = [*between, str(image)]
        if own.kind is not Kind.ACTIVE:
            lower.append(self._fs(own))
        return [self._with(self._overlay(own, lower, mapped=mapped), volumes)]

    def in_guest(self, chain: Sequence[Snapshot], volume: str) -> list[Mount]:
        """For `chain[0]` when the image is not here at all: its layers are empty directories, or there are none."""
        lower = [self._fs(layer) for layer in chain[1:]] or [str(self._snapshots)]
        if chain[0].kind is not Kind.ACTIVE:
            lower.append(self._fs(chain[0]))
        return [self._with(self._overlay(chain[0], lower), [volume])]

    def _with(self, mount: Mount, volumes: Sequence[str]) -> Mount:
        return Mount(self._helper, mount.source, [*mount.options, *volumes]) if volumes else mount

    def _overlay(self, own: Snapshot, lower: Sequence[str], *, mapped: bool = False) -> Mount:
        options = ["userxattr"] if self._userxattr else []
        if own.kind is Kind.ACTIVE:
            if self._volatile or VOLATILE in own.labels:
                options.append("volatile")
            options += [f"workdir={self._snapshots}/{own.id}/work", f"upperdir={self._fs(own)}"]
            if not mapped:
                options += _id_options(own.labels)
        return Mount("overlay", "overlay", [*options, f"lowerdir={':'.join(lower)}"])

    def _fs(self, snapshot: Snapshot) -> str:
        return f"{self._snapshots}/{snapshot.id}/fs"


def _id_options(labels: Mapping[str, str]) -> list[str]:
    # containerd's mount code takes these two out again and makes idmapped lower mounts of them
    pairs = (("uidmap", UID_MAPPING), ("gidmap", GID_MAPPING))
    return [f"{option}={labels[key]}" for option, key in pairs if labels.get(key)]
