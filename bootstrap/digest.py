"""The two chunk digests. Both release the GIL on large inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from blake3 import blake3

from bootstrap.layout.common import Digester

EMPTY = {Digester.BLAKE3: blake3(b"").digest(), Digester.SHA256: hashlib.sha256(b"").digest()}
"""Digest of nothing: what an empty file and a special file have in v5."""


def hasher(kind: Digester) -> Any:
    """An incremental hasher with `update(data)` and `digest() -> bytes` (32 bytes)."""
    return hashlib.sha256() if kind == Digester.SHA256 else blake3()


def function(kind: Digester) -> Callable[[bytes | bytearray | memoryview], bytes]:
    """`digest` of this kind, for who calls it many times."""
    return _sha256 if kind == Digester.SHA256 else _blake3


def _sha256(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _blake3(data: bytes | bytearray | memoryview) -> bytes:
    return blake3(data).digest()


def digest(kind: Digester, data: bytes | bytearray | memoryview) -> bytes:
    """The 32-byte digest of `data`."""
    if kind == Digester.SHA256:
        return hashlib.sha256(data).digest()
    return blake3(data).digest()
