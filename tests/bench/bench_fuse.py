"""Our nydusd beside upstream's: the same image, each with a cache of its own.

    python -m tests.bench.bench_fuse [--big MiB] [--files N] [--entries N] [--rounds N] [--only PLACE ...] [--json FILE]

Prints the median of the rounds for both and the ratio (above 1: ours is better). The blobs come from a directory
(`local`; "cold": nothing cached by the daemon; "disk": its cache is full, the kernel's pages dropped; "warm": the
kernel has the pages), or, always cold, from a registry on this machine (`registry`), behind 5 ms and 1 Gbit/s (`fast`)
or behind 20 ms and 40 Mbit/s (`slow`). "all": 8 readers, each with a file of its own.
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


_READERS = 8
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
    for number in range(entries):
        folder = root / "many" / f"d{number // 500:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}").touch()


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


def measure_remote(binary: Path | None, boot: Path, host: str, place: str) -> dict[str, float]:
    """What a fresh daemon reads from a registry, all of it for the first time."""
    daemon = Nydusd(binary=binary)
    config = daemon.dir / "c.json"
    config.write_text(registry_config(host, daemon.dir / "cache"))
    daemon.args = ("-B", boot, "-C", config)
    drop_caches()
    with daemon:
        if place == "slow":
            return {
                "slow: sequential, MiB/s": _figure(_SEQUENTIAL, daemon.mnt / "link"),
                "slow: tar of 150, s": _seconds("tar cf - tree/d000 tree/d005 tree/d009 | cat >/dev/null", daemon.mnt),
            }
        return {
            f"{place}: sequential, MiB/s": _figure(_SEQUENTIAL, daemon.mnt / "big"),
            f"{place}: random 4K, 1/s": _figure(_RANDOM, daemon.mnt / "random", "200"),
            f"{place}: all, s": _seconds("for i in part-*; do cat $i >/dev/null & done; wait", daemon.mnt),
            f"{place}: tar, s": _seconds(_TAR, daemon.mnt),
        }


def measure_local(binary: Path | None, boot: Path, blobs: Path) -> dict[str, float]:
    """Figures of one daemon, started for this, with a directory of blobs."""
    daemon = Nydusd(binary=binary)
    config = daemon.dir / "c.json"
    config.write_text(localfs_config(blobs, work_dir=daemon.dir / "cache"))
    daemon.args = ("-B", boot, "-C", config)
    figures: dict[str, float] = {}
    drop_caches()
    with daemon:
        big = daemon.mnt / "big"
        figures["ready, s"] = daemon.ready_seconds
        figures["idle RSS, MiB"] = daemon.memory("VmRSS") / 1024
        figures["find -ls first, s"] = _seconds("find . -ls", daemon.mnt)
        figures["find -ls again, s"] = _seconds("find . -ls", daemon.mnt)
        figures["sequential cold, MiB/s"] = _figure(_SEQUENTIAL, big)
        figures["all cold, s"] = _seconds("for i in part-*; do cat $i >/dev/null & done; wait", daemon.mnt)
        figures["sequential warm, MiB/s"] = _figure(_SEQUENTIAL, big)
        figures["random 4K cold, 1/s"] = _figure(_RANDOM, daemon.mnt / "random", "300")
        figures["random 4K warm, 1/s"] = _figure(_RANDOM, big, "20000")
        figures["tar cold, s"] = _seconds(_TAR, daemon.mnt)
        figures["tar warm, s"] = _seconds(_TAR, daemon.mnt)
        time.sleep(1.5)  # let the cache become durable: its writing is not what the next lines measure
        drop_caches()
        figures["sequential disk, MiB/s"] = _figure(_SEQUENTIAL, big)
        drop_caches()
        figures["random 4K disk, 1/s"] = _figure(_RANDOM, big, "3000")
        drop_caches()
        figures["tar disk, s"] = _seconds(_TAR, daemon.mnt)
        figures["RSS after, MiB"] = daemon.memory("VmRSS") / 1024
        figures["RSS anonymous after, MiB"] = daemon.memory("RssAnon") / 1024
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
                            figures[name] |= measure_local(binary, boot, base / "blobs")
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
    print(f"{'':28}{'ours':>12}{'upstream':>12}{'ratio':>8}")
    for figure, row in table.items():
        line = f"{figure:28}{row['ours']:12.3f}"
        if "upstream" in row:
            better = row["ours"] / row["upstream"] if figure.endswith("/s") else row["upstream"] / row["ours"]
            row["ratio"] = better
            line += f"{row['upstream']:12.3f}{better:8.2f}"
        print(line)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
