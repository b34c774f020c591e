"""The snapshotter's socket is open soon after its start: what only some calls need is imported by them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Measured: all of them took as long as everything else before the socket, and 10 MB
FOR_LATER = (
    "asyncio", "grpc.aio",
    "trio", "httpx", "numpy", "attr", "rich", "bootstrap.reader", "nydusfs.cache", "nydusfs.containerd.client",
    "http.server", "tarfile", "difflib", "logging.handlers",
)  # fmt: skip

START = "from snapshotter import cli, lean; lean.import_grpc(); import snapshotter.recovery"


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_what_only_some_calls_need_is_not_imported_at_the_start() -> None:
    loaded = set(printed(f"{START}; import sys; print(*sys.modules)").split())
    assert "snapshotter.service" in loaded
    assert not loaded & set(FOR_LATER)


def test_looking_for_unused_blobs_brings_nothing_large_along(tmp_path: Path) -> None:
    blob = tmp_path / "cache" / ("a" * 64)
    for folder in (blob, tmp_path / "cache" / ".worker-2", tmp_path / "snapshots" / "1" / "fs"):
        folder.mkdir(parents=True)
    os.utime(blob, (0, 0))
    code = f"""
{START}
import pathlib, sys
from snapshotter.cachegc import orphans, remove
cache = pathlib.Path({str(tmp_path / "cache")!r})
(found,) = orphans(cache, pathlib.Path({str(tmp_path / "snapshots")!r}))
remove(cache, found)
print(*sys.modules)
"""
    assert not {"trio", "nydusfs.cache"} & set(printed(code).split())
    assert not blob.exists()


def test_what_is_left_out_can_be_had_later(tmp_path: Path) -> None:
    """By whoever asks: also by the parts of gRPC that were compiled to use it."""
    code = f"""
import asyncio, grpc.aio
async def serve():
    server = grpc.aio.server()
    server.add_insecure_port('unix:{tmp_path}/s')
    await server.start()
    async with grpc.aio.insecure_channel('unix:{tmp_path}/s') as channel:
        await asyncio.wait_for(channel.channel_ready(), 20)
    await server.stop(0)
asyncio.run(serve())
print('served')
"""
    assert printed(f"{START}\n{code}") == "served\n"
    assert printed(f"import asyncio; from snapshotter import lean; lean.import_grpc()\n{code}") == "served\n"


def test_pages_of_libraries_are_given_back() -> None:
    """And what is written to in them is not: the program goes on, libraries and all."""
    measure = "sum(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssFile'))"
    code = f"""
{START}
import hashlib, sqlite3, ssl
libraries = lean.Libraries()
before = {measure}
libraries.give_back()
print(before, {measure})
import re, asyncio, decimal
assert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0'
assert sqlite3.connect(':memory:').execute('select 1 + 1').fetchone() == (2,)
assert ssl.create_default_context() and decimal.Decimal(1) / 3 and re.compile('a+').match('aa')
import grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1)); server.start(); server.stop(0).wait()
"""
    before, after = map(int, printed(code).split())
    assert after < before * 0.7, "kB of files in memory"


STOPPED = """
import faulthandler, os, random, signal, sys, threading, time
from snapshotter.cli import _Stop

sys.setswitchinterval(1e-6)
faulthandler.dump_traceback_later(60, exit=True)

def ends(after):
    while time.perf_counter() < after:
        pass
    os.kill(os.getpid(), signal.SIGTERM)

for number in range(3000):
    stop = _Stop()
    thread = threading.Thread(target=ends, args=(time.perf_counter() + random.random() * 60e-6,))
    thread.start()
    stop.wait()
    thread.join()
    os.close(stop._pipe)
    os.close(signal.set_wakeup_fd(-1))
print("stopped")
"""


def test_a_signal_at_the_moment_when_it_begins_to_wait_for_one_is_heard() -> None:
    """It was not, one time in 1,500 of these: a snapshotter that was stopped right after its start went on for ever."""
    assert printed(STOPPED) == "stopped\n"
