"""What is found to run lazily, as configured."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotter.lazy.blockdisk import ExportMode


@dataclass(frozen=True, slots=True)
class LazySettings:
    """Section `experimental` of the TOML file. `signed`: only bootstraps with a signature are mounted."""

    index: bool = False
    referrers: bool = False
    estargz: bool = False
    tarfs: bool = False
    tarfs_hint: bool = False  # only images that ask for it
    tarfs_jobs: int = 0
    export: ExportMode | None = None  # tarfs images as block devices, too
    signed: bool = False
