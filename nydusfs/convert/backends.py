"""Blobs outside of registries: what `--*backend-type` and `--*backend-config[-file]` name, to read and to push.

Configurations have the keys of nydusd's (reference nydusd.md 1.3), and for pushes those of upstream's nydusify.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from nydusfs.convert.streams import PieceStream
from nydusfs.errors import ConfigError, ConvertError, os_reason

if TYPE_CHECKING:
    from nydusfs.objects.client import ObjectClient

KINDS = ("oss", "s3", "localfs")
_RANGE = 8 << 20  # bytes of one request when a whole blob is read
_PIECE = 1 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """A backend's type and its table, as nydusd's configuration has them. `repr` shows no secret."""

    kind: str
    table: dict[str, Any]
    where: str

    def __repr__(self) -> str:
        return f"BackendChoice({self.kind!r}, {self.where!r})"

    def open(self) -> BlobStore:
        """Raises ConfigError."""
        from nydusfs.config import LocalFsBackend, ObjectBackend, load_backend

        backend = load_backend(self.kind, json.dumps(self.table), self.where)
        if isinstance(backend, ObjectBackend):
            from nydusfs.objects.client import ObjectClient

            return ObjectStore(ObjectClient(backend))
        assert isinstance(backend, LocalFsBackend)
        if not backend.dir:
            raise ConfigError("dir", "is missing: blobs are files in a directory", self.where)
        return FolderStore(Path(backend.dir))


def chosen_backend(given: Mapping[str, Any], prefix: str = "", *, required: bool = False) -> BackendChoice | None:
    """From the flags --{prefix}backend-type, -config and -config-file; None without the first. Raises ConfigError, and
    ConvertError for what does not fit together."""
    flag = f"--{prefix}backend"
    names = prefix.replace("-", "_")
    kind, text, file = (given.get(f"{names}backend_{part}") for part in ("type", "config", "config_file"))
    if not kind:
        if required:
            raise ConvertError(f"{flag}-type is missing: {', '.join(KINDS)}")
        return None
    if kind not in KINDS:
        raise ConvertError(f"{flag}-type {kind!r} is not one of {', '.join(KINDS)}")
    if text and file:
        raise ConvertError(f"{flag}-config and {flag}-config-file exclude each other")
    where = f"{flag}-config"
    if file:
        where = str(file)
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text"
            raise ConvertError(f"{flag}-config-file {file}: {reason}") from None
    if not text or not text.strip():
        raise ConvertError(f"{flag}-type {kind} needs {flag}-config or {flag}-config-file")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("", f"is not valid JSON: {error}", where) from None
    if not isinstance(table, dict):
        raise ConfigError("", "is not a JSON object", where)
    return BackendChoice(kind, table, where)


class BlobStore(Protocol):
    """Thread-safe. Every method raises NydusError. `name` is for messages."""

    name: str

    def size(self, blob_id: str) -> int | None:
        """Bytes of a blob, None if it is not there."""

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        """Exactly these bytes."""

    def open(self, blob_id: str) -> io.RawIOBase:
        """All of a blob from its start. Nothing is verified."""

    def put_file(self, blob_id: str, path: Path, *, force: bool = False, progress: Progress | None = None) -> bool:
        """Stores a file as a blob; False if one of its size is there already, which `force` replaces."""

    def url(self, blob_id: str) -> str:
        """Where a blob is, for people."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Closing:
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ObjectStore(_Closing):
    """A bucket."""

    def __init__(self, client: ObjectClient) -> None:
        self._client = client
        self.name = self.url("")

    def size(self, blob_id: str) -> int | None:
        return self._client.size(blob_id)

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        return self._client.read(blob_id, offset, size)

    def open(self, blob_id: str) -> io.RawIOBase:
        size = self.size(blob_id)
        if size is None:
            raise ConvertError(f"blob {blob_id} does not exist in {self.name}")
        return PieceStream(self._ranges(blob_id, size))

    def _ranges(self, blob_id: str, size: int) -> Iterator[bytes]:
        for offset in range(0, size, _RANGE):
            yield self._client.read(blob_id, offset, min(_RANGE, size - offset))

    def put_file(self, blob_id: str, path: Path, *, force: bool = False, progress: Progress | None = None) -> bool:
        if not force and self.size(blob_id) == path.stat().st_size:
            return False
        self._client.put_file(blob_id, path, progress)
        return True

    def url(self, blob_id: str) -> str:
        bucket = self._client.bucket
        return f"{bucket.backend.type}://{bucket.backend.bucket_name}/{bucket.key(blob_id)}"

    def close(self) -> None:
        self._client.close()


class FolderStore(_Closing):
    """A directory with one file per blob."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = str(folder)

    def _path(self, blob_id: str) -> Path:
        if not blob_id or "/" in blob_id or blob_id in (".", ".."):
            raise ConvertError(f"blob id {blob_id!r} cannot be a file name")
        return self._folder / blob_id

    def size(self, blob_id: str) -> int | None:
        try:
            return self._path(blob_id).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConvertError(os_reason(error)) from error

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        with self.open(blob_id) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise ConvertError(f"{self._path(blob_id)} ends before byte {offset + size}")
        return data

    def open(self, blob_id: str) -> io.RawIOBase:
        try:
            return cast(io.RawIOBase, self._path(blob_id).open("rb", buffering=0))
        except FileNotFoundError:
            raise ConvertError(f"blob {blob_id} does not exist in {self.name}") from None
        except OSError as error:
            raise ConvertError(os_reason(error)) from error

    def put_file(self, blob_id: str, path: Path, *, force: bool = False, progress: Progress | None = None) -> bool:
        target = self._path(blob_id)
        if not force and self.size(blob_id) == path.stat().st_size:
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, part = tempfile.mkstemp(prefix=f".{blob_id[:16]}.", suffix=".part", dir=self._folder)
            try:
                with os.fdopen(descriptor, "wb") as out, path.open("rb") as source:
                    os.fchmod(out.fileno(), 0o644)
                    while piece := source.read(_PIECE):
                        out.write(piece)
                        if progress is not None:
                            progress(len(piece))
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(part, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
                raise
        except OSError as error:
            raise ConvertError(os_reason(error)) from error
        return True

    def url(self, blob_id: str) -> str:
        return str(self._folder / blob_id) if blob_id else self.name
