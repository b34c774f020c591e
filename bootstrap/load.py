"""A whole bootstrap as tables, for commands that change images. Readers of images use `reader`.

Decoding goes level by level: all directories of one depth at once, so that a layer of 5,000 files costs some tens of
array operations for each level and a few microseconds per name (20 ms in all).
"""

from __future__ import annotations

from bootstrap.chunktable import BlobInfo
from bootstrap.flat import FlatTree
from bootstrap.load_v5 import LoaderV5
from bootstrap.load_v6 import LoaderV6
from bootstrap.reader import Blob, Bootstrap, BootstrapV5, BootstrapV6


def blob_info(blob: Blob) -> BlobInfo:
    """The builder's view of a blob table entry."""
    return BlobInfo(
        id=blob.id,
        chunk_size=blob.chunk_size,
        compressor=blob.compressor,
        digester=blob.digester,
        features=blob.features,
        chunk_count=blob.chunk_count,
        compressed_size=blob.compressed_size,
        uncompressed_size=blob.uncompressed_size,
        toc_size=blob.toc_size,
        toc_digest=blob.toc_digest,
        ci_compressor=blob.ci_compressor,
        ci_offset=blob.ci_offset,
        ci_compressed_size=blob.ci_compressed_size,
        ci_uncompressed_size=blob.ci_uncompressed_size,
        meta_digest=blob.meta_digest,
        meta_size=blob.meta_size,
        cipher=blob.cipher,
        cipher_iv=blob.cipher_iv,
        readahead_offset=blob.readahead_offset,
        readahead_size=blob.readahead_size,
    )


def load_tree(image: Bootstrap, blobs: list[BlobInfo]) -> FlatTree:
    """All paths of `image`, by depth; `blobs` stand for the image's blob table in its order.

    Raises FormatError for bytes that break the format.
    """
    if isinstance(image, BootstrapV5):
        return LoaderV5(image, blobs).load()
    assert isinstance(image, BootstrapV6)
    return LoaderV6(image, blobs).load()
