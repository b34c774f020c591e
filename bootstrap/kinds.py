"""The conversion types of `nydus-image create`: where each takes its files from and which mode stores them (5.12)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import BinaryIO

from bootstrap.errors import BuildError
from bootstrap.layout.common import Compressor, Digester
from bootstrap.modes import Mode
from bootstrap.modes.cachefiles import CacheFilesMode
from bootstrap.modes.estargztoc import TocMode
from bootstrap.modes.packed import PackedMode
from bootstrap.modes.reference import RefMode
from bootstrap.modes.tarfs import TarfsMode
from bootstrap.options import BuildOptions


@dataclass(frozen=True, slots=True)
class Kind:
    """`source`: "directory", "tar" or "toc". `compressor`, `digester`: forced ones, None where the options decide.

    `forbids`: options that make no sense for it, by their names on the command line.
    """

    name: str
    source: str
    mode: type[Mode] = PackedMode
    compressor: Compressor | None = None
    digester: Digester | None = None
    only_v6: bool = False
    forbids: tuple[str, ...] = ()

    def open(self, stream: BinaryIO) -> BinaryIO:
        """The uncompressed tar inside a layer file, as `build_layer` needs it for this kind. Close it when done; that
        leaves `stream` open."""
        return self.mode.open(stream)

    def with_cache_files(self) -> Kind:
        """This kind, but leaving cache files in `options.cache_dir` instead of a blob. BuildError if it cannot."""
        if self.mode is not PackedMode:
            raise BuildError(f"conversion type `{self.name}` conflicts with `--blob-cache-dir`")
        return replace(self, mode=CacheFilesMode)

    def settle(self, options: BuildOptions) -> BuildOptions:
        """`options` with what the kind forces; BuildError, naming the option, for what it cannot do."""
        if self.only_v6 and options.fs_version != 6:
            version = f"--fs-version {options.fs_version}"
            raise BuildError(f"'{version}' conflicts with conversion type '{self.name}', only V6 is supported")
        given = {
            "--blob-id": options.blob_id is not None,
            "--encrypt": options.secret is not None,
            "--batch-size": options.batch_size,
            "--prefetch-policy blob": options.prefetch_policy == "blob",
            "--blob-inline-meta": options.inline_meta,
            "--features blob-toc": options.blob_toc,
            "--chunk-dict": options.chunk_dict is not None,
        }
        for name in self.forbids:
            if given[name] and name == "--batch-size":  # upstream's words
                raise BuildError(f"unsupported ConversionType for batch chunk: {self.name} (--batch-size)")
            if given[name]:
                raise BuildError(f"conversion type '{self.name}' conflicts with '{name}'")
        return replace(
            options,
            compressor=options.compressor if self.compressor is None else self.compressor,
            digester=options.digester if self.digester is None else self.digester,
        )


# Where the data is somebody else's file there is nothing to batch or to move forward.
_FIXED = ("--encrypt", "--batch-size", "--prefetch-policy blob")
_NAMED = ("--blob-id", *_FIXED)
_BARE = ("--blob-inline-meta", "--features blob-toc", "--chunk-dict", *_FIXED)

KINDS = {
    kind.name: kind
    for kind in (
        Kind("dir-rafs", "directory"),
        Kind("tar-rafs", "tar"),
        Kind("targz-rafs", "tar"),
        Kind("estargz-rafs", "tar"),
        Kind("targz-ref", "tar", RefMode, Compressor.GZIP, Digester.SHA256, only_v6=True, forbids=_NAMED),
        Kind("estargz-ref", "tar", RefMode, Compressor.GZIP, Digester.SHA256, only_v6=True, forbids=_NAMED),
        Kind("estargztoc-ref", "toc", TocMode, Compressor.GZIP, Digester.SHA256, only_v6=True, forbids=_FIXED),
        Kind("tar-tarfs", "tar", TarfsMode, Compressor.NONE, Digester.SHA256, only_v6=True, forbids=_BARE),
    )
}
ALIASES = {"directory": "dir-rafs", "stargz_index": "estargztoc-ref"}
