"""AES-XTS of chunks, blob meta region and its header; reference: RAFS format 4.4.

One key and one IV per blob, the IV being the tweak of every data unit: equal plain bytes give equal stored bytes. That
is the format's choice, not one to copy elsewhere. Key and IV lie in the bootstrap, which is therefore the secret.

`cryptography` is imported at the first use: images without encryption do not pay its 40 ms.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from bootstrap.errors import CodecError
from bootstrap.layout.common import Cipher

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher as _Engine
    from cryptography.hazmat.primitives.ciphers.modes import XTS

KEY_SIZE = {Cipher.AES_128_XTS: 32, Cipher.AES_256_XTS: 64}
"""Bytes of both halves together. The blob table has room for 32, so images use AES-128-XTS only."""

IV_SIZE = 16
MIN_UNIT = 16
"""XTS takes no less than one AES block: shorter input is padded to it and marked."""

PAD_MARK = b"\x78\x90"
PADDED_SIZE = MIN_UNIT + len(PAD_MARK)


class Secret(NamedTuple):
    """What a blob is encrypted with."""

    cipher: Cipher
    key: bytes
    iv: bytes


def generate(cipher: Cipher = Cipher.AES_128_XTS) -> Secret:
    """A random key and IV. Raises CodecError for a cipher images cannot use."""
    size = _key_size(cipher)
    return Secret(cipher, distinct_halves(os.urandom(size)), os.urandom(IV_SIZE))


def distinct_halves(key: bytes) -> bytes:
    """`key`, its first half replaced where XTS would refuse it: with equal halves."""
    half = len(key) // 2
    first, second = key[:half], key[half:]
    if first != second:
        return key
    return (b"\x5a" if second[0] == 0xA5 else b"\xa5") * half + second


def encrypt(secret: Secret, data: bytes | bytearray | memoryview) -> bytes:
    """The stored form of `data`: as long as it, but 18 bytes when `data` has fewer than 16."""
    if len(data) < MIN_UNIT:
        missing = MIN_UNIT - len(data)
        data = bytes(data) + bytes([missing]) * missing + PAD_MARK
    worker = _engine(secret).encryptor()
    return worker.update(data) + worker.finalize()


def decrypt(secret: Secret, data: bytes | bytearray | memoryview, size: int | None = None) -> bytes:
    """The bytes that were encrypted; `size` is their number where the caller knows it.

    Without it 18 bytes that look padded are cut: 18 bytes that only end like padding cannot be told apart.
    Raises CodecError for stored bytes that cannot be of this form.
    """
    if len(data) < MIN_UNIT:
        raise CodecError(f"{len(data)} encrypted bytes are fewer than a block of {MIN_UNIT}")
    worker = _engine(secret).decryptor()
    plain = worker.update(data) + worker.finalize()
    if len(plain) == PADDED_SIZE != size:
        plain = _unpad(plain)
    if size is not None and len(plain) != size:
        raise CodecError(f"decrypts to {len(plain)} bytes instead of {size}")
    return plain


def _unpad(plain: bytes) -> bytes:
    missing = plain[MIN_UNIT - 1]
    size = MIN_UNIT - missing
    if plain[MIN_UNIT:] == PAD_MARK and 0 <= size < MIN_UNIT and plain[size:MIN_UNIT] == bytes([missing]) * missing:
        return plain[:size]
    return plain


def stored_size(size: int) -> int:
    """Bytes that `size` bytes take once encrypted."""
    return size if size >= MIN_UNIT else PADDED_SIZE


def to_table(secret: Secret) -> tuple[bytes, int, bytes]:
    """Blob table fields `blob_meta_digest`, `blob_meta_size`, `cipher_iv` of an encrypted blob (reference 1.4)."""
    if secret.cipher != Cipher.AES_128_XTS:
        raise CodecError(f"{secret.cipher.label}: its key does not fit a blob table")
    return secret.key, int.from_bytes(secret.iv[:8], "little"), secret.iv[8:]


def from_table(cipher: int, meta_digest: bytes, meta_size: int, cipher_iv: bytes) -> Secret:
    """The reverse. Raises CodecError for a cipher that images cannot use."""
    if cipher != Cipher.AES_128_XTS:
        raise CodecError(f"cipher {cipher} of an encrypted blob is not aes-128-xts (1)")
    return Secret(Cipher.AES_128_XTS, meta_digest, meta_size.to_bytes(8, "little") + cipher_iv)


def _key_size(cipher: Cipher) -> int:
    size = KEY_SIZE.get(cipher)
    if size is None:
        raise CodecError(f"no data can be encrypted with {cipher.label}: use aes-128-xts")
    return size


def _engine(secret: Secret) -> _Engine[XTS]:
    from cryptography.hazmat.primitives.ciphers import Cipher as Engine
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import XTS

    if len(secret.key) != _key_size(secret.cipher) or len(secret.iv) != IV_SIZE:
        raise CodecError(f"{secret.cipher.label}: key of {len(secret.key)} and IV of {len(secret.iv)} bytes")
    half = len(secret.key) // 2
    if secret.key[:half] == secret.key[half:]:
        raise CodecError(f"{secret.cipher.label}: the halves of the key are equal")
    return Engine(AES(secret.key), XTS(secret.iv))
