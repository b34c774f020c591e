"""Random layer stacks through the tools: unpack, compact and optimize keep the image a container sees."""

from __future__ import annotations

import io
import stat
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bootstrap.blobsource import Blobs, open_blobs
from bootstrap.build import BuildOptions, build_layer
from bootstrap.check import check_bootstrap
from bootstrap.checkblob import check_blobs
from bootstrap.compact import CompactOptions, compact
from bootstrap.layout.common import Compressor
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.optimize import Wanted, optimize
from bootstrap.reader import open_bootstrap
from bootstrap.unpack import unpack
from tests.lab.layering import CHUNK, Inode, Layer, Step, check_image, overlay, stacks
from tests.lab.manifest import FolderReader


def tar_of(blobs: Blobs) -> bytes:
    out = io.BytesIO()
    unpack(blobs, out, threads=1)
    return out.getvalue()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    plans=stacks,
    version=st.sampled_from([5, 6]),
    compressor=st.sampled_from([Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD]),
    options=st.builds(
        CompactOptions,
        min_used_ratio=st.sampled_from([0, 50, 99]),
        compact_blob_size=st.sampled_from([0, 3 * CHUNK, 1 << 20]),
        max_compact_size=st.sampled_from([0, 2 * CHUNK, 1 << 20]),
    ),
    ranges=st.lists(st.tuples(st.integers(0, 4 * CHUNK), st.integers(0, 2 * CHUNK)), max_size=3),
    every=st.integers(1, 4),
)
def test_the_tree_stays_wherever_its_data_goes(
    plans: list[list[Step]],
    version: int,
    compressor: Compressor,
    options: CompactOptions,
    ranges: list[tuple[int, int]],
    every: int,
) -> None:
    stack = [Layer(plan) for plan in plans]
    build = BuildOptions(fs_version=version, compressor=compressor, chunk_size=CHUNK, inline_meta=True, threads=1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sources = []
        for layer in stack:
            out = io.BytesIO()
            result = build_layer(io.BytesIO(layer.data), out, build)
            (work / result.blob_sha256).write_bytes(out.getvalue())
            sources.append(MergeSource(work / result.blob_sha256, blob_digest=result.blob_sha256))
        boot = work / "image.boot"
        merge_layers(sources, boot)
        with open_bootstrap(boot) as image, open_blobs(image, work) as blobs:
            tar = tar_of(blobs)
            compacted = compact(blobs, work, options, threads=1)
            files = [b"/" + path for path, entry in image.walk() if entry.dtype in (4, 8)][::every]
            optimized = optimize(blobs, [Wanted(path, tuple(ranges) or None) for path in files], work, threads=1)
        expected = overlay(stack)
        expected[()] = Inode(stat.S_IFDIR, 0o755)  # a tar of an image does not name its root
        out = io.BytesIO()
        again = build_layer(io.BytesIO(tar), out, BuildOptions(fs_version=version, chunk_size=CHUNK, threads=1))
        (work / "again.boot").write_bytes(again.bootstrap)
        (work / (again.blob_id or "none")).write_bytes(out.getvalue())
        with open_bootstrap(work / "again.boot") as image:
            check_image(image, FolderReader(image, work), expected)
        for result_bytes in (compacted.bootstrap, optimized.bootstrap):
            if result_bytes is None:
                continue
            (work / "new").write_bytes(result_bytes)
            with open_bootstrap(work / "new") as image, open_blobs(image, work) as blobs:
                assert tar_of(blobs) == tar
                check_bootstrap(image)
                check_blobs(image, name, threads=1)
