"""Conversion speed: our `nydus-image create --type tar-rafs` beside upstream's on the same layer tars.

    python -m tests.bench.bench_convert [--layer FILE]... [--rounds 3] [--json FILE]

Without --layer it packs two layers of this machine's Python: a runtime (large and small files) and sources only. Both
programs run as processes, turn about, and the best of the rounds counts: other load on the machine only ever adds.
`cpu` is user + system time. Output bytes are compared; compressed bytes may differ with the version of the libraries.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

from bootstrap.merge import extract_bootstrap
from tests.lab.paths import ref_bin

OURS = [sys.executable, "-c", "from bootstrap.cli.create import create; create()"]
FLAGS = ["--type", "tar-rafs", "--whiteout-spec", "none", "--blob-inline-meta", "--features", "blob-toc", "-l", "warn"]
BLOCK_LIMIT = 200 << 20


def pack(out: Path, only: str = "") -> Path:
    """A layer of the standard library and site packages, parents first, up to BLOCK_LIMIT bytes."""
    top = Path(sysconfig.get_paths()["stdlib"])
    size = 0
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        directory = tarfile.TarInfo("opt")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(directory)
        directory.name = "opt/python"
        archive.addfile(directory)
        for folder, subfolders, names in os.walk(top):
            subfolders.sort()
            place = Path("opt/python") / Path(folder).relative_to(top)
            if place != Path("opt/python"):
                archive.add(folder, str(place), recursive=False)
            for name in sorted(names):
                path = Path(folder, name)
                if not name.endswith(only) or (path.is_symlink() and only):
                    continue
                archive.add(path, str(place / name), recursive=False)
                size += path.lstat().st_size
            if size > BLOCK_LIMIT:
                break
    return out


def measure(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True, timeout=600, stdin=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(ours: Path, theirs: Path) -> str:
    """How alike two layer blobs are. The table of contents has the bootstrap packed by zstd in any case."""
    if filecmp.cmp(ours, theirs, shallow=False):
        return "equal"
    with ours.open("rb") as a, theirs.open("rb") as b:
        one = extract_bootstrap(a, ours.stat().st_size)
        two = extract_bootstrap(b, theirs.stat().st_size)
    return "equal, but for how zstd packed the bootstrap" if one == two else "compressed bytes differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=Path, action="append", help="a layer tar; repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    upstream = ref_bin("nydus-image")
    if upstream is None:
        print("interop: no reference nydus-image here, measuring ours alone")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        layers = arguments.layer or [pack(work / "runtime.tar"), pack(work / "sources.tar", ".py")]
        print(f"{'layer':14} {'MB':>6} {'compressor':10} {'ours s':>8} {'cpu s':>7} {'theirs s':>8} {'cpu s':>7} "
              f"{'wall ratio':>10} {'cpu ratio':>9}  bytes")  # fmt: skip
        for layer in layers:
            for compressor in ("zstd", "lz4_block", "none"):
                best: dict[str, tuple[float, float]] = {}
                for _ in range(arguments.rounds):
                    for who, program in (("ours", OURS), ("theirs", [str(upstream), "create"])):
                        if who == "theirs" and upstream is None:
                            continue
                        out = work / who
                        out.unlink(missing_ok=True)
                        flags = [*FLAGS, "--compressor", compressor, "--blob", str(out), str(layer)]
                        wall, cpu = measure([*program, *flags])
                        old = best.get(who, (wall, cpu))
                        best[who] = (min(wall, old[0]), min(cpu, old[1]))
                size = layer.stat().st_size
                ours, theirs = best["ours"], best.get("theirs")
                words = "" if theirs is None else compare(work / "ours", work / "theirs")
                rows.append(
                    {
                        "layer": layer.name,
                        "bytes": size,
                        "compressor": compressor,
                        "ours": ours,
                        "theirs": theirs,
                        "wall_ratio": theirs and ours[0] / theirs[0],
                        "cpu_ratio": theirs and ours[1] / theirs[1],
                        "output": words,
                    }
                )
                tail = "" if theirs is None else (
                    f"{theirs[0]:8.2f} {theirs[1]:7.2f} {ours[0] / theirs[0]:10.2f} {ours[1] / theirs[1]:9.2f}  {words}"
                )  # fmt: skip
                print(f"{layer.name:14} {size / 1e6:6.0f} {compressor:10} {ours[0]:8.2f} {ours[1]:7.2f} {tail}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
