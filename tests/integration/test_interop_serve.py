"""Upstream's nydusd serves what our nydus-image wrote: every format, whole and merged from layers, entry by entry."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.paths import ref_bin
from tests.unit.test_build_fixtures import REFERENCE, make_tree

NYDUSD = ref_bin("nydusd")
pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
    pytest.mark.skipif(
        REFERENCE is None or NYDUSD is None, reason="interop: fixtures and reference nydusd are not here"
    ),
]

MATRIX = [*itertools.product((5, 6), ("none", "lz4_block", "zstd"), ("blake3", "sha256"))]
# tree, chunk size and layers of the reference images whose manifests say what must be seen
PLAIN = ("tar-rafs", 0x10000, ("nasty-tar",))
MERGED = ("merged3", 0x8000, ("layer1", "layer2", "layer3"))
# In a process of its own: a daemon that hangs must not take the test along.
COMPARE = """
import sys
from pathlib import Path
from tests.lab.manifest import check_tree, load_manifest
for line in check_tree(Path(sys.argv[2]), load_manifest(Path(sys.argv[1]))):
    print(line.encode("utf-8", "backslashreplace").decode())
"""


def nydus_image(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from bootstrap.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    module, folder = make_tree(), tmp_path_factory.mktemp("tars")
    found = {}
    for _, chunk, names in (PLAIN, MERGED):
        for name in names:
            out = io.BytesIO()
            module.write_tar(module.TREES[name](chunk), out)
            found[name] = folder / f"{name}.tar"
            found[name].write_bytes(out.getvalue())
    return found


@pytest.fixture(scope="module")
def upstream() -> Iterator[Nydusd]:
    with Nydusd(binary=NYDUSD) as daemon:
        yield daemon


def flags(version: int, compressor: str, digester: str, chunk: int) -> list[str]:
    kinds = ["--fs-version", str(version), "--compressor", compressor, "--digester", digester]
    return ["create", "-l", "warn", "--type", "tar-rafs", *kinds, "--chunk-size", hex(chunk)]


def differences(daemon: Nydusd, case: str, boot: Path, blobs: Path) -> list[str]:
    """Mounts the image in upstream's daemon and compares what is seen there with a manifest."""
    assert REFERENCE is not None
    at = "/" + "-".join(blobs.parts[-1:])
    work = daemon.dir / "cache" / at[1:]
    work.mkdir(parents=True)
    # it can verify v5 only
    config = localfs_config(blobs, config_id=at, work_dir=work, digest_validate=case.startswith("v5"))
    answer = daemon.mount(at, boot, config)
    assert answer.status == 204, answer
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(REFERENCE / case), str(daemon.mnt / at[1:])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert daemon.umount(at).status == 204
    return done.stdout.splitlines()


@pytest.mark.parametrize(("version", "compressor", "digester"), MATRIX)
def test_upstream_serves_our_image(
    upstream: Nydusd, tars: dict[str, Path], tmp_path: Path, version: int, compressor: str, digester: str
) -> None:
    """Metadata and data apart; hard links, devices, fifos, xattrs, sparse and odd names included."""
    case, chunk, (name,) = PLAIN
    blobs = tmp_path / f"plain-{version}-{compressor}-{digester}"
    blobs.mkdir()
    boot = tmp_path / "image.boot"
    nydus_image(*flags(version, compressor, digester, chunk), "-B", boot, "-D", blobs, tars[name])
    assert differences(upstream, f"v{version}-{case}", boot, blobs) == []


@pytest.mark.parametrize(("version", "compressor", "digester"), MATRIX)
def test_upstream_serves_our_merged_image(
    upstream: Nydusd, tars: dict[str, Path], tmp_path: Path, version: int, compressor: str, digester: str
) -> None:
    """Three layer blobs with their metadata inside; the upper ones remove and replace what the lower ones brought."""
    case, chunk, names = MERGED
    blobs = tmp_path / f"merged-{version}-{compressor}-{digester}"
    blobs.mkdir()
    toc = ["--features", "blob-toc"] if version == 6 else []

    def layer(name: str) -> Path:
        made, report = tmp_path / f"{name}.blob", tmp_path / f"{name}.json"
        inline: list[str | Path] = ["--blob-inline-meta", *toc, "--whiteout-spec", "none", "--blob", made, "-J", report]
        nydus_image(*flags(version, compressor, digester, chunk), *inline, tars[name])
        # named as a registry's client names it
        return made.rename(blobs / str(json.loads(report.read_text())["blobs"][-1]))

    with ThreadPoolExecutor(2) as pool:
        layers = [*pool.map(layer, names)]
    boot = tmp_path / "image.boot"
    nydus_image("merge", "-l", "warn", "-B", boot, *layers)
    assert differences(upstream, f"v{version}-{case}", boot, blobs) == []
