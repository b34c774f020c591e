"""Our nydusd beside upstream's: the same image, each with a cache of its own.

    python -m tests.bench.bench_fuse [--big MiB] [--files N] [--entries N] [--rounds N] [--only PLACE ...] [--json FILE]

Prints the median of the rounds for both and the ratio (above 1: ours is better), and the processor time that the
daemon used meanwhile. The blobs come from a directory (`local`; "cold": nothing cached by the daemon; "disk": its cache
is full, the kernel's pages dropped; "warm": the kernel has the pages; "again": the daemon was started anew on its full
cache, the kernel knows no name and has no page of the mount), or, always cold, from a registry on this machine
(`registry`), behind 5 ms and 1 Gbit/s (`fast`) or behind 20 ms and 40 Mbit/s (`slow`). "all": 8 readers, each with a
file of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bootstrap.build import build_directory
from bootstrap.options import BuildOptions
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.images import Blob, push_blob
from tests.lab.paths import ref_bin
from tests.lab.process import drop_caches, remove_tree, work_dir
from tests.lab.registry import Registry
from tests.lab.shaper import ShapedLink

MIB = 1 << 20

_SEQUENTIAL = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
began = time.perf_counter()
total = 0
while data := os.read(fd, 1 << 20): total += len(data)
print(total / (1 << 20) / (time.perf_counter() - began))
"""
_RANDOM = """
import os, random, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
pages = os.fstat(fd).st_size // 4096
rng = random.Random(7)
offsets = [rng.randrange(pages) * 4096 for _ in range(int(sys.argv[2]))]
began = time.perf_counter()
for offset in offsets: os.pread(fd, 4096, offset)
print(len(offsets) / (time.perf_counter() - began))
"""


# What the start of a program does: names that are not there, links, small files from end to end.
_REPLAY = """
import os, random, sys, time
os.chdir(sys.argv[1])
numbers = list(range(int(sys.argv[2])))
random.Random(5).shuffle(numbers)
began = time.perf_counter()
for number in numbers:
    folder = f"d{number // 50:03d}"
    os.path.exists(f"{folder}/absent-{number}")
    name = os.readlink(f"{folder}/link-{number}") if number % 10 == 0 else f"file-{number}"
    with open(f"{folder}/{name}", "rb", buffering=0) as file: file.readall()
print(len(numbers) / (time.perf_counter() - began))
"""

_READERS = 8
_ALL = "for i in part-*; do cat $i >/dev/null & done; wait"
_TAR = "tar cf - tree | cat >/dev/null"
_LINKS = {"fast": (5.0, 1000.0), "slow": (20.0, 40.0)}  # ms, Mbit/s


