"""Every byte of every supported reference image through cache and fetch, from a directory of blobs; no mount."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from bootstrap.reader import Bootstrap
from nydusfs.config import load_config
from nydusfs.image_reader import ImageReader
from nydusfs.services import open_services
from tests.lab.paths import reference_cases, shared_dir

CASES = reference_cases()

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here"),
]


def _manifest(case: Path) -> dict[str, Any]:
    plain = case / "manifest.json"
    text = plain.read_bytes() if plain.exists() else gzip.decompress((case / "manifest.json.gz").read_bytes())
    found: dict[str, Any] = json.loads(text)
    return found


def _config(case: Path, work: Path, validate: bool) -> str:
    inline = case / "layer"
    backend = {"blob_file": str(inline)} if inline.exists() else {"dir": str(case)}
    cache = {"type": "blobcache", "validate": validate, "config": {"work_dir": str(work)}}
    device = {"backend": {"type": "localfs", "config": backend}, "cache": cache}
    return json.dumps({"device": device, "mode": "direct"})


async def _read_whole(reader: ImageReader, ino: int, size: int, step: int) -> bytes:
    parts = []
    for offset in range(0, size, step):
        parts.append(await reader.read(ino, offset, step))
    return b"".join(parts)


async def _check(reader: ImageReader, entries: list[dict[str, Any]], step: int) -> int:
    image: Bootstrap = reader.bootstrap
    files = 0
    for entry in entries:
        if entry["type"] != "file":
            continue
        ino = image.resolve(os.fsencode(entry["path"]))
        data = await _read_whole(reader, ino, entry["size"], step)
        assert len(data) == entry["size"], entry["path"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["path"]
        files += 1
    return files


@pytest.mark.parametrize("name", CASES)
def test_every_byte(name: str, tmp_path: Path) -> None:
    shared = shared_dir()
    assert shared is not None
    case = shared / "fixtures" / "reference" / name
    entries = _manifest(case)["entries"]
    boot = case / "layer" if (case / "layer").exists() else case / "image.boot"

    async def main() -> None:
        for step, validate in ((131072, False), (5000, True), (1 << 22, False)):
            config = load_config(_config(case, tmp_path, validate), name)
            async with open_services() as services:
                reader = await services.open_image(str(boot), config, name=name)
                before = reader.backend_counters.read_count
                files = await _check(reader, entries, step)
                assert files or "no-data" in name
                if step != 131072:  # a second process finds everything in the cache
                    assert reader.backend_counters.read_count == before == 0
                await services.scheduler.idle()
                reader.close()

    trio.run(main)
