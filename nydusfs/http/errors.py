"""What can go wrong with one exchange. Messages are short: the caller puts the source's name in front."""

from __future__ import annotations


class HttpError(Exception):
    """Base: the exchange failed; nothing is known about the resource."""


class ConnectFailed(HttpError):
    """No connection: refused, unreachable, name unknown, TLS handshake failed."""


class TlsFailed(ConnectFailed):
    """The peer answered, but not with TLS that we accept."""


class HttpTimeout(HttpError):
    """No connection, no answer or no progress within the time allowed."""


class ProtocolViolation(HttpError):
    """The peer does not speak HTTP as RFC 9112 has it, or ended in mid message."""


class StaleConnection(HttpError):
    """A kept connection turned out to be closed before any byte of the answer; the request can be sent again."""
