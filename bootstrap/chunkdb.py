"""Chunk dictionaries: which chunks many images have, as a bootstrap that builds and merges take with --chunk-dict.

Reference: RAFS format 5.11, nydusd.md 7.3 (`chunkdict generate`). A dictionary refers to data blobs that exist: an
image built with it lists those blobs too. So it is worth most when it needs few of them:

* shared chunks are those that at least two images have;
* of the blobs that hold some, the one with most bytes not covered yet is taken, until all are covered;
* an image that uses a blob may as well use all of it, so every other chunk known of these blobs comes along.

The database remembers the images of earlier runs; its tables are upstream's with columns of our own (`chunk_index`,
`chunk_flags`, `blob_entry`): without the number a chunk has in its blob nobody could read it. Rows upstream wrote
count as uses but are never picked.
"""

from __future__ import annotations

import json
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.errors import BuildError
from bootstrap.flat import flatten
from bootstrap.grouped import FileChunks, directories
from bootstrap.layout.common import (
    MAX_BLOBS,
    BlobFeatures,
    Compressor,
    Digester,
    SuperFlags,
    super_flags,
)
from bootstrap.load import blob_info
from bootstrap.reader import Bootstrap
from bootstrap.tree import Node
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

MIN_BLOB = 4096
"""Blobs with fewer bytes in the dictionary are not worth an entry in every image."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (
    id INTEGER PRIMARY KEY,
    image_reference TEXT,            -- name of the image
    version TEXT,                    -- its tag; both together name an image
    chunk_blob_id TEXT NOT NULL,
    chunk_digest TEXT,               -- hex
    chunk_crc32 INT,
    chunk_compressed_size INT,       -- bytes, as all sizes and offsets
    chunk_uncompressed_size INT,
    chunk_compressed_offset INT,
    chunk_uncompressed_offset INT
);
CREATE TABLE IF NOT EXISTS blob (
    id INTEGER PRIMARY KEY,
    blob_id TEXT NOT NULL,
    blob_compressed_size INT,
    blob_uncompressed_size INT,
    blob_compressor TEXT,
    blob_meta_ci_compressed_size INT,
    blob_meta_ci_uncompressed_size INT,
    blob_meta_ci_offset INT
);
"""
_OWN_COLUMNS = (("chunk", "chunk_index", "INT"), ("chunk", "chunk_flags", "INT"), ("blob", "blob_entry", "TEXT"))
_IMAGE = "image_reference || char(10) || version"


@dataclass(frozen=True)
class Form:
    """What all images of a dictionary share, and who uses it must have too."""

    version: int
    chunk_size: int
    compressor: Compressor
    digester: Digester
    explicit_owners: bool


@dataclass(frozen=True)
class Dictionary:
    """`bootstrap`: its bytes; `blobs`: ids in table order; `uncompressed_size`: bytes of all chunks."""

    bootstrap: bytes | bytearray
    blobs: list[str]
    chunk_count: int
    uncompressed_size: int
    small_blobs: list[str]
    lonely_images: list[str]
    """Images that share no chunk with another one."""


class _Pick(NamedTuple):
    blob_id: str
    digest: str
    flags: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    index: int  # type: ignore[assignment]  # the name the format gives it
    crc32: int


_PICK = (
    "chunk_blob_id, chunk_digest, chunk_flags, chunk_compressed_size, chunk_uncompressed_size, "
    "chunk_compressed_offset, chunk_uncompressed_offset, chunk_index, chunk_crc32"
)


def form_of(image: Bootstrap) -> Form:
    return Form(
        image.version,
        image.chunk_size,
        image.compressor,
        image.digester,
        bool(image.flags & SuperFlags.EXPLICIT_UIDGID),
    )


