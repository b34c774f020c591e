"""Packed structures come back, and hostile ones are refused with their name, place and value."""

from __future__ import annotations

import pytest

from bootstrap.errors import FormatError
from bootstrap.layout import batch, blobmeta, estargz, zran


def test_contexts_have_the_bytes_of_the_reference() -> None:
    # reference 10.1 F and the fixtures' golden vectors
    context = zran.ZranContext(187761, 987149, 0, 543625, 1441256, 32768, 0x67, 5)
    assert zran.unpack_context(zran.pack_context(context)) == context
    stored = bytes.fromhex("63290a000000000076e31700000000000000000000000000894b0800e8fd15000080000000000000")
    assert zran.unpack_context(stored) == zran.ZranContext(665955, 1565558, 0, 543625, 1441256, 32768, 0, 0)
    assert zran.pack_context(zran.unpack_context(stored)) == stored
    stored = bytes.fromhex("5900000013010000" + "00" * 32)
    assert batch.unpack_context(stored) == (89, 275)
    assert batch.pack_context(batch.BatchContext(89, 275)) == stored


def test_entries_of_the_reference() -> None:
    stored = bytes.fromhex("00000000002022040000000000b02d01")
    assert blobmeta.unpack_v1(stored) == (0, 0x12DC, 0, 0x4223)
    assert blobmeta.pack_v1(0, 0x12DC, 0, 0x4223) == stored
    stored = bytes.fromhex("010000001e010003a9030000007a00000010000000000000")
    entry = blobmeta.unpack_v2(stored)
    assert entry == (0x3A9, 122, 0x1000, 287, blobmeta.V2_COMPRESSED | blobmeta.V2_ZRAN, 0x1000)
    assert blobmeta.unpack_position(entry.data) == (0, 0x1000)
    assert blobmeta.pack_v2(entry) == stored


def test_estargz_footers() -> None:
    footer = estargz.pack_footer(0x1234)
    assert len(footer) == 51 and footer[16:38] == b"0000000000001234STARGZ"
    assert estargz.unpack_footer(b"...." + footer, 0x2000) == 0x1234
    legacy = footer[:10] + b"\x16\0" + footer[16:]
    assert len(legacy) == 47 and estargz.unpack_footer(b"xxxx" + legacy, 0x2000) == 0x1234
    for bad, size, message in (
        (b"\0" * 51, 100, "not that of"),
        (footer, 0x1234 + 51, "behind the end"),
        (footer.replace(b"001234", b"00123G"), 0x2000, "payload"),
        (footer.replace(b"001234", b"+01234"), 0x2000, "payload"),
    ):
        with pytest.raises(FormatError, match=message):
            estargz.unpack_footer(bad, size)


def test_header_magics() -> None:
    header = blobmeta.Header(blobmeta.MAGIC, 5, 3, 7, 0, 100, 168)
    data = blobmeta.HEADER.pack(*header)
    assert blobmeta.unpack_header(data, 0) == header
    for at in (0, 4095):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(FormatError, match="blob meta header at offset 0x50"):
            blobmeta.unpack_header(damaged, 0x50)
