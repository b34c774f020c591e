"""What can go wrong in this room. Only `service.py` (gRPC codes) and `cli.py` (exit codes) translate these."""

from __future__ import annotations

MAX_SENTENCE = 600  # characters, of up to 12 bytes each on the wire; clients take 8 KiB of headers


class SnapshotterError(Exception):
    """Base: `str(error)` is one sentence for the user."""


class InvalidArgument(SnapshotterError):
    """The request itself is wrong."""


class NotFound(SnapshotterError):
    """No such snapshot, parent or instance."""


class AlreadyExists(SnapshotterError):
    """The key or name is taken, or a remote layer needs no unpacking."""


class FailedPrecondition(SnapshotterError):
    """The request is right, but not in this state."""


class PermissionDenied(SnapshotterError):
    """A rule of the operator forbids it."""


class ResourceExhausted(SnapshotterError):
    """The disk is full."""


class Unavailable(SnapshotterError):
    """Something this call needs is not there yet, or not any more: try again."""


class SettingsError(SnapshotterError):
    """Flags or a configuration file that cannot be used."""


class StartError(SnapshotterError):
    """The machine cannot run the snapshotter, or another one is running."""


class InstallError(SnapshotterError):
    """A node that cannot be changed as asked, or not safely."""


def sentence(message: str) -> str:
    """One line whatever names are in it, and short: a longer one does not fit the header it travels in, and the client
    sees RESOURCE_EXHAUSTED instead. Its end stays, as clients look for words there."""
    if len(message) > MAX_SENTENCE:
        message = f"{message[: MAX_SENTENCE // 2]}...{message[-MAX_SENTENCE // 2 :]}"
    if message.isprintable():
        return message
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in message)
