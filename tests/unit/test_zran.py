"""Random access into gzip: every block border is a place to start from, members may end inside a slice."""

from __future__ import annotations

import ctypes
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap import zlibstream
from bootstrap.errors import CodecError, FormatError, RafsError
from bootstrap.layout.zran import CONTEXT, ZranContext
from bootstrap.zlibstream import BLOCK, GZIP, Inflate
from bootstrap.zran import Contexts, decode_slice


def _text(size: int, seed: int = 1) -> bytes:
    words = [random.Random(seed + i).randbytes(3 + i % 9) for i in range(400)]
    choose = random.Random(seed)
    return b" ".join(choose.choice(words) for _ in range(size // 5))[:size]


def _gzip(data: bytes, level: int = 6) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def _borders(file: bytes, plain: bytes) -> list[tuple[ZranContext, bytes]]:
    """A context for each inner block border of the first member, reaching to the end of the data."""
    inflate = Inflate(GZIP)
    inflate.feed(file)
    room = ctypes.create_string_buffer(len(plain) + 1)
    out = 0
    found = []
    while not inflate.ended:
        out += inflate.inflate_into(ctypes.addressof(room) + out, len(room) - out, BLOCK)
        if inflate.data_type & 0x80 and not inflate.data_type & 0x40 and not inflate.ended:
            at = len(file) - inflate.left
            bits = inflate.data_type & 7
            window = inflate.dictionary()
            assert window == plain[max(out - 32768, 0) : out]
            byte = file[at - 1] if bits else 0
            found.append((ZranContext(at, out, 0, len(file) - at, len(plain) - out, len(window), byte, bits), window))
    return found


@pytest.mark.parametrize("engine", list(zlibstream.engines()), ids=lambda engine: Path(engine.name).name)
def test_every_block_border_is_an_entrance(engine: zlibstream.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlibstream, "_engine", lambda: engine)
    plain = _text(700_000)
    file = _gzip(plain)
    borders = _borders(file, plain)
    assert len(borders) > 5 and {context.ctx_bits for context, _ in borders} > {0, 1}
    for context, window in borders:
        stored = memoryview(file)[context.in_offset :]
        assert decode_slice(context, window, stored) == plain[context.out_offset :]
        assert decode_slice(context, memoryview(window), stored, 10) == plain[context.out_offset :][:10]


def test_members_may_end_inside_a_slice() -> None:
    first, rest = _text(300_000), [_text(200, 2), b"", _text(90_000, 3), b"x"]
    file = _gzip(first) + b"".join(map(_gzip, rest))
    plain = first + b"".join(rest)
    context, window = _borders(_gzip(first), first)[1]
    context = context._replace(in_len=len(file) - context.in_offset, out_len=len(plain) - context.out_offset)
    assert decode_slice(context, window, file[context.in_offset :]) == plain[context.out_offset :]
    cut = context._replace(in_len=context.in_len - 9)  # in the trailer of the last member: all data is there
    assert decode_slice(cut, window, file[cut.in_offset : cut.in_offset + cut.in_len]) == plain[cut.out_offset :]
    with pytest.raises(CodecError, match="members"):
        decode_slice(context._replace(out_len=context.out_len + 1), window, file[context.in_offset :])


def test_damage_is_told() -> None:
    plain = _text(300_000)
    file = _gzip(plain)
    context, window = _borders(file, plain)[1]
    stored = file[context.in_offset :]
    with pytest.raises(CodecError, match="stored bytes"):
        decode_slice(context, window, stored[:-1])
    short = context._replace(in_len=500)
    with pytest.raises(CodecError, match=r"500 stored bytes give \d+ of"):
        decode_slice(short, window, stored[:500])
    with pytest.raises(CodecError, match="zlib"):
        decode_slice(context, window, b"\xff" * len(stored))
    empty = _gzip(b"") * 70_000
    many = ZranContext(10, 0, 0, len(empty) - 10, 1, 0, 0, 0)
    with pytest.raises(CodecError, match="members"):
        decode_slice(many, b"", empty[10:])


def test_contexts_are_checked_before_use() -> None:
    good = ZranContext(10, 0, 0, 100, 1000, 4, 0x55, 3)

    def region(context: ZranContext) -> bytes:
        return bytes(24) + CONTEXT.pack(*context) + b"wxyz"

    contexts = Contexts(region(good), 24, 44, 1, 110)
    assert contexts[0] == good and bytes(contexts.dictionary(good)) == b"wxyz" and len(contexts) == 1
    bad = [
        (good._replace(in_len=101), "in_len"),
        (good._replace(in_offset=1 << 63), "in_offset"),
        (good._replace(in_len=0), "in_len"),
        (good._replace(out_len=(16 << 20) + 1), "out_len"),
        (good._replace(out_len=0), "out_len"),
        (good._replace(dict_offset=1), "dict_offset"),
        (good._replace(dict_size=32769), "dict_size"),
        (good._replace(ctx_bits=8), "ctx_bits"),
    ]
    for context, word in bad:
        with pytest.raises(FormatError, match=word):
            Contexts(region(context), 24, 44, 1, 110)[0]
    for offset, size, count in ((24, 45, 1), (24, 44, 2), (-1, 44, 1), (24, 44, -1)):
        with pytest.raises(FormatError, match="zran context"):
            Contexts(region(good), offset, size, count, 110)
    with pytest.raises(FormatError, match="index 1"):
        contexts[1]


_PLAIN = _text(60_000)
_FILE = _gzip(_PLAIN[:40_000]) + _gzip(_PLAIN[40_000:])
_CONTEXT, _WINDOW = _borders(_gzip(_PLAIN[:40_000]), _PLAIN[:40_000])[0]
_CONTEXT = _CONTEXT._replace(in_len=len(_FILE) - _CONTEXT.in_offset, out_len=len(_PLAIN) - _CONTEXT.out_offset)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_but_a_domain_error(data: st.DataObject) -> None:
    stored = bytearray(_FILE[_CONTEXT.in_offset :])
    for at in data.draw(st.lists(st.integers(0, len(stored) - 1), max_size=8)):
        stored[at] = data.draw(st.integers(0, 255))
    context = _CONTEXT._replace(
        out_len=data.draw(st.sampled_from([1, 1000, _CONTEXT.out_len, 16 << 20])),
        ctx_bits=data.draw(st.integers(0, 9)),
        ctx_byte=data.draw(st.integers(0, 255)),
    )
    try:
        out = decode_slice(context, data.draw(st.sampled_from([_WINDOW, _WINDOW[::-1]])), stored)
    except RafsError:
        return
    assert len(out) == context.out_len
