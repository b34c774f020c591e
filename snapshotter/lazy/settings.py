"""What is found to run lazily, as configured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LazySettings:
    """Section `experimental` of the TOML file. `signed`: only bootstraps with a signature are mounted."""

    index: bool = False
    referrers: bool = False
    estargz: bool = False
    signed: bool = False
