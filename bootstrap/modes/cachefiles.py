"""Instead of a blob, the files a daemon's cache would hold of it (`--blob-cache-dir`): RAFS format 4.11 and 5.12.

Id and sizes in the bootstrap are those of the blob that would have been written, so it is made all the same, but only
hashed.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from bootstrap.errors import BuildError
from bootstrap.layout.blobmeta import HEADER_SIZE
from bootstrap.layout.common import round_up
from bootstrap.modes import Context
from bootstrap.modes.packed import PackedMode


class Discard:
    """The output of a build whose blob nobody wants."""

    @staticmethod
    def write(data: bytes | bytearray) -> int:
        return len(data)


class CacheFilesMode(PackedMode):
    """Leaves `<id>.blob.data` and `<id>.blob.meta` in `options.cache_dir`; nothing without data or after a failure."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        folder = self.options.cache_dir
        if folder is None:
            raise BuildError("no directory for the cache files is given")
        self._folder: Path = folder
        handle, name = tempfile.mkstemp(prefix=".blob.", suffix=".tmp", dir=folder)
        self._path = Path(name)
        self._data: BinaryIO = os.fdopen(handle, "wb", buffering=1 << 20)
        self._end = 0

    def close(self) -> None:
        super().close()
        self._data.close()
        with suppress(FileNotFoundError):
            self._path.unlink()

    def take_new(self, name: bytes, data: bytes) -> tuple[int, int]:
        number, plain_at = super().take_new(name, data)
        self._data.write(bytes(plain_at - self._end))
        self._data.write(data)
        self._end = plain_at + len(data)
        return number, plain_at

    def finish_separate(self) -> None:
        super().finish_separate()
        info = self.info
        self._data.write(bytes(info.uncompressed_size - self._end))
        self._data.close()
        region = bytes(self.entries + self.contexts)
        meta = self._folder / f"{info.id}.blob.meta"
        partial = self._path.with_suffix(".meta.tmp")
        try:
            partial.write_bytes(region.ljust(round_up(len(region), HEADER_SIZE), b"\0") + self.file.meta_header)
            os.chmod(partial, 0o600)
            os.replace(self._path, self._folder / f"{info.id}.blob.data")
            os.replace(partial, meta)
        finally:
            partial.unlink(missing_ok=True)
