"""HTTP/1.1 messages as bytes: pure functions, no I/O. RFC 9110 and 9112, the part a GET client needs.

Strict where leniency is dangerous (two lengths, control characters in headers, absurd sizes), lenient where real
servers are sloppy (bare LF as line end, blanks around values).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nydusfs.http.errors import ProtocolViolation

MAX_HEAD = 64 * 1024
MAX_HEADERS = 200
MAX_CHUNK_LINE = 256
MAX_LENGTH = 1 << 62

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n\0]*)?")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_END = re.compile(rb"\r?\n\r?\n")
_DIGITS = re.compile(r"[0-9]{1,19}")
_RANGE = re.compile(r"bytes\s+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,25}|\*)", re.IGNORECASE)


@dataclass(slots=True)
class Head:
    """Status line and headers. Header names are lower case; repeated ones are joined by a comma (challenges too)."""

    status: int
    headers: dict[str, str]
    http10: bool = False

    def get(self, name: str) -> str:
        return self.headers.get(name, "")

    @property
    def chunked(self) -> bool:
        """Raises `ProtocolViolation` for codings that we never asked for."""
        coding = self.headers.get("transfer-encoding")
        if coding is None:
            return False
        if coding.strip().lower() != "chunked":
            raise ProtocolViolation(f"transfer coding {coding[:40]!r} was not asked for")
        return True

    @property
    def length(self) -> int | None:
        """Content-Length; None where there is none. Repeated equal values are one value."""
        text = self.headers.get("content-length")
        if text is None:
            return None
        values = {value.strip() for value in text.split(",")}
        if len(values) != 1 or not _DIGITS.fullmatch(value := values.pop()) or int(value) > MAX_LENGTH:
            raise ProtocolViolation(f"illegal Content-Length {text[:40]!r}")
        return int(value)

    @property
    def keep_alive(self) -> bool:
        options = self.headers.get("connection", "").lower()
        return "keep-alive" in options if self.http10 else "close" not in options

    @property
    def bodiless(self) -> bool:
        return self.status in (204, 304) or self.status < 200


def find_head_end(buffer: bytes | bytearray) -> int:
    """Index behind the blank line that ends the head, -1 while it is not here. Raises when it is too long."""
    match = _END.search(buffer, 0, MAX_HEAD)
    if match:
        return match.end()
    if len(buffer) >= MAX_HEAD:
        raise ProtocolViolation(f"response head is longer than {MAX_HEAD} bytes")
    return -1


def parse_head(raw: bytes) -> Head:
    """Parse a complete head, blank line included. Raises `ProtocolViolation`."""
    lines = raw.replace(b"\r\n", b"\n").split(b"\n")
    status = _STATUS.fullmatch(lines[0])
    if status is None:
        raise ProtocolViolation(f"not an HTTP/1.1 answer: {lines[0][:40]!r}")
    headers: dict[str, str] = {}
    if len(lines) > MAX_HEADERS:
        raise ProtocolViolation(f"more than {MAX_HEADERS} header lines")
    for line in lines[1:]:
        if not line:
            break
        key, text = _known.get(line) or _parse_line(line)
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return Head(int(status[2]), headers, status[1] == b"0")


# A server's answers differ in few of their lines: the others are known from the last ones.
_known: dict[bytes, tuple[str, str]] = {}
_MOST_KNOWN, _LONGEST_KNOWN = 256, 256


def _parse_line(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    if not colon or not _NAME.fullmatch(name):
        raise ProtocolViolation(f"illegal header line {line[:40]!r}")
    if b"\r" in value or b"\0" in value:
        raise ProtocolViolation(f"illegal value of header {name[:40]!r}")
    found = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
    if len(line) <= _LONGEST_KNOWN:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[line] = found
    return found


def parse_content_range(text: str) -> tuple[int, int] | None:
    """First and last byte (inclusive). The total behind the slash is not returned on purpose: Dragonfly invents it."""
    match = _RANGE.fullmatch(text.strip())
    if match is None or int(match[1]) > int(match[2]):
        return None
    return int(match[1]), int(match[2])


def parse_chunk_size(line: bytes) -> int:
    """The size of one chunk of a chunked body, extensions ignored."""
    digits = line.partition(b";")[0].strip(b" \t")
    if not 1 <= len(digits) <= 15 or not re.fullmatch(rb"[0-9a-fA-F]+", digits):
        raise ProtocolViolation(f"illegal chunk size {line[:20]!r}")
    return int(digits, 16)


def format_request(method: str, target: str, host: str, headers: Iterable[tuple[str, str]], body: bytes = b"") -> bytes:
    """A request; the caller has checked that `target` and `headers` hold no line breaks."""
    lines = [f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers]
    if body:
        lines.append(f"Content-Length: {len(body)}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("latin-1") + body
