"""Reading a bootstrap of 1,000,000 files: opening, lookups, walks, the chunk map; seconds and memory per entry.

    python -m tests.bench.bench_reader [--files 1000000] [--keep DIRECTORY] [--json FILE]

The bootstraps are made by our own writers: one directory of 100,000 files, the rest in directories of 500, one chunk
per file. Each line is measured in a process of its own, so that memory is what that work took; pages of the file itself
are shared and given back under pressure and not counted. `cpu` is user + system time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.flat import flatten
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor, Digester, SuperFlags
from bootstrap.tree import Node
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

BIG = 100_000
SMALL = 500
FLAGS = SuperFlags.COMPRESS_ZSTD | SuperFlags.HASH_BLAKE3 | SuperFlags.EXPLICIT_UIDGID


def write(path: Path, version: int, files: int) -> None:
    """A bootstrap of that many files. Takes about 1.5 KB of memory per file."""
    blob = BlobInfo("b" * 64, 0x100000, Compressor.ZSTD, Digester.BLAKE3, BlobFeatures(0x4000_0001))
    blob.chunk_count, blob.uncompressed_size, blob.compressed_size = files, files * 4096, files * 1000
    blob.ci_offset, blob.ci_uncompressed_size = files * 1000, files * 16
    table = ChunkTable()
    home = table.place_of(blob)

    def directory(parent: Node | None, name: bytes) -> Node:
        node = Node(name, stat.S_IFDIR | 0o755)
        if parent is not None:
            assert parent.children is not None
            node.parent = parent
            parent.children[name] = node
        return node

    root = directory(None, b"/")
    folder = directory(root, b"big")
    for number in range(files):
        if number >= BIG and number % SMALL == 0:
            folder = directory(root, b"dir-%05d" % (number // SMALL))
        node = Node(b"file-%07d" % number, stat.S_IFREG | 0o644)
        node.size, node.parent = 3000, folder
        digest = hashlib.blake2b(b"%d" % number, digest_size=32).digest()
        place = number * 4096 if version == 6 else number * 3000
        node.add_chunk(table.add(digest, home, ChunkFlags.COMPRESSED, 1000, 3000, number * 1000, place, number, 0))
        assert folder.children is not None
        folder.children[node.name] = node
    tree = flatten(root, table, [blob], 0x100000)
    if version == 6:
        data = write_v6(tree, chunk_size=0x100000, flags=FLAGS | SuperFlags.ENCRYPT_NONE, prefetch=[])
    else:
        data = write_v5(tree, chunk_size=0x100000, flags=FLAGS, prefetch=[])
    path.write_bytes(data)


PRELUDE = """
import gc, json, random, resource, sys, time
from bootstrap.reader import open_bootstrap
from bootstrap.chunkmap import ChunkMap
path, table, files = sys.argv[1], sys.argv[2], int(sys.argv[3])
def anonymous():
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
def name(number):
    return b"/%s/file-%07d" % (b"big" if number < 100000 else b"dir-%05d" % (number // 500), number)
numbers = random.Random(1)
image, count = None, 1
def done(**more):
    print(json.dumps({"wall": time.perf_counter() - began, "cpu": cpu() - used, "kb": anonymous() - before,
                      "count": count, **more}))
"""
START = "before, used, began = anonymous(), cpu(), time.perf_counter()\n"
OPEN = "image = open_bootstrap(path)\n"
WORK = {
    "open": START + OPEN + "done()",
    "attr": OPEN
    + "inos = [image.resolve(name(numbers.randrange(files))) for _ in range(20000)]\n"
    + START
    + "for ino in inos: image.attr(ino)\ncount = len(inos)\ndone()",
    "lookup among 500": OPEN
    + "names = [name(numbers.randrange(100000, files)) for _ in range(20000)]\n"
    + "pairs = [(image.resolve(n[:10]), n[11:]) for n in names]\n"
    + START
    + "for parent, n in pairs: assert image.lookup(parent, n)\ncount = len(pairs)\ndone()",
    "lookup among 100,000": OPEN
    + "big = image.resolve(b'/big')\nnames = [b'file-%07d' % numbers.randrange(100000) for _ in range(20000)]\n"
    + START
    + "for n in names: assert image.lookup(big, n)\ncount = len(names)\ndone()",
    "walk": OPEN + START + "count = sum(1 for _ in image.walk())\ndone()",
    "walk and attr": OPEN
    + START
    + "count = 0\nfor _, entry in image.walk():\n image.attr(entry.ino)\n count += 1\ndone()",
    "chunk map, first": OPEN + START + "chunks = ChunkMap.open(image, table)\ncount = len(chunks)\n"
    "done(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
    "chunk map, again": OPEN + START + "chunks = ChunkMap.open(image, table)\ncount = len(chunks)\ndone()",
    "extent and chunk": OPEN
    + "chunks = ChunkMap.open(image, table)\n"
    + "inos = [image.resolve(name(numbers.randrange(files))) for _ in range(20000)]\n"
    + START
    + "for ino in inos:\n for e in image.extents(ino, 0, 4096):\n"
    + "  chunks.member(chunks.find(e.blob_index, e.blob_offset, e.size))\n"
    + "count = len(inos)\ndone()",
}


def measure(work: str, path: Path, table: Path, files: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + WORK[work], str(path), str(table), str(files)],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="directory for the bootstraps, used again when they are there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for version in (5, 6):
            path = folder / f"v{version}-{args.files}.boot"
            if not path.exists():
                # In a process of its own, for its memory.
                code = f"from tests.bench.bench_reader import *; write(Path({str(path)!r}), {version}, {args.files})"
                subprocess.run([sys.executable, "-c", code], check=True, timeout=1800)
            print(f"\nRAFS v{version}, {args.files} files, {path.stat().st_size >> 20} MiB")
            table = Path(scratch) / f"map-{version}"
            for work in WORK:
                rounds = []
                for _ in range(args.rounds):
                    if work == "chunk map, first":
                        table.unlink(missing_ok=True)
                    rounds.append(measure(work, path, table, args.files))
                best = min(rounds, key=lambda found: found["cpu"])
                results.setdefault(f"v{version}", {})[work] = best
                each = best["cpu"] / best["count"] * 1e6
                peak = f", peak {best['peak'] / 1024:.0f} MiB" if "peak" in best else ""
                print(
                    f"{work:22} {best['wall'] * 1000:9.1f} ms  cpu {best['cpu'] * 1000:9.1f} ms"
                    f"  {each:8.2f} us each of {best['count']:.0f}  {best['kb']:.0f} KiB{peak}"
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
