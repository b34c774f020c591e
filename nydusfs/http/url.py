"""URLs as far as a blob client needs them: an origin to connect to and a request target."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote, urlsplit

from nydusfs.http.errors import ProtocolViolation

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Where to connect: the key of a connection pool. Scheme "unix": plain HTTP over the socket with path `host`."""

    scheme: str
    host: str  # without brackets
    port: int

    @property
    def netloc(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        if self.scheme == "unix":
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if _DEFAULT_PORTS[self.scheme] == self.port else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.host}" if self.scheme == "unix" else f"{self.scheme}://{self.netloc}"


class Url(NamedTuple):
    origin: Origin
    target: str  # path and query, percent-encoded, begins with "/"

    def __str__(self) -> str:
        """Without the query: signed URLs carry credentials there."""
        return f"{self.origin}{self.target.partition('?')[0]}"

    @property
    def full(self) -> str:
        return f"{self.origin}{self.target}"


def parse_url(text: str) -> Url:
    """Raises `ProtocolViolation` for anything but an absolute http or https URL."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ProtocolViolation("not a URL") from None
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS or not parts.hostname or port == 0:
        raise ProtocolViolation("not an absolute http or https URL")
    # Characters that are legal in a target stay as they are; blanks, controls and non-ASCII are encoded, so that
    # nothing in a Location can break out of the request line.
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if not target.startswith("/"):
        target = "/" + target
    if parts.query:
        target += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
    try:
        host = parts.hostname.encode("idna").decode("ascii") if not parts.hostname.isascii() else parts.hostname
    except UnicodeError:
        raise ProtocolViolation("not a legal host name") from None
    if any(char <= " " or char in '/\\@?#"<>' for char in host):
        raise ProtocolViolation("not a legal host name")
    return Url(Origin(scheme, host, port or _DEFAULT_PORTS[scheme]), target)


def parse_authority(scheme: str, netloc: str) -> Origin:
    """`host[:port]` of a configuration."""
    return parse_url(f"{scheme}://{netloc}/").origin
