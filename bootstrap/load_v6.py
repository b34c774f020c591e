"""A v6 bootstrap as tables. Reference: RAFS format 1.6 - 1.13."""

from __future__ import annotations

import stat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bootstrap.chunktable import BlobInfo
from bootstrap.errors import FormatError
from bootstrap.flat import S_IFMT, Ints, no_chunks, ragged
from bootstrap.layout import v6
from bootstrap.layout.common import MAX_NAME, BlobFeatures, SuperFlags
from bootstrap.layout.tables import CHUNK, V6_COMPACT, V6_INODE
from bootstrap.levels import MAX_NSEC, Loader, empty_inodes, known_types, refuse
from bootstrap.reader import BootstrapV6


class _Entries(NamedTuple):
    """Of dirents: the block each stands in, its inode, where its name begins and ends in the file, whether it is one of
    the two dots, the type it claims for its inode."""

    within: Ints
    nids: Ints
    begins: Ints
    ends: Ints
    dots: NDArray[np.bool_]
    types: NDArray[np.uint32]


class LoaderV6(Loader):
    """Handles are nids."""

    def __init__(self, image: BootstrapV6, blobs: list[BlobInfo]) -> None:
        super().__init__(image.data, blobs, image.size // v6.DIRENT.size)
        self._image = image
        self._block = image.block_size
        self._meta = image.inode_offset(0)
        self._chunk_size = image.chunk_size
        # A file needs 8 bytes here per chunk: larger sizes are lies, and may overflow what is added to them.
        self._max_size = max(image.size // 8 * image.chunk_size, image.size)
        self._slots = np.frombuffer(image.data, "V32")
        self._words = np.frombuffer(image.data, "<u4")
        self._dictionary = any(blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED for blob in blobs)
        self._raw = np.empty(0, V6_INODE)
        """The inodes of the level in work, compact ones widened."""
        self._payloads = np.empty(0, np.int64)

    def root(self) -> int:
        return self._image.root

    def offset(self, handle: int) -> int:
        return self._meta + v6.NID_UNIT * handle

    # -- inodes

    def _decode(self, nids: Ints) -> tuple[NDArray[np.void], Ints]:
        """Inodes as stored (1.6), compact ones widened, and the offsets of what follows inode and attributes."""
        size = self._image.size
        at = self._meta + v6.NID_UNIT * nids
        outside = (nids <= 0) | (nids > size) | (at + v6.NID_UNIT > size)
        refuse("inode", outside, at, lambda row: f"number {nids[row]} lies outside the file")
        slots = at // v6.NID_UNIT
        halves = np.empty((len(nids), 2), "V32")
        halves[:, 0] = self._slots[slots]
        halves[:, 1] = self._slots[np.minimum(slots + 1, len(self._slots) - 1)]
        raw = halves.view(V6_INODE).reshape(-1)
        wide = raw["format"] & 1 == 1
        refuse("inode", wide & (at + 64 > size), at, lambda row: "is cut by the end of the file")
        if not wide.all():
            narrow = np.flatnonzero(~wide)
            compact = np.ascontiguousarray(halves[narrow, 0]).view(V6_COMPACT)
            widened = np.zeros(len(narrow), V6_INODE)
            for name in ("format", "xattr_icount", "mode", "nlink", "size", "union", "ino", "uid", "gid"):
                widened[name] = compact[name]
            raw[narrow] = widened
        form = raw["format"]
        refuse("inode", (form & ~np.uint16(v6.FORMAT_MASK) | form & 2) != 0, at, lambda row: f"format {form[row]:#x}")
        refuse("inode", raw["nlink"] == 0, at, lambda row: "link count 0")
        mode = raw["mode"]
        refuse("inode", ~known_types(mode), at, lambda row: f"mode {mode[row]:#o} is of no known type")
        sizes = raw["size"]
        too_large = sizes > np.uint64(self._max_size)
        refuse("inode", too_large, at, lambda row: f"size {sizes[row]} does not fit a bootstrap of {size} bytes")
        icount = raw["xattr_icount"].astype(np.int64)
        payloads = at + np.where(wide, 64, 32) + np.where(icount > 0, 8 + 4 * icount, 0)
        refuse("xattr area", payloads > size, at, lambda row: f"{icount[row]} words reach behind the end of the file")
        return raw, payloads

    def level(self, handles: Ints) -> NDArray[np.void]:
        raw, payloads = self._decode(handles)
        self._raw, self._payloads = raw, payloads
        made = empty_inodes(len(raw))
        for name in ("mode", "uid", "gid", "mtime"):
            made[name] = raw[name]
        made["mtime_nsec"] = np.minimum(raw["mtime_nsec"], MAX_NSEC)
        kinds = raw["mode"] & S_IFMT
        device = (kinds == stat.S_IFCHR) | (kinds == stat.S_IFBLK)
        made["rdev"][device] = raw["union"][device]
        made["link"] = np.where((raw["nlink"] > 1) & (kinds != stat.S_IFDIR), raw["ino"], 0)
        regular = kinds == stat.S_IFREG
        made["size"][regular] = raw["size"][regular]
        starts = self._meta + v6.NID_UNIT * handles + np.where(raw["format"] & 1, 64, 32)
        for row in np.flatnonzero(raw["xattr_icount"]).tolist():
            nid = int(handles[row])
            area = self._data[int(starts[row]) : int(payloads[row])]
            made["xattrs"][row] = self.add_xattrs(area, lambda nid=nid: self._image.xattrs(nid))  # type: ignore[misc]
        links = np.flatnonzero(kinds == stat.S_IFLNK)
        made["first"][links] = np.arange(len(links)) + len(self.targets)
        targets = self._link_targets(handles[links], raw[links], payloads[links])
        made["size"][links] = np.fromiter(map(len, targets), np.int64, len(targets))
        self.targets += targets
        return made

    def _link_targets(self, nids: Ints, raw: NDArray[np.void], payloads: Ints) -> list[bytes]:
        ends = payloads + raw["size"].astype(np.int64)
        inline = (raw["format"] >> 1 == v6.LAYOUT_FLAT_INLINE) & (ends <= self._image.size)
        plain = inline & (ends > payloads) & (raw["size"] < min(self._block, v6.MAX_SYMLINK))
        found = []
        for nid, good, begin, end in zip(nids.tolist(), plain.tolist(), payloads.tolist(), ends.tolist(), strict=True):
            target = self._data[begin:end] if good else b"\0"
            found.append(target if b"\0" not in target else self._image.readlink(nid))  # it knows what is wrong
        return found

    # -- directories

    def children(self, handles: Ints) -> tuple[list[bytes], Ints, Ints]:
        owner, starts, spans = self._dirent_blocks(handles)
        entries = self._dirents(starts, spans)
        kept = np.flatnonzero(~entries.dots)
        names = self._names(entries.begins[kept], entries.ends[kept])
        if self._dictionary and any(b"/" in name for name in names):  # see BootstrapV6.list_dir
            shown = [row for row, name in enumerate(names) if b"/" not in name]
            kept, names = kept[shown], [names[row] for row in shown]
        self.spend(len(names))
        counts = np.bincount(owner[entries.within[kept]], minlength=len(handles))
        return names, entries.nids[kept], counts.astype(np.int64)

    def _names(self, begins: Ints, ends: Ints) -> list[bytes]:
        text = self._data
        return [text[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

    def _dirent_blocks(self, handles: Ints) -> tuple[Ints, Ints, Ints]:
        """The dirent blocks of the directories in `_raw`, which `handles` are: the directory each belongs to, its place
        in the file and its bytes."""
        block, total = self._block, self._image.size
        rows = np.flatnonzero(self._raw["mode"] & S_IFMT == stat.S_IFDIR)
        raw, payloads = self._raw[rows], self._payloads[rows]
        at = self._meta + v6.NID_UNIT * handles
        layouts = raw["format"] >> 1
        plain = layouts == v6.LAYOUT_FLAT_PLAIN
        refuse(
            "inode",
            ~plain & (layouts != v6.LAYOUT_FLAT_INLINE),
            at,
            lambda row: f"data layout {layouts[row]} for a directory or link",
        )
        sizes = raw["size"].astype(np.int64)
        data = raw["union"].astype(np.int64) * block
        full, tails = sizes // block, sizes % block
        tail_at = np.where(plain, data + full * block, payloads)
        beyond = ((full > 0) & (data + full * block > total)) | ((tails > 0) & (tail_at + tails > total))
        refuse("inode", beyond, at, lambda row: f"its {sizes[row]} bytes reach behind the end of the file")

        blocks = full + (tails > 0)
        self._spare(int(blocks.sum()))
        owner = np.repeat(np.arange(len(handles)), blocks)
        part = ragged(blocks)
        last = part == full[owner]
        starts = np.where(last, tail_at[owner], data[owner] + part * block)
        spans = np.where(last, tails[owner], block)
        return owner, starts, spans

    def _dirents(self, starts: Ints, spans: Ints) -> _Entries:
        """What stands in these dirent blocks (1.9)."""
        total = self._image.size
        short = spans < v6.DIRENT.size
        refuse("dirent block", short, starts, lambda row: f"first name at 0 of {spans[row]} bytes")
        floors = (self._words[starts // 4 + 2] & 0xFFFF).astype(np.int64)
        entries = floors // v6.DIRENT.size
        wrong = (entries == 0) | (floors % v6.DIRENT.size != 0) | (floors > spans)
        refuse("dirent block", wrong, starts, lambda row: f"first name at {floors[row]} of {spans[row]} bytes")

        self._spare(int(entries.sum()))
        within = np.repeat(np.arange(len(starts)), entries)
        places = starts[within] + v6.DIRENT.size * ragged(entries)
        words = places // 4
        nids = self._words[words].astype(np.int64) | self._words[words + 1].astype(np.int64) << 32
        begins = (self._words[words + 2] & 0xFFFF).astype(np.int64)
        ends = np.empty_like(begins)
        ends[:-1] = begins[1:]
        lasts = np.cumsum(entries) - 1
        ends[lasts] = self._last_ends(starts, spans, begins[lasts])
        lengths = ends - begins
        broken = (begins < floors[within]) | (lengths <= 0) | (ends > spans[within]) | (lengths > MAX_NAME + 1)
        refuse("dirent", broken, places, lambda row: f"name from {begins[row]} to {ends[row]} of {spans[within][row]}")

        begins += starts[within]
        ends += starts[within]
        octets = self._words.view(np.uint8)
        first, second = octets[begins], octets[np.minimum(begins + 1, total - 1)]
        dots = (first == 0x2E) & ((lengths == 1) | ((lengths == 2) & (second == 0x2E)))
        return _Entries(within, nids, begins, ends, dots, self._words[words + 2] >> 16 & 0xFF)

    def _spare(self, names: int) -> None:
        """Before tables of that length are made: overlapping directories may claim billions."""
        # "." and ".." are not counted in the budget of names, and each directory has 24 bytes for them.
        if names > self._budget + 2 * (self._image.size // v6.NID_UNIT):
            raise FormatError("directory tree", 0, "more names than fit the file: directories overlap")

    def _last_ends(self, starts: Ints, spans: Ints, begins: Ints) -> list[int]:
        """The last name of a block ends at the first NUL or with the block."""
        find = self._data.find
        found = []
        for start, span, begin in zip(starts.tolist(), spans.tolist(), begins.tolist(), strict=True):
            end = find(b"\0", start + begin, start + span) if begin < span else -1
            found.append(span if end < 0 else end - start)
        return found

    # -- chunks

    def chunks(self, handles: Ints, inodes: NDArray[np.void]) -> tuple[Ints, NDArray[np.void]]:
        rows = np.flatnonzero((inodes["mode"] & S_IFMT == stat.S_IFREG) & (inodes["size"] > 0))
        nids, first_rows, inverse = np.unique(handles[rows], return_index=True, return_inverse=True)
        raw, payloads = self._decode(nids)
        at = self._meta + v6.NID_UNIT * nids
        layouts = raw["format"] >> 1
        refuse(
            "inode",
            layouts != v6.LAYOUT_CHUNK_BASED,
            at,
            lambda row: f"data layout {layouts[row]} for a regular file",
        )
        sizes = inodes["size"][rows[first_rows]]
        counts = -(-sizes // self._chunk_size)
        tables = (payloads + 7) & ~7
        refuse(
            "chunk addresses",
            tables + 8 * counts > self._image.size,
            tables,
            lambda row: f"those of {sizes[row]} bytes reach behind the end of the file",
        )
        total = int(counts.sum())
        if 8 * total > self._image.size:
            raise FormatError("chunk addresses", 0, "more than fit the file: inodes overlap")
        addresses = np.frombuffer(self._data, "<u8")[np.repeat(tables // 8, counts) + ragged(counts)]
        blobs = (addresses >> np.uint64(16) & np.uint64(0xFF)).astype(np.int64) - 1
        places = np.repeat(tables, counts) + 8 * ragged(counts)
        refuse(
            "chunk address",
            (blobs < 0) | (blobs >= len(self._blobs)),
            places,
            lambda row: f"blob {blobs[row]} of {len(self._blobs)}",
        )
        begins = np.cumsum(counts) - counts
        inodes["first"][rows] = begins[inverse]
        inodes["count"][rows] = counts[inverse]
        if self._image.flags & SuperFlags.TARFS:
            return self._made_up(addresses, sizes, counts)
        return self._look_up(addresses, places)

    def _look_up(self, addresses: NDArray[np.uint64], places: Ints) -> tuple[Ints, NDArray[np.void]]:
        """References into the chunk table (1.12), by blob, index and place."""
        table = self._image.ext
        records = np.frombuffer(
            self._data, CHUNK, table.chunk_table_size // CHUNK.itemsize, table.chunk_table_offset
        ) if table.chunk_table_size else no_chunks()
        index, blob = records["index"].astype(np.uint64), records["blob"].astype(np.uint64) + np.uint64(1)
        at = records["uncompressed_offset"] // np.uint64(self._block)
        keys = index & np.uint64(0xFFFF) | blob << np.uint64(16) | (index >> np.uint64(16)) << np.uint64(24)
        keys |= at << np.uint64(32)
        # No file can mean the others, and the blob they name need not be there.
        named = (blob <= np.uint64(len(self._blobs))) & (index < np.uint64(1 << 24)) & (at < np.uint64(1 << 32))
        records, keys = records[named], keys[named]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        found = np.searchsorted(keys, addresses, side="right") - 1
        missing = found < 0
        if len(keys):
            missing |= keys[np.maximum(found, 0)] != addresses
        if missing.any():
            row = int(np.flatnonzero(missing)[0])
            low, high, where = v6.CHUNK_ADDRESS.unpack(addresses[row].tobytes())
            raise FormatError(
                "chunk address",
                int(places[row]),
                f"chunk {low | high >> 8 << 16} of blob {(high & 0xFF) - 1} at block {where} has no record",
            )
        return order[found], records

    def _made_up(self, addresses: NDArray[np.uint64], sizes: Ints, counts: Ints) -> tuple[Ints, NDArray[np.void]]:
        """Tarfs keeps no records: the address says where, the file how much (1.13)."""
        records = np.zeros(len(addresses), CHUNK)
        records["blob"] = (addresses >> np.uint64(16) & np.uint64(0xFF)) - np.uint64(1)
        high = addresses >> np.uint64(24) & np.uint64(0xFF)
        records["index"] = addresses & np.uint64(0xFFFF) | high << np.uint64(16)
        offsets = (addresses >> np.uint64(32)) * np.uint64(self._block)
        records["compressed_offset"] = records["uncompressed_offset"] = offsets
        left = np.repeat(sizes, counts) - ragged(counts) * self._chunk_size
        records["compressed_size"] = records["uncompressed_size"] = np.minimum(left, self._chunk_size)
        return np.arange(len(records)), records
