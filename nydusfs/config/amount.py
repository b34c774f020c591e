"""Amounts of disk as operators write them."""

from __future__ import annotations

import os
from pathlib import Path


def parse_amount(text: str | int, path: str) -> int:
    """Bytes of "10GiB", "500M", 1048576 or "80%" (of the file system of `path`). Raises ValueError."""
    if isinstance(text, int):
        number, unit = float(text), ""
    else:
        stripped = text.strip()
        digits = stripped.rstrip("%kKmMgGtTiIbB ")
        unit = stripped[len(digits) :].strip().lower()
        number = float(digits)
    if not 0 <= number < 1 << 62:
        raise ValueError(f"{text!r} is out of range")
    if unit == "%":
        if number > 100:
            raise ValueError(f"{text!r} is more than the whole disk")
        where = Path(path)
        while not where.exists() and where != where.parent:
            where = where.parent
        info = os.statvfs(where)
        return int(info.f_blocks * info.f_frsize * number / 100)
    scales = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    scale = scales.get(unit if unit in scales else unit.removesuffix("ib").removesuffix("b"))
    if scale is None:
        raise ValueError(f"{unit!r} is not a unit")
    return int(number * scale)
