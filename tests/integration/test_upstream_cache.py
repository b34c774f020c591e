"""Cache directories that upstream's nydusd really wrote are taken over: nothing they hold is fetched again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from snapshotter.cachectl.ctl import command
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.drivers import both
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.mounted import check_mount
from tests.lab.paths import ref_bin, shared_dir

NYDUSD, OLD_NYDUSD = ref_bin("nydusd"), ref_bin("nydusd-2.2.5")
pytestmark = [
    both,
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
    pytest.mark.skipif(
        shared_dir() is None or NYDUSD is None or OLD_NYDUSD is None,
        reason="interop: fixtures and the reference nydusd 2.4 and 2.2.5 are not here",
    ),
]
# Chunks at odd offsets (v5), aligned ones, tables of the blob's own (batch, zran), layers with shared blobs, no codec.
CASES = (
    "v5-lz4-blake3-1m", "v5-none-sha256-4k", "v5-zstd-sha256-64k-aligned", "v5-merged3", "v6-zstd-blake3-1m",
    "v6-batch-128k", "v6-zran-slices", "v6-merged3", "v6-encrypt",
)  # fmt: skip
NOT_RAW = ("v6-batch-128k", "v6-zran-slices")  # upstream itself answers ENOSYS to reads of these with `compressed`
# Old daemons do not know the images of today's builder all.
OLD_CASES = ("v5-lz4-blake3-1m", "v5-none-sha256-4k", "v6-zstd-blake3-1m", "v6-merged3")


def _case(name: str) -> Path:
    shared = shared_dir()
    assert shared is not None
    return shared / "fixtures" / "reference" / name


@contextmanager
def _registry(case: Path) -> Iterator[FaultyServer]:
    blobs = {path.name: path.read_bytes() for path in case.iterdir() if len(path.name) == 64}
    with faulty_server(blobs) as server:
        yield server


def _config(server: FaultyServer, work: Path, **cache: bool) -> str:
    backend = {"scheme": "http", "host": server.netloc, "repo": "a/b"}
    return json.dumps(
        {
            "device": {
                "id": "one",
                "backend": {"type": "registry", "config": backend},
                "cache": {"type": "blobcache", "config": {"work_dir": str(work)}, **cache},
            },
            "mode": "direct",
            "enable_xattr": True,
        }
    )


def _read_with_upstream(binary: Path | None, case: Path, config: str) -> None:
    with Nydusd(binary=binary) as upstream:
        answer = upstream.mount("/i", case / "image.boot", config)
        assert answer.status == 204, (answer, upstream.log_text()[-2000:])
        # its start time where the time is 0, and another mode of the root: not what this is about
        found = check_mount(case, upstream.mnt / "i")
        assert not [line for line in found if "mtime" not in line and "mode" not in line], found


@pytest.mark.parametrize(
    ("name", "age", "compressed"),
    [
        *((name, "2.4", False) for name in CASES),
        *((name, "2.4", True) for name in CASES if name not in NOT_RAW),
        *((name, "2.2.5", False) for name in OLD_CASES),
    ],
)
def test_nothing_is_fetched_again(name: str, age: str, compressed: bool, tmp_path: Path) -> None:
    case, work = _case(name), tmp_path / "cache"
    work.mkdir()
    with _registry(case) as server:
        _read_with_upstream(NYDUSD if age == "2.4" else OLD_NYDUSD, case, _config(server, work, compressed=compressed))
        assert server.data_requests
        left = {path.name: path.stat().st_mtime_ns for path in work.iterdir() if path.is_file()}
        before = len(server.data_requests)
        with Nydusd() as ours:
            answer = ours.mount("/i", case / "image.boot", _config(server, work))
            assert answer.status == 204, answer
            assert check_mount(case, ours.mnt / "i") == []
            assert "is taken over" in ours.log_text()
        again = [request.span for request in server.data_requests[before:]]
        assert again == [], f"fetched again; {sorted(left)}"
        for file, changed in left.items():
            assert (work / file).stat().st_mtime_ns == changed, f"{file} is upstream's own"


# Cache directories of upstream, and blobs: of images with chunks at odd offsets, with tables of the blob itself,
# and with digests that only the whole tar vouches for.
IMPORTS = (
    ("v5-lz4-blake3-1m", "upstream"), ("v6-batch-128k", "upstream"), ("v6-zran-slices", "upstream"),
    ("v5-merged3", "blobs"), ("v6-batch-128k", "blobs"), ("v6-zran-slices", "blobs"), ("v6-encrypt", "blobs"),
    ("v6-tar-tarfs", "blobs"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "form"), IMPORTS)
def test_an_imported_image_needs_no_registry(name: str, form: str, tmp_path: Path) -> None:
    case, work = _case(name), tmp_path / "cache"
    with _registry(case) as server:
        source = tmp_path / "source"
        source.mkdir()
        if form == "upstream":
            _read_with_upstream(NYDUSD, case, _config(server, source))
        else:
            for blob, data in server.blobs.items():
                (source / blob).write_bytes(data)
        told = CliRunner().invoke(
            command, ["import", str(source), "--cache-dir", str(work), "-B", str(case / "image.boot"), "--json"]
        )
        assert told.exit_code == 0, (told.stdout, told.stderr, told.exception)
        assert sum(blob["absent"] for blob in json.loads(told.stdout)["blobs"]) == 0
        before = len(server.data_requests)
        server.mode = "503"
        with Nydusd() as ours:
            answer = ours.mount("/i", case / "image.boot", _config(server, work))
            assert answer.status == 204, answer
            assert check_mount(case, ours.mnt / "i") == []
        assert len(server.data_requests) == before
