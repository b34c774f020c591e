"""Writes eStargz archives as the reference writer does: a gzip member begins with each chunk, padding and headers up to
the next one are its tail; then the table of contents and the footer. For tests; real archives are in the fixtures."""

from __future__ import annotations

import base64
import datetime
import gzip
import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from typing import Any

import zstandard

from bootstrap.layout.estargz import TOC_NAME, pack_footer, pack_zstd_footer

LANDMARK = ".no.prefetch.landmark"
_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}


def member(data: bytes) -> bytes:
    """A gzip member that ends like those of Go: an empty last block behind the data's."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH) + packer.flush()


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file(name: str, data: bytes, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A tar entry of a regular file and its content."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry, data


def frame(data: bytes) -> bytes:
    """A frame of zstd as Go's writer makes them: without its size where the data takes several blocks."""
    packer = zstandard.ZstdCompressor(level=3, write_content_size=len(data) < 1 << 17)
    return packer.compress(data)


def write_estargz(
    entries: Iterable[tuple[tarfile.TarInfo, bytes]],
    chunk_size: int = 4 << 20,
    *,
    legacy: bool = False,
    zstd: bool = False,
) -> tuple[bytes, bytes]:
    """The archive and the JSON of its table. `legacy`: the 47-byte footer of stargz. `zstd`: as zstd:chunked, which
    the same writer makes with frames for members; table and footer are frames that decoders skip."""
    pack = frame if zstd else member
    landmark = file(LANDMARK, b"\xf0")
    out = bytearray()
    open_member = b""
    table: list[dict[str, Any]] = []
    for entry, data in [landmark, *entries]:
        open_member += entry.tobuf(tarfile.PAX_FORMAT)
        kind = _TYPES[entry.type]
        made = datetime.datetime.fromtimestamp(entry.mtime, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        found: dict[str, Any] = {
            "name": entry.name + ("/" if kind == "dir" else ""),
            "type": kind,
            "modtime": made,
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
            "NumLink": 0,
        }
        if entry.linkname:
            found["linkName"] = entry.linkname
        if kind in ("char", "block"):
            found["devMajor"], found["devMinor"] = entry.devmajor, entry.devminor
        xattrs = {k.removeprefix("SCHILY.xattr."): v for k, v in entry.pax_headers.items() if k.startswith("SCHILY")}
        if xattrs:
            found["xattrs"] = {key: base64.b64encode(value.encode()).decode() for key, value in xattrs.items()}
        if kind != "reg":
            table.append(found)
            continue
        found["size"], found["digest"] = len(data), digest(data)
        for at in range(0, len(data), chunk_size) or [0]:
            piece = data[at : at + chunk_size]
            if at:
                found = {"name": entry.name, "type": "chunk", "NumLink": 0, "chunkOffset": at}
            if data:
                out += pack(open_member) if open_member else b""
                found["offset"] = len(out)
                found["chunkDigest"] = digest(piece)
                if at + len(piece) < len(data):
                    found["chunkSize"] = len(piece)
                open_member = piece
            table.append(found)
        open_member += bytes(-len(data) % 512)
    out += pack(open_member + bytes(1024) if zstd else open_member)
    text = json.dumps({"version": 1, "entries": table}, indent="\t").encode()
    at = len(out)
    if zstd:
        stored = frame(text)
        out += struct.pack("<II", 0x184D2A50, len(stored)) + stored
        return bytes(out) + pack_zstd_footer(at + 8, len(stored), len(text)), text
    index, _ = file(TOC_NAME, text)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream:
        stream.write(index.tobuf(tarfile.PAX_FORMAT) + text + bytes(-len(text) % 512 + 1024))
    out += packed.getvalue()
    footer = pack_footer(at)
    if legacy:
        footer = footer[:10] + bytes([22, 0]) + footer[16:]
    return bytes(out) + footer, text
