"""Merging: our `nydus-image merge` beside upstream's on the same layer bootstraps.

    python -m tests.bench.bench_merge [--layers 30] [--files 5000] [--fs-version 6 5] [--rounds 3] [--json FILE]
        [--keep DIR]

The layers are made here: new files in directories of their own, and in one entry of eight something below that is
replaced, removed, linked or hung into a directory that other layers have too. Both programs run as processes, turn
about, and the best of the rounds counts: other load on the machine only ever adds. `cpu` is user + system time, `rss`
the peak of resident memory in MB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lab.paths import ref_bin

OURS = [sys.executable, "-c", "from bootstrap.cli import main; main()"]
CREATE = ["create", "-l", "warn", "--type", "tar-rafs", "--whiteout-spec", "none", "--blob-inline-meta"]
SHARED_FOLDERS = 40


def layer_tar(number: int, files: int) -> bytes:
    """One layer of `files` entries that are no directories: deterministic, so that rounds and machines compare."""
    random_ = random.Random(number)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        known: set[str] = set()

        def add(path: str, kind: bytes, data: bytes = b"", link: str = "") -> None:
            head, _, _ = path.rpartition("/")
            if head and head not in known:
                add(head, tarfile.DIRTYPE)
            if path in known:
                return
            known.add(path)
            member = tarfile.TarInfo(path)
            member.type, member.linkname, member.size = kind, link, len(data)
            member.mode, member.mtime = (0o755 if kind == tarfile.DIRTYPE else 0o644), 1_700_000_000 + number
            if random_.random() < 0.01:
                member.pax_headers = {"SCHILY.xattr.security.capability": "x" * 20}
            archive.addfile(member, io.BytesIO(data))

        made = 0
        while made < files:
            folder = f"usr/lib/package{number}/module{made // 400}/part{made // 12}"
            name = f"{folder}/{random_.choice(['', 'lib', 'test_', '_'])}name{made}.{random_.choice(['py', 'so', 'h'])}"
            made += 1
            shared = f"usr/share/common{random_.randrange(SHARED_FOLDERS)}"
            dice = random_.randrange(64)
            data = b"%d %d" % (number, made)
            if dice == 0 and number:
                add(f"{shared}/.wh.entry{random_.randrange(files)}", tarfile.REGTYPE)
            elif dice == 1 and number:
                below = random_.randrange(number)
                part = random_.randrange(files // 12)
                add(f"usr/lib/package{below}/module{part * 12 // 400}/.wh.part{part}", tarfile.REGTYPE)
            elif dice < 6:
                add(f"{shared}/entry{random_.randrange(files)}", tarfile.REGTYPE, data)
            elif dice < 9:
                add(name, tarfile.SYMTYPE, link=f"../{shared}/entry{made}")
            elif dice == 9:
                add(f"{name}.first", tarfile.REGTYPE, data)
                add(name, tarfile.LNKTYPE, link=f"{name}.first")
            else:
                add(name, tarfile.REGTYPE, data)
    return out.getvalue()


def make_layers(folder: Path, version: int, layers: int, files: int) -> list[Path]:
    """The bootstraps of all layers, lowest first."""

    def one(number: int) -> Path:
        boot = folder / f"{number:064x}"
        if not boot.exists():
            tar = folder / f"{number}.tar"
            tar.write_bytes(layer_tar(number, files))
            flags = ["--fs-version", str(version), "--compressor", "none", "--blob", f"{boot}.tmp", str(tar)]
            subprocess.run([*OURS, *CREATE, *flags], check=True, timeout=600, stdin=subprocess.DEVNULL)
            from bootstrap.inlined import extract_bootstrap

            with open(f"{boot}.tmp", "rb") as blob:
                boot.write_bytes(extract_bootstrap(blob, os.fstat(blob.fileno()).st_size))
            tar.unlink()
            Path(f"{boot}.tmp").unlink()
        return boot

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(one, range(layers))]


def measure(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds and peak RSS (MB) of one run."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command[0]} ended with status {status}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--fs-version", type=int, nargs="+", choices=[5, 6], default=[6, 5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the layers there for the next time")
    given = parser.parse_args()
    programs = {"ours": OURS}
    if (upstream := ref_bin("nydus-image")) is not None:
        programs["upstream"] = [str(upstream)]
    else:
        print("upstream's nydus-image is not here: ours alone", file=sys.stderr)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for version in given.fs_version:
            kind = f"v{version}-{given.layers}x{given.files}"
            layers = make_layers((given.keep or Path(scratch)) / kind, version, given.layers, given.files)
            outputs = {name: Path(scratch) / f"{kind}-{name}" for name in programs}
            best: dict[str, dict[str, float]] = {}
            for _ in range(given.rounds):
                for name, program in programs.items():
                    run = measure([*program, "merge", "-l", "warn", "-B", str(outputs[name]), *map(str, layers)])
                    old = best.setdefault(name, run)
                    best[name] = {key: min(value, old[key]) for key, value in run.items()}
            results[kind] = best
            for name, figures in best.items():
                print(f"{kind} {name:9}", *(f"{key} {value:7.2f}" for key, value in figures.items()))
            if len(best) == 2:
                ratios = {key: best["ours"][key] / best["upstream"][key] for key in best["ours"]}
                equal = outputs["ours"].read_bytes() == outputs["upstream"].read_bytes()
                print(f"{kind} ratio    ", *(f"{key} {value:7.2f}" for key, value in ratios.items()), f"equal: {equal}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
