"""Where a command finds the data of its image: --blob, --blob-dir, or a storage backend.

bootstrap reads files itself. Any other backend is nydusfs' business, which this package must not import: it is looked
up by name when a user names one, and answers with a `BlobReader` like any other.
"""

from __future__ import annotations

import importlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bootstrap.cli.building import CommandError

if TYPE_CHECKING:
    from bootstrap.blobsource import BlobReader
    from bootstrap.reader import Bootstrap

F = TypeVar("F", bound=Callable[..., Any])

_BACKENDS = "nydusfs.sources.blocking"
"""Has `open_backend(kind, json_text, where)` and `open_config(text, where)`, both -> BlobReader."""
_WINDOW = 2 << 20
_WINDOWS = 8


def backend_options(command: F) -> F:
    """--backend-type and what configures it."""
    for option in (
        click.option("--backend-config-file", metavar="FILE", help="The same from a file."),
        click.option("--backend-config", metavar="JSON", help="Configuration of the backend, as in nydusd's."),
        click.option(
            "--backend-type", metavar="TYPE",
            help="Read blobs from a storage backend: registry, oss, s3, localdisk, http-proxy, localfs.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


class OneFile:
    """Any blob from one file; the one the bootstrap itself lies in from there."""

    def __init__(self, path: str, image: Bootstrap) -> None:
        from bootstrap.blobsource import Folder

        self._folder = Folder(os.path.dirname(path) or ".", image.path)
        self._name = os.path.basename(path)
        self._own = os.path.basename(image.path).split(".", 1)[0]
        self._own_exists = any(self._own in (blob.id, blob.meta_digest.hex()) for blob in image.blobs)

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        own = self._own_exists and blob_id == self._own and os.path.exists(self._folder.path(blob_id))
        return self._folder.read(blob_id if own else self._name, offset, size)

    def close(self) -> None:
        self._folder.close()


class Windows:
    """Reads a far-away blob in pieces of 2 MiB and keeps the last of them: chunks are small and asked for in order."""

    def __init__(self, source: BlobReader, ends: dict[str, int]) -> None:
        self._source = source
        self._ends = ends
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        start = offset - offset % _WINDOW
        end = min(start + _WINDOW, self._ends.get(blob_id, 0))
        if offset + size > end:
            return self._source.read(blob_id, offset, size)
        data = self._kept.get((blob_id, start))
        if data is None:
            data = self._kept[blob_id, start] = self._source.read(blob_id, start, end - start)
            if len(self._kept) > _WINDOWS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end((blob_id, start))
        return data[offset - start : offset - start + size]

    def close(self) -> None:
        self._source.close()


class FolderFirst:
    """Blobs in a directory, those that are not there from a backend."""

    def __init__(self, folder: str, backend: BlobReader) -> None:
        from bootstrap.blobsource import Folder

        self._folder = Folder(folder)
        self._backend = backend

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        local = os.path.exists(self._folder.path(blob_id))
        return (self._folder if local else self._backend).read(blob_id, offset, size)

    def close(self) -> None:
        self._folder.close()
        self._backend.close()


def open_data(image: Bootstrap, given: dict[str, Any], needed: str) -> BlobReader:
    """The place of an image's blobs by its options; CommandError when none is given.

    Looks at `blob`, `blob_dir`, `backend_type` with `backend_config` or `backend_config_file`, and `config`, as far as
    the command has them. `needed` ends the message: the options one can give.
    """
    from bootstrap.blobsource import Folder

    blob, folder, kind = given.get("blob"), given.get("blob_dir"), given.get("backend_type")
    if blob:
        if len(image.blobs) > 1:
            raise CommandError(f"--blob is one data blob, the image has {len(image.blobs)}: use --blob-dir")
        return OneFile(blob, image)
    if kind:
        text, where = _backend_config(given)
        reader = importlib.import_module(_BACKENDS).open_backend(kind, text, where)
        return Windows(reader, {blob.id: blob.data_size for blob in image.blobs})
    if folder:
        if not os.path.isdir(folder):
            raise CommandError(f"--blob-dir {folder} is not a directory")
        return Folder(folder, image.path)
    if given.get("config"):
        path = given["config"]
        reader = importlib.import_module(_BACKENDS).open_config(_text(path), path)
        return Windows(reader, {blob.id: blob.data_size for blob in image.blobs})
    if not image.blobs:
        return Folder(os.path.dirname(image.path) or ".", image.path)
    raise CommandError(f"invalid backend configuration, {needed} must be specified")


def _backend_config(given: dict[str, Any]) -> tuple[str, str]:
    """The JSON of the backend and what to call it in messages."""
    if given.get("backend_config_file"):
        return _text(given["backend_config_file"]), given["backend_config_file"]
    if given.get("backend_config"):
        return given["backend_config"], "--backend-config"
    raise CommandError("--backend-config or --backend-config-file must be specified")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise CommandError(f"fail to read backend config file {path}: {reason}") from error
