"""Mutations that keep most of the structure: fields replaced by numbers that matter, blocks moved, text values swapped.

Deterministic: the same generator state gives the same bytes.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

_NUMBERS = (
    0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x1FF, 0x200, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0xFFFF, 0x10000,
    0xFFFFF, 0x100000, 0x1000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 40) - 1, 1 << 44, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1,
)  # fmt: skip
_WIDTHS = ((1, "B"), (2, "<H"), (4, "<I"), (8, "<Q"))
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 63, 1 << 64, 1.5, 1e308, "", "x", "/", "..", "../x", "\0", "\ud800",
    "a" * 300, "sha256:" + "0" * 64, "sha256:zz", "0x1000", "1MB", [], {}, [[]], {"": None}, [None] * 20,
)  # fmt: skip


def mutate(rng: random.Random, data: bytes, others: Sequence[bytes], weak_spots: Sequence[int] = ()) -> bytes:
    """One to a few changes. `weak_spots`: offsets that structures are read from, hit more often than the rest."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        _change(rng, out, others, weak_spots)
    return bytes(out)


def _place(rng: random.Random, size: int, weak_spots: Sequence[int]) -> int:
    if weak_spots and rng.random() < 0.7:
        return min(rng.choice(weak_spots) + rng.choice((0, 0, 0, 1, 2, 4, 8, rng.randrange(64))), max(size - 1, 0))
    return rng.randrange(size) if size else 0


def _change(rng: random.Random, out: bytearray, others: Sequence[bytes], weak_spots: Sequence[int]) -> None:
    if not out:
        out += rng.randbytes(rng.randrange(64))
        return
    at = _place(rng, len(out), weak_spots)
    kind = rng.randrange(10)
    if kind < 4:  # a field becomes another number
        width, code = rng.choice(_WIDTHS)
        at -= at % width if rng.random() < 0.8 else 0
        if at + width <= len(out):
            old = int.from_bytes(out[at : at + width], "little")
            number = rng.choice((*_NUMBERS, old + 1, old - 1, old * 2, old ^ (1 << rng.randrange(width * 8)), len(out)))
            struct.pack_into(code, out, at, number & ((1 << (8 * width)) - 1))
    elif kind == 4:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 5:  # cut
        del out[at:]
    elif kind == 6:  # take a piece away
        del out[at : at + rng.choice((1, 4, 8, 32, 128, 512, 4096))]
    elif kind == 7:  # double a piece
        size = rng.choice((1, 4, 8, 12, 32, 80, 128, 512))
        out[at:at] = out[at : at + size]
    elif kind == 8:  # copy over
        size = rng.choice((2, 4, 8, 12, 24, 32, 64, 80, 128))
        source = _place(rng, len(out), weak_spots)
        piece = out[source : source + size]
        out[at : at + len(piece)] = piece
    else:  # a piece of another input
        other = rng.choice(others) if others else bytes(64)
        if other:
            source = rng.randrange(len(other))
            piece = other[source : source + rng.choice((8, 32, 128, 512, 4096))]
            out[at : at + len(piece)] = piece


def mutate_json(rng: random.Random, text: bytes) -> bytes:
    """A document with some of its values, keys or members changed; now and then plain bytes are."""
    if rng.random() < 0.15:
        return mutate(rng, text, [])
    try:
        value = json.loads(text)
    except ValueError:
        return mutate(rng, text, [])
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _edit(rng, value)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _edit(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {**value, rng.choice(("", "x", key + "x", "\ud800")): rng.choice(_VALUES)}
        return {**value, key: _edit(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return [*value, value[at]]
        return [*value[:at], _edit(rng, value[at]), *value[at + 1 :]]
    return rng.choice(_VALUES)
