"""dm-verity hash trees: SHA-256, 4096-byte hash blocks, no superblock, no salt. Reference: RAFS format 5.16.

The tree lies behind the data, topmost level first; each level is padded with zeros to whole blocks, as the kernel's
`veritysetup` wants it (upstream fills the rest with the digest of nothing, which veritysetup refuses).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

from bootstrap.layout.common import DIGEST_SIZE, round_up

HASH_BLOCK = 4096
_READ = 1 << 22


@dataclass(frozen=True)
class VerityParameters:
    """What opening the device needs. `hash_offset` in bytes, `data_blocks` in units of `data_block_size`."""

    data_block_size: int
    data_blocks: int
    hash_offset: int
    root_hash: str

    def as_options(self) -> str:
        """As options of veritysetup, the root hash last; the form upstream prints."""
        return (
            f'--no-superblock --format=1 -s "" --hash=sha256 --data-block-size={self.data_block_size} '
            f"--hash-block-size={HASH_BLOCK} --data-blocks {self.data_blocks} --hash-offset {self.hash_offset} "
            f"{self.root_hash}"
        )


def append_tree(file: BinaryIO, size: int, block_size: int) -> VerityParameters:
    """Hash the first `size` bytes of a file open for reading and writing, whole blocks, and write the tree behind them.

    `block_size` is 512 or 4096. Memory: 32 bytes per data block.
    """
    blocks, rest = divmod(size, block_size)
    if rest or not blocks:
        raise ValueError(f"{size} bytes are not whole blocks of {block_size}")
    levels = [_leaves(file, size, block_size)]
    while len(levels[-1]) > HASH_BLOCK:
        below = levels[-1]
        level = b"".join(
            [hashlib.sha256(below[at : at + HASH_BLOCK]).digest() for at in range(0, len(below), HASH_BLOCK)]
        )
        levels.append(_pad(level))
    offset = round_up(size, HASH_BLOCK)
    file.seek(offset)
    for level in reversed(levels):
        file.write(level)
    return VerityParameters(block_size, blocks, offset, hashlib.sha256(levels[-1]).hexdigest())


def _leaves(file: BinaryIO, size: int, block_size: int) -> bytes:
    zeros = bytes(block_size)
    of_zeros = hashlib.sha256(zeros).digest()
    found = bytearray()
    file.seek(0)
    left = size
    while left:
        piece = file.read(min(left, _READ))
        if not piece:
            raise OSError("the image became shorter while it was read")
        if len(piece) % block_size:
            raise OSError("a read of the image ended inside a block")
        left -= len(piece)
        for at in range(0, len(piece), block_size):
            block = piece[at : at + block_size]
            found += of_zeros if block == zeros else hashlib.sha256(block).digest()
    return _pad(bytes(found))


def _pad(level: bytes) -> bytes:
    return level.ljust(round_up(len(level), HASH_BLOCK), b"\0")


assert HASH_BLOCK % DIGEST_SIZE == 0
