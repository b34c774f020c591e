"""Blobs as files: one file for all, or a directory of them named by their ids."""

from __future__ import annotations

import os
import time
from pathlib import Path

import trio

from bootstrap.cacheform import DATA_SUFFIX, CacheForm
from bootstrap.errors import FormatError
from nydusfs.config import LocalFsBackend
from nydusfs.counters import BackendCounters
from nydusfs.errors import SourceError
from nydusfs.sources.base import Buffer, Check, FileSource, Priority, WrongBytes


class TooShort(Exception):
    """The file ends before the range does."""


class LocalFsSource(FileSource):
    """`dir` is looked at before `alt_dirs` (upstream joins the id twice there and so prefers the alternatives)."""

    def __init__(self, backend: LocalFsBackend) -> None:
        self.counters = BackendCounters("localfs")
        self.name = f"localfs {backend.blob_file or backend.dir}"
        self._blob_file = backend.blob_file
        self._dirs = [folder for folder in (backend.dir, *backend.alt_dirs) if folder]
        self._paths: dict[str, list[str]] = {}
        self._cache_forms: dict[Path, CacheForm] = {}

    def _candidates(self, blob_id: str) -> list[Path]:
        if self._blob_file:
            return [Path(self._blob_file)]
        if not blob_id or "/" in blob_id or blob_id in (".", ".."):
            return []
        return [Path(folder) / blob_id for folder in self._dirs]

    def open_blob(self, blob_id: str, end: int) -> tuple[int, int] | None:
        paths = self._paths.get(blob_id)
        if paths is None:
            paths = self._paths[blob_id] = [str(path) for path in self._candidates(blob_id)]
        for path in paths:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
            except OSError:
                continue
        return None

    async def read(
        self,
        blob_id: str,
        offset: int,
        size: int,
        priority: Priority,
        check: Check | None = None,
        urgent: trio.Event | None = None,
    ) -> Buffer:
        started = time.monotonic()
        tried: list[tuple[str, str]] = []
        damaged = False
        for path in self._candidates(blob_id):
            try:
                data = await trio.to_thread.run_sync(self._pread, path, offset, size)
                if check is not None:
                    await check(data)
            except TooShort as error:
                damaged = True
                tried.append((str(path), str(error)))
            except FormatError as error:
                tried.append((str(path), str(error)))
            except OSError as error:
                tried.append((str(path), (error.strerror or str(error)).lower()))
            except WrongBytes as error:
                damaged = True
                tried.append((str(path), str(error)))
            else:
                self.counters.record(size, started, False)
                return data
        self.counters.record(size, started, True)
        what = f"cannot read {size} bytes at {offset} of blob {blob_id} from {self.name}"
        raise SourceError(what, tried, damaged=damaged)

    async def aclose(self) -> None:
        for form in self._cache_forms.values():
            form.close()
        self._cache_forms.clear()

    def _pread(self, path: Path, offset: int, size: int) -> bytes:
        try:
            return pread(path, offset, size)
        except FileNotFoundError:
            # What `nydus-image create --blob-cache-dir` leaves instead of a blob.
            if not os.path.exists(f"{path}{DATA_SUFFIX}"):
                raise
        form = self._cache_forms.get(path)
        if form is None:
            form = self._cache_forms.setdefault(path, CacheForm(str(path)))
        data = form.pread(size, offset)
        if len(data) != size:
            raise TooShort(f"{path}{DATA_SUFFIX} ends after {len(data)} of {size} bytes at {offset}")
        return data


def pread(path: Path, offset: int, size: int) -> bytes:
    """Raises OSError, and TooShort when the file ends early."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, size, offset)
        while len(data) < size:
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                raise TooShort(f"file ends after {len(data)} of {size} bytes at {offset}")
            data += more
        return data
    finally:
        os.close(fd)
