"""Members of a tar as OCI layers have them: USTAR headers, PAX records where those are too small.

Reference: RAFS format 6.7; POSIX pax interchange format. The bytes depend on the arguments alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)

FILE, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_PAX = b"x"

_NAME_SIZE = 100
_BLANK_CHECKSUM = b" " * 8
_USTAR = b"ustar\x0000"


@dataclass(slots=True)
class Member:
    """One entry. `kind` is a type flag of this module; `mtime` in seconds, may be negative; `link` where it points."""

    name: bytes
    kind: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    mtime_nsec: int = 0
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def pack_member(member: Member) -> bytes:
    """Everything of an entry but its content, which follows and is padded to 512 bytes (`padding`)."""
    records: dict[bytes, bytes] = {}
    if len(member.name) > _NAME_SIZE:
        records[b"path"] = member.name
    if len(member.link) > _NAME_SIZE:
        records[b"linkpath"] = member.link
    if member.mtime_nsec:
        records[b"mtime"] = _fraction(member.mtime, member.mtime_nsec)
    for key, value in member.xattrs.items():
        records[b"SCHILY.xattr." + key] = value
    return _extension(member.name, records) + _header(member)


def padding(size: int) -> bytes:
    """What follows `size` bytes of content."""
    return bytes(-size % BLOCK)


def _header(member: Member) -> bytes:
    raw = b"".join(
        (
            member.name[:_NAME_SIZE].ljust(_NAME_SIZE, b"\0"),
            _number(member.mode & 0o7777, 8),
            _number(member.uid, 8),
            _number(member.gid, 8),
            _number(member.size, 12),
            _number(member.mtime, 12),
            _BLANK_CHECKSUM,
            member.kind,
            member.link[:_NAME_SIZE].ljust(_NAME_SIZE, b"\0"),
            _USTAR,
            bytes(64),  # user and group names: those of this machine would mean nothing elsewhere
            _number(member.major, 8),
            _number(member.minor, 8),
            bytes(167),
        )
    )
    return b"%b%06o\0 %b" % (raw[:148], sum(raw), raw[156:])


def _number(value: int, size: int) -> bytes:
    """Octal digits and a NUL; what does not fit so is base-256, as GNU tar introduced it and all readers know it."""
    digits = size - 1
    if 0 <= value < 8**digits:
        return b"%0*o\0" % (digits, value)
    sign = b"\x80" if value >= 0 else b"\xff"
    return sign + (value % (1 << 8 * digits)).to_bytes(digits, "big")


def _extension(name: bytes, records: dict[bytes, bytes]) -> bytes:
    """The PAX header in front of an entry, empty when it needs none."""
    if not records:
        return b""
    body = b"".join(_record(key, records[key]) for key in sorted(records))
    folder, _, base = name.rpartition(b"/")
    shown = b"PaxHeaders.0/" + base
    header = _header(Member((folder + b"/" + shown if folder else shown)[:_NAME_SIZE], _PAX, 0o644, size=len(body)))
    return header + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, where the length counts its own digits."""
    rest = len(key) + len(value) + 3
    size = rest + len(str(rest))
    if rest + len(str(size)) != size:
        size += 1
    return b"%d %b=%b\n" % (size, key, value)


def _fraction(seconds: int, nanoseconds: int) -> bytes:
    """A time as a decimal number: -5 s + 250,000,000 ns are -4.75."""
    sign = b""
    if seconds < 0:
        sign, seconds, nanoseconds = b"-", -seconds - 1, 1_000_000_000 - nanoseconds
    return (b"%b%d.%09d" % (sign, seconds, nanoseconds)).rstrip(b"0")
