"""The last layer of a Nydus image: a tar.gz of the merged bootstrap and, for v6, each layer's chunk table.

Byte for byte what upstream writes (RAFS format 6.2): the order, modes and ustar headers are part of the image's digest,
and equal input must give an equal layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import BinaryIO

from bootstrap.inlined import read_toc, read_toc_entry, sections
from bootstrap.layout import toc
from nydusfs.convert.gzipped import GzipWriter
from nydusfs.errors import ConvertError

BOOTSTRAP_PATHS = ("image/image.boot", "image.boot")  # the second: old v5 images
_BLOCK = 512
_PIECE = 1 << 20
# an entry count of 2^20 chunks of 24 bytes each; upstream refuses larger tables
_MAX_META = 256 << 20

_HEADER = Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")


@dataclass(frozen=True, slots=True)
class BootstrapLayer:
    """Digests are `sha256:<hex>`; `size` is that of the gzip file."""

    path: Path
    digest: str
    diff_id: str
    size: int


def write_bootstrap_layer(
    bootstrap: Path, metas: Iterable[tuple[str, Path]], out: Path, extras: Sequence[tuple[str, Path]] = ()
) -> BootstrapLayer:
    """`metas`: (layer digest hex, file with its chunk table) in layer order, each name once; `extras`: (name, file) of
    what else goes into `image/`. Raises OSError."""
    with out.open("wb") as file:
        packed = GzipWriter(file)
        for piece in _tar(bootstrap, metas, extras):
            packed.write(piece)
        packed.finish()
    return BootstrapLayer(out, packed.digest, packed.diff_id, packed.size)


def _tar(bootstrap: Path, metas: Iterable[tuple[str, Path]], extras: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    yield tar_header("image", 0o755, 0, b"5")
    files = [("image/image.boot", bootstrap)]
    files += [(f"image/{digest}.blob.meta", path) for digest, path in dict(metas).items()]
    files += [(f"image/{name}", path) for name, path in extras]
    for name, path in files:
        size = path.stat().st_size
        yield tar_header(name, 0o444, size, b"0")
        with path.open("rb") as source:
            while piece := source.read(_PIECE):
                yield piece
        if size % _BLOCK:
            yield bytes(_BLOCK - size % _BLOCK)
    yield bytes(2 * _BLOCK)


def tar_header(name: str, mode: int, size: int, kind: bytes) -> bytes:
    """A ustar header as Go's archive/tar writes it for an entry without owner and time."""
    zero = b"0000000\0"
    length = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
    fields = (name.encode(), b"%07o\0" % mode, zero, zero, length, b"00000000000\0")
    rest = (kind, b"", b"ustar\0", b"00", b"", b"", zero, zero, b"")
    total = sum(_HEADER.pack(*fields, b" " * 8, *rest))
    return _HEADER.pack(*fields, b"%06o\0 " % total, *rest)


def chunk_table(blob: BinaryIO, size: int) -> bytes | None:
    """The chunk table of a v6 layer blob as stored in a bootstrap layer and in nydusd's cache: the plain table padded
    to 4096 bytes, then its header. None for blobs without table of contents (v5) or without chunks.

    Raises RafsError for a damaged blob.
    """
    entries = {entry.name: entry for entry in read_toc(blob, size)}
    table, head = entries.get(toc.BLOB_META), entries.get(toc.BLOB_META_HEADER)
    if table is None or head is None or not table.uncompressed_size:
        return None
    plain = read_toc_entry(blob, table, _MAX_META)
    return plain + bytes(-len(plain) % 4096) + read_toc_entry(blob, head, _MAX_META)


def toc_digest(blob: BinaryIO, size: int) -> str:
    """SHA-256 (hex) of the entries of a layer blob's table of contents, "" if it has none. Raises RafsError."""
    header, at = next(sections(blob, size), (None, 0))
    if header is None or header.name != toc.BLOB_TOC:
        return ""
    blob.seek(at)
    return hashlib.sha256(blob.read(header.size)).hexdigest()


def unpack_bootstrap_layer(stream: BinaryIO, folder: Path, what: str, limit: int = 8 << 30) -> Path:
    """Writes the files of a bootstrap layer (given uncompressed) below `folder`, flat names only; the path of the
    bootstrap. Raises ConvertError if there is none."""
    import tarfile

    found: Path | None = None
    total = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./").lstrip("/")
                parts = name.split("/")
                wanted = name in BOOTSTRAP_PATHS or (
                    len(parts) == 2 and parts[0] == "image" and parts[1] not in ("", ".", "..")
                )
                source = archive.extractfile(member) if member.isreg() and wanted else None
                if source is None:
                    continue
                total += member.size
                if total > limit:
                    raise ConvertError(f"{what}: its bootstrap layer unpacks to more than {limit} bytes")
                target = folder / "image" / parts[-1]
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    while piece := source.read(_PIECE):
                        out.write(piece)
                if name in BOOTSTRAP_PATHS:
                    found = target
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise ConvertError(f"{what}: its bootstrap layer is not a readable tar: {error}") from error
    if found is None:
        raise ConvertError(f"{what}: its bootstrap layer has no image/image.boot")
    return found
