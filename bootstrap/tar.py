"""Layer archives: their entries as a stream.

Our own parser, because the one of the standard library builds an object of 40 attributes per entry (about 60 us; this
one needs 8) and decodes names to text. Rules: RAFS format 5.8 and, where that is silent, what containerd accepts.
"""

from __future__ import annotations

from struct import Struct
from typing import BinaryIO, NoReturn
from zlib import adler32

from bootstrap.decompress import READ_SIZE as READ_SIZE
from bootstrap.decompress import open_layer as open_layer
from bootstrap.errors import BuildError

BLOCK = 512
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
MAX_EXTENSION = 8 << 20  # of a PAX or GNU long-name record: a hostile header must not make us read gigabytes

REGULAR, LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_WITHOUT_DATA = frozenset((LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO))

# name mode uid gid size mtime checksum type linkname magic+version owner group devmajor devminor prefix
_HEADER = Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_ZERO_BLOCK = bytes(BLOCK)


class Entry:
    """One member: `type` is one of the constants above, numbers are plain, names are raw bytes as stored."""

    __slots__ = ("devmajor", "devminor", "gid", "linkname", "mode", "mtime", "name", "size", "type", "uid", "xattrs")

    def __init__(self, name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int) -> None:
        self.name = name
        self.type = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = size
        self.mtime = mtime
        self.linkname = b""
        self.devmajor = 0
        self.devminor = 0
        self.xattrs: dict[bytes, bytes] | None = None

    @property
    def shown(self) -> str:
        """The name for messages."""
        return repr(self.name.decode("utf-8", "backslashreplace"))


