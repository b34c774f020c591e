"""What can be wrong with an image, by situation. Only commands turn these into a line and an exit code."""

from __future__ import annotations

__all__ = ["BuildError", "CodecError", "DigestMismatch", "FormatError", "RafsError"]


class RafsError(Exception):
    """Base of every error this package raises on purpose. `str()` is one line fit for a user."""


class FormatError(RafsError):
    """Bytes that break the format.

    `structure` names what was being read ("v6 superblock", "dirent block"), `offset` is the byte offset in the file.
    """

    def __init__(self, structure: str, offset: int, message: str) -> None:
        super().__init__(f"{structure} at offset {offset:#x}: {message}")
        self.structure = structure
        self.offset = offset
        self.message = message


class CodecError(RafsError):
    """Stored bytes that do not decode to what their record promises, or a coding that is not supported."""


class DigestMismatch(RafsError):
    """Decoded bytes whose digest or checksum differs from the record: damaged or forged data."""


class BuildError(RafsError):
    """A source (tar, directory, layer set) that cannot become an image."""
