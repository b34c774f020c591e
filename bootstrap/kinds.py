"""The conversion types of `nydus-image create`: where each takes its files from and which mode stores them (5.12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bootstrap.layout.common import Compressor, Digester
from bootstrap.modes import Context, Mode
from bootstrap.modes.packed import PackedMode


@dataclass(frozen=True, slots=True)
class Kind:
    """`source`: "directory" or "tar". `compressor`, `digester`: forced ones, None where the options decide."""

    name: str
    source: str
    mode: Callable[[Context], Mode] = PackedMode
    compressor: Compressor | None = None
    digester: Digester | None = None
    only_v6: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("dir-rafs", "directory"),
        Kind("tar-rafs", "tar"),
        Kind("targz-rafs", "tar"),
        Kind("estargz-rafs", "tar"),
    )
}
ALIASES = {"directory": "dir-rafs", "stargz_index": "estargztoc-ref"}
