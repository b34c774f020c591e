"""The metadata stage: a finished tree becomes a bootstrap."""

from __future__ import annotations

from bootstrap.flat import FlatTree
from bootstrap.layout import v5, v6
from bootstrap.layout.common import SuperFlags, super_flags
from bootstrap.options import BuildOptions
from bootstrap.tree import clean_patterns
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6


def write_bootstrap(tree: FlatTree, options: BuildOptions, v6_flags: SuperFlags) -> tuple[bytearray, int]:
    """The bootstrap in the version, flags and prefetch policy of `options`; and its inode count.

    `v6_flags`: those of the mode (cipher, tarfs).
    """
    flags = super_flags(options.compressor, options.digester)
    if options.repeatable:
        tree.inodes["uid"] = tree.inodes["gid"] = 0
    else:
        flags |= SuperFlags.EXPLICIT_UIDGID
    prefetch = clean_patterns(options.prefetch)[0] if options.prefetch_policy == "fs" else []
    if options.fs_version == 6:
        flags |= v6_flags
        data = write_v6(tree, chunk_size=options.chunk_size, flags=flags, prefetch=prefetch)
        return data, v6.SUPERBLOCK.unpack_from(data, v6.SUPER_OFFSET)[6]
    data = write_v5(tree, chunk_size=options.chunk_size, flags=flags, prefetch=prefetch)
    return data, v5.SUPERBLOCK.unpack_from(data)[9]