class ChunkDatabase:
    """Chunks of many images in SQLite. `path` may be ":memory:". Raises BuildError for what is no such database."""

    def __init__(self, path: str) -> None:
        try:
            self._db = sqlite3.connect(path)
            self._db.executescript(_SCHEMA)
            for table, column, kind in _OWN_COLUMNS:
                known = {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}
                if column not in known:
                    self._db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
            self._db.execute("CREATE INDEX IF NOT EXISTS chunk_by_digest ON chunk(chunk_digest)")
            self._db.execute("CREATE INDEX IF NOT EXISTS chunk_by_blob ON chunk(chunk_blob_id)")
        except sqlite3.Error as error:
            raise BuildError(f"cannot use the chunk database {path}: {error}") from error
        self._path = path

    def add(self, image: Bootstrap, name: str, tag: str) -> int:
        """Replace what is known of the image `name:tag` by the chunks it has now; their number."""
        blobs = [blob_info(blob) for blob in image.blobs]
        usable = [not blob.features & (BlobFeatures.TARFS | BlobFeatures.EXTERNAL) for blob in blobs]
        try:
            with self._db:
                self._db.execute("DELETE FROM chunk WHERE image_reference = ? AND version = ?", (name, tag))
                for blob, good in zip(blobs, usable, strict=True):
                    if good:
                        self._add_blob(blob)
                before = self._db.total_changes
                self._db.executemany(
                    "INSERT INTO chunk (image_reference, version, chunk_blob_id, chunk_digest, chunk_crc32, "
                    "chunk_compressed_size, chunk_uncompressed_size, chunk_compressed_offset, "
                    "chunk_uncompressed_offset, chunk_index, chunk_flags) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    self._rows(image, blobs, usable, name, tag),
                )
                return self._db.total_changes - before
        except sqlite3.Error as error:
            raise BuildError(f"cannot write the chunk database {self._path}: {error}") from error
        except OverflowError:
            raise BuildError(f"{image.path}: a chunk or blob lies or ends behind 2^63 bytes") from None

    def _rows(
        self, image: Bootstrap, blobs: list[BlobInfo], usable: list[bool], name: str, tag: str
    ) -> Iterator[tuple[str | int, ...]]:
        chunks = FileChunks(image)
        for _, _, entries in directories(image):
            for entry in entries:
                if entry.dtype != 8:
                    continue
                for chunk in chunks.of(entry.ino):
                    if usable[chunk.blob_index]:
                        yield (
                            name, tag, blobs[chunk.blob_index].id, chunk.digest.hex(), chunk.crc32,
                            chunk.compressed_size, chunk.uncompressed_size, chunk.compressed_offset,
                            chunk.uncompressed_offset, chunk.index, chunk.flags,
                        )  # fmt: skip

    def _add_blob(self, blob: BlobInfo) -> None:
        self._db.execute("DELETE FROM blob WHERE blob_id = ?", (blob.id,))
        self._db.execute(
            "INSERT INTO blob (blob_id, blob_compressed_size, blob_uncompressed_size, blob_compressor, "
            "blob_meta_ci_compressed_size, blob_meta_ci_uncompressed_size, blob_meta_ci_offset, blob_entry) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                blob.id, blob.compressed_size, blob.uncompressed_size, blob.compressor.label,
                blob.ci_compressed_size, blob.ci_uncompressed_size, blob.ci_offset, _pack_entry(blob),
            ),
        )  # fmt: skip

    def lonely_images(self) -> list[str]:
        """Images none of whose chunks another image has, as name:tag."""
        found = self._ask(
            f"SELECT DISTINCT image_reference, version FROM chunk WHERE {_IMAGE} NOT IN "
            f"(SELECT {_IMAGE} FROM chunk WHERE chunk_digest IN (SELECT chunk_digest FROM chunk GROUP BY "
            f"chunk_digest, chunk_uncompressed_size HAVING COUNT(DISTINCT {_IMAGE}) > 1)) ORDER BY 1, 2"
        )
        return [f"{name}:{tag}" for name, tag in found]

    def shared(self) -> list[_Pick]:
        """Every known place of every chunk that several images have."""
        return self._picks(
            "chunk_index IS NOT NULL AND (chunk_digest, chunk_uncompressed_size) IN (SELECT chunk_digest, "
            f"chunk_uncompressed_size FROM chunk GROUP BY 1, 2 HAVING COUNT(DISTINCT {_IMAGE}) > 1)"
        )

    def of_blob(self, blob_id: str) -> list[_Pick]:
        """All known chunks of a blob."""
        return self._picks("chunk_index IS NOT NULL AND chunk_blob_id = ?", blob_id)

    def _picks(self, condition: str, *values: str) -> list[_Pick]:
        query = f"SELECT DISTINCT {_PICK} FROM chunk WHERE {condition} ORDER BY chunk_blob_id, chunk_index"
        return [_Pick._make(row) for row in self._ask(query, *values)]

    def blob(self, blob_id: str) -> BlobInfo | None:
        """The entry of a blob; None for one that only upstream's tool saw."""
        rows = self._ask("SELECT blob_entry FROM blob WHERE blob_id = ?", blob_id)
        return _unpack_entry(rows[0][0]) if rows and rows[0][0] else None

    def _ask(self, query: str, *values: str) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise BuildError(f"cannot read the chunk database {self._path}: {error}") from error

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> ChunkDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def generate(database: ChunkDatabase, form: Form) -> Dictionary:
    """The dictionary of all images in the database that have this form's digest and chunk size."""
    picks, blobs, small = _choose(database, form)
    table = ChunkTable()
    file = Node(b"chunkdict", stat.S_IFREG | 0o660)
    for pick in picks:
        blob = blobs[pick.blob_id]
        file.add_chunk(
            table.add(
                bytes.fromhex(pick.digest), table.place_of(blob), pick.flags, pick.compressed_size,
                pick.uncompressed_size, pick.compressed_offset, pick.uncompressed_offset, pick.index, pick.crc32,
            )
        )  # fmt: skip
    # One address per chunk, whatever its size: the file is a list, nobody reads it through its size.
    file.size = (len(picks) - 1) * form.chunk_size + picks[-1].uncompressed_size if picks else 0
    root = Node(b"/", stat.S_IFDIR | 0o660)
    root.uid = root.gid = 1000
    root.children = {file.name: file}
    flags = super_flags(form.compressor, form.digester)
    if form.explicit_owners:
        flags |= SuperFlags.EXPLICIT_UIDGID
    if form.version == 6:
        secret = any(blob.features & BlobFeatures.ENCRYPTED for blob in table.blobs)
        flags |= SuperFlags.ENCRYPT_XTS if secret else SuperFlags.ENCRYPT_NONE
    write = write_v6 if form.version == 6 else write_v5
    tree = flatten(root, table, table.blobs, form.chunk_size)
    data = write(tree, chunk_size=form.chunk_size, flags=flags, prefetch=[])
    return Dictionary(
        data,
        [blob.id for blob in table.blobs],
        len(picks),
        sum(pick.uncompressed_size for pick in picks),
        small,
        database.lonely_images(),
    )


