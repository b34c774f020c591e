"""What can go wrong in this room, each with one sentence for the user.

`str(error)` is that sentence: it names the file, key, blob or address concerned and, where there is one, the remedy.
Edges (CLI, HTTP API, FUSE) map these classes to exit codes, status codes and errno; nothing else does.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence


def os_reason(error: OSError) -> str:
    """What the kernel said, as `file: reason` and without errno's number, for a line to a user."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason


class NydusError(Exception):
    """Base of every error that may reach a user. `exit_code` is what a command line ends with."""

    exit_code = 1


class ConfigError(NydusError):
    """A configuration that cannot be used.

    `key` is the dotted path of the offending key, "" for the whole text; `where` names the file or API call.
    """

    def __init__(self, key: str, message: str, where: str = "") -> None:
        self.key = key
        self.message = message
        self.where = where
        super().__init__(": ".join(part for part in (where, key, message) if part))


class SourceError(NydusError):
    """No source could deliver the bytes asked for. `tried` holds a (source name, reason) pair for each, in order.

    `damaged`: at least one source answered, but with bytes that are not the blob's; a smaller read may succeed.
    """

    def __init__(self, what: str, tried: Sequence[tuple[str, str]] = (), *, damaged: bool = False) -> None:
        self.what = what
        self.tried = list(tried)
        self.damaged = damaged
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.tried)
        super().__init__(f"{what}: {reasons}" if reasons else what)


class CacheError(NydusError):
    """A cache directory that cannot be used: not a directory, not writable, or served by another process."""


class CacheDiskError(CacheError):
    """The same because of the disk: full, read-only or broken. Images can be served without it."""


class ReadError(NydusError):
    """A read of an image failed for good; `errno` is what the reader of the file gets."""

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        self.errno = errno
        super().__init__(message)


class RegistryError(NydusError):
    """A registry refused, failed or could not be reached.

    `status` is the HTTP status (0: no answer at all), `url` the address asked, without query, `retry_after` the pause
    in seconds that the registry asked for.
    """

    def __init__(self, message: str, *, status: int = 0, url: str = "", retry_after: float = 0.0) -> None:
        self.status = status
        self.url = url
        self.retry_after = retry_after
        super().__init__(message)


class AuthError(RegistryError):
    """The registry does not accept the credentials, or wants some where there are none."""


class WrongBytesError(RegistryError):
    """A blob arrived whole, but its bytes or their number are not those of its digest. Another try may get others."""


class NotFoundError(RegistryError):
    """The registry answers, but has no such image, manifest or blob."""


class ObjectStoreError(NydusError):
    """An object store refused, failed or could not be reached. `status` is the HTTP status, 0: no answer at all."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        self.status = status
        super().__init__(message)


class ConvertError(NydusError):
    """An image cannot be converted, checked or mounted."""
