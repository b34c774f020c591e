"""Indexing of gzip layers: our `nydus-image create --type targz-ref` beside upstream's on the same tar.gz.

    python -m tests.bench.bench_zran [--layer FILE.tar.gz]... [--rounds 3] [--json FILE]

Without --layer it packs 500 MB of this machine's /usr, gzip -6. Both programs run as processes, turn about; the best of
the rounds counts. `cpu` is user + system time. The outputs must be the same bytes.
"""

from __future__ import annotations

import argparse
import filecmp
import gzip
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.bench.bench_convert import measure
from tests.lab.paths import ref_bin

OURS = [sys.executable, "-c", "from bootstrap.cli.create import create; create()"]
FLAGS = ["--type", "targz-ref", "--blob-inline-meta", "--features", "blob-toc", "-l", "warn"]
SIZE = 500 << 20


def pack(out: Path) -> Path:
    """A layer of documents, data and programs, as large as SIZE or as there are."""
    size = 0
    with (
        gzip.open(out, "wb", 6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for top in ("/usr/share", "/usr/lib/python3", "/usr/lib"):
            for folder, subfolders, names in os.walk(top):
                subfolders.sort()
                for name in sorted(names):
                    path = Path(folder, name)
                    if not path.is_symlink() and path.is_file():
                        archive.add(path, str(path)[1:])
                        size += path.stat().st_size
                    if size > SIZE:
                        return out
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=Path, action="append", help="a tar.gz; repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    programs = {"ours": OURS}
    upstream = ref_bin("nydus-image")
    if upstream is None:
        print("interop: no reference nydus-image here, measuring ours alone")
    else:
        programs["theirs"] = [str(upstream), "create"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for layer in arguments.layer or [pack(work / "usr.tar.gz")]:
            best: dict[str, tuple[float, float]] = {}
            for _ in range(arguments.rounds):
                for who, program in programs.items():
                    wall, cpu = measure([*program, *FLAGS, "--blob", str(work / who), str(layer)])
                    old = best.get(who, (wall, cpu))
                    best[who] = (min(wall, old[0]), min(cpu, old[1]))
            row: dict[str, object] = {"layer": layer.name, "bytes": layer.stat().st_size, **best}
            if "theirs" in best:
                row["wall_ratio"] = best["ours"][0] / best["theirs"][0]
                row["cpu_ratio"] = best["ours"][1] / best["theirs"][1]
                row["equal"] = filecmp.cmp(work / "ours", work / "theirs", shallow=False)
            print(row)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