def _choose(database: ChunkDatabase, form: Form) -> tuple[list[_Pick], dict[str, BlobInfo], list[str]]:
    """The chunks of the dictionary in the order of their blobs, the blobs, and ids of blobs too small to be used."""
    entries: dict[str, BlobInfo | None] = {}
    holders: dict[tuple[str, int], list[str]] = {}  # of each shared chunk not covered yet
    gains: dict[str, int] = {}  # bytes of such chunks by blob, in the order of their ids
    for pick in database.shared():
        blob_id, key = pick.blob_id, (pick.digest, pick.uncompressed_size)
        if blob_id not in entries:
            entries[blob_id] = _fitting(database.blob(blob_id), form)
        if entries[blob_id] is not None:
            holders.setdefault(key, []).append(blob_id)
            gains[blob_id] = gains.get(blob_id, 0) + key[1]
    chosen: dict[tuple[str, int], _Pick] = {}
    small: list[str] = []
    blobs: dict[str, BlobInfo] = {}
    while gains and len(blobs) < MAX_BLOBS - 2:  # an image that uses the dictionary needs a place for its own data
        best = max(gains, key=gains.__getitem__)
        if not gains.pop(best):
            break
        own = {(pick.digest, pick.uncompressed_size): pick for pick in reversed(database.of_blob(best))}
        if sum(key[1] for key in own) < MIN_BLOB:
            small.append(best)
            continue
        blob = entries[best]
        assert blob is not None
        blobs[best] = _for_dictionary(blob)
        for key, pick in own.items():
            chosen.setdefault(key, pick)
            for other in holders.pop(key, ()):
                if other in gains:
                    gains[other] -= key[1]
    picks = sorted(chosen.values(), key=lambda pick: (pick.blob_id, pick.index))
    return picks, blobs, small


def _fitting(blob: BlobInfo | None, form: Form) -> BlobInfo | None:
    """The blob if images of this form can use it; only v6 blobs have a table of their chunks."""
    if blob is None or (blob.digester, blob.chunk_size) != (form.digester, form.chunk_size):
        return None
    return blob if bool(blob.ci_uncompressed_size) == (form.version == 6) else None


def _for_dictionary(blob: BlobInfo) -> BlobInfo:
    """The entry as the dictionary has it. Without the flag of the digest array readers take its chunk table."""
    blob.features |= BlobFeatures.IS_CHUNKDICT_GENERATED
    blob.features &= ~(BlobFeatures.INLINED_FS_META | BlobFeatures.INLINED_CHUNK_DIGEST)
    return blob


def _pack_entry(blob: BlobInfo) -> str:
    values = {field.name: getattr(blob, field.name) for field in fields(blob)}
    return json.dumps({key: value.hex() if isinstance(value, bytes) else value for key, value in values.items()})


def _unpack_entry(text: str) -> BlobInfo:
    try:
        values = json.loads(text)
        for key in ("toc_digest", "meta_digest", "cipher_iv"):
            values[key] = bytes.fromhex(values[key])
        values["compressor"] = Compressor(values["compressor"])
        values["digester"] = Digester(values["digester"])
        values["features"] = BlobFeatures(values["features"])
        return BlobInfo(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"the chunk database has an unusable blob entry: {error}") from error
