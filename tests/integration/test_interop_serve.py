"""Each daemon serves what the other side's nydus-image wrote, entry by entry and byte by byte.

Mounts are the dear part of the interop matrix: every pair of its values (form and chunk size, version and compressor,
and so on) occurs, not every combination. See `test_interop_matrix` for the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.erofs import cannot_mount_erofs, is_erofs
from tests.lab.forms import Case, Image, Sources, all_cases, make, our_program, pairwise, upstream_program
from tests.lab.mounted import check_mount
from tests.lab.paths import ref_bin, shared_dir

NYDUSD, NYDUS_IMAGE = ref_bin("nydusd"), ref_bin("nydus-image")
pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
    pytest.mark.skipif(
        shared_dir() is None or NYDUSD is None or NYDUS_IMAGE is None,
        reason="interop: fixtures and reference nydusd and nydus-image are not here",
    ),
]

CASES = pairwise(all_cases(("none", "lz4_block", "zstd"), ("blake3", "sha256"), (0x1000, 0x4000, 0x100000)))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("nasty"), simple=False)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("simple"), simple=True)


@pytest.fixture
def sources(case: Case, nasty: Sources, simple: Sources) -> Sources:
    """Devices, fifos and all; but upstream misplaces long link targets in tarfs mode, and misreads well placed ones."""
    return simple if case.form == "tarfs" else nasty


@pytest.fixture(scope="module")
def upstream() -> Iterator[Nydusd]:
    with Nydusd(binary=NYDUSD) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def our_daemon() -> Iterator[Nydusd]:
    with Nydusd() as daemon:
        yield daemon


def differences(
    daemon: Nydusd, case: Case, image: Image, sources: Sources, folder: Path, driver: str = ""
) -> list[str]:
    """Mounts the image and compares what is seen with the layers it was made of. `driver`: of our daemon."""
    at = f"/{case.label}"
    work = daemon.dir / "cache" / case.label
    work.mkdir(parents=True, exist_ok=True)
    if case.form == "tarfs" and daemon.binary is not None:  # it looks for the tars there (reference 1.13)
        for blob in image.blobs.iterdir():
            shutil.copy(blob, work)
    # upstream can verify v5 only, and EROFS not at each read
    more: dict[str, Any] = {"digest_validate": case.version == 5 and driver != "erofs"}
    if driver:
        more["fs_driver"] = driver
    answer = daemon.mount(at, image.boot, localfs_config(image.blobs, config_id=at, work_dir=work, **more))
    if driver == "erofs" and (case.version == 5 or case.form == "tarfs") and answer.status == 500:
        assert "fs_driver erofs is not possible" in answer.message  # a v5 image may have holes
        return []
    assert answer.status == 204, answer
    if driver:
        assert is_erofs(daemon.mnt / case.label) == (driver == "erofs")
    manifest = sources.manifest(image.layers)
    if daemon.binary is not None:  # it shows its start time where the time is 0, and the root as 0755
        manifest["ignore"] += [{"field": "mtime", "path": e["path"]} for e in manifest["entries"] if not e["mtime"][0]]
        manifest["ignore"].append({"field": "mode", "path": "/"})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = check_mount(folder, daemon.mnt / case.label)
    assert daemon.umount(at).status == 204
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_upstream_serves_our_image(case: Case, upstream: Nydusd, sources: Sources, tmp_path: Path) -> None:
    image = make(our_program, case, sources, tmp_path / "image")
    assert differences(upstream, case, image, sources, tmp_path) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_we_serve_upstream_s_image(case: Case, our_daemon: Nydusd, sources: Sources, tmp_path: Path) -> None:
    assert NYDUS_IMAGE is not None
    image = make(upstream_program(NYDUS_IMAGE), case, sources, tmp_path / "image")
    for driver in ("fuse", "erofs") if not cannot_mount_erofs() else ("fuse",):
        assert differences(our_daemon, case, image, sources, tmp_path, driver) == [], driver