def make_tree(root: Path, big_mib: int, files: int, entries: int) -> None:
    """One big file and many small ones, of half compressible bytes, and entries without any."""
    rng = random.Random(1)

    def half(size: int) -> bytes:
        return rng.randbytes(size // 2) + bytes(size - size // 2)

    root.mkdir()
    # "link" is read over the slow link: 3 s of it. "random" is met by random reads first.
    parts = [(f"part-{number}", max(1, big_mib // _READERS)) for number in range(_READERS)]
    for name, size in (("big", big_mib), ("random", 32), ("link", 24), *parts):
        with (root / name).open("wb") as file:
            for _ in range(size * 16):
                file.write(half(MIB // 16))
    for number in range(files):
        folder = root / "tree" / f"d{number // 50:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{number}").write_bytes(half(rng.randrange(200, 16000)))
        if number % 10 == 0:
            (folder / f"link-{number}").symlink_to(f"file-{number}")
    for number in range(entries):
        folder = root / "many" / f"d{number // 500:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}").touch()
    # What a layer has: containerd and Docker cut its times to seconds.
    for folder, _, names in os.walk(root):
        for name in (".", *names):
            path = os.path.join(folder, name)
            os.utime(path, (seconds := int(os.lstat(path).st_mtime), seconds), follow_symlinks=False)


def _figure(code: str, *arguments: str | Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=True
    )
    return float(done.stdout)


def _seconds(command: str, cwd: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["sh", "-c", command], cwd=cwd, timeout=300, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def registry_config(host: str, work: Path) -> str:
    """A version 1 configuration for the repository `bench` of a registry spoken to in the clear."""
    backend = {"type": "registry", "config": {"scheme": "http", "host": host, "repo": "bench", "timeout": 30}}
    cache = {"type": "blobcache", "config": {"work_dir": str(work)}}
    return json.dumps({"device": {"id": "", "backend": backend, "cache": cache}, "mode": "direct"})


class Figures(dict[str, float]):
    """By name; under a name with `_CPU` behind it the seconds of processor time that the daemon used for that."""

    def __init__(self, daemon: Nydusd) -> None:
        self._daemon = daemon

    def add(self, name: str, measure: Callable[[], float]) -> None:
        clock = (~self._daemon.worker_pid << 3) | 2  # as clock_getcpuclockid(3) makes it
        before = time.clock_gettime(clock)
        self[name] = measure()
        self[name + _CPU] = time.clock_gettime(clock) - before


_CPU = ", CPU"


def measure_remote(binary: Path | None, boot: Path, host: str, place: str) -> dict[str, float]:
    """What a fresh daemon reads from a registry, all of it for the first time."""
    daemon = Nydusd(binary=binary)
    config = daemon.dir / "c.json"
    config.write_text(registry_config(host, daemon.dir / "cache"))
    daemon.args = ("-B", boot, "-C", config)
    figures = Figures(daemon)
    mnt = daemon.mnt
    drop_caches()
    with daemon:
        if place == "slow":
            figures.add("slow: sequential, MiB/s", lambda: _figure(_SEQUENTIAL, mnt / "link"))
            tar = "tar cf - tree/d000 tree/d005 tree/d009 | cat >/dev/null"
            figures.add("slow: tar of 150, s", lambda: _seconds(tar, mnt))
            return figures
        figures.add(f"{place}: sequential, MiB/s", lambda: _figure(_SEQUENTIAL, mnt / "big"))
        figures.add(f"{place}: random 4K, 1/s", lambda: _figure(_RANDOM, mnt / "random", "200"))
        figures.add(f"{place}: all, s", lambda: _seconds(_ALL, mnt))
        figures.add(f"{place}: tar, s", lambda: _seconds(_TAR, mnt))
    return figures


def measure_local(binary: Path | None, boot: Path, blobs: Path, files: int) -> dict[str, float]:
    """Figures of one daemon, started for this, with a directory of blobs."""
    daemon = Nydusd(binary=binary)
    config = daemon.dir / "c.json"
    config.write_text(localfs_config(blobs, work_dir=daemon.dir / "cache"))
    daemon.args = ("-B", boot, "-C", config)
    figures = Figures(daemon)
    mnt, big = daemon.mnt, daemon.mnt / "big"
    drop_caches()
    with daemon:
        figures["ready, s"] = daemon.ready_seconds
        figures["idle RSS, MiB"] = daemon.memory("VmRSS") / 1024
        figures.add("find -ls first, s", lambda: _seconds("find . -ls", mnt))
        figures.add("find -ls again, s", lambda: _seconds("find . -ls", mnt))
        figures.add("sequential cold, MiB/s", lambda: _figure(_SEQUENTIAL, big))
        figures.add("all cold, s", lambda: _seconds(_ALL, mnt))
        figures.add("sequential warm, MiB/s", lambda: _figure(_SEQUENTIAL, big))
        figures.add("random 4K cold, 1/s", lambda: _figure(_RANDOM, mnt / "random", "300"))
        figures.add("random 4K warm, 1/s", lambda: _figure(_RANDOM, big, "20000"))
        figures.add("tar cold, s", lambda: _seconds(_TAR, mnt))
        figures.add("tar warm, s", lambda: _seconds(_TAR, mnt))
        time.sleep(1.5)  # let the cache become durable: its writing is not what the next lines measure
        drop_caches()
        figures.add("sequential disk, MiB/s", lambda: _figure(_SEQUENTIAL, big))
        drop_caches()
        figures.add("random 4K disk, 1/s", lambda: _figure(_RANDOM, big, "3000"))
        drop_caches()
        figures.add("tar disk, s", lambda: _seconds(_TAR, mnt))
        figures["RSS after, MiB"] = daemon.memory("VmRSS") / 1024
        figures["RSS anonymous after, MiB"] = daemon.memory("RssAnon") / 1024
        daemon.stop()
        daemon.start()
        figures.add("small files again, 1/s", lambda: _figure(_REPLAY, mnt / "tree", str(min(files, 5000))))
        daemon.stop()
        daemon.start()
        figures.add("tar again, s", lambda: _seconds(_TAR, mnt))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", type=int, default=48, metavar="MIB", help="size of the one big file")
    parser.add_argument("--files", type=int, default=10_000, help="number of small files")
    parser.add_argument("--entries", type=int, default=90_000, help="number of empty files, for find")
    parser.add_argument("--only", choices=("local", "registry", *_LINKS), action="append", help="places to measure")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := can_mount_fuse():
        print(f"cannot run: {reason}")
        return 1
    contenders: dict[str, Path | None] = {"ours": None}
    reference = ref_bin("nydusd")
    if reference is None:
        print("interop: no reference nydusd here, only ours is measured")
    else:
        contenders["upstream"] = reference
    base = work_dir()
    try:
        make_tree(base / "t", options.big, options.files, options.entries)
        blob = base / "blob"
        with blob.open("wb") as out:
            result = build_directory(str(base / "t"), out, BuildOptions())
        boot = base / "boot"
        boot.write_bytes(result.bootstrap)
        (base / "blobs").mkdir()
        os.rename(blob, base / "blobs" / result.blob_id)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        path = base / "blobs" / result.blob_id
        stored = Blob(f"sha256:{result.blob_id}", path.stat().st_size, path, "application/octet-stream")
        places = options.only or ["local", "registry", *_LINKS]
        with ExitStack() as stack:
            registry = stack.enter_context(Registry(base / "reg"))
            push_blob(registry.host, "bench", stored)
            hosts = {"registry": registry.host}
            for place, (rtt, mbit) in _LINKS.items():
                link = ShapedLink(base / place, registry.host, rtt_ms=rtt, mbit=mbit)
                hosts[place] = stack.enter_context(link).host
            for _ in range(options.rounds):
                figures: dict[str, dict[str, float]] = {name: {} for name in contenders}
                for place in places:
                    for name, binary in contenders.items():  # alternating: a busy minute hits both
                        if place == "local":
                            figures[name] |= measure_local(binary, boot, base / "blobs", options.files)
                        else:
                            figures[name] |= measure_remote(binary, boot, hosts[place], place)
                for name in contenders:
                    runs[name].append(figures[name])
    finally:
        remove_tree(base)
    table = {
        figure: {name: statistics.median(run[figure] for run in results) for name, results in runs.items()}
        for figure in runs["ours"][0]
    }
    print(f"{'':28}{'ours':>12}{'upstream':>12}{'ratio':>8}{'CPU, ms':>12}{'upstream':>12}")
    for figure, row in table.items():
        if figure.endswith(_CPU):
            continue
        line = f"{figure:28}{row['ours']:12.3f}"
        if "upstream" in row:
            better = row["ours"] / row["upstream"] if figure.endswith("/s") else row["upstream"] / row["ours"]
            row["ratio"] = better
            line += f"{row['upstream']:12.3f}{better:8.2f}"
        used = table.get(figure + _CPU, {})
        print(line + "".join(f"{seconds * 1000:12.0f}" for seconds in used.values()))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
