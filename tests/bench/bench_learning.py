"""Starts of an image whose earlier starts were watched: what was asked for beforehand, over-fetch, and time.

    python -m tests.bench.bench_learning [--rounds N] [--link slow|fast|both] [--json FILE]

A real daemon with a real mount and an empty cache each time, the registry behind 40 Mbit/s and 20 ms (slow) or 1 Gbit/s
and 5 ms (fast). The program reads 400 small files in groups and pieces of large ones, in the order of what it imports,
and computes a little. `first`: nothing is known. `second`: the profile of the first start is there. Then the same
program with profiles that do not fit: `stale`, of another program; `hostile`, naming every segment of the image,
those of the program last; beside `off`, where nothing is learned or fetched ahead. Times are from the first read.
Seconds of the program, MB over the link beside those of the segments that it needs, the share of these that was asked
for before the program did, and the time beside what the bytes take at the link's rate plus one round trip and the
program's own computing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bootstrap.build import build_directory
from bootstrap.chunkmap import ChunkMap
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from nydusfs.profile import Course, Profile, identity
from nydusfs.segments import SEGMENT_SIZE, make_segment
from tests.bench.bench_fuse import registry_config
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.images import Blob, push_blob
from tests.lab.process import drop_caches, remove_tree, work_dir
from tests.lab.registry import Registry
from tests.lab.shaper import ShapedLink

LINKS = {"slow": (20.0, 40.0), "fast": (5.0, 1000.0)}  # ms, Mbit/s
COMPUTES = 0.001  # seconds per file

# Reads what each line names: a path, an offset and a size; prints the seconds it took.
_PROGRAM = """
import os, sys, time
began = time.monotonic()
for line in open(sys.argv[1]):
    path, offset, size = line.split()
    fd = os.open(os.path.join(sys.argv[2], path), os.O_RDONLY)
    if int(offset): os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, int(size), int(offset))
    os.close(fd)
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end: pass
print(time.monotonic() - began)
"""


def make_tree(root: Path) -> None:
    rng = random.Random(11)
    for package in range(120):
        folder = root / f"p{package:03}"
        folder.mkdir(parents=True)
        for number in range(30):
            size = rng.randrange(500, 30_000)
            (folder / f"m{number:02}").write_bytes(rng.randbytes(size // 2) + bytes(size - size // 2))
    for number in range(12):
        (root / f"lib{number:02}").write_bytes(b"".join(rng.randbytes(32768) + bytes(32768) for _ in range(80)))


def program(seed: int, packages: range, libraries: range) -> str:
    """What one program reads."""
    rng = random.Random(seed)
    lines: list[str] = []
    for package in rng.sample(packages, 20):
        lines += [f"p{package:03}/m{number:02} 0 40000" for number in rng.sample(range(30), 20)]
    for library in libraries:
        for place in sorted(rng.sample(range(1, 20), 6)):
            lines.insert(rng.randrange(len(lines)), f"lib{library:02} {place * 262144} 65536")
    return "\n".join(lines)


def settings(host: str, work: Path, learn: bool) -> str:
    value = json.loads(registry_config(host, work))
    value["fs_prefetch"] = {"enable": False, "learn": learn}
    return json.dumps(value)


class Bench:
    def __init__(self, base: Path) -> None:
        self.base = base
        make_tree(base / "t")
        blob = base / "blob"
        with blob.open("wb") as out:
            result = build_directory(str(base / "t"), out, BuildOptions())
        self.boot = base / "boot"
        self.boot.write_bytes(result.bootstrap)
        self.blob = Blob(f"sha256:{result.blob_id}", blob.stat().st_size, blob, "application/octet-stream")
        image = open_bootstrap(str(self.boot))
        self.name = identity(image)
        chunks = ChunkMap.open(image, None)
        self.sizes: dict[tuple[str, int], int] = {}
        for number in range(-(-image.blobs[0].uncompressed_size // SEGMENT_SIZE)):
            try:
                segment = make_segment(chunks, image.blobs[0], number)
            except KeyError:
                continue
            self.sizes[image.blobs[0].id, number] = segment.compressed_end - segment.compressed_start
        self.mine = program(1, range(60), range(6))
        self.other = program(2, range(60, 120), range(6, 12))

    def run(self, link: ShapedLink, work: Path, reads: str, learn: bool = True) -> dict[str, float]:
        """One start, with the profile that lies at `work`, which has the run's profile afterwards."""
        drop_caches()
        with Nydusd() as daemon:
            before = link.count().down
            assert daemon.mount("/", self.boot, settings(link.host, work, learn)).status == 204
            listing = daemon.dir / "reads"
            listing.write_text(reads)
            command = [sys.executable, "-c", _PROGRAM, str(listing), str(daemon.mnt), str(COMPUTES)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            time.sleep(0.5)  # what is under way counts
            moved = link.count().down - before
            ahead = daemon.get("metrics/blobcache").body["prefetch_segments"]
            daemon.stop()
        remove_tree(work)
        return {"seconds": float(done.stdout), "bytes": moved, "ahead": ahead}

    def scenario(self, link: ShapedLink) -> dict[str, dict[str, float]]:
        """All five starts. The profile's file is what is carried from one to the next."""
        work = self.base / "cache"
        file = self.base / "cache.profiles" / f"{self.name}.json"
        file.unlink(missing_ok=True)
        found = {"off": self.run(link, work, self.mine, learn=False), "first": self.run(link, work, self.mine)}
        profile = file.read_bytes()
        needed = {(blob, number) for blob, number, _ in json.loads(profile)["segments"]}
        found["second"] = self.run(link, work, self.mine)
        file.unlink()
        self.run(link, work, self.other)
        found["stale"] = self.run(link, work, self.mine)
        keys = sorted(self.sizes, key=lambda key: (key in needed, key))
        file.write_bytes(Profile(Course(9, dict.fromkeys(keys, 2.5))).encode())
        found["hostile"] = self.run(link, work, self.mine)
        file.unlink()
        for figures in found.values():
            figures["needed"] = sum(self.sizes[key] for key in needed)
            figures["asked"] = figures["ahead"] / len(needed)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", choices=(*LINKS, "both"), default="both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := can_mount_fuse():
        print(f"cannot run: {reason}")
        return 1
    table: dict[str, Any] = {}
    base = work_dir()
    try:
        bench = Bench(base)
        with Registry(base / "reg") as registry:
            push_blob(registry.host, "bench", bench.blob)
            for name in LINKS if options.link == "both" else (options.link,):
                rtt, mbit = LINKS[name]
                with ShapedLink(base / name, registry.host, rtt_ms=rtt, mbit=mbit) as link:
                    rounds = [bench.scenario(link) for _ in range(options.rounds)]
                computing = COMPUTES * len(bench.mine.splitlines())
                heads = f"{'s':>8}{'of off':>8}{'of first':>10}{'of link':>9}{'MB':>8}{'of needed':>11}{'asked':>8}"
                print(f"{name:10}{heads}")
                for start in rounds[0]:
                    row = {key: statistics.median(one[start][key] for one in rounds) for key in rounds[0][start]}
                    for other in ("off", "first"):
                        ratios = [one[start]["seconds"] / one[other]["seconds"] for one in rounds]
                        row[f"of {other}"] = statistics.median(ratios)
                    ideal = row["bytes"] / (mbit * 1e6 / 8) + rtt / 1000 + computing
                    row["of link"] = row["seconds"] / ideal
                    table[f"{name} {start}"] = row
                    figures = f"{row['seconds']:8.2f}{row['of off']:8.2f}{row['of first']:10.2f}{row['of link']:9.2f}"
                    figures += f"{row['bytes'] / 1e6:8.1f}"
                    share = f"{row['asked']:8.2f}" if start == "second" else ""
                    print(f"{start:10}{figures}{row['bytes'] / row['needed']:11.2f}{share}", flush=True)
    finally:
        remove_tree(base)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
