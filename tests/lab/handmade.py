"""Small images whose data is stored in every form the format knows, put together structure by structure.

No builder of ours is asked how: only the packing of single structures and the writers of bootstraps are shared, so a
reader is held against the specification and not against its own writer.
"""

from __future__ import annotations

import gzip
import hashlib
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from crc32c import crc32c

from bootstrap import crypt
from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.codec import compress
from bootstrap.flat import flatten
from bootstrap.layout import batch, blobmeta, estargz, tarfs, zran
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor, Digester, SuperFlags, round_up
from bootstrap.tree import Node
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

CHUNK = 0x4000
BATCH = 0x4000
SECRET = crypt.Secret(crypt.Cipher.AES_128_XTS, bytes(range(32)), bytes(range(100, 116)))
FEATURES = BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC


@dataclass
class Made:
    """`boot` and the blobs lie in `folder`; `files` is what must come out."""

    folder: Path
    files: dict[bytes, bytes]
    info: BlobInfo
    region: bytes = b""  # of the blob meta, plain
    header: blobmeta.Header | None = None
    stored: dict[str, bytes] = field(default_factory=dict)

    @property
    def boot(self) -> Path:
        return self.folder / "image.boot"


@dataclass
class _Chunk:
    data: bytes
    offset: int  # uncompressed
    flags: int = ChunkFlags.HAS_CRC
    at: int = 0  # stored
    size: int = 0
    entry: blobmeta.EntryV2 | None = None
    digest: bool = True


