"""The cache's limit and floor under many images at work, what goes when it is reached, and keys of the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.config import load_config
from nydusfs.services import open_services
from tests.integration.test_cache_command import durable
from tests.integration.test_cache_disk import tmpfs
from tests.integration.test_sources_faults import config_text
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.process import drop_caches
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]

MIB = 1 << 20
IMAGES = 8
SECONDS = 5.0
# Reads files in any order and as programs do, without help of the page cache, until it is told to end.
READER = """
import hashlib, os, random, sys
root, files = sys.argv[1], dict(item.split("=") for item in sys.argv[2:])
choice, rounds = random.Random(root), 0
while not os.path.exists(root + "/../../stop"):
    name = choice.choice(list(files))
    fd = os.open(root + "/" + name, os.O_RDONLY)
    hasher = hashlib.sha256()
    while data := os.read(fd, choice.choice((4096, 65536, 1 << 20))):
        hasher.update(data)
    if hasher.hexdigest() != files[name]:
        sys.exit("wrong bytes in " + name)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    rounds += 1
print(rounds)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[TinyImage]:
    """Eight of 6 MiB: 48 MiB in all."""
    folder = tmp_path_factory.mktemp("images")
    return [
        tiny_image(folder, {f"f{part}": noise(2 * MIB + 5000, 100 * number + part) for part in range(3)})
        for number in range(IMAGES)
    ]


@pytest.fixture
def server(images: list[TinyImage]) -> Iterator[FaultyServer]:
    with faulty_server({image.blob_id: image.blob for image in images}) as server:
        yield server


def mount(daemon: Nydusd, image: TinyImage, server: FaultyServer, at: str, cache: dict[str, Any], **more: Any) -> None:
    # times that a busy machine does not reach
    backend = {"scheme": "http", "host": server.netloc, "repo": "a/b", "timeout": 60, "connect_timeout": 30}
    device = {
        "backend": {"type": "registry", "config": backend},
        "cache": {"type": "blobcache", "config": cache, **more},
    }
    prefetch = {"enable": True, "threads_count": 4}
    answer = daemon.mount(
        at, image.bootstrap, json.dumps({"device": device, "mode": "direct", "fs_prefetch": prefetch})
    )
    assert answer.status == 204, (answer, daemon.log_text())


def free(folder: Path) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


@pytest.mark.parametrize("how", ["bytes", "percent", "floor"])
def test_eight_images_hold_it_within_one_percent(
    how: str, images: list[TinyImage], server: FaultyServer, tmp_path: Path
) -> None:
    import hashlib

    with ExitStack() as stack:
        size = 40 * MIB
        disk = stack.enter_context(tmpfs(tmp_path / "disk", str(size)))
        work = disk / "cache"
        cache: dict[str, Any] = {"work_dir": str(work)}
        limit = floor = 0
        if how == "floor":
            floor = 24 * MIB
            cache["min_free"] = floor
        else:
            limit = 16 * MIB if how == "bytes" else size * 40 // 100
            cache["limit"] = limit if how == "bytes" else "40%"
        daemon = stack.enter_context(Nydusd())
        for number, image in enumerate(images):
            mount(daemon, image, server, f"/{number}", cache)
        readers = []
        for number, image in enumerate(images):
            words = [f"{name}={hashlib.sha256(data).hexdigest()}" for name, data in image.files.items()]
            command = [sys.executable, "-c", READER, str(daemon.mnt / str(number)), *words]
            readers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

        def reached(least: int) -> bool:
            return size - least > 0.8 * limit if limit else least < floor + 8 * MIB

        # Of the whole disk at one moment, files that are open and deleted included.
        least, until = size, time.monotonic() + SECONDS
        while time.monotonic() < until or (not reached(least) and time.monotonic() < until + 40):
            least = min(least, free(disk))
            time.sleep(0.002)
        (daemon.dir / "stop").touch()
        rounds = [int(reader.communicate(timeout=60)[0] or 0) for reader in readers]
        assert [reader.returncode for reader in readers] == [0] * IMAGES, daemon.log_text()[-3000:]
        assert sum(rounds) >= IMAGES, rounds
        assert reached(least)
        assert size - least <= 1.01 * limit if limit else least >= floor * 0.99
        (store,) = daemon.get("cache").body["stores"]
        assert store["evictions"] > 0, "the limit was reached"


