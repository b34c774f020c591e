"""Every path and chunk of an image in the lines of upstream's `check -v`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bootstrap.base import Attr
    from bootstrap.reader import Bootstrap

_KINDS = {4: "dir", 8: "file", 10: "symlink", 2: "char", 6: "block", 1: "fifo", 12: "socket"}
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0", '"': '\\"', "\\": "\\\\"}


def quoted(raw: bytes) -> str:
    """A name in double quotes on one line, whatever bytes it has, escaped as Rust programs do."""
    return '"' + "".join(map(_shown, raw.decode("utf-8", "surrogateescape"))) + '"'


def _shown(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02X}"
    if char.isprintable() and unicodedata.category(char) not in ("Mn", "Me"):
        return char
    return f"\\u{{{code:x}}}"


def listing(image: Bootstrap) -> Iterator[str]:
    """One line per path, depth first, files followed by one line per chunk."""
    from bootstrap.grouped import FileChunks
    from bootstrap.layout.common import ChunkFlags

    chunks = FileChunks(image)
    children: dict[int, int] = {}
    yield _line(image, image.root, 4, b"/", b"/", children)
    for path, entry in image.walk():
        yield _line(image, entry.ino, entry.dtype, b"/" + path, entry.name, children)
        if entry.dtype == 8:
            for number, chunk in enumerate(chunks.of(entry.ino)):
                crc = f", crc32 {chunk.crc32:#x}" if chunk.flags & ChunkFlags.HAS_CRC else ""
                yield (
                    f"\t chunk: id {chunk.digest.hex()}, index {chunk.index}, blob_index {chunk.blob_index}, "
                    f"file_offset {number * image.chunk_size}, compressed {chunk.compressed_offset}/"
                    f"{chunk.compressed_size}, uncompressed {chunk.uncompressed_offset}/{chunk.uncompressed_size}{crc}"
                )


def _line(image: Bootstrap, ino: int, dtype: int, path: bytes, name: bytes, children: dict[int, int]) -> str:
    attr = image.attr(ino)
    kind = _KINDS[dtype]
    if dtype == 8 and _is_link(image, ino, attr):
        kind = "hardlink"
    target = image.readlink(ino) if dtype == 10 else None
    first, count = _children(image, ino, dtype, attr)
    size = attr.size
    symlink_size = size & 0xFFFF if image.version == 6 else len(target or b"")
    link = "None" if target is None else f"Some({quoted(target)})"
    return (
        f"inode: {kind} {quoted(path)}: index 0 ino {ino} real_ino {ino} child_index {first} child_count {count} "
        f"i_nlink {attr.nlink} i_size {size} i_blocks {attr.blocks} i_name_size {len(name)} i_symlink_size "
        f"{symlink_size} has_xattr {str(bool(image.xattrs(ino))).lower()} link {link} "
        f"i_mtime {attr.mtime % (1 << 64)} i_mtime_nsec {attr.mtime_nsec}"
    )


def _is_link(image: Bootstrap, ino: int, attr: Attr) -> bool:
    return attr.nlink > 1


def _children(image: Bootstrap, ino: int, dtype: int, attr: Attr) -> tuple[int, int]:
    from bootstrap.reader_v5 import BootstrapV5

    if isinstance(image, BootstrapV5):
        node = image.node(ino)
        return node.child_index, node.child_count
    if dtype == 4:
        return 0, sum(1 for _ in image.list_dir(ino))
    return 0, -(-attr.size // image.chunk_size)
