"""Tarfs mode: the data blob is a plain tar, mapped in 512-byte blocks; reference: RAFS format 1.13."""

from __future__ import annotations

from bootstrap.layout.common import BlobFeatures

BLOCK_BITS = 9
BLOCK_SIZE = 1 << BLOCK_BITS
FEATURES = BlobFeatures.CAP_TAR_TOC | BlobFeatures.TARFS
