"""Interchange with upstream's nydus-image over the whole matrix: versions, compressors, digesters, chunk sizes, forms.

For each case both programs build the image by the same command lines. Then
- upstream's `check` and `unpack` take ours and see the source,
- our `check`, reader and `unpack` take upstream's and see the source,
- and where nothing is left to chance both wrote the same bytes: bootstrap, blobs and their ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bootstrap.check import check_bootstrap
from bootstrap.reader import open_bootstrap
from tests.lab.forms import Case, Image, Program, Sources, all_cases, check_tar, make, our_program, upstream_program
from tests.lab.manifest import FolderReader, check_image
from tests.lab.paths import ref_bin, shared_dir
from tests.unit.test_build_fixtures import rewrite

NYDUS_IMAGE = ref_bin("nydus-image")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        shared_dir() is None or NYDUS_IMAGE is None, reason="interop: fixtures and reference nydus-image are not here"
    ),
]

CASES = all_cases(("none", "lz4_block", "zstd"), ("blake3", "sha256"), (0x1000, 0x4000, 0x100000))
CASES += [Case(5, "zstd", "blake3", 0x1000000, "merged"), Case(6, "lz4_block", "sha256", 0x1000000, "merged")]
UPSTREAM_UNPACKS = ("plain", "inline", "merged", "dictionary", "tar-ref")
"""Of the others it makes broken archives or none, of its own images too."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"), simple=True)


@pytest.fixture(scope="module")
def upstream() -> Program:
    assert NYDUS_IMAGE is not None
    return upstream_program(NYDUS_IMAGE)


def read_by_us(image: Image, manifest: dict[str, Any]) -> list[str]:
    with open_bootstrap(image.boot) as opened:
        check_bootstrap(opened)
        return check_image(opened, FolderReader(opened, image.blobs), manifest)


def unpacked(program: Program, image: Image, manifest: dict[str, Any], out: Path) -> list[str]:
    program("unpack", "-l", "warn", "-D", image.blobs, "--output", out, image.boot)
    return check_tar(out.read_bytes(), manifest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_both_read_what_both_write(case: Case, sources: Sources, upstream: Program, tmp_path: Path) -> None:
    ours = make(our_program, case, sources, tmp_path / "ours")
    theirs = make(upstream, case, sources, tmp_path / "theirs")
    manifest = sources.manifest(ours.layers)

    report = tmp_path / "check.json"
    upstream("check", "-l", "warn", "-B", ours.boot, "-J", report)
    with open_bootstrap(ours.boot) as image:
        assert json.loads(report.read_text())["blobs"] == [blob.id for blob in image.blobs]
    assert read_by_us(theirs, manifest) == []
    if case.form in UPSTREAM_UNPACKS:
        assert unpacked(upstream, ours, manifest, tmp_path / "ours.tar") == []
    assert unpacked(our_program, theirs, manifest, tmp_path / "theirs.tar") == []

    if case.encrypted:  # keys are random
        assert read_by_us(ours, manifest) == []
        return
    mine, other = ours.files(), theirs.files()
    if case.form == "tarfs":  # upstream gives a whole last chunk 0 bytes, in a table nobody reads (reference 1.13)
        mine[""], other[""] = rewrite(ours.boot, []), rewrite(theirs.boot, [])
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []
