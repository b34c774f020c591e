"""Our builder on a real directory tree against upstream's bytes: block edges of directories in all combinations."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest

from bootstrap.build import BuildOptions, build_directory
from bootstrap.layout.common import Compressor
from tests.lab.paths import ref_bin

NYDUS_IMAGE = ref_bin("nydus-image")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(NYDUS_IMAGE is None, reason="interop: the reference nydus-image is not here"),
]


@pytest.mark.parametrize("version", [5, 6])
def test_a_real_tree_gives_upstream_s_bytes(version: int, tmp_path: Path) -> None:
    source = Path(os.__file__).parent
    out = io.BytesIO()
    result = build_directory(str(source), out, BuildOptions(fs_version=version, compressor=Compressor.LZ4_BLOCK))
    flags = ["-l", "warn", "-v", str(version), "--compressor", "lz4_block"]
    command = [str(NYDUS_IMAGE), "create", *flags, "-B", str(tmp_path / "boot"), "-D", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL, capture_output=True)
    assert result.bootstrap == (tmp_path / "boot").read_bytes()
    assert (tmp_path / result.blob_id).read_bytes() == out.getvalue()
