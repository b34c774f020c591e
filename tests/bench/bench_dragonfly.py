"""Two nodes that start an image, one after the other, through real Dragonfly: seconds, and what the registry gives.

    python -m tests.bench.bench_dragonfly [--link slow|fast] [--mib 48] [--rounds 3] [--json FILE]

The registry is docker-registry behind a link of 40 Mbit/s and 20 ms (slow) or of 1 Gbit/s and 5 ms (fast), which peers
do not share among themselves. `start` reads small files scattered over the image (3 of 40), `all` every file; each node
in an order of its own, without prefetch. Ways: the registry alone; classic Dragonfly; modern Dragonfly asked in small
ranges as upstream's nydusd does (`X-Dragonfly-Piece-Length` in the configuration switches ours off), the same with the
header that makes it fetch the whole blob, and as our daemon asks it. Bytes are those of the link towards Dragonfly and
the nodes, of both nodes together and of the second one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.dragonfly import CLASSIC, MODERN, Dragonfly, missing
from tests.lab.images import Blob, push_blob
from tests.lab.process import remove_tree, work_dir
from tests.lab.registry import Registry
from tests.lab.shaper import ShapedLink
from tests.lab.stack import daemon_config
from tests.lab.timedreads import TimedReads
from tests.lab.tiny import TinyImage, noise, tiny_image

LINKS = {"slow": (20.0, 40.0), "fast": (5.0, 1000.0)}  # ms, Mbit/s
SMALL = {"X-Dragonfly-Piece-Length": "4MiB"}
WAYS: list[tuple[str, str, dict[str, str]]] = [  # label, generation, more headers
    ("registry alone", "", {}),
    ("classic", CLASSIC, {}),
    ("modern, small ranges", MODERN, SMALL),
    ("modern, small ranges and whole blob", MODERN, {**SMALL, "X-Dragonfly-Prefetch": "true"}),
    ("modern, whole pieces", MODERN, {}),
]


class Bench:
    def __init__(self, stack: ExitStack, work: Path, link: str, mib: int) -> None:
        self.work = work
        self.registry = stack.enter_context(Registry(work / "reg"))
        self.link = stack.enter_context(ShapedLink(work / "link", self.registry.host, *LINKS[link]))
        self.clusters = {
            flavor: stack.enter_context(Dragonfly(work / flavor[0], self.link.url, flavor=flavor, peers=2))
            for flavor in (CLASSIC, MODERN)
            if not missing(flavor)
        }
        rng = random.Random(1)
        files = {f"f{number:04}": noise(rng.randrange(1, 66_000), number) for number in range(mib * 32)}
        self.image: TinyImage = tiny_image(work, files)
        self.blob = Blob(
            f"sha256:{self.image.blob_id}", len(self.image.blob), work / "blob", "application/octet-stream"
        )
        self.blob.path.write_bytes(self.image.blob)
        self._runs = 0

    def files(self, pattern: str) -> Mapping[str, bytes]:
        if pattern == "all":
            return self.image.files
        return {name: data for n, (name, data) in enumerate(sorted(self.image.files.items())) if n % 40 < 3}

    def run(self, flavor: str, headers: Mapping[str, str], pattern: str) -> dict[str, float]:
        """A repository of its own each time, so that no peer knows anything of it."""
        self._runs += 1
        repo = f"lab/run{self._runs}"
        push_blob(self.registry.host, repo, self.blob)
        figures: dict[str, float] = {}
        begin = self.link.count().down
        for number, label in enumerate(("first", "second")):
            mirrors = []
            if flavor:
                mirror = self.clusters[flavor].mirror(number)
                mirrors = [{**mirror, "headers": {**mirror["headers"], **headers}}]
            directory = self.work / f"n{self._runs}{number}"
            (directory / "d").mkdir(parents=True)
            config = directory / "config.json"
            settings = {"host": self.link.host, "repo": repo, "prefetch": False, "work_dir": str(directory / "cache")}
            config.write_text(json.dumps(daemon_config(mirrors, **settings)))
            before = self.link.count().down
            with Nydusd("--config", config, "--bootstrap", self.image.bootstrap, directory=directory / "d") as node:
                read = TimedReads(node.mnt, self.files(pattern), directory, number).figures(300)
            if read.wrong:
                sys.exit(f"{flavor or 'registry'}: {read.wrong[0]}")
            figures[f"{label}_seconds"] = read.seconds
            figures[f"{label}_mb"] = (self.link.count().down - before) / 1e6
        figures["both_mb"] = (self.link.count().down - begin) / 1e6
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_dragonfly")
    parser.add_argument("--link", choices=LINKS, default="slow")
    parser.add_argument("--mib", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reason = can_mount_fuse() or missing(CLASSIC) or missing(MODERN)
    if reason:
        sys.exit(reason)
    work = work_dir()
    results: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            bench = Bench(stack, work, options.link, options.mib)
            for pattern in ("start", "all"):
                size = sum(map(len, bench.files(pattern).values())) / 1e6
                print(
                    f"{pattern}: {size:.1f} MB of a blob of {len(bench.image.blob) / 1e6:.1f} MB, {options.link} link"
                )
                print(f"{'':36} {'first s':>8} {'second s':>9} {'both MB':>8} {'second MB':>10}", flush=True)
                rounds: dict[str, list[dict[str, float]]] = {label: [] for label, _, _ in WAYS}
                for _ in range(options.rounds):
                    for label, flavor, headers in WAYS:
                        rounds[label].append(bench.run(flavor, headers, pattern))
                for label, runs in rounds.items():
                    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                    results[f"{pattern}: {label}"] = median
                    first, second = median["first_seconds"], median["second_seconds"]
                    line = f"{label:36} {first:8.2f} {second:9.2f} {median['both_mb']:8.1f} {median['second_mb']:10.1f}"
                    print(line, flush=True)
    finally:
        remove_tree(work)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
