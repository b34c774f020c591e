"""External files: content that lies in a store of its own, named by an attributes file. Reference: RAFS format 5.15.

They leave the image of a directory and make a second one, with the directories above them; a merge joins both again.
(Upstream writes the same bytes; its own loader takes them in v5 only.)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from crc32c import crc32c

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.directory import open_file
from bootstrap.errors import BuildError
from bootstrap.flat import flatten
from bootstrap.layout.common import MAX_BLOB_ID, BlobFeatures, ChunkFlags, Compressor, SuperFlags, is_chunk_size
from bootstrap.metadata import write_bootstrap
from bootstrap.options import BuildOptions
from bootstrap.tree import Node, find, number, path_of

__all__ = ["ExternalFile", "build_external", "parse_attributes"]

log = logging.getLogger(__name__)

_BLOCK = 4096
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"([0-9]+)\s*([A-Za-z]*)")
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|[0-9]+")
_KNOWN = frozenset(
    (
        "type",
        "blob_index",
        "blob_id",
        "chunk_size",
        "chunk_0_compressed_offset",
        "compressed_size",
        "file_size",
        "crcs",
    )
)


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """Where the content of one file is: `compressed_size` bytes are in the blob, `offset` is that of its first chunk.

    `file_size`: of the file when the one in the directory is only a placeholder. `crcs`: CRC-32C of its chunks, none if
    they have to be computed.
    """

    blob_index: int
    blob_id: str
    chunk_size: int
    offset: int
    compressed_size: int
    file_size: int | None
    crcs: tuple[int, ...]


def parse_attributes(text: str) -> dict[bytes, ExternalFile]:
    """External files by absolute path, from lines `PATH key=value ...`; lines without type=external say nothing.

    Raises BuildError with the number of the line.
    """
    found = {}
    for number_of_line, line in enumerate(text.splitlines(), 1):
        where = f"attributes, line {number_of_line}"
        path, values = _line(line.strip(), where)
        if path is None or values.get("type") != "external":
            continue
        for key in values.keys() - _KNOWN:
            log.warning("%s: unknown attribute %s", where, key)
        found[path] = _file(values, where)
    return found


def _line(line: str, where: str) -> tuple[bytes | None, dict[str, str]]:
    if not line or line.startswith("#"):
        return None, {}
    if line.startswith('"'):
        path, rest = _quoted(line, where)
    else:
        head, *tail = line.split(None, 1)
        path, rest = head.encode("utf-8", "surrogateescape"), tail[0] if tail else ""
    values = {}
    for item in rest.split():
        key, equals, value = item.partition("=")
        if equals:
            values[key] = value
    return b"/" + b"/".join(part for part in path.split(b"/") if part), values


_ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", '"': b'"', "\\": b"\\"}


def _quoted(line: str, where: str) -> tuple[bytes, str]:
    """A path in double quotes, with the escapes git writes, and what follows."""
    out = bytearray()
    at = 1
    while at < len(line):
        sign = line[at]
        if sign == '"':
            return bytes(out), line[at + 1 :]
        if sign == "\\" and re.match("[0-3][0-7]{2}", line[at + 1 : at + 4]):
            out.append(int(line[at + 1 : at + 4], 8))
            at += 4
        elif sign == "\\" and line[at + 1 : at + 2] in _ESCAPES:
            out += _ESCAPES[line[at + 1]]
            at += 2
        else:
            out += sign.encode("utf-8", "surrogateescape")
            at += 1
    raise BuildError(f"{where}: the path's quotation does not end")


def _file(values: dict[str, str], where: str) -> ExternalFile:
    def number_of(key: str, default: str | None = None) -> int:
        text = values.get(key, default)
        if text is None:
            raise BuildError(f"{where}: {key} is missing")
        if not _NUMBER.fullmatch(text):
            raise BuildError(f"{where}: {key}={text} is not a number")
        value = int(text, 0) if text.startswith("0x") else int(text)
        if value >= 1 << 63:
            raise BuildError(f"{where}: {key}={text} is too large")
        return value

    blob_id = values.get("blob_id", "")
    if not blob_id.isprintable() or not 0 < len(blob_id.encode()) <= MAX_BLOB_ID:
        raise BuildError(f"{where}: blob_id={blob_id!r} is no text of 1 to {MAX_BLOB_ID} bytes")
    crcs = values.get("crcs", "")
    pieces = crcs.split(",") if crcs else []
    if not all(_NUMBER.fullmatch(piece) for piece in pieces):
        raise BuildError(f"{where}: crcs={crcs} are not numbers separated by commas")
    found = tuple(int(piece, 0) if piece.startswith("0x") else int(piece) for piece in pieces)
    if any(crc > 0xFFFFFFFF for crc in found):
        raise BuildError(f"{where}: crcs={crcs} do not fit 32 bits")
    return ExternalFile(
        blob_index=number_of("blob_index"),
        blob_id=blob_id,
        chunk_size=_chunk_size(values, where),
        offset=number_of("chunk_0_compressed_offset"),
        compressed_size=number_of("compressed_size"),
        file_size=number_of("file_size") if "file_size" in values else None,
        crcs=found,
    )


def _chunk_size(values: dict[str, str], where: str) -> int:
    text = values.get("chunk_size", "")
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * _UNITS.get(match[2].lower(), 0) if match else 0
    if not is_chunk_size(size):
        raise BuildError(f"{where}: chunk_size={text} is not a power of two from 4KiB to 16MiB")
    return size


def build_external(
    root: Node, files: dict[bytes, ExternalFile], options: BuildOptions
) -> tuple[bytes | bytearray, list[str]]:
    """Take `files` out of the tree and make an image of their own of them: its bootstrap and its blob ids.

    Directories in which nothing else lies leave `root` too. (Upstream removes every directory on the way to an external
    file and loses what else is in it.) Raises BuildError for paths that are no regular files and contradicting values.
    """
    sizes = sorted({found.chunk_size for found in files.values()})
    if len(sizes) != 1:
        raise BuildError(f"an image has one chunk size, the external files have {', '.join(map(hex, sizes)) or 'none'}")
    number(root)
    top = _copy(root)
    moved = {_move(root, top, path, found): found for path, found in files.items()}
    blobs = _Blobs(moved.values(), options)
    for node in number(top):
        if node in moved:
            blobs.add(node, moved[node])
    own = replace(options, chunk_size=sizes[0], prefetch=[], prefetch_policy="none")
    listed = [blobs.infos[index] for index in sorted(blobs.infos)]
    data, _ = write_bootstrap(flatten(top, blobs.table, listed, own.chunk_size), own, SuperFlags.ENCRYPT_NONE)
    return data, [info.id for info in listed]


def _copy(node: Node) -> Node:
    """The same directory without its entries."""
    made = Node(node.name, node.mode)
    for field in ("uid", "gid", "rdev", "mtime", "mtime_nsec", "xattrs"):
        setattr(made, field, getattr(node, field))
    return made


def _move(root: Node, top: Node, path: bytes, found: ExternalFile) -> Node:
    """The file at `path` goes from one tree to the other."""
    node = find(root, path)
    if node is None or not node.is_file:
        what = "is not in the source" if node is None else "is no regular file"
        raise BuildError(f"external file {path.decode('utf-8', 'backslashreplace')!r} {what}")
    if found.file_size is not None and node.size not in (0, found.file_size):
        raise BuildError(f"{path_of(node)} has {node.size} bytes, the attributes give it {found.file_size}")
    if not node.size:
        node.size = found.file_size or 0
    above = []
    at = node
    while at.parent is not at:
        assert at.parent is not None
        above.append(at.parent)
        at = at.parent
    made = top
    for directory in reversed(above[:-1]):
        assert made.children is not None
        made = made.children.setdefault(directory.name, _copy(directory))
    assert made.children is not None
    made.children[node.name] = node
    for directory, child in zip(above, [node, *above], strict=False):
        assert directory.children is not None
        del directory.children[child.name]
        if directory.children:
            break
    node.group = None
    return node


class _Blobs:
    """The external blobs and the records of their chunks."""

    def __init__(self, files: Iterable[ExternalFile], options: BuildOptions) -> None:
        self.table = ChunkTable()
        self.infos: dict[int, BlobInfo] = {}
        for found in files:
            info = self.infos.setdefault(found.blob_index, _info(found, options))
            if (info.id, info.compressed_size) != (found.blob_id, found.compressed_size):
                raise BuildError(
                    f"external blob {found.blob_index} is {info.id} with {info.compressed_size} bytes and "
                    f"{found.blob_id} with {found.compressed_size}"
                )
        ids = [info.id for info in self.infos.values()]
        if len(set(ids)) < len(ids):
            raise BuildError("two blob_index of the external files have the same blob_id")

    def add(self, node: Node, found: ExternalFile) -> None:
        """The chunks of a file, in the order of the tree."""
        info = self.infos[found.blob_index]
        if found.offset + node.size > found.compressed_size:
            raise BuildError(
                f"{path_of(node)}: {node.size} bytes at {found.offset} do not lie in a blob of {found.compressed_size}"
            )
        crcs = found.crcs or _checksums(node, found.chunk_size)
        count = -(-node.size // found.chunk_size)
        if len(crcs) != count:
            raise BuildError(f"invalid crc index {len(crcs)} for file {path_of(node)}: it has {count} chunks")
        node.forget_chunks()
        at, left = found.offset, node.size
        for crc in crcs:
            size = min(left, found.chunk_size)
            flags = int(ChunkFlags.HAS_CRC) if crc else 0  # readers refuse the flag together with 0
            index = info.chunk_count
            place = self.table.place_of(info)
            node.add_chunk(self.table.add(bytes(32), place, flags, size, size, at, at, index, crc))
            info.chunk_count = index + 1
            at += size
            left -= size


def _info(found: ExternalFile, options: BuildOptions) -> BlobInfo:
    return BlobInfo(
        id=found.blob_id,
        chunk_size=found.chunk_size,
        compressor=Compressor.NONE,
        digester=options.digester,
        features=BlobFeatures.CAP_TAR_TOC | BlobFeatures.EXTERNAL,
        compressed_size=found.compressed_size,
        # A v6 device has at least one block.
        uncompressed_size=max(found.compressed_size, _BLOCK) if options.fs_version == 6 else found.compressed_size,
        ci_compressor=Compressor.LZ4_BLOCK,  # what upstream has where no blob meta was ever written
    )


def _checksums(node: Node, chunk_size: int) -> list[int]:
    """CRCs of the chunks of a file whose content is at hand."""
    found = []
    with open_file(node) as file:
        left = node.size
        while left:
            data = file.read(min(left, chunk_size))
            if len(data) < min(left, chunk_size):
                raise BuildError(f"{path_of(node)} is only a placeholder: its attributes need crcs, one for each chunk")
            found.append(crc32c(data))
            left -= len(data)
    return found
