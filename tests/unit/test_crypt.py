"""AES-XTS: the reference's vectors, the padding rule, keys that XTS refuses."""

from __future__ import annotations

import hashlib
import json

import pytest

from bootstrap import crypt
from bootstrap.codec import decompress
from bootstrap.errors import CodecError
from bootstrap.layout import blobmeta
from bootstrap.layout.common import Cipher, Compressor
from tests.lab.paths import shared_dir

KEY = bytes([0x0C]) * 31 + b"\x0a"
SECRET = crypt.Secret(Cipher.AES_128_XTS, KEY, bytes(16))


def test_the_check_value_of_the_reference() -> None:
    assert crypt.encrypt(SECRET, b"1").hex() == "1df853e84717cce491f7bcb79c9edfb42ed2"


@pytest.mark.skipif(shared_dir() is None, reason="interop: vectors lie in the shared material")
def test_vectors_of_a_real_image() -> None:
    shared = shared_dir()
    assert shared is not None
    folder = shared / "fixtures" / "reference"
    golden = json.loads((folder / "golden.json").read_text())["encryption"]
    secret = crypt.Secret(Cipher.AES_128_XTS, bytes.fromhex(golden["key_hex"]), bytes.fromhex(golden["iv_hex"]))
    for vector in golden["computed"]:
        plain, stored = bytes.fromhex(vector["plain_hex"]), bytes.fromhex(vector["cipher_hex"])
        assert crypt.encrypt(secret, plain) == stored
        assert crypt.decrypt(secret, stored) == plain
    assert len(golden["computed"]) > 5
    for chunk in golden["chunks_from_image"]:
        stored = bytes.fromhex(chunk["stored_hex"])
        plain = crypt.decrypt(secret, stored)
        assert plain.hex() == chunk["decrypted_hex"]
        assert crypt.encrypt(secret, plain) == stored
    blob = next(path for path in (folder / golden["case"]).iterdir() if len(path.name) == 64).read_bytes()
    region = golden["ci_region"]
    end = region["offset"] + region["stored_size"]
    header = blobmeta.unpack_header(crypt.decrypt(secret, blob[end : end + 4096]), end)
    plain = crypt.decrypt(secret, blob[region["offset"] : end])
    table = decompress(Compressor(header.ci_compressor), plain, header.ci_uncompressed_size)
    assert hashlib.sha256(table).hexdigest() == region["decrypted_and_decompressed_sha256"]


@pytest.mark.parametrize("cipher", [Cipher.AES_128_XTS, Cipher.AES_256_XTS])
def test_every_small_size_comes_back(cipher: Cipher) -> None:
    secret = crypt.generate(cipher)
    for size in range(70):
        plain = bytes(range(size))
        stored = crypt.encrypt(secret, plain)
        assert len(stored) == crypt.stored_size(size) == (size if size >= 16 else 18)
        assert crypt.decrypt(secret, stored) == crypt.decrypt(secret, stored, size) == plain


def test_eighteen_bytes_that_look_padded_come_back_by_their_size() -> None:
    plain = b"fifteen bytes..\x01\x78\x90"
    stored = crypt.encrypt(SECRET, plain)
    assert crypt.decrypt(SECRET, stored, 18) == plain
    assert crypt.decrypt(SECRET, stored) == plain[:15]
    # Not padding: 3 is not repeated three times, 17 is more than a block.
    for almost in (b"thirteen byte\x02\x03\x03\x78\x90", bytes([17]) * 16 + b"\x78\x90"):
        assert crypt.decrypt(SECRET, crypt.encrypt(SECRET, almost)) == almost


def test_keys_have_different_halves() -> None:
    half = bytes(range(16))
    assert crypt.distinct_halves(half + half) == b"\xa5" * 16 + half
    assert crypt.distinct_halves(b"\xa5" * 32) == b"\x5a" * 16 + b"\xa5" * 16
    assert crypt.distinct_halves(KEY) == KEY
    one, two = crypt.generate(), crypt.generate()
    assert one.key != two.key and one.iv != two.iv and len(one.key) == 32 and len(one.iv) == 16
    assert crypt.from_table(1, *crypt.to_table(one)) == one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crypt.decrypt(SECRET, bytes(15)), "fewer than a block"),
        (lambda: crypt.decrypt(SECRET, bytes(20), 19), "20 bytes instead of 19"),
        (lambda: crypt.decrypt(crypt.Secret(Cipher.AES_128_XTS, bytes(32), bytes(16)), bytes(16)), "halves"),
        (lambda: crypt.encrypt(crypt.Secret(Cipher.AES_128_XTS, bytes(16), bytes(16)), b"x"), "key of 16"),
        (lambda: crypt.generate(Cipher.AES_256_GCM), "aes-256-gcm"),
        (lambda: crypt.from_table(2, bytes(32), 0, bytes(8)), "cipher 2"),
        (lambda: crypt.to_table(crypt.generate(Cipher.AES_256_XTS)), "does not fit"),
    ],
)
def test_what_cannot_be_is_a_codec_error(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(CodecError, match=message):
        call()
