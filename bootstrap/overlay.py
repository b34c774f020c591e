"""Layers become one tree: who wins, whiteouts, implied directories. Reference: RAFS format 5.9.

All layers are walked at once, directory by directory. A directory that a single layer knows is a range of rows, copied
without a look at its names; only where layers meet are names compared.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from bootstrap.chunktable import BlobInfo
from bootstrap.flat import IMPLIED, NO_BLOB, FlatTree, Ints

OCI_PREFIX = b".wh."
OCI_OPAQUE = b".wh..wh..opq"
OVERLAY_OPAQUE = b"trusted.overlay.opaque"


def is_whiteout(name: bytes, mode: int, rdev: int, spec: str) -> bool:
    """Whether a path of a layer stands for the absence of others: no content of the image."""
    if spec == "oci":
        return name.startswith(OCI_PREFIX) and len(name) > len(OCI_PREFIX)
    return spec == "overlayfs" and stat.S_ISCHR(mode) and rdev == 0


def overlay(layers: Sequence[tuple[FlatTree, str]]) -> FlatTree:
    """The tree of all layers, lowest first, in G-order. Each comes with its whiteout spec: oci, overlayfs or none.

    Whiteouts act on lower layers only and vanish, in the lowest layer too. Attributes of a directory are those of the
    topmost layer that describes it: one that only implies it has no say. Chunks, attributes and texts of the layers are
    shared, not copied; layers with a blob entry in common share it in the result.
    """
    return _Overlay([_Layer(tree, spec) for tree, spec in layers]).run()


@dataclass(slots=True)
class _Layer:
    """A layer and what the walk wants to know of it at once. `base`: its first row in the tables of all layers."""

    tree: FlatTree
    spec: str
    base: int = 0
    names: list[bytes] = field(init=False)
    first: list[int] = field(init=False)
    count: list[int] = field(init=False)
    directories: list[int] = field(init=False)
    described: list[bool] = field(init=False)
    place: dict[int, int] = field(init=False)
    removed: dict[int, list[bytes]] = field(init=False)
    """By directory: the names it removes from lower layers."""
    hidden: dict[int, list[int]] = field(init=False)
    """By directory: the rows in it that are whiteouts, ascending."""
    opaque: set[int] = field(init=False)

    def __post_init__(self) -> None:
        tree = self.tree
        rows = tree.directories()
        inodes = tree.inodes[rows]
        self.names = tree.names
        self.directories = rows.tolist()
        self.place = {row: place for place, row in enumerate(self.directories)}
        self.first, self.count = inodes["first"].tolist(), inodes["count"].tolist()
        self.described = (inodes["flags"] & IMPLIED == 0).tolist()
        self.removed, self.hidden, self.opaque = {}, {}, set()
        if self.spec == "oci":
            self._scan_oci()
        elif self.spec == "overlayfs":
            self._scan_overlayfs()

    def _hide(self, rows: list[int], victims: list[bytes | None]) -> None:
        if rows:
            parents = self.tree.parents()[rows].tolist()
            for row, parent, victim in zip(rows, parents, victims, strict=True):
                self.hidden.setdefault(parent, []).append(row)
                if victim is None:
                    self.opaque.add(parent)
                else:
                    self.removed.setdefault(parent, []).append(victim)

    def _scan_oci(self) -> None:
        found = [row for row, name in enumerate(self.names) if name.startswith(OCI_PREFIX)]
        rows = [row for row in found if len(self.names[row]) > len(OCI_PREFIX)]
        names = [self.names[row] for row in rows]
        self._hide(rows, [None if name == OCI_OPAQUE else name[len(OCI_PREFIX) :] for name in names])

    def _scan_overlayfs(self) -> None:
        tree = self.tree
        rows = np.flatnonzero((tree.kinds() == stat.S_IFCHR) & (tree.inodes["rdev"] == 0)).tolist()
        self._hide(rows, [self.names[row] for row in rows])
        for row in self.directories:
            place = tree.inodes["xattrs"][row]
            if place >= 0 and tree.xattrs[place].get(OVERLAY_OPAQUE) == b"y":
                self.opaque.add(row)

    def children(self, place: int) -> tuple[int, int]:
        first = self.first[place]
        return first, first + self.count[place]


# Where a directory is found: the layer and the number of the directory in it, lowest layer first.
_Sources = list[tuple[_Layer, int]]


class _Overlay:
    def __init__(self, layers: list[_Layer]) -> None:
        self._layers = layers
        base = 0
        for layer in layers:
            layer.base = base
            base += len(layer.names)
        self._rows: list[int] = []
        """The result: rows in the tables of all layers."""
        self._ranges: list[tuple[int, int, int]] = []
        """Row, first child and number of children of each directory."""
        self._closed: list[int] = []
        """Directories that were opaque: their mark must go."""

    def run(self) -> FlatTree:
        whole: _Sources = [(layer, 0) for layer in self._layers]
        self._rows.append(self._root())
        self._close(0, whole)
        stack: list[tuple[int, _Sources]] = [(0, whole)]
        while stack:
            row, sources = stack.pop()
            start = len(self._rows)
            below = self._take(sources[0], start) if len(sources) == 1 else self._join(sources, start)
            self._ranges.append((row, start, len(self._rows) - start))
            below.reverse()
            stack += below
        return self._tables()

    def _root(self) -> int:
        """The row with the root's attributes: of the topmost layer in which they are not those of no entry at all."""
        for layer in reversed(self._layers[1:]):
            if not _is_default(layer.tree):
                return layer.base
        return self._layers[0].base

    def _take(self, source: tuple[_Layer, int], start: int) -> list[tuple[int, _Sources]]:
        """The children of a directory that only one layer has; returns the directories among them."""
        layer, place = source
        first, end = layer.children(place)
        base = layer.base
        directories = layer.directories
        low = bisect_left(directories, first)
        high = low
        while high < len(directories) and directories[high] < end:
            high += 1
        hidden = layer.hidden.get(directories[place])
        if hidden is None:
            self._rows += range(base + first, base + end)
            shift = start - first
            return [(directories[number] + shift, [(layer, number)]) for number in range(low, high)]
        gone = set(hidden)
        kept = [row for row in range(first, end) if row not in gone]
        self._rows += [base + row for row in kept]
        places = layer.place
        return [(start + at, [(layer, places[row])]) for at, row in enumerate(kept) if row in places]

    def _join(self, sources: _Sources, start: int) -> list[tuple[int, _Sources]]:
        """The children of a directory that several layers have."""
        merged: dict[bytes, int] = {}
        folders: dict[bytes, _Sources] = {}
        for layer, place in sources:
            row = layer.directories[place]
            first, end = layer.children(place)
            names = layer.names
            if row in layer.opaque:
                merged.clear()
                folders.clear()
            for victim in layer.removed.get(row, ()):
                if merged.pop(victim, None) is not None:
                    folders.pop(victim, None)
            base = layer.base
            new = dict(zip(names[first:end], range(base + first, base + end), strict=True))
            fresh: dict[bytes, tuple[_Layer, int]] = {}
            directories = layer.directories
            at = bisect_left(directories, first)
            while at < len(directories) and directories[at] < end:
                fresh[names[directories[at]]] = (layer, at)
                at += 1
            for hidden in layer.hidden.get(row, ()):
                del new[names[hidden]]
                fresh.pop(names[hidden], None)
            for name in folders.keys() & new.keys():
                if name not in fresh:
                    del folders[name]
            for name, source in fresh.items():
                known = folders.get(name)
                if known is None:
                    folders[name] = [source]
                else:
                    known.append(source)
            merged.update(new)
        order = sorted(merged)
        below = []
        for name in sorted(folders):
            found = folders[name]
            at = bisect_left(order, name)
            below.append((start + at, found))
            if len(found) > 1:
                merged[name] = self._attributes(found)
                self._close(start + at, found)
        if len(order) > 1:
            self._rows += itemgetter(*order)(merged)
        elif order:
            self._rows.append(merged[order[0]])
        return below

    def _close(self, row: int, sources: _Sources) -> None:
        """Note a directory whose attribute has hidden what lay below: it must not do so once more at run time."""
        layer, place = sources[-1]
        if layer.spec == "overlayfs" and len(sources) > 1 and layer.directories[place] in layer.opaque:
            self._closed.append(row)

    def _attributes(self, sources: _Sources) -> int:
        """The row whose attributes a directory of several layers has."""
        for layer, place in reversed(sources):
            if layer.described[place]:
                return layer.base + layer.directories[place]
        layer, place = sources[0]
        return layer.base + layer.directories[place]

    def _tables(self) -> FlatTree:
        trees = [layer.tree for layer in self._layers]
        tables = trees[0] if len(trees) == 1 else _chain(trees)
        rows = self._rows
        inodes = tables.inodes[rows]
        ranges = np.array(self._ranges, np.int64)
        inodes["first"][ranges[:, 0]] = ranges[:, 1]
        inodes["count"][ranges[:, 0]] = ranges[:, 2]
        implied = inodes["flags"] & IMPLIED != 0
        inodes["mtime_nsec"][implied] = 0
        inodes["flags"][implied] &= ~np.uint32(IMPLIED)
        xattrs = tables.xattrs
        for row in self._closed:
            left = {k: v for k, v in xattrs[inodes["xattrs"][row]].items() if k != OVERLAY_OPAQUE}
            inodes["xattrs"][row] = len(xattrs) if left else -1
            if left:
                xattrs = [*xattrs, left]
        names = tables.names
        return FlatTree(
            [names[row] for row in rows], inodes, tables.refs, tables.chunks, tables.blobs, xattrs, tables.targets
        )


