"""Conversion speed: all layers of an image, ours beside upstream's `nydus-image create` on one layer after the other.

    python -m tests.bench.bench_convert [--layer FILE]... [--rounds 3] [--forms tar,tar.gz] [--json FILE]

Without --layer the image is made of this machine's /usr: programs, libraries, Python, documents, headers; five layers
of about 800 MB and 25,000 files together. Ours is one process that calls `bootstrap.layers.build_layers` with a worker
for each CPU. Both sides run turn about; the figures are medians. `cpu` is user + system time of all processes, `MB`
the largest sum of their proportional set sizes. The blobs are compared byte for byte.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.paths import REPO, ref_bin

_PR_SET_CHILD_SUBREAPER = 36
MB = 1 << 20

LAYERS = (
    (150 * MB, ("/usr/bin", "/usr/sbin")),
    (220 * MB, ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu")),
    (150 * MB, ("/usr/lib/python3", "/usr/lib/python3.11", "/usr/local/lib")),
    (170 * MB, ("/usr/share/doc", "/usr/share/locale", "/usr/share/perl", "/usr/share/man", "/usr/share/zoneinfo")),
    (150 * MB, ("/usr/include", "/usr/src", "/usr/share/icons")),
)

OURS = """
import sys
from pathlib import Path
from bootstrap.layers import LayerFile, build_layers
from bootstrap.layout.common import Compressor, Digester
from bootstrap.options import BuildOptions
compressor, digester, out, *sources = sys.argv[1:]
options = BuildOptions(
    compressor=Compressor[compressor.upper()], digester=Digester[digester.upper()], inline_meta=True, blob_toc=True,
    whiteout_spec="none", prefetch=[b"/"], prefetch_policy="fs",
)
for _ in build_layers([LayerFile(i, Path(s), Path(out, f"ours-{i}"), options) for i, s in enumerate(sources)]):
    pass
"""


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of memory."""

    wall: float
    cpu: float
    memory: int = 0


def pack(out: Path, tops: Sequence[str], limit: int) -> int:
    """A layer of what lies below `tops`, parents first, up to `limit` bytes; the number of files."""
    size = count = 0
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        known: set[Path] = set()

        def folders(path: Path) -> None:
            for folder in [*reversed(path.parents), path]:
                if folder not in known and folder != Path("/"):
                    known.add(folder)
                    archive.add(folder, str(folder)[1:], recursive=False)

        for path in _files(tops):
            length = path.lstat().st_size
            if size + length > limit:
                continue
            folders(path.parent)
            archive.add(path, str(path)[1:], recursive=False)
            size += length
            count += 1
    return count


def _files(tops: Sequence[str]) -> Iterator[Path]:
    for top in tops:
        for folder, subfolders, names in os.walk(top):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                with suppress(OSError):
                    if path.lstat().st_size < 32 * MB:
                        yield path


def compress(path: Path) -> Path:
    packed = path.with_suffix(".tar.gz")
    with (
        path.open("rb") as source,
        packed.open("wb") as out,
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6, mtime=0) as archive,
    ):
        shutil.copyfileobj(source, archive, 1 << 20)
    return packed


class _Memory(threading.Thread):
    """Watches the proportional set size of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.2):
            self.peak = max(self.peak, sum(map(_pss, _descendants(self._pid))))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for at in found:
        with suppress(OSError):
            for task in Path(f"/proc/{at}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _pss(pid: int) -> int:
    with suppress(OSError, ValueError), open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    return 0


def measure(command: Sequence[str]) -> Cost:
    """One run, with everything it has started: orphans come to this process (it is their subreaper)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=REPO)
    assert process.stdin is not None
    process.stdin.write(b"/\n")
    process.stdin.close()
    memory = _Memory(process.pid)
    code = process.wait(timeout=900)
    wall = time.perf_counter() - started
    peak = memory.stop()
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    if code:
        raise SystemExit(f"{command[0]} failed with {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak)


def ours(layers: Sequence[Path], compressor: str, digester: str, out: Path) -> Cost:
    return measure([sys.executable, "-c", OURS, compressor, digester, str(out), *map(str, layers)])


def theirs(program: Path, layers: Sequence[Path], compressor: str, digester: str, out: Path) -> Cost:
    costs = []
    for number, layer in enumerate(layers):
        kind = "targz-rafs" if layer.suffix == ".gz" else "tar-rafs"
        flags = ["--log-level", "warn", "--type", kind, "--blob-inline-meta", "--features", "blob-toc"]
        flags += ["--whiteout-spec", "none", "--prefetch-policy", "fs", "--compressor", compressor]
        flags += ["--digester", digester, "--blob", str(out / f"theirs-{number}")]
        costs.append(measure([str(program), "create", *flags, str(layer)]))
    return Cost(sum(cost.wall for cost in costs), sum(cost.cpu for cost in costs), max(cost.memory for cost in costs))


def median(costs: Sequence[Cost]) -> Cost:
    columns = zip(*((cost.wall, cost.cpu, cost.memory) for cost in costs), strict=True)
    wall, cpu, memory = (statistics.median(column) for column in columns)
    return Cost(wall, cpu, int(memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=Path, action="append", help="a layer tar; repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", default="tar,tar.gz")
    parser.add_argument("--compressors", default="lz4_block,zstd")
    parser.add_argument("--digesters", default="blake3,sha256")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    upstream = ref_bin("nydus-image")
    if upstream is None:
        print("interop: no reference nydus-image here, measuring ours alone")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        layers: list[Path] = arguments.layer or []
        if not layers:
            layers = [work / f"layer{number}.tar" for number in range(len(LAYERS))]
            counts = [pack(out, tops, limit) for out, (limit, tops) in zip(layers, LAYERS, strict=True)]
            print(f"{sum(counts)} files in {len(layers)} layers, "
                  f"{sum(layer.stat().st_size for layer in layers) / 1e6:.0f} MB of tar")  # fmt: skip
        forms = {"tar": layers}
        if "tar.gz" in arguments.forms.split(","):
            with ProcessPoolExecutor() as pool:
                forms["tar.gz"] = list(pool.map(compress, layers))
        print("form   compressor digester  ours s    cpu   MB theirs s    cpu   MB wall ratio cpu ratio  blobs")
        for form in arguments.forms.split(","):
            for compressor in arguments.compressors.split(","):
                for digester in arguments.digesters.split(","):
                    mine, others = [], []
                    for _ in range(arguments.rounds):
                        if upstream is not None:
                            others.append(theirs(upstream, forms[form], compressor, digester, work))
                        mine.append(ours(forms[form], compressor, digester, work))
                    a, b = median(mine), median(others) if others else None
                    line = f"{form:7}{compressor:11}{digester:9}{a.wall:7.2f}{a.cpu:7.2f}{a.memory >> 20:5}"
                    row = {"form": form, "compressor": compressor, "digester": digester, "ours": asdict(a)}
                    if b is not None:
                        same = sum(
                            (work / f"ours-{number}").read_bytes() == (work / f"theirs-{number}").read_bytes()
                            for number in range(len(layers))
                        )
                        line += f"{b.wall:9.2f}{b.cpu:7.2f}{b.memory >> 20:5}"
                        line += f"{a.wall / b.wall:11.2f}{a.cpu / b.cpu:10.2f}  {same} of {len(layers)} equal"
                        row |= {"theirs": asdict(b), "equal": same}
                    rows.append(row)
                    print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
