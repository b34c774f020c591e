"""Every backend but the registry: an image read through it, and what happens when it is not well."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.config import load_config
from nydusfs.errors import ConfigError, ReadError
from nydusfs.image_reader import ImageReader
from nydusfs.objects import credentials
from nydusfs.services import open_services
from nydusfs.sources import Priority, SourceHub, open_source, race, registry
from nydusfs.sources.gpt import GptError, read_partitions
from tests.lab.daemon import Nydusd, can_mount_fuse, reader
from tests.lab.disk import write_disk
from tests.lab.faulty import dead_port, faulty_server
from tests.lab.moto import moto_bucket
from tests.lab.objects import object_server
from tests.lab.paths import ref_bin
from tests.lab.tiny import TinyImage, noise, tiny_image

FILES = {"hello": b"hello, world\n", "data.bin": noise(700_000), **{f"f{n}": noise(3000, n) for n in range(20)}}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return tiny_image(tmp_path_factory.mktemp("image"), FILES)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines under test stall for seconds: no hedge shall be taken for a choice."""
    monkeypatch.setattr(registry, "MIRROR_PATIENCE", 20.0)
    monkeypatch.setattr(race, "UNKNOWN", 20.0)
    monkeypatch.setattr(race, "ORIGIN_HEDGE", 20.0)


def document(kind: str, options: dict[str, Any]) -> str:
    """Version 2, the only one that knows http-proxy. No cache: each read goes to the source."""
    return json.dumps({"version": 2, "backend": {"type": kind, kind: options}})


def run(image: TinyImage, text: str, scenario: Callable[[ImageReader], Awaitable[None]]) -> None:
    failures: list[BaseException] = []

    async def main() -> None:
        with trio.fail_after(60):
            async with open_services() as services:
                try:
                    opened = await services.open_image(str(image.bootstrap), load_config(text, "test"), name="img")
                    await scenario(opened)
                    opened.close()
                except Exception as error:  # not as a group
                    failures.append(error)

    trio.run(main)
    if failures:
        raise failures[0]


async def read(opened: ImageReader, name: str) -> bytes:
    ino = opened.bootstrap.resolve(name.encode())
    return await opened.read(ino, 0, opened.bootstrap.attr(ino).size)


async def all_right(opened: ImageReader) -> None:
    for name, data in FILES.items():
        assert await read(opened, name) == data, name


def wrong(message: str) -> Callable[[ImageReader], Awaitable[None]]:
    async def scenario(opened: ImageReader) -> None:
        with pytest.raises(ReadError, match=message):
            await read(opened, "hello")

    return scenario


# -- object stores


