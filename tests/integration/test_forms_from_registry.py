"""Forms whose data or tables are fetched apart: from a registry, lazily, healed from the next source, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs import tables
from nydusfs.config import load_config
from nydusfs.errors import ReadError
from nydusfs.image_reader import ImageReader
from nydusfs.services import open_services
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.drivers import both
from tests.lab.faulty import faulty_server
from tests.lab.handmade import Made, contents, make
from tests.lab.images import Blob, push_blob
from tests.lab.mounted import check_mount
from tests.lab.paths import shared_dir
from tests.lab.registry import Registry, find_program

TABLED = ["batch", "batch-encrypted", "zran"]


def config_text(work: Path, origin: str, mirror: str = "", *, prefetch: bool = False) -> str:
    backend: dict[str, Any] = {"host": origin, "repo": "a/b", "scheme": "http", "timeout": 20, "connect_timeout": 10}
    if mirror:
        backend["mirrors"] = [{"host": mirror}]
    cache = {"type": "blobcache", "config": {"work_dir": str(work)}}
    document = {"device": {"backend": {"type": "registry", "config": backend}, "cache": cache}, "mode": "direct"}
    return json.dumps({**document, "fs_prefetch": {"enable": prefetch, "prefetch_all": prefetch}})


def run(made: Made, text: str, act: Callable[[ImageReader], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_services() as services:
            reader = await services.open_image(str(made.boot), load_config(text, "test"), name="made")
            try:
                with trio.fail_after(60):
                    await act(reader)
            finally:
                reader.close()

    trio.run(main)


async def check_all(reader: ImageReader, made: Made) -> None:
    for name in sorted(made.files):
        assert await reader.read(reader.bootstrap.resolve(name), 0, 1 << 24) == made.files[name], name


@pytest.mark.parametrize("form", [*TABLED, "tarfs"])
def test_tables_come_with_the_first_read_and_once(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image")
    with faulty_server(made.stored) as origin:
        text = config_text(tmp_path / "cache", origin.netloc)

        async def first(reader: ImageReader) -> None:
            assert not origin.data_requests, "an image opens without its blobs"
            async with trio.open_nursery() as nursery:  # many readers at once, one fetch of the table
                for name in sorted(made.files):
                    nursery.start_soon(reader.read, reader.bootstrap.resolve(name), 0, 100)
            await check_all(reader, made)

        run(made, text, first)
        spans = [request.span for request in origin.data_requests if made.info.id in request.target]
        assert len(spans) == len(set(spans)), "a range was fetched twice"
        origin.requests.clear()
        run(made, text, lambda reader: check_all(reader, made))
        assert not origin.data_requests, "all of it was kept, tables too"


def test_what_a_reader_got_is_kept_though_all_ends_right_behind_it(tmp_path: Path) -> None:
    """He goes on when his bytes are verified, before they are written."""
    made = make("batch", tmp_path / "image")
    name = min(name for name, data in made.files.items() if data)

    async def one(reader: ImageReader) -> None:
        assert await reader.read(reader.bootstrap.resolve(name), 0, 100) == made.files[name][:100]

    with faulty_server(made.stored) as origin:
        text = config_text(tmp_path / "cache", origin.netloc)
        run(made, text, one)
        origin.requests.clear()
        run(made, text, one)
        assert not origin.data_requests


def test_a_tar_is_read_once_and_kept(tmp_path: Path) -> None:
    """The pass that verifies it is the only fetch: larger than one request, smaller pieces stay as segments."""
    noise = hashlib.shake_256(b"noise").digest(9_500_000)
    made = make("tarfs", tmp_path / "image", {b"big": noise, **contents(20)})
    with faulty_server(made.stored) as origin:
        text = config_text(tmp_path / "cache", origin.netloc)
        run(made, text, lambda reader: check_all(reader, made))
        read = sum(request.span[1] - request.span[0] + 1 for request in origin.data_requests if request.span)
        assert read == len(made.stored[made.info.id])


def test_a_wrong_tar_is_an_error_and_serves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "WRONG_TAR_PAUSE", 0.0)
    made = make("tarfs", tmp_path / "image")
    good = made.stored[made.info.id]
    with faulty_server({made.info.id: good[:-700] + b"x" + good[-699:]}) as origin:

        async def act(reader: ImageReader) -> None:
            for name in sorted(made.files)[1:]:
                with pytest.raises(ReadError):
                    await reader.read(reader.bootstrap.resolve(name), 0, 10)
            origin.blobs = made.stored
            await check_all(reader, made)

        run(made, config_text(tmp_path / "cache", origin.netloc), act)


@pytest.mark.parametrize("form", TABLED)
def test_a_mirror_with_wrong_bytes_is_passed_over_for_tables_too(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image")
    with faulty_server(made.stored) as origin, faulty_server(made.stored, mode="wrong-bytes") as mirror:
        text = config_text(tmp_path / "cache", origin.netloc, mirror.url)
        run(made, text, lambda reader: check_all(reader, made))
        assert mirror.data_requests and origin.data_requests


@pytest.mark.parametrize("form", TABLED)
def test_a_table_that_cannot_be_had_is_an_error_until_it_can(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image")
    with faulty_server(made.stored, mode="404") as origin:

        async def act(reader: ImageReader) -> None:
            ino = reader.bootstrap.resolve(b"file-010")
            with pytest.raises(ReadError, match="404"):
                await reader.read(ino, 0, 10)
            assert reader.bootstrap.attr(ino).size == len(made.files[b"file-010"])
            origin.mode = "ok"
            await check_all(reader, made)

        run(made, config_text(tmp_path / "cache", origin.netloc), act)


@pytest.mark.parametrize("form", [*TABLED, "tarfs", "tar-ref", "external"])
def test_prefetch_of_all(form: str, tmp_path: Path) -> None:
    made = make(form, tmp_path / "image")
    with faulty_server(made.stored) as origin:

        async def act(reader: ImageReader) -> None:
            await reader.prefetch()
            origin.mode = "503"
            await check_all(reader, made)

        run(made, config_text(tmp_path / "cache", origin.netloc, prefetch=True), act)


# ---- the real programs


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    running = Registry(tmp_path_factory.mktemp("registry")).start()
    try:
        yield running
    finally:
        running.stop()


@pytest.mark.root
@pytest.mark.interop
@pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())
@pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here")
@pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")
@both
def test_reference_images_from_a_real_registry(registry: Registry, tmp_path: Path) -> None:
    """OCI references read the original layers there, their tables the meta blobs."""
    shared = shared_dir()
    assert shared is not None
    with Nydusd() as daemon:
        for name in ("v6-zran-merged3", "v6-estargz-ref", "v6-merged3-encrypt-batch", "v6-tar-tarfs", "v6-tar-ref"):
            case = shared / "fixtures" / "reference" / name
            for path in case.iterdir():
                if len(path.name) == 64:
                    data = path.read_bytes()
                    if hashlib.sha256(data).hexdigest() == path.name:
                        push_blob(registry.host, "a/b", Blob(f"sha256:{path.name}", len(data), path, ""))
            text = config_text(tmp_path / name, registry.host)
            assert daemon.mount(f"/{name}", case / "image.boot", text).status == 204
            assert check_mount(case, daemon.mnt / name) == []
        mark = registry.mark()
        for name in ("v6-zran-merged3", "v6-tar-tarfs"):
            assert check_mount(shared / "fixtures" / "reference" / name, daemon.mnt / name) == []
        assert not registry.since(mark).blobs().requests