def _is_default(tree: FlatTree) -> bool:
    """Whether the root has the attributes, all but the nanoseconds, of one that no entry describes."""
    root = tree.inodes[0]
    return bool(
        root["mode"] == stat.S_IFDIR | 0o755
        and not root["mtime"]
        and not root["uid"]
        and not root["gid"]
        and root["xattrs"] < 0
    )


def _chain(trees: list[FlatTree]) -> FlatTree:
    """All rows of all trees, one tree after the other; the places in rows are those of the whole."""
    names: list[bytes] = []
    xattrs: list[dict[bytes, bytes]] = []
    targets: list[bytes] = []
    blobs: dict[BlobInfo, int] = {}
    inodes: list[NDArray[np.void]] = []
    refs: list[Ints] = []
    chunks: list[NDArray[np.void]] = []
    ref = chunk = link = 0
    for tree in trees:
        rows, kinds = tree.inodes.copy(), tree.kinds()
        rows["first"][kinds == stat.S_IFREG] += ref
        rows["first"][kinds == stat.S_IFLNK] += len(targets)
        rows["xattrs"][rows["xattrs"] >= 0] += len(xattrs)
        highest = int(rows["link"].max())
        rows["link"][rows["link"] > 0] += link
        places = np.array([blobs.setdefault(blob, len(blobs)) for blob in tree.blobs], np.uint32)
        records = tree.chunks.copy()
        known = records["blob"] != NO_BLOB
        records["blob"][known] = places[records["blob"][known]]
        inodes.append(rows)
        refs.append(tree.refs + chunk)
        chunks.append(records)
        ref, chunk, link = ref + len(tree.refs), chunk + len(records), link + highest
        names += tree.names
        xattrs += tree.xattrs
        targets += tree.targets
    return FlatTree(
        names, np.concatenate(inodes), np.concatenate(refs), np.concatenate(chunks), list(blobs), xattrs, targets
    )
