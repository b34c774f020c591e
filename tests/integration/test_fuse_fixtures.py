"""Every reference image of the supported kinds, through our daemon's mount, entry by entry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.erofs import is_erofs, marked_devices
from tests.lab.mounted import check_mount
from tests.lab.paths import reference_cases, shared_dir

CASES = reference_cases()

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
    pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here"),
]


def _case(name: str) -> Path:
    shared = shared_dir()
    assert shared is not None
    return shared / "fixtures" / "reference" / name


def _source(case: Path) -> Path:
    inline = case / "layer"
    return inline if inline.exists() else case / "image.boot"


def _config(case: Path, work: Path) -> str:
    inline = case / "layer"
    backend = {"blob_file": str(inline)} if inline.exists() else {"dir": str(case)}
    return json.dumps(
        {
            "device": {
                "id": case.name,
                "backend": {"type": "localfs", "config": backend},
                "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
            },
            "mode": "direct",
        }
    )


@pytest.fixture(scope="module")
def daemon(fs_driver: str) -> Iterator[Nydusd]:
    with Nydusd() as running:
        yield running


@pytest.mark.parametrize("name", CASES)
def test_fixture_is_served_as_its_manifest_says(daemon: Nydusd, name: str, fs_driver: str) -> None:
    """Mounted through the API beside the others; read twice, so that the second pass comes from caches."""
    case = _case(name)
    answer = daemon.mount(f"/{name}", _source(case), _config(case, daemon.dir / "cache" / name))
    assert answer.status == 204, answer
    # a plain tar has no blocks of 4096 bytes: that form stays with FUSE
    assert is_erofs(daemon.mnt / name) == (fs_driver == "erofs" and name != "v6-tar-tarfs")
    assert check_mount(case, daemon.mnt / name) == []
    assert check_mount(case, daemon.mnt / name) == []


def test_all_of_them_stay_right_side_by_side_and_leave_one_by_one(daemon: Nydusd) -> None:
    mounted = daemon.get("daemon").body["backend_collection"]
    assert {f"/{name}" for name in CASES} <= mounted.keys()
    for name in CASES:
        assert daemon.umount(f"/{name}").status == 204
        assert not (daemon.mnt / name).exists()
        assert marked_devices(daemon.dir / "cache" / name) == []
    assert daemon.get("daemon").body["backend_collection"] == {}


@pytest.mark.parametrize("name", ["v5-lz4-blake3-1m", "v6-zstd-blake3-1m", "v6-merged3"])
def test_one_image_at_the_root(name: str, tmp_path: Path) -> None:
    """The dedicated form: --bootstrap and --localfs-dir, the image is the mount itself."""
    case = _case(name)
    blobs = tmp_path / "blobs"
    shutil.copytree(case, blobs)
    with Nydusd("-B", blobs / "image.boot", "-D", blobs) as running:
        assert check_mount(case, running.mnt) == []
        assert running.get("daemon").body["backend_collection"].keys() == {"/"}


def test_backend_information_is_upstreams(daemon: Nydusd) -> None:
    case = _case("v6-zstd-blake3-1m")
    assert daemon.mount("/info", case / "image.boot", localfs_config(case)).status == 204
    info = daemon.get("daemon/backend?mountpoint=/info").body
    assert daemon.umount("/info").status == 204
    # as nydusd v2.4.4 answers for this image
    assert info == {
        "magic": 3774210530, "version": 1536, "sb_size": 0, "root_inode": 0, "chunk_size": 1048576, "batch_size": 0,
        "inodes_count": 210, "flags": {"bits": 16777396}, "inode_table_entries": 0, "inode_table_offset": 0,
        "blob_table_size": 256, "blob_table_offset": 4096, "extended_blob_table_offset": 0,
        "extended_blob_table_entries": 0, "blob_device_table_count": 1, "blob_device_table_offset": 1408,
        "prefetch_table_offset": 0, "prefetch_table_entries": 0, "attr_timeout": {"secs": 4294967296, "nanos": 0},
        "entry_timeout": {"secs": 4294967296, "nanos": 0}, "is_chunk_dict": False, "meta_blkaddr": 2, "root_nid": 128,
        "chunk_table_offset": 147456, "chunk_table_size": 8800,
    }  # fmt: skip
