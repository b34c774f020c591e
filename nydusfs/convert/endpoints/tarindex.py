"""Members of an uncompressed tar by name, found in one pass over its headers and then read by position."""

from __future__ import annotations

import os
import posixpath
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

from nydusfs.convert.endpoints.files import FilePart
from nydusfs.errors import ConvertError

# An image has hundreds of members; a tar of a root file system given by mistake has millions
MAX_MEMBERS = 50_000


class TarIndex:
    """Thread-safe. Raises ConvertError for a file that is no tar, OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, tuple[int, int]] = {}  # name -> offset, size
        links: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for count, member in enumerate(archive):
                    if count >= MAX_MEMBERS:
                        raise ConvertError(f"{path} is no image archive: it has more than {MAX_MEMBERS} members")
                    name = posixpath.normpath(member.name)
                    if member.isreg() and not member.issparse():
                        self._members[name] = member.offset_data, member.size
                    elif member.issym():  # layers shared between images, by older docker versions
                        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                    elif member.islnk():
                        links[name] = posixpath.normpath(member.linkname)
                    archive.members = []  # type: ignore[attr-defined]  # else each header is kept
        except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
            raise ConvertError(f"{path} is not a tar archive: {error}") from error
        for name, target in links.items():
            if target in self._members:
                self._members.setdefault(name, self._members[target])
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __contains__(self, name: str) -> bool:
        return posixpath.normpath(name) in self._members

    def size(self, name: str) -> int:
        return self._members[posixpath.normpath(name)][1]

    def open(self, name: str, what: str, digest: str = "") -> FilePart:
        """KeyError if there is no such member."""
        offset, size = self._members[posixpath.normpath(name)]
        return FilePart(self._descriptor, offset, size, what, digest)

    def read(self, name: str, limit: int) -> bytes:
        if name not in self:
            raise ConvertError(f"{self.path} has no {name}: it is no image archive")
        if self.size(name) > limit:
            raise ConvertError(f"{name} of {self.path} is larger than {limit} bytes")
        with self.open(name, f"{name} of {self.path}") as part:
            data = bytearray()
            while piece := part.read(1 << 20):
                data += piece
            return bytes(data)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