@pytest.mark.parametrize("kind", ["s3", "oss"])
def test_a_bucket(kind: str, image: TinyImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_LOOK", 3600.0)  # only a refusal makes it look again
    with object_server(kind, tokens={"LABKEY": "session one"}) as store:
        store.objects[f"pre fix/{image.blob_id}"] = image.blob
        config = store.config(object_prefix="pre fix/", session_token="session one")
        if kind == "oss":
            del config["region"]
        run(image, document(kind, config), all_right)
        assert all(seen.method == "GET" and "range" in seen.headers for seen in store.requests)
        run(image, document(kind, {**config, "session_token": ""}), wrong(r"status 403 \(InvalidToken\)"))
        run(image, document(kind, {**config, "access_key_secret": "x"}), wrong(r"403 \(SignatureDoesNotMatch\)"))
        run(image, document(kind, {**config, "object_prefix": ""}), wrong(r"404 \(NoSuchKey\)"))

        keys = tmp_path / "keys"

        def write_keys(token: str) -> None:
            lines = ["[default]", "aws_access_key_id=LABKEY", "aws_secret_access_key=lab+secret/42"]
            keys.write_text("\n".join([*lines, f"aws_session_token={token}\n"]))

        async def renewed(opened: ImageReader) -> None:
            """The token expires while the image is mounted, and somebody has put another one there."""
            assert await read(opened, "hello") == FILES["hello"]
            store.tokens["LABKEY"] = "session two"
            write_keys("session two")
            os.utime(keys, (1, 1))
            await all_right(opened)

        write_keys("session one")
        loose = {name: value for name, value in config.items() if not name.startswith(("access", "session"))}
        run(image, document(kind, {**loose, "credentials_file": str(keys)}), renewed)


def test_all_readers_get_the_new_credentials(image: TinyImage, tmp_path: Path) -> None:
    """Whoever is refused when another reader's refusal had the file read already, too."""
    keys = tmp_path / "keys"

    def write_keys(secret: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id=LABKEY\naws_secret_access_key={secret}\n")

    with object_server("s3") as store:
        store.objects[image.blob_id] = image.blob
        config = store.config(credentials_file=str(keys), access_key_id="", access_key_secret="")
        write_keys(store.keys["LABKEY"])

        async def main() -> None:
            with trio.fail_after(60):
                await readers_and_a_rotation()

        async def readers_and_a_rotation() -> None:
            async with trio.open_nursery() as nursery:
                hub = SourceHub(nursery)
                source = open_source(load_config(document("s3", config), "test").backend, hub)
                await source.read(image.blob_id, 0, 100, Priority.DEMAND)
                store.keys["LABKEY"] = "another secret"
                async with trio.open_nursery() as readers:
                    with store.lock:
                        for offset in range(8):
                            readers.start_soon(source.read, image.blob_id, offset, 100, Priority.DEMAND)
                        await trio.sleep(0.3)
                        write_keys("another secret")
                nursery.cancel_scope.cancel()
                hub.close()

        trio.run(main)


def test_a_bucket_of_a_server_that_others_made(image: TinyImage, tmp_path: Path) -> None:
    """moto's, which has botocore compute each signature: the host with its port is in it, odd names too."""
    path = f"pre fix/ü+~/{image.blob_id}"
    with moto_bucket(tmp_path, {path: image.blob}) as bucket:
        where = {"object_prefix": "pre fix/ü+~/"}
        run(image, document("s3", {**bucket.user, **where}), all_right)
        run(image, document("s3", {**bucket.session, **where}), all_right)
        run(image, document("s3", {**bucket.user, **where, "access_key_secret": "x"}), wrong("403 .SignatureDoesNotMa"))
        run(image, document("s3", {**bucket.session, **where, "session_token": "x"}), wrong("InvalidToken"))
        run(image, document("s3", bucket.user), wrong("404 .NoSuchKey"))


def test_a_bucket_behind_a_mirror(image: TinyImage) -> None:
    """The mirror gets the same path and headers; it is the origin that must accept the signature."""
    with object_server("s3") as store, faulty_server({image.blob_id: image.blob}) as mirror:
        store.objects[image.blob_id] = image.blob
        config = store.config(mirrors=[{"host": mirror.url, "headers": {"X-Dragonfly-Registry": "http://x"}}])
        run(image, document("s3", config), all_right)
        assert not store.requests
        assert mirror.requests[0].target == f"/blobs/{image.blob_id}"
        assert mirror.requests[0].headers["authorization"].startswith("AWS4-HMAC-SHA256")
        mirror.mode = "wrong-bytes"
        run(image, document("s3", config), all_right)
        assert store.requests


# -- http-proxy


def test_an_http_server_of_blobs(image: TinyImage) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(faulty_server({image.blob_id: image.blob}))
        for addr, path in ((server.url, "/blobs/"), (f"{server.url}/top", "blobs")):
            run(image, document("http-proxy", {"addr": addr, "path": path}), all_right)
        assert {request.target for request in server.requests} == {f"{p}/blobs/{image.blob_id}" for p in ("", "/top")}
        refused = stack.enter_context(dead_port())
        run(image, document("http-proxy", {"addr": f"http://{refused}"}), wrong("connection refused"))
        proxy = stack.enter_context(faulty_server({image.blob_id: image.blob}))
        through = {"addr": f"http://{refused}", "path": "/x", "proxy": {"url": proxy.url}}
        run(image, document("http-proxy", through), all_right)
        assert proxy.requests[0].target == f"http://{refused}/x/{image.blob_id}"
        assert proxy.requests[0].headers["x-dragonfly-use-p2p"] == "true"


@contextmanager
def unix_server(path: Path, blob: bytes, status: str) -> Iterator[list[str]]:
    """One blob at "/", as upstream's tests have it: the range alone, with status 200 or 206."""
    seen: list[str] = []

    def talk(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while line := lines.readline().decode():
                seen.append(line.strip())
                headers = {}
                while (header := lines.readline().decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
                part = blob[first : last + 1]
                more = f"Content-Range: bytes {first}-{last}/{len(blob)}\r\n" if status.startswith("206") else ""
                connection.sendall(f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(part)}\r\n\r\n".encode() + part)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            try:
                while True:
                    threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        yield seen
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("status", ["206 Partial Content", "200 OK"])
def test_a_unix_socket_of_one_blob(status: str, image: TinyImage, tmp_path: Path) -> None:
    path = tmp_path / "blob.sock"
    with unix_server(path, image.blob, status) as seen:
        run(image, document("http-proxy", {"addr": str(path), "path": "/ignored"}), all_right)
        assert set(seen) == {"GET / HTTP/1.1"}
    with pytest.raises(ConfigError, match=r"addr: '/none\.sock' is neither"):
        load_config(document("http-proxy", {"addr": "/none.sock"}), "test")


# -- localfs


def test_folders_of_blobs(image: TinyImage, tmp_path: Path) -> None:
    """`dir` is first; what is damaged or cut off there is read from `alt_dirs`, in their order."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
    first, second, third = (folder / image.blob_id for folder in folders)
    config = {"dir": str(folders[0]), "alt_dirs": [str(folder) for folder in folders[1:]]}
    run(image, document("localfs", config), wrong(f"{second}: no such file"))
    third.write_bytes(image.blob)
    run(image, document("localfs", config), all_right)
    first.write_bytes(image.blob[:2])
    second.write_bytes(bytes(byte ^ 0x55 for byte in image.blob))
    run(image, document("localfs", config), all_right)
    third.unlink()
    run(image, document("localfs", config), wrong(f"{second}: .*digest"))
    run(image, document("localfs", {"blob_file": str(second)}), wrong("digest"))
    second.write_bytes(image.blob)
    run(image, document("localfs", {"blob_file": str(second)}), all_right)


# -- localdisk


@pytest.mark.parametrize(("halves", "sector"), [(False, 512), (True, 512), (False, 4096)])
def test_a_disk_with_a_partition_table(halves: bool, sector: int, image: TinyImage, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    other = {"ab" * 32: noise(100_000, 9)}
    write_disk(disk, {**other, image.blob_id: image.blob}, halves=halves, sector=sector)
    run(image, document("localdisk", {"device_path": str(disk)}), all_right)
    with disk.open("r+b") as file:  # the first table is lost: the one at the end counts
        file.seek(sector)
        file.write(bytes(sector))
    run(image, document("localdisk", {"device_path": str(disk)}), all_right)
    write_disk(disk, other, halves=halves, sector=sector)
    run(image, document("localdisk", {"device_path": str(disk)}), wrong("no partition of this name"))


def test_a_disk_without_partition_table(image: TinyImage, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(image.blob)
    bare = {"device_path": str(disk), "disable_gpt": True}
    run(image, document("localdisk", bare), all_right)
    disk.write_bytes(bytes(4096) + image.blob)
    place = {"offset": 4096, "size": len(image.blob)}
    run(image, document("localdisk", {**bare, "blobs": {image.blob_id: place}}), all_right)
    outside = {**bare, "blobs": {image.blob_id: {"offset": 4096, "size": 1 << 40}}}
    for options, message in ((outside, "lie outside of"), ({"device_path": str(disk)}, "no GUID partition table")):
        with pytest.raises(ConfigError, match=message):
            run(image, document("localdisk", options), all_right)
    with pytest.raises(ConfigError, match="/none: No such file"):
        run(image, document("localdisk", {"device_path": "/none"}), all_right)


def test_damaged_tables_are_named(image: TinyImage, tmp_path: Path) -> None:
    """Each byte of header and first entry flipped, in both tables: an error with its place, or the other table."""
    disk = tmp_path / "disk"
    write_disk(disk, {"ab" * 32: b"data"})
    good = disk.read_bytes()
    for place in [*range(512, 512 + 92), *range(1024, 1024 + 128)]:
        damaged = bytearray(good)
        damaged[place] ^= 0xFF
        damaged[len(good) - 512 :] = bytes(512)
        with pytest.raises(GptError):
            read_partitions(lambda offset, count, data=damaged: bytes(data[offset : offset + count]), len(good))
    for length in range(0, 4096, 100):
        with pytest.raises(GptError):
            read_partitions(lambda offset, count, end=length: good[:end][offset : offset + count], length)


@pytest.mark.interop
@pytest.mark.root
def test_upstream_reads_the_same_disks(image: TinyImage, tmp_path: Path) -> None:
    """What our test writes is what upstream's localdisk takes for a disk of blobs."""
    binary = ref_bin("nydusd")
    if binary is None:
        pytest.skip("interop: the reference nydusd is not here")
    if reason := can_mount_fuse():
        pytest.skip(reason)
    code = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    with Nydusd(binary=binary) as daemon:
        for halves in (False, True):
            disk = tmp_path / f"disk{halves}"
            write_disk(disk, {image.blob_id: image.blob}, halves=halves)
            device = {"backend": {"type": "localdisk", "config": {"device_path": str(disk)}}}
            device["cache"] = {"type": "blobcache", "config": {"work_dir": str(tmp_path / f"cache{halves}")}}
            text = json.dumps({"device": device, "mode": "direct"})
            assert daemon.mount(f"/d{halves}", image.bootstrap, text).status == 204
            assert reader(code, daemon.mnt / f"d{halves}" / "hello").stdout == "hello, world\n"
