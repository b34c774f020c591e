"""Random layers beside upstream's tools: its merge writes the same bytes, its check takes what our writers wrote.

A few examples in CI, always the same; more: `pytest --hypothesis-profile=long --timeout=0`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given

from tests.lab.layering import Inode, Layer, Step, stacks
from tests.lab.paths import ref_bin
from tests.unit.test_build_fixtures import rewrite
from tests.unit.test_build_model import Form, examples, forms, workshop

NYDUS_IMAGE = ref_bin("nydus-image")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(NYDUS_IMAGE is None, reason="interop: the reference nydus-image is not here"),
]


def upstream(*arguments: str | Path) -> None:
    command = [str(NYDUS_IMAGE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr + done.stdout


@examples(25)
@given(plans=stacks, form=forms)
def test_upstream_checks_what_we_write(plans: list[list[Step]], form: Form) -> None:
    with workshop(form) as shop:
        sources = [shop.layer(Layer(plan).data) for plan in plans]
        for boot in [*(source.path for source in sources), shop.merge(sources)]:
            upstream("check", "-l", "warn", "-B", boot)


@examples(40)
@given(plans=stacks, form=forms)
def test_upstream_merges_to_the_same_bytes(plans: list[list[Step]], form: Form) -> None:
    # Without any data upstream forgets the chunk size.
    first = Step((), b"first", "file", Inode(0, 0o644, content=b"content"))
    plans = [[first, *plans[0]], *plans[1:]]
    with workshop(form) as shop:
        layers = [Layer(plan, upstream=True, whiteouts=number > 0) for number, plan in enumerate(plans)]
        sources = [shop.layer(layer.data) for layer in layers]
        lists = {
            "--blob-digests": [source.blob_digest for source in sources],
            "--original-blob-ids": [source.original_blob_id for source in sources],
            "--blob-sizes": [source.blob_size and str(source.blob_size) for source in sources],
        }
        flags: list[str] = []
        for name, items in lists.items():  # a layer without a blob has none; its item means nothing
            if any(items):
                flags += [name, ",".join(item or "0" * (64 if name == "--blob-digests" else 1) for item in items)]
        theirs = shop.path()
        upstream("merge", "-l", "warn", "-B", theirs, *flags, *(source.path for source in sources))
        ours = shop.merge(sources)
        if form.kind == "tar-tarfs":  # upstream gives a whole last chunk 0 bytes, in a table nobody reads (1.13)
            assert rewrite(ours, []) == rewrite(theirs, [])
        else:
            assert ours.read_bytes() == theirs.read_bytes()
