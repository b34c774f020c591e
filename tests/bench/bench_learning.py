"""Starts of an image whose earlier starts were watched: what was asked for beforehand, over-fetch, and time.

    python -m tests.bench.bench_learning [--rounds N] [--link slow|fast|both] [--json FILE]

A real daemon with a real mount and an empty cache each time, the registry behind 40 Mbit/s and 20 ms (slow) or 1 Gbit/s
and 5 ms (fast). What the registry sends is in its memory: its disk is not measured. The program reads 400 small files
in groups and pieces of large ones, in the order of what it imports, and computes a little. `first`: nothing is known.
`second`: the profile of the first start is there. Then the same program with profiles that do not fit: `stale`, of
another program; `hostile`, naming every segment of the image, those of the program last; beside `off`, where nothing is
learned or fetched ahead, and `here`, where all of it is in the cache and in memory: what the program takes by itself,
which no prefetch can save. Times are from the first read.

`of link`: beside what the needed bytes take at the link's rate plus one round trip; `of both`: beside that and the
program's own time, one after the other. MB over the link, also beside those of the segments that the program needs;
requests; the share of the segments that was asked for before the program did; milliseconds of processor time, from the
mount to the program's end, of daemon, program, registry and link, which share the machine.
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
from tests.lab.daemon import Nydusd, all_durable, can_mount_fuse
from tests.lab.erofs import cpu_seconds
from tests.lab.images import Blob, push_blob
from tests.lab.process import remove_tree, wait_until, work_dir
from tests.lab.registry import Registry
from tests.lab.shaper import ShapedLink

LINKS = {"slow": (20.0, 40.0), "fast": (5.0, 1000.0)}  # ms, Mbit/s
COMPUTES = 0.001  # seconds per file
COLUMNS = {  # width and digits
    "seconds": (8, 2), "of off": (7, 2), "of first": (9, 2), "of link": (8, 2), "of both": (8, 2), "MB": (7, 1),
    "of needed": (10, 2), "asked": (6, 2), "requests": (9, 0), "daemon": (7, 0), "program": (8, 0), "registry": (9, 0),
    "shaper": (7, 0),
}  # fmt: skip

# Reads what each line names: a path, an offset and a size; prints the seconds it took, and those of the processor.
_PROGRAM = """
import os, sys, time
began, used = time.monotonic(), time.process_time()
for line in open(sys.argv[1]):
    path, offset, size = line.split()
    fd = os.open(os.path.join(sys.argv[2], path), os.O_RDONLY)
    if int(offset): os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, int(size), int(offset))
    os.close(fd)
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end: pass
print(time.monotonic() - began, time.process_time() - used)
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

    def run(
        self, link: ShapedLink, registry: Registry, work: Path, reads: str, *, learn: bool = True, keep: bool = False
    ) -> dict[str, float]:
        """One start, with the profile that lies at `work`, which has the run's profile afterwards, and the cache too if
        it is to be kept."""
        for path in work.glob("*/*"):
            path.read_bytes()
        with Nydusd() as daemon:
            pids = {"daemon": daemon.worker_pid, "registry": registry.pid, "shaper": link.pid}
            used = {name: cpu_seconds(pid) for name, pid in pids.items()}
            before, mark = link.count().down, registry.mark()
            assert daemon.mount("/", self.boot, settings(link.host, work, learn)).status == 204
            listing = daemon.dir / "reads"
            listing.write_text(reads)
            command = [sys.executable, "-c", _PROGRAM, str(listing), str(daemon.mnt), str(COMPUTES)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            found = {name: 1000 * (cpu_seconds(pid) - used[name]) for name, pid in pids.items()}
            if keep:
                wait_until(lambda: all_durable(work), 60, "the cache on the disk")
            time.sleep(0.5)  # what is under way counts
            found["bytes"] = link.count().down - before
            found["requests"] = registry.since(mark).blobs().count
            found["ahead"] = daemon.get("metrics/blobcache").body["prefetch_segments"]
            daemon.stop()
        if not keep:
            remove_tree(work)
        seconds, program = map(float, done.stdout.split())
        return {"seconds": seconds, "program": 1000 * program, **found}

    def scenario(self, link: ShapedLink, registry: Registry) -> dict[str, dict[str, float]]:
        """All six starts. The profile's file is what is carried from one to the next."""
        work = self.base / "cache"
        file = self.base / "cache.profiles" / f"{self.name}.json"
        file.unlink(missing_ok=True)

        def run(reads: str = self.mine, **how: bool) -> dict[str, float]:
            return self.run(link, registry, work, reads, **how)

        found = {"off": run(learn=False), "first": run()}
        profile = file.read_bytes()
        needed = {(blob, number) for blob, number, _ in json.loads(profile)["segments"]}
        found["second"] = run(keep=True)
        found["here"] = run()
        file.unlink()
        run(self.other)
        found["stale"] = run()
        keys = sorted(self.sizes, key=lambda key: (key in needed, key))
        file.write_bytes(Profile(Course(9, dict.fromkeys(keys, 2.5))).encode())
        found["hostile"] = run()
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
                    rounds = [bench.scenario(link, registry) for _ in range(options.rounds)]
                for start in rounds[0]:
                    for one in rounds:
                        row = one[start]
                        ideal = row["needed"] / (mbit * 1e6 / 8) + rtt / 1000
                        row["of link"] = row["seconds"] / ideal
                        row["of both"] = row["seconds"] / (ideal + one["here"]["seconds"])
                        row["of needed"] = row["bytes"] / row["needed"]
                        row["MB"] = row["bytes"] / 1e6
                        for other in ("off", "first"):
                            row[f"of {other}"] = row["seconds"] / one[other]["seconds"]
                print(f"{name:9}" + "".join(f"{column:>{width}}" for column, (width, _) in COLUMNS.items()))
                for start in rounds[0]:
                    row = {key: statistics.median(one[start][key] for one in rounds) for key in rounds[0][start]}
                    table[f"{name} {start}"] = row
                    print(f"{start:9}" + "".join(f"{row[key]:{w}.{d}f}" for key, (w, d) in COLUMNS.items()), flush=True)
    finally:
        remove_tree(base)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
