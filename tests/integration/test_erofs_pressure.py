"""EROFS mounts where something is short: room in the cache, memory, processor time. Never a wrong byte, never an error.

Every reader is a process of its own with a deadline: one that hangs in the kernel costs its test and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from nydusfs.segments import SEGMENT_SIZE
from tests.integration.test_erofs import ON, bound, digests, marked_devices, read_all, registry_config
from tests.lab.daemon import Nydusd, wait_until
from tests.lab.erofs import cannot_mount_erofs, is_erofs, settle
from tests.lab.faulty import faulty_server
from tests.lab.killing import READER
from tests.lab.process import kill_together
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())]


def limited(config: str, limit: int) -> str:
    document = json.loads(config)
    document["device"]["cache"]["config"]["limit"] = limit
    return json.dumps(document)


def held_bytes(work: Path) -> int:
    """What segments take on the disk, each file once."""
    sizes: dict[int, int] = {}
    for path in [*work.glob("[!.]*/*-*"), *marked_devices(work)]:
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        sizes[facts.st_ino] = facts.st_blocks * 512
    return sum(sizes.values())


@contextmanager
def verifying_readers(folder: Path, image: TinyImage, *roots: Path, count: int = 4) -> Iterator[list[dict[str, Any]]]:
    """Read all files of some mounts in random order, dropping their pages; the reports are there at the end."""
    expected = {
        str(root / name): blake2b(data, digest_size=16).hexdigest()
        for root in roots
        for name, data in image.files.items()
    }
    (folder / "files.json").write_text(json.dumps(expected))
    reports: list[dict[str, Any]] = []
    stop = folder / "stop"
    stop.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, folder / "files.json", stop, str(seed)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(count)
    ]
    try:
        yield reports
    finally:
        stop.touch()
        for process in processes:
            try:
                reports.append(json.loads(process.communicate(timeout=30)[0]))
            finally:
                process.kill()


def assert_all_right(reports: list[dict[str, Any]], reads: int) -> None:
    assert [line for report in reports for line in report["said"]] == []
    assert sum(report["wrong"] + report["errors"] for report in reports) == 0
    assert sum(report["reads"] for report in reports) > reads


def test_a_cache_holds_to_its_limit_under_mounts_that_are_read(tmp_path: Path) -> None:
    """Two mounts of 12 MiB, a limit of 5: data goes and comes back while verifying readers are at it and the worker
    is killed. What is in use by the end stays, unasked."""
    image = tiny_image(tmp_path, {f"f{n}": noise(2 * SEGMENT_SIZE, n) for n in range(24)})
    limit, work, most = 20 * SEGMENT_SIZE, tmp_path / "cache", 0
    with faulty_server({image.blob_id: image.blob}) as server, Nydusd(*ON) as running:
        config = limited(registry_config(server, work), limit)
        for where in ("/a", "/b"):
            assert running.mount(where, image.bootstrap, config).status == 204
            assert is_erofs(running.mnt / where[1:])
        with verifying_readers(tmp_path, image, running.mnt / "a", running.mnt / "b") as reports:
            until = time.monotonic() + 5
            while time.monotonic() < until:
                for _ in range(20):
                    time.sleep(0.1)
                    most = max(most, held_bytes(work))
                worker = running.worker_pid
                kill_together([worker])
                wait_until(lambda w=worker: running.running() and running.worker_pid != w, 20, "the next worker")  # type: ignore[misc]
        assert_all_right(reports, 100)
        fetched = sum(end + 1 - start for start, end in (r.span for r in server.data_requests if r.span is not None))
        assert fetched > 2 * len(image.blob), "nothing was evicted"
        # a segment a reader waits for is written whatever there is, one per reader and some ahead of them
        assert most < limit + 12 * SEGMENT_SIZE, f"{most / SEGMENT_SIZE} segments"
        assert read_all(running.mnt / "a") == read_all(running.mnt / "b") == digests(image)
        assert {running.umount("/a").status, running.umount("/b").status} == {204}
        assert marked_devices(work) == []
        assert held_bytes(work) <= limit


def test_a_complete_mount_with_a_limit_asks_nobody_until_its_data_has_to_go(tmp_path: Path) -> None:
    """All of it is there at the mount: nobody is needed. A second image pushes it out of the cache, also below a mount
    of a daemon of which nothing is left; both mounts ask again."""
    image = tiny_image(tmp_path, {f"f{n}": noise(SEGMENT_SIZE, n) for n in range(12)})
    other = tiny_image(tmp_path, {f"g{n}": noise(SEGMENT_SIZE, n + 100) for n in range(12)})
    work = tmp_path / "cache"
    with faulty_server({image.blob_id: image.blob, other.blob_id: other.blob}) as server, Nydusd(*ON) as running:
        config = limited(registry_config(server, work), 16 * SEGMENT_SIZE)
        assert running.mount("/a", image.bootstrap, config).status == 204
        assert read_all(running.mnt / "a") == digests(image)
        settle(work)
        assert running.umount("/a").status == 204
        assert running.mount("/a", image.bootstrap, config).status == 204
        with bound(running.mnt / "a", tmp_path / "held") as held:
            running.kill_all()
            assert read_all(held) == digests(image)
            running.start()
            assert running.mount("/a", image.bootstrap, config).status == 204
            assert running.mount("/b", other.bootstrap, config).status == 204
            before = len(server.data_requests)
            assert read_all(running.mnt / "b") == digests(other)
            assert len([path for path in marked_devices(work) if not path.stat().st_size]) >= 8
            assert read_all(held) == digests(image)
            assert read_all(running.mnt / "a") == digests(image)
            assert len(server.data_requests) > before
            assert held_bytes(work) <= 20 * SEGMENT_SIZE