class TarStream:
    """Entries of a tar, front to back. Between two `next()` calls, `read()` gives the content of the entry.

    Accepts ustar, old V7, GNU (long names, base-256) and PAX; refuses sparse and multi-volume entries. Zero blocks
    between concatenated archives are skipped, garbage behind the end mark is read and dropped.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._read = source.read
        self._left = 0  # content of the current entry not read so far
        self._padding = 0
        self._entry: Entry | str = "the first entry"
        self._numbers: dict[bytes, int] = {}
        self.position = 0
        """Bytes of the tar consumed so far."""

    @property
    def _shown(self) -> str:
        return self._entry if isinstance(self._entry, str) else self._entry.shown

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        if data is None:
            raise BuildError("the layer is a non-blocking stream without data")
        if len(data) < size:  # BufferedReader returns short only at the end, other streams may not
            pieces = [data]
            got = len(data)
            while got < size:
                data = self._read(size - got)
                if not data:
                    break
                pieces.append(data)
                got += len(data)
            data = b"".join(pieces)
        self.position += len(data)
        return data

    def read(self, size: int) -> bytes:
        """The next bytes of the content, `size` of them unless the content ends before; b"" behind its end."""
        left = self._left
        if size >= left:
            if not left:
                return b""
            size = left
        data = self._exactly(size)
        if len(data) < size:
            self._truncated()
        self._left = left - size
        return data

    def _truncated(self) -> NoReturn:
        raise BuildError(f"the tar ends in the middle of {self._shown} (after {self.position} bytes): truncated?")

    def _skip(self) -> None:
        while self._left:
            self.read(READ_SIZE)

    def _extension(self, size: int, what: str) -> bytes:
        if not 0 <= size <= MAX_EXTENSION:
            raise BuildError(f"{what} of {size} bytes at {self.position}: 0 to {MAX_EXTENSION} are possible")
        self._left = size
        self._padding = -size % BLOCK
        self._entry = what
        return self.read(size)

    def next(self) -> Entry | None:
        """The next entry, or None at the end; the rest of the last one's content is skipped."""
        if self._left:
            self._skip()
        pax: dict[bytes, bytes] | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        zeros = 0
        while True:
            padding, self._padding = self._padding, 0  # fetched with the header that follows, in one call
            header = self._exactly(padding + BLOCK)
            if padding:
                header = header[padding:]
            if len(header) < BLOCK:
                if self.position < BLOCK:
                    raise BuildError("not a tar: empty or shorter than one header")
                if header and not zeros:
                    raise BuildError(f"the tar ends in the middle of a header after {self._shown}: truncated?")
                if pax or long_name or long_link:
                    raise BuildError(f"the tar ends behind the extension of an entry, after {self._shown}: truncated?")
                return None
            if not header[0] and header == _ZERO_BLOCK:
                zeros += 1
                continue
            fields = _HEADER.unpack(header)
            if not _checksum_ok(header, fields[6]):
                if zeros >= 2:
                    self._drain()
                    return None
                if self.position == BLOCK:
                    raise BuildError("not a tar: the first 512 bytes are no tar header (wrong checksum)")
                raise BuildError(
                    f"damaged tar: no header at {self.position - BLOCK} where one must follow {self._shown}"
                )
            zeros = 0
            kind = fields[7]
            try:
                size = _number(fields[4])
                if kind == b"x":
                    pax = self._pax(self._extension(size, "a PAX header"))
                elif kind == b"g":  # comments of git archive; containerd ignores them too
                    self._extension(size, "a global PAX header")
                elif kind == b"L":
                    long_name = self._extension(size, "a GNU long name").split(b"\0", 1)[0]
                elif kind == b"K":
                    long_link = self._extension(size, "a GNU long link name").split(b"\0", 1)[0]
                else:
                    return self._make(fields, size, pax, long_name, long_link)
            except ValueError as error:
                raise BuildError(f"damaged tar: header at {self.position - BLOCK}: {error}") from error

    def _make(
        self,
        fields: tuple[bytes, ...],
        size: int,
        pax: dict[bytes, bytes] | None,
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Entry:
        name, mode, uid, gid, _, mtime, _, kind, link, magic, _, _, major, minor, prefix = fields
        name = name.split(b"\0", 1)[0]
        if prefix[0] and magic == b"ustar\x0000":
            name = prefix.split(b"\0", 1)[0] + b"/" + name
        if long_name is not None:
            name = long_name
        if kind == b"\0":
            kind = DIRECTORY if name.endswith(b"/") else REGULAR
        known = self._known
        entry = Entry(name, kind, known(mode) & 0o7777, known(uid), known(gid), size, _number(mtime))
        if kind != REGULAR:
            if kind in (LINK, SYMLINK):
                entry.linkname = link.split(b"\0", 1)[0] if long_link is None else long_link
            elif kind in (CHAR, BLOCKDEV):
                entry.devmajor, entry.devminor = _number(major), _number(minor)
        if pax is not None:
            self._apply(entry, pax)
        self._entry = entry
        size = entry.size
        if kind != REGULAR:
            if kind not in _WITHOUT_DATA:
                raise BuildError(f"{entry.shown}: tar entries of type {kind!r} are not supported")
            entry.size = size = 0  # some archivers repeat the target's size in a link's header; no data follows
            if not 0 <= entry.devmajor <= MAX_MAJOR or not 0 <= entry.devminor <= MAX_MINOR:
                raise BuildError(f"{entry.shown}: device {entry.devmajor}:{entry.devminor} does not exist on Linux")
        if not 0 <= entry.uid <= 0xFFFFFFFF or not 0 <= entry.gid <= 0xFFFFFFFF:
            raise BuildError(f"{entry.shown}: owner {entry.uid}:{entry.gid} does not fit 32 bits")
        if not 0 <= size < 1 << 63:
            raise BuildError(f"{entry.shown}: size {size} is not possible")
        if not -(1 << 63) <= entry.mtime < 1 << 63:
            raise BuildError(f"{entry.shown}: modification time {entry.mtime} does not fit 64 bits")
        self._left = size
        self._padding = -size % BLOCK
        return entry

    def _known(self, field: bytes) -> int:
        """A number that most entries have in common: modes and owners are looked up, not read again."""
        found = self._numbers.get(field)
        if found is None:
            found = _number(field)
            if len(self._numbers) < 4096:
                self._numbers[field] = found
        return found

    @staticmethod
    def _apply(entry: Entry, pax: dict[bytes, bytes]) -> None:
        for key, value in pax.items():
            if key.startswith(b"SCHILY.xattr."):
                if entry.xattrs is None:
                    entry.xattrs = {}
                entry.xattrs[key[13:]] = value
            elif not value:
                continue  # the header's field counts, as for containerd
            elif key == b"path":
                entry.name = value
            elif key == b"linkpath":
                entry.linkname = value
            elif key == b"uid":
                entry.uid = int(value)
            elif key == b"gid":
                entry.gid = int(value)
            elif key == b"size":
                entry.size = int(value)
            elif key == b"mtime":
                whole = _whole_seconds(value)
                if abs(whole - entry.mtime) > 1:  # the header has no place for it; else it only differs by rounding
                    entry.mtime = whole
            elif key.startswith(b"GNU.sparse."):
                raise BuildError(f"{entry.shown}: sparse files are not supported in layers")

    @staticmethod
    def _pax(data: bytes) -> dict[bytes, bytes]:
        """Records are split by their length, never at newlines: attribute values may hold any byte."""
        records = {}
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + 20)
            if space < 0:
                if data[at:].strip(b"\0") == b"":
                    break
                raise ValueError("a PAX record has no length")
            length = int(data[at:space])
            end = at + length
            equals = data.find(b"=", space + 1, end)
            if length <= space - at or end > len(data) or equals < 0 or data[end - 1 : end] != b"\n":
                raise ValueError("a PAX record is damaged")
            records[data[space + 1 : equals]] = data[equals + 1 : end - 1]
            at = end
        return records

    def _drain(self) -> None:
        """Read to the end, so that the writer of a pipe does not die of it."""
        while True:
            data = self._read(READ_SIZE)
            if not data:
                return
            self.position += len(data)


def _checksum_ok(header: bytes, stored: bytes) -> bool:
    """The sum of all bytes, those of the field itself taken as spaces.

    Adler-32 has it in its low half: exactly, as 256 bytes stay below its modulus. `sum` is twenty times slower.
    """
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    try:
        return total - sum(stored) + 256 == int(stored.strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False


def _whole_seconds(value: bytes) -> int:
    """A decimal number, rounded down: images made of tars keep whole seconds, as upstream's do.

    Upstream does not look at this record, and gets 0 for times before 1970 and after 2242: archivers that write PAX
    leave them out of the header.
    """
    seconds, _, fraction = value.partition(b".")
    if fraction and not fraction.isdigit():
        raise ValueError(f"mtime {value!r} is not a number")
    whole = int(seconds)
    down = whole - 1 if seconds.startswith(b"-") and fraction.strip(b"0") else whole
    if not -(1 << 63) <= down < 1 << 63:
        raise ValueError(f"mtime {value!r} does not fit 64 bits")
    return down


def _number(field: bytes) -> int:
    """Octal text, or base-256 (negative ones too); an empty field is 0."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field) - 1
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    try:
        return int(text, 8)
    except ValueError:
        raise ValueError(f"{field!r} is not an octal number") from None