def contents(count: int = 40, seed: int = 1) -> dict[bytes, bytes]:
    """Files of all sizes around the borders that matter: compressible, noise, empty, of several chunks, repeated."""
    found: dict[bytes, bytes] = {}
    for number in range(count):
        size = (1, 3, 15, 16, 17, 18, 100, 900, 2500, 4096, 4097, 9000, CHUNK, CHUNK + 1, 3 * CHUNK + 5)[number % 15]
        noise = blake3(b"%d %d" % (seed, number)).digest(length=size)
        text = (b"line %d of text\n" % number * (size // 10 + 1))[:size]
        found[b"file-%03d" % number] = noise if number % 3 else text
    found[b"empty"] = b""
    return found


def make(
    form: str, folder: Path, files: dict[bytes, bytes] | None = None, *, seed: int = 1, beside: bool = False
) -> Made:
    """An image in `folder` (created) whose one blob has this `form`, a key of `FORMS`. `beside`: the blob meta lies
    beside the bootstrap too, as `<id>.blob.meta`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = contents(seed=seed) if files is None else files
    chunks: list[_Chunk] = []
    uses: dict[bytes, list[int]] = {}
    place = 0
    for name, data in sorted(files.items()):
        uses[name] = []
        for at in range(0, len(data), CHUNK):
            part = data[at : at + CHUNK]
            uses[name].append(len(chunks))
            chunks.append(_Chunk(part, place))
            place = round_up(place + len(part), 4096)
    info = BlobInfo("", CHUNK, Compressor.ZSTD, Digester.BLAKE3, FEATURES)
    info.chunk_count, info.uncompressed_size = len(chunks), place
    made = Made(folder, files, info)
    FORMS[form](made, chunks)
    table = ChunkTable()
    home = table.place_of(info)
    rows = []
    for index, chunk in enumerate(chunks):
        kind = hashlib.sha256 if info.digester == Digester.SHA256 else blake3
        digest = kind(chunk.data).digest() if chunk.digest else bytes(32)
        crc = crc32c(chunk.data)
        rows.append(
            table.add(digest, home, chunk.flags, chunk.size, len(chunk.data), chunk.at, chunk.offset, index, crc)
        )
    root = Node(b"/", stat.S_IFDIR | 0o755)
    assert root.children is not None
    for name, data in files.items():
        node = Node(name, stat.S_IFREG | 0o644)
        node.size, node.parent = len(data), root
        for index in uses[name]:
            node.add_chunk(rows[index])
        root.children[name] = node
    flags = SuperFlags.EXPLICIT_UIDGID | {
        Compressor.NONE: SuperFlags.COMPRESS_NONE, Compressor.ZSTD: SuperFlags.COMPRESS_ZSTD,
        Compressor.GZIP: SuperFlags.COMPRESS_GZIP, Compressor.LZ4_BLOCK: SuperFlags.COMPRESS_LZ4_BLOCK,
    }[info.compressor]  # fmt: skip
    flags |= SuperFlags.HASH_SHA256 if info.digester == Digester.SHA256 else SuperFlags.HASH_BLAKE3
    tree = flatten(root, table, [info], CHUNK)
    if form.startswith("v5"):
        made.boot.write_bytes(write_v5(tree, chunk_size=CHUNK, flags=flags, prefetch=[]))
    else:
        flags |= SuperFlags.ENCRYPT_XTS if info.cipher else SuperFlags.ENCRYPT_NONE
        flags |= SuperFlags.TARFS if info.features & BlobFeatures.TARFS else 0
        made.boot.write_bytes(write_v6(tree, chunk_size=CHUNK, flags=flags, prefetch=[]))
    for name_, content in made.stored.items():
        (folder / name_).write_bytes(content)
    if beside and made.header is not None:
        name_ = info.meta_digest.hex() if info.features & BlobFeatures.SEPARATE else info.id
        (folder / f"{name_}.blob.meta").write_bytes(blobmeta_file(made.region, made.header))
    return made


def blobmeta_file(region: bytes, header: blobmeta.Header) -> bytes:
    """`<id>.blob.meta` of reference 4.11."""
    return region + bytes(-len(region) % 4096) + blobmeta.HEADER.pack(*header)


def seal(made: Made, region: bytes, contexts: int, count: int, data: bytes) -> bytes:
    """Blob meta behind `data`, or apart when SEPARATE: sets the fields of the table; the bytes of the blob that has it.

    `contexts`: bytes of `region` that are contexts and dictionaries, `count` of them.
    """
    info = made.info
    separate = bool(info.features & BlobFeatures.SEPARATE)
    kind = Compressor.ZSTD if separate else info.compressor
    packed = compress(kind, region)
    info.ci_compressor = kind if packed is not None else Compressor.NONE
    stored = region if packed is None else packed
    encrypted = bool(info.features & BlobFeatures.ENCRYPTED)
    if encrypted:
        stored = crypt.encrypt(SECRET, stored)
    info.ci_offset = 0 if separate else len(data)
    info.ci_compressed_size, info.ci_uncompressed_size = len(stored), len(region)
    made.region = region
    made.header = blobmeta.Header(
        blobmeta.MAGIC, info.features, info.ci_compressor, info.chunk_count, info.ci_offset, len(stored), len(region),
        len(region) - contexts if contexts else 0, contexts, count,
    )  # fmt: skip
    header = blobmeta.HEADER.pack(*made.header)
    return stored + (crypt.encrypt(SECRET, header) if encrypted else header)


def _finish(made: Made, data: bytes, region: bytes, contexts: int = 0, count: int = 0) -> None:
    whole = data + seal(made, region, contexts, count, data)
    made.info.id = hashlib.sha256(whole).hexdigest()
    made.info.compressed_size = len(whole)
    made.stored = {made.info.id: whole}


def _separate(made: Made, layer: bytes, region: bytes, contexts: int = 0, count: int = 0) -> None:
    info = made.info
    info.id, info.compressed_size = hashlib.sha256(layer).hexdigest(), len(layer)
    meta = seal(made, region, contexts, count, b"")
    info.meta_digest, info.meta_size = hashlib.sha256(meta).digest(), len(meta)
    made.stored = {info.id: layer, info.meta_digest.hex(): meta}


def _store(chunk: _Chunk, out: bytearray, kind: Compressor, encrypt: bool) -> None:
    packed = compress(kind, chunk.data)
    stored = chunk.data if packed is None else packed
    chunk.flags |= ChunkFlags.COMPRESSED if packed is not None else 0
    if encrypt:
        stored = crypt.encrypt(SECRET, stored)
        chunk.flags |= ChunkFlags.ENCRYPTED
    chunk.at, chunk.size = len(out), len(stored)
    out += stored


def _entry(chunk: _Chunk) -> blobmeta.EntryV2:
    flags = blobmeta.V2_COMPRESSED if chunk.flags & ChunkFlags.COMPRESSED else 0
    flags |= blobmeta.V2_ENCRYPTED if chunk.flags & ChunkFlags.ENCRYPTED else 0
    return blobmeta.EntryV2(
        chunk.at, chunk.size, chunk.offset, len(chunk.data), flags | blobmeta.V2_HAS_CRC, crc32c(chunk.data)
    )


def _plain(made: Made, chunks: list[_Chunk]) -> None:
    out = bytearray()
    for chunk in chunks:
        _store(chunk, out, made.info.compressor, False)
    region = b"".join(blobmeta.pack_v1(c.at, c.size, c.offset, len(c.data)) for c in chunks)
    _finish(made, bytes(out), region)


def _gzip(made: Made, chunks: list[_Chunk]) -> None:
    """v5, one gzip member per chunk."""
    made.info.compressor, made.info.digester = Compressor.GZIP, Digester.SHA256
    made.info.features = BlobFeatures.CAP_TAR_TOC
    out = bytearray()
    place = 0
    for chunk in chunks:
        stored = gzip.compress(chunk.data, mtime=0)
        if len(stored) < len(chunk.data):
            chunk.flags |= ChunkFlags.COMPRESSED
        else:
            stored = chunk.data
        chunk.at, chunk.size, chunk.offset = len(out), len(stored), place
        place += len(chunk.data)
        out += stored
    made.info.uncompressed_size = place
    made.info.id, made.info.compressed_size = hashlib.sha256(out).hexdigest(), len(out)
    made.stored = {made.info.id: bytes(out)}


def _encrypt(made: Made) -> None:
    info = made.info
    info.features |= BlobFeatures.ENCRYPTED | BlobFeatures.CHUNK_INFO_V2
    info.cipher = SECRET.cipher
    info.meta_digest, info.meta_size, info.cipher_iv = crypt.to_table(SECRET)


def _encrypted(made: Made, chunks: list[_Chunk]) -> None:
    _encrypt(made)
    out = bytearray()
    for chunk in chunks:
        _store(chunk, out, made.info.compressor, True)
    _finish(made, bytes(out), b"".join(blobmeta.pack_v2(_entry(chunk)) for chunk in chunks))


def _batch(made: Made, chunks: list[_Chunk]) -> None:
    made.info.features |= BlobFeatures.BATCH | BlobFeatures.CHUNK_INFO_V2
    encrypt = bool(made.info.features & BlobFeatures.ENCRYPTED)
    out, buffer, members = bytearray(), bytearray(), []
    contexts: list[batch.BatchContext] = []

    def flush() -> None:
        if not members:
            return
        packed = compress(made.info.compressor, bytes(buffer))
        stored = bytes(buffer) if packed is None else packed
        if encrypt:
            stored = crypt.encrypt(SECRET, stored)
        offset = 0
        for chunk in members:
            flags = blobmeta.V2_COMPRESSED | blobmeta.V2_BATCH | (blobmeta.V2_ENCRYPTED if encrypt else 0)
            data = blobmeta.pack_position(len(contexts), offset)
            chunk.entry = blobmeta.EntryV2(len(out), 0, chunk.offset, len(chunk.data), flags, data)
            chunk.flags |= ChunkFlags.ENCRYPTED if encrypt else 0
            offset += len(chunk.data)
        contexts.append(batch.BatchContext(len(stored), len(buffer)))
        out.extend(stored)
        buffer.clear()
        members.clear()

    for chunk in chunks:
        if len(chunk.data) < BATCH // 2:
            if len(buffer) + len(chunk.data) >= BATCH:
                flush()
            buffer += chunk.data
            members.append(chunk)
        else:
            flush()
            _store(chunk, out, made.info.compressor, encrypt)
    flush()
    packed_contexts = b"".join(map(batch.pack_context, contexts))
    entries = b"".join(blobmeta.pack_v2(chunk.entry or _entry(chunk)) for chunk in chunks)
    _finish(made, bytes(out), entries + packed_contexts, len(packed_contexts), len(contexts))


def _batch_encrypted(made: Made, chunks: list[_Chunk]) -> None:
    _encrypt(made)
    _batch(made, chunks)


def _layer(chunks: list[_Chunk]) -> tuple[bytes, list[int]]:
    """Where each chunk is in what stands for a tar: behind a header of 512 bytes, padded."""
    plain, places = bytearray(), []
    for chunk in chunks:
        plain += b"header".ljust(512, b"\0")
        places.append(len(plain))
        plain += chunk.data + bytes(-len(chunk.data) % 512)
    return bytes(plain), places


def _reference(made: Made, features: BlobFeatures) -> None:
    made.info.features |= features | BlobFeatures.SEPARATE | BlobFeatures.CHUNK_INFO_V2
    made.info.compressor, made.info.digester = Compressor.GZIP, Digester.SHA256


def _tar_ref(made: Made, chunks: list[_Chunk]) -> None:
    _reference(made, BlobFeatures(0))
    plain, places = _layer(chunks)
    for chunk, place in zip(chunks, places, strict=True):
        chunk.at, chunk.size = place, len(chunk.data)
    _separate(made, plain, b"".join(blobmeta.pack_v2(_entry(chunk)) for chunk in chunks))


def _zran(made: Made, chunks: list[_Chunk]) -> None:
    """Two gzip members. Slices begin at the first member, at a byte border inside it that needs the dictionary, and at
    the second member; the one before that reaches into it."""
    _reference(made, BlobFeatures.ZRAN)
    plain, places = _layer(chunks)
    middle, second = places[len(places) // 3] - 512, places[2 * len(places) // 3] - 512
    across = places[2 * len(places) // 3] + len(chunks[2 * len(places) // 3].data)  # ends behind the second's start
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    gz = packer.compress(plain[:middle]) + packer.flush(zlib.Z_SYNC_FLUSH)
    middle_in = len(gz)
    gz += packer.compress(plain[middle:second]) + packer.flush()
    second_in = len(gz) + 10
    gz += gzip.compress(plain[second:], mtime=0)
    dictionary = plain[max(0, middle - 32768) : middle]
    # From the middle to the end of the chunk that lies behind the start of the second member.
    reach = len(gz) - 8
    contexts = [
        zran.ZranContext(10, 0, 0, middle_in - 10, middle, 0, 0, 0),
        zran.ZranContext(middle_in, middle, 0, reach - middle_in, across - middle, len(dictionary), 0, 0),
        zran.ZranContext(second_in, second, len(dictionary), len(gz) - second_in, len(plain) - second, 0, 0, 0),
    ]
    entries = b""
    for chunk, place in zip(chunks, places, strict=True):
        number = 0 if place < middle else 1 if place + len(chunk.data) <= across else 2
        chunk.flags |= ChunkFlags.COMPRESSED
        chunk.at, chunk.size = contexts[number].in_offset, 1
        flags = blobmeta.V2_COMPRESSED | blobmeta.V2_ZRAN
        data = blobmeta.pack_position(number, place - contexts[number].out_offset)
        entries += blobmeta.pack_v2(blobmeta.EntryV2(chunk.at, 1, chunk.offset, len(chunk.data), flags, data))
    packed = b"".join(map(zran.pack_context, contexts)) + dictionary
    _separate(made, gz, entries + packed, len(packed), len(contexts))


def _tarfs(made: Made, chunks: list[_Chunk]) -> None:
    """The tar itself, in blocks of 512 bytes; its SHA-256 is all that vouches."""
    made.info.features, made.info.compressor = tarfs.FEATURES, Compressor.NONE
    made.info.digester = Digester.SHA256
    plain, places = _layer(chunks)
    for chunk, place in zip(chunks, places, strict=True):
        chunk.at = chunk.offset = place
        chunk.size, chunk.digest, chunk.flags = len(chunk.data), False, 0
    made.info.id, made.info.ci_compressor = hashlib.sha256(plain).hexdigest(), Compressor.LZ4_BLOCK
    made.info.compressed_size = made.info.uncompressed_size = len(plain)
    made.stored = {made.info.id: plain}


def _legacy_stargz(made: Made, chunks: list[_Chunk]) -> None:
    """V1 entries, one gzip member per chunk among others, sizes that are upper bounds (7.5)."""
    made.info.features = FEATURES | BlobFeatures.SEPARATE
    made.info.compressor, made.info.digester = Compressor.GZIP, Digester.SHA256
    gz = bytearray(gzip.compress(b"tar header", mtime=0))
    for chunk in chunks:
        chunk.at = len(gz)
        gz += gzip.compress(chunk.data, mtime=0) + gzip.compress(b"the next tar header", mtime=0)
    starts = [chunk.at for chunk in chunks[1:]] + [len(gz)]
    for chunk, following in zip(chunks, starts, strict=True):
        chunk.size = min(following - chunk.at, estargz.compressed_bound(len(chunk.data)))
        chunk.flags = ChunkFlags.COMPRESSED
    region = b"".join(blobmeta.pack_v1(c.at, c.size, c.offset, len(c.data)) for c in chunks)
    _separate(made, bytes(gz), region)


def _external(made: Made, chunks: list[_Chunk]) -> None:
    """Files somewhere in a foreign file, at any offset, vouched for by CRCs (5.15)."""
    made.info.features, made.info.compressor = BlobFeatures.CAP_TAR_TOC | BlobFeatures.EXTERNAL, Compressor.NONE
    out = bytearray(b"head".ljust(512, b"\0"))
    for chunk in chunks:
        chunk.at = chunk.offset = len(out)
        chunk.size, chunk.digest = len(chunk.data), False
        out += chunk.data + b"gap"
    made.info.id, made.info.ci_compressor = "external-file", Compressor.LZ4_BLOCK
    made.info.compressed_size = made.info.uncompressed_size = len(out)
    made.stored = {made.info.id: bytes(out)}


FORMS: dict[str, Callable[[Made, list[_Chunk]], None]] = {
    "plain": _plain,
    "v5-gzip": _gzip,
    "encrypted": _encrypted,
    "batch": _batch,
    "batch-encrypted": _batch_encrypted,
    "tar-ref": _tar_ref,
    "zran": _zran,
    "legacy-stargz": _legacy_stargz,
    "external": _external,
    "tarfs": _tarfs,
}
