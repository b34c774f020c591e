"""What a reader pays for prefetch: demand reads while the whole image is fetched ahead, and without prefetch.

    python -m tests.bench.bench_prefetch [--rounds N] [--seconds S] [--link slow|fast|both] [--json FILE]

A real daemon with a real mount, the registry behind a link of 40 Mbit/s and 20 ms (slow), or of 1 Gbit/s and 5 ms. The
reader asks for 4 KiB in places nobody has read, in the part of the image that prefetch reaches last, so each read is
one fetch in both runs. `steady`: one after the other without a pause; `crowd`: four such readers; `bursts`: ten reads,
then 0.7 s in which the program computes; `sparse`: one read, then 0.2 s; `rare`: then 1.5 s. Prints the p95 of the
reads without and with prefetch, their ratio (medians of the rounds, both sides in turn), and how much of the link's
rate prefetch had meanwhile.
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
from bootstrap.options import BuildOptions
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.images import Blob, push_blob
from tests.lab.process import drop_caches, remove_tree, work_dir
from tests.lab.registry import Registry
from tests.lab.shaper import ShapedLink

MIB = 1 << 20
LINKS = {"slow": (20.0, 40.0), "fast": (5.0, 1000.0)}  # ms, Mbit/s
PATTERNS = {
    "steady": (1, 0, 0.0),
    "crowd": (4, 0, 0.0),
    "bursts": (1, 10, 0.7),
    "sparse": (1, 1, 0.2),
    "rare": (1, 1, 1.5),
}

# Prints the seconds of each read, each in a chunk of its own.
_READER = """
import json, os, random, sys, threading, time
path, readers, burst, pause, seconds = sys.argv[1], *map(json.loads, sys.argv[2:])
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
places = [n << 18 for n in range(os.fstat(fd).st_size >> 18)]
random.Random(5).shuffle(places)
places = iter(places)
taken = []
end = time.monotonic() + seconds
def run():
    count = 0
    for place in places:
        began = time.monotonic()
        if began > end: return
        os.pread(fd, 4096, place)
        taken.append(time.monotonic() - began)
        count += 1
        if burst and count % burst == 0: time.sleep(pause)
threads = [threading.Thread(target=run) for _ in range(readers)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(taken))
"""


def make_image(base: Path, ahead_mib: int, demand_mib: int) -> tuple[Path, Blob]:
    """Chunks of 256 KiB, half compressible; `z` is what the reader reads, the last of the blob."""
    rng = random.Random(3)
    (base / "t").mkdir(parents=True)
    for name, size in (("a", ahead_mib), ("z", demand_mib)):
        with (base / "t" / name).open("wb") as file:
            for _ in range(size * 16):
                file.write(rng.randbytes(MIB // 32) + bytes(MIB // 32))
    blob = base / "blob"
    with blob.open("wb") as out:
        result = build_directory(str(base / "t"), out, BuildOptions(chunk_size=0x40000))
    (base / "boot").write_bytes(result.bootstrap)
    remove_tree(base / "t")
    return base / "boot", Blob(f"sha256:{result.blob_id}", blob.stat().st_size, blob, "application/octet-stream")


def config(host: str, work: Path, prefetch: bool) -> str:
    backend = {"type": "registry", "config": {"scheme": "http", "host": host, "repo": "bench", "timeout": 30}}
    cache = {"type": "blobcache", "config": {"work_dir": str(work)}}
    ahead = {"enable": prefetch, "threads_count": 8, "merging_size": MIB, "prefetch_all": True, "learn": False}
    device = {"id": "", "backend": backend, "cache": cache}
    return json.dumps({"device": device, "mode": "direct", "fs_prefetch": ahead})


def run(boot: Path, link: ShapedLink, pattern: str, prefetch: bool, seconds: float) -> dict[str, float]:
    """One fresh daemon. `rate`: bytes per second that prefetch had while the reader read."""
    drop_caches()
    with Nydusd() as daemon:
        # Named, so that it waits neither for the start to be over nor for whoever reads what is here.
        text = config(link.host, daemon.dir / "cache", prefetch)
        assert daemon.mount("/", boot, text, prefetch_files=["/"]).status == 204
        time.sleep(1.0)  # prefetch is under way
        before = daemon.get("metrics/blobcache").body["prefetch_data_amount"]
        arguments = [str(value) for value in (daemon.mnt / "z", *PATTERNS[pattern], seconds)]
        command = [sys.executable, "-c", _READER, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
        fetched = daemon.get("metrics/blobcache").body["prefetch_data_amount"] - before
    taken = sorted(json.loads(done.stdout))
    return {
        "reads": len(taken),
        "p50": taken[len(taken) // 2],
        "p95": taken[int(len(taken) * 0.95)],
        "longest": taken[-1],
        "rate": fetched / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--link", choices=(*LINKS, "both"), default="both")
    parser.add_argument("--pattern", choices=tuple(PATTERNS), action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := can_mount_fuse():
        print(f"cannot run: {reason}")
        return 1
    table: dict[str, Any] = {}
    base = work_dir()
    print(f"{'':16}{'reads':>7}{'p50':>8}{'p95':>8}  with:{'p50':>8}{'p95':>8}{'longest':>9}{'ratio':>7}{'of link':>9}")
    try:
        for name in LINKS if options.link == "both" else (options.link,):
            rtt, mbit = LINKS[name]
            # More than the link carries in all of a run, so that prefetch never runs out of work.
            boot, blob = make_image(base / name, int(2.2 * options.seconds * min(mbit, 1000) / 8), 256)
            with (
                Registry(base / f"{name}-reg") as registry,
                ShapedLink(base / f"{name}-link", registry.host, rtt_ms=rtt, mbit=mbit) as link,
            ):
                push_blob(registry.host, "bench", blob)
                for pattern in options.pattern or PATTERNS:
                    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
                    for _ in range(options.rounds):
                        for prefetch in (False, True):
                            runs[prefetch].append(run(boot, link, pattern, prefetch, options.seconds))
                    without, beside = (
                        {key: statistics.median(run[key] for run in runs[prefetch]) for key in runs[prefetch][0]}
                        for prefetch in (False, True)
                    )
                    ratio = beside["p95"] / without["p95"]
                    share = beside["rate"] / (mbit * 1e6 / 8)
                    table[f"{name} {pattern}"] = {"without": without, "with": beside, "ratio": ratio, "share": share}
                    times = f"{without['p50'] * 1e3:8.1f}{without['p95'] * 1e3:8.1f}       "
                    times += f"{beside['p50'] * 1e3:8.1f}{beside['p95'] * 1e3:8.1f}{beside['longest'] * 1e3:9.1f}"
                    label = f"{name} {pattern}"
                    print(f"{label:16}{without['reads']:7.0f}{times}{ratio:7.2f}{share:9.2f}", flush=True)
            remove_tree(base / name)
    finally:
        remove_tree(base)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0 if all(row["ratio"] <= 1.2 for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
