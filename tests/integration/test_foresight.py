"""The first start of an image: what a program will load, and files beside those read, are asked for before the reader
does. Real daemon, real mount, real programs."""

from __future__ import annotations

import marshal
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest

from bootstrap.options import BuildOptions
from nydusfs import pyc
from tests.integration.test_learning import asked, config
from tests.lab.daemon import Nydusd, can_mount_fuse, wait_until
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]
CHUNK = 64 * 1024


def program_files() -> dict[str, bytes]:
    """A program of this machine that loads several libraries, at the paths at which its loader looks for them."""
    program = os.path.realpath(shutil.which("ls") or "/bin/ls")
    text = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    paths = [word for line in text.splitlines() for word in line.split() if word.startswith("/")]
    return {path.lstrip("/"): Path(path).read_bytes() for path in [program, *paths]}


@pytest.fixture
def image(tmp_path: Path) -> TinyImage:
    files = program_files() | {
        f"small/{number:03}": noise(30_000, 100 + number) + bytes(30_000) for number in range(240)
    }
    return tiny_image(tmp_path, files, BuildOptions(chunk_size=CHUNK), mode=0o755)


@pytest.fixture
def running(image: TinyImage, tmp_path: Path, fs_driver: str) -> Iterator[tuple[FaultyServer, Nydusd]]:
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server, Nydusd() as daemon:
        assert daemon.mount("/a", image.bootstrap, config(server, tmp_path / "cache")).status == 204
        yield server, daemon


def test_the_program_of_the_image_is_on_its_way_before_anybody_reads(tmp_path: Path) -> None:
    files = program_files() | {"etc/group": b"root:x:0:\n", "start": b"#!/usr/bin/env ls\n"}
    options = BuildOptions(chunk_size=CHUNK, prefetch=[b"/start"], prefetch_policy="fs")
    image = tiny_image(tmp_path, files, options, mode=0o755)
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server, Nydusd() as daemon:
        assert daemon.mount("/a", image.bootstrap, config(server, tmp_path / "cache")).status == 204
        assert settled(server) > 8 * CHUNK


def settled(server: FaultyServer) -> int:
    """Bytes asked for, once something was and nothing is any more."""

    def silent() -> bool:
        return bool(server.data_requests) and time.monotonic() - server.data_requests[-1].when > 1.0

    wait_until(silent, 60, "silence")
    return asked(server)


def test_a_program_that_is_started_has_its_libraries_fetched(
    image: TinyImage, running: tuple[FaultyServer, Nydusd]
) -> None:
    server, daemon = running
    names = [name for name in image.files if not name.startswith("small")]
    with (daemon.mnt / "a" / names[0]).open("rb") as file:
        assert file.read(64) == image.files[names[0]][:64]
    before = settled(server)
    # The head alone was read: what loading reads of the program and its libraries came by itself.
    assert before > 8 * CHUNK
    # And it runs, with the image's own loader and libraries.
    at = {name: daemon.mnt / "a" / name for name in names}
    loader, folders = at[names[-1]], ":".join({str(path.parent) for path in at.values()})
    argv = [loader, "--library-path", folders, at[names[0]], "--version"]
    assert "coreutils" in subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout


def test_a_module_that_is_read_has_what_it_imports_fetched(tmp_path: Path) -> None:
    """And what that imports: none of it was read. Each is alone in its chunks, so nothing comes along."""
    lib, tag = "usr/lib/python3", sys.implementation.cache_tag
    sources = {
        "main": "import pack.inner\ndef later():\n    import lazy\n",
        "pack/__init__": "from . import sibling\n",
        "pack/inner": "",
        "pack/sibling": "import deep",
        "deep": "",
        "lazy": "",
        "stranger": "",
    }
    files: dict[str, bytes] = {}
    for number, (name, source) in enumerate(sources.items()):
        folder, _, stem = f"{lib}/{name}".rpartition("/")
        code = compile(f"{source}\nDATA = {noise(2 * CHUNK, number)!r}", f"/{lib}/{name}.py", "exec")
        files[f"{folder}/__pycache__/{stem}.{tag}.pyc"] = MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
        files[f"{folder}/__pycache__/{stem}.{tag}.pyc.beside"] = noise(300_000, 90 + number)
    image = tiny_image(tmp_path, files, BuildOptions(chunk_size=CHUNK))
    path = f"{lib}/__pycache__/main.{tag}.pyc"
    if pyc.read(files[path]) is None:
        pytest.skip(f"modules of {tag} are not understood")
    with faulty_server({image.blob_id: image.blob}, latency=0.02) as server, Nydusd() as daemon:
        assert daemon.mount("/a", image.bootstrap, config(server, tmp_path / "cache")).status == 204
        assert (daemon.mnt / "a" / path).read_bytes() == files[path]
        settled(server)
        before = len(server.data_requests)
        for name in ("pack/__init__", "pack/inner", "pack/sibling", "deep"):
            other = next(one for one in files if one.endswith(f"{name.split('/')[-1]}.{tag}.pyc") and name[:4] in one)
            assert (daemon.mnt / "a" / other).read_bytes() == files[other]
        assert len(server.data_requests) == before
        for name in ("lazy", "stranger"):
            other = f"{lib}/__pycache__/{name}.{tag}.pyc"
            assert (daemon.mnt / "a" / other).read_bytes() == files[other]
        assert len(server.data_requests) > before


def test_neighbours_in_a_row_are_a_run(image: TinyImage, running: tuple[FaultyServer, Nydusd]) -> None:
    server, daemon = running

    server.rate = 4_000_000  # bytes are dear: what nobody asks for is not fetched

    def read(number: int) -> None:
        name = f"small/{number:03}"
        assert (daemon.mnt / "a" / name).read_bytes() == image.files[name]

    # Four of them lie in a segment.
    for number in (30, 10, 14, 18):
        read(number)
    settled(server)
    requests = len(server.data_requests)
    read(22)
    assert len(server.data_requests) == requests, "the run went on before it was read on"
    read(50)
    read(40)
    assert len(server.data_requests) == requests + 2, "two places are no run"


def test_where_waiting_costs_more_than_bytes_one_place_is_enough(
    image: TinyImage, running: tuple[FaultyServer, Nydusd]
) -> None:
    server, daemon = running
    for number in range(0, 200, 20):
        (daemon.mnt / "a" / f"small/{number:03}").read_bytes()
    settled(server)
    before = len(server.data_requests)
    (daemon.mnt / "a" / "small/213").read_bytes()
    settled(server)
    assert len(server.data_requests) > before + 1
    requests = len(server.data_requests)
    (daemon.mnt / "a" / "small/218").read_bytes()
    assert len(server.data_requests) == requests