def test_a_reader_that_has_a_file_mapped_sees_its_bytes_whatever_goes(
    images: list[TinyImage], server: FaultyServer, tmp_path: Path
) -> None:
    code = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for line in sys.stdin:
    print(hashlib.sha256(view).hexdigest(), flush=True)
"""
    import hashlib

    with Nydusd() as daemon:
        cache = {"work_dir": str(tmp_path / "cache"), "limit": 4 * MIB}
        for number, image in enumerate(images):
            mount(daemon, image, server, f"/{number}", cache)
        held = subprocess.Popen(
            [sys.executable, "-c", code, str(daemon.mnt / "0" / "f1")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert held.stdin is not None and held.stdout is not None
        expected = hashlib.sha256(images[0].files["f1"]).hexdigest()
        for number in (*range(1, IMAGES), 1):
            held.stdin.write("again\n")
            held.stdin.flush()
            assert held.stdout.readline().strip() == expected
            for name, data in images[number].files.items():
                assert (daemon.mnt / str(number) / name).read_bytes() == data
            drop_caches()
        held.stdin.close()
        assert held.wait(60) == 0


def test_what_is_read_often_outlives_what_was_read_lately(tmp_path: Path) -> None:
    """A hot file, then a stream of cold ones four times the cache: the hot one needs the registry no more."""
    files = {"hot": noise(600_000, 1), **{f"cold{number:02}": noise(600_000, 2 + number) for number in range(20)}}
    image = tiny_image(tmp_path, files)
    text = config_text(tmp_path / "cache", "NETLOC").replace('"work_dir"', '"limit": 3000000, "work_dir"')

    async def run() -> None:
        async with open_services() as services:
            config = load_config(text.replace("NETLOC", server.netloc), "t")
            reader = await services.open_image(str(image.bootstrap), config, name="i")

            async def read(name: str) -> None:
                ino = reader.bootstrap.resolve(name.encode())
                for offset in range(0, 600_000, 100_000):
                    assert await reader.read(ino, offset, 100_000) == files[name][offset : offset + 100_000]

            for _ in range(20):
                await read("hot")
                await services.scheduler.idle()
                services.stores()[0].fresh.clear()  # as when a while has passed
            # What is being written cannot go, and three of them fill this cache: each alone, and none read ahead.
            for number in range(20):
                await read(f"cold{7 * number % 20:02}")
                await services.scheduler.idle()
            asked = len(server.data_requests)
            await read("hot")
            assert [request.span for request in server.data_requests[asked:]] == []
            await read("cold00")
            assert len(server.data_requests) > asked, "the first of the others had to go"
            reader.close()

    with faulty_server({image.blob_id: image.blob}) as server:
        trio.run(run)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_keys_of_the_cache(
    compressed: bool, validate: bool, images: list[TinyImage], server: FaultyServer, tmp_path: Path
) -> None:
    """`compressed` changes nothing that a reader sees. With `validate` damage on the disk is found by its reader,
    without it what was verified once is believed."""
    image, work = images[0], tmp_path / "cache"
    cache = {"work_dir": str(work)}
    for number in range(2):
        with Nydusd() as daemon:
            mount(daemon, image, server, "/i", cache, compressed=compressed, validate=validate)
            if number:
                path = durable(work, image)[0]
                with path.open("r+b") as file:
                    file.seek(10)
                    file.write(bytes([image.files["f0"][10] ^ 1]))
            before = len(server.data_requests)
            found = {name: (daemon.mnt / "i" / name).read_bytes() for name in image.files}
            wrong = [name for name, data in image.files.items() if found[name] != data]
            assert wrong == (["f0"] if number and not validate else [])
            if number:
                assert len(server.data_requests) == before + validate
                assert ("damaged in the cache" in daemon.log_text()) == validate
            durable(work, image)
