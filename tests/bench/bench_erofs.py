"""EROFS mounts beside a plain ext4 directory, a plain EROFS image, our FUSE and upstream's nydusd.

    python -m tests.bench.bench_erofs [--big MiB] [--files N] [--rounds N] [--json FILE]

Medians over the rounds, all sides in turn in each. "disk": the kernel's page cache dropped; "warm": it has the pages;
"cold": nothing cached by the daemon, blobs in a local directory; "fetch alone": such a miss without a kernel. Complete
images are mounted with all segments cached. Daemon time is that of all our processes while the complete image is read.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from bootstrap.build import build_directory
from bootstrap.options import BuildOptions
from nydusfs.config import load_config
from nydusfs.drivers import mountapi
from nydusfs.drivers.erofs import image as erofs_image
from nydusfs.drivers.erofs import mount
from nydusfs.hands import Hands
from nydusfs.services import open_services
from tests.bench.bench_fuse import _RANDOM, _SEQUENTIAL, make_tree
from tests.lab.daemon import Nydusd, localfs_config
from tests.lab.erofs import cannot_mount_erofs, cpu_seconds, settle
from tests.lab.paths import ref_bin
from tests.lab.process import drop_caches, processes_mentioning, remove_tree, run, work_dir

_TAR = "tar -cf - -C $0 . | cat"  # with /dev/null as its output tar reads no data
_MISSES = """
import os, random, statistics, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
step = 1 << 20
offsets = list(range(0, os.fstat(fd).st_size - step, step))
random.Random(3).shuffle(offsets)
took = []
for offset in offsets[: int(sys.argv[2])]:
    began = time.perf_counter()
    os.pread(fd, 4096, offset)
    took.append(time.perf_counter() - began)
print(statistics.median(took) * 1e6)
"""

# Memory that a virtual machine's host took back while it was free is slow when it is touched again, many times slower
# than all that is measured here. In huge pages, since page caches take large pieces.
_TOUCH = """
import mmap, sys
size = int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, size, 1 << 20): memory[at : at + (1 << 20)] = bytes(1 << 20)
"""


def _number(code: str, *words: str | Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=300, check=True
    )
    return float(done.stdout)


def _seconds(*words: str | Path) -> float:
    began = time.perf_counter()
    subprocess.run(list(map(str, words)), stdout=subprocess.DEVNULL, check=True, timeout=300)
    return time.perf_counter() - began


def measure(large: Path, small: Path) -> dict[str, float]:
    """One side, once: rates are better when larger, seconds when smaller."""
    big, found = large / "big", {}
    ways: list[tuple[str, Callable[[], float]]] = [
        ("sequential MiB/s", lambda: _number(_SEQUENTIAL, big)),
        ("random 4 KiB ops/s", lambda: _number(_RANDOM, big, "20000")),
        ("tar s", lambda: _seconds("sh", "-c", _TAR, small)),
        ("find -ls s", lambda: _seconds("find", small, "-ls")),
    ]
    for name, work in ways:
        drop_caches()
        found[f"{name}, disk"] = work()
        if name.startswith("random"):
            _number(_SEQUENTIAL, big)  # so that all of it is in memory, and not what was read by chance
        # what the one before left in memory: a run after `drop_caches` of another way would read the disk again
        found[f"{name}, warm"] = statistics.median(work() for _ in range(3))
    return found


def image_seconds(case: Path, work: Path) -> tuple[float, float]:
    """Processor time to write the metadata image and to open it again."""

    async def go() -> tuple[float, float]:
        config = load_config(localfs_config(case, work_dir=work), "bench")
        async with open_services() as services:
            reader = await services.open_image(str(case / "image.boot"), config, name="/")
            mark = erofs_image.fingerprint(reader.bootstrap, True)
            began = time.process_time()
            erofs_image.write_image(reader, work / "image", mark, True)
            written = time.process_time()
            assert erofs_image.open_image(work / "image", mark)
            reader.close()
            return written - began, time.process_time() - written

    return trio.run(go)


def fetch_alone(case: Path, work: Path, misses: int) -> float:
    """Microseconds in the median that a miss takes without a kernel: read, decode, verify and keep, in one thread."""

    async def go() -> float:
        config = load_config(localfs_config(case, work_dir=work), "bench")
        async with open_services() as services:
            reader = await services.open_image(str(case / "image.boot"), config, name="/")
            ino = reader.bootstrap.resolve(b"/big")
            offsets = list(range(0, reader.bootstrap.attr(ino).size - (1 << 20), 1 << 20))
            random.Random(3).shuffle(offsets)
            segments = [reader.segments_of(ino, offset, 4096)[0] for offset in offsets[:misses]]

            def fetch() -> list[float]:
                took = []
                for segment in segments:
                    began = time.perf_counter()
                    assert reader.fill(segment, Hands(), lambda: None)
                    took.append(time.perf_counter() - began)
                return took

            took = await trio.to_thread.run_sync(fetch)
            reader.close()
            return statistics.median(took) * 1e6

    return trio.run(go)


def make_case(base: Path, name: str, tree: Path) -> Path:
    """A directory with the image of a tree and its blob."""
    case = base / f"case-{name}"
    case.mkdir()
    with (case / "blob").open("w+b") as file:
        result = build_directory(os.fspath(tree), file, BuildOptions())
    (case / "blob").rename(case / result.blob_id)
    (case / "image.boot").write_bytes(result.bootstrap)
    return case


def plain_image(tree: Path, target: Path) -> None:
    """The same tree as mkfs.erofs writes it, mounted."""
    run(["mkfs.erofs", "-E", "noinline_data", target.with_suffix(".img"), tree], timeout=300)
    target.mkdir()
    mounted = mount.open_erofs(str(target.with_suffix(".img")), [])
    mountapi.attach(mounted, str(target))
    os.close(mounted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", type=int, default=256)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--complete", action="store_true", help="only images that are complete: a minute instead of four"
    )
    parser.add_argument("--incomplete", action="store_true", help="only images that are not")
    options = parser.parse_args()
    if reason := cannot_mount_erofs():
        sys.exit(reason)
    base = work_dir()
    trees = {"large": base / "large", "small": base / "small"}
    plain = {name: base / f"plain-{name}" for name in trees}
    try:
        make_tree(trees["large"], options.big, options.files, 0)
        (trees["large"] / "tree").rename(trees["small"])
        cases = {name: make_case(base, name, tree) for name, tree in trees.items()}
        (base / "write").mkdir()
        written, opened = image_seconds(cases["small"], base / "write")
        report: dict[str, Any] = {"image written, s": written, "image opened again, s": opened}
        for name, tree in trees.items():
            plain_image(tree, plain[name])
        case = cases["large"]

        sides: dict[str, list[dict[str, float]]] = {}
        with Nydusd("--fs-driver", "erofs") as daemon:
            for name, made in cases.items() if not options.incomplete else ():
                config = localfs_config(made, work_dir=base / "cache")
                assert daemon.mount("/fill", made / "image.boot", config).status == 204
                _seconds("sh", "-c", "find $0 -type f -exec cat {} +", daemon.mnt / "fill")
                assert daemon.umount("/fill").status == 204
                settle(base / "cache")
                fuse = json.dumps({**json.loads(config), "fs_driver": "fuse"})
                assert daemon.mount(f"/fuse-{name}", made / "image.boot", fuse).status == 204
                assert daemon.mount(f"/erofs-{name}", made / "image.boot", config).status == 204
            pids = processes_mentioning(str(daemon.sock))
            spent = 0.0
            for _ in range(0 if options.incomplete else options.rounds):
                sides.setdefault("ext4", []).append(measure(trees["large"], trees["small"]))
                sides.setdefault("plain erofs", []).append(measure(plain["large"], plain["small"]))
                drop_caches()  # the kernel tells nydusd which inodes of the FUSE mount it forgets
                time.sleep(1)
                before = sum(map(cpu_seconds, pids))
                ours = measure(daemon.mnt / "erofs-large", daemon.mnt / "erofs-small")
                spent += sum(map(cpu_seconds, pids)) - before
                sides.setdefault("ours, erofs", []).append(ours)
                sides.setdefault("ours, fuse", []).append(measure(daemon.mnt / "fuse-large", daemon.mnt / "fuse-small"))
            report["daemon s while erofs was read"] = spent

        # incomplete images: each round a new daemon and a new cache
        programs: list[tuple[str, tuple[str, ...], Path | None]] = [
            ("ours, erofs", ("--fs-driver", "erofs"), None),
            ("ours, fuse", (), None),
        ]
        upstream = ref_bin("nydusd")
        if options.complete:
            programs = []
        elif upstream is None:
            print("interop: upstream's nydusd is not here, that side is left out", file=sys.stderr)
        else:
            programs.append(("upstream, fuse", (), upstream))
        for number in range(options.rounds):
            for name, flags, binary in programs:
                found = sides.setdefault(name, [])
                if len(found) <= number:
                    found.append({})
                for what, code, words in (("sequential MiB/s", _SEQUENTIAL, []), ("miss p50 us", _MISSES, ["100"])):
                    with Nydusd(*flags, binary=binary) as daemon:
                        config = localfs_config(case, work_dir=base / f"cold-{name}-{number}-{what[:4]}")
                        Path(base / f"cold-{name}-{number}-{what[:4]}").mkdir()
                        assert daemon.mount("/a", case / "image.boot", config).status == 204
                        drop_caches()
                        run([sys.executable, "-c", _TOUCH, str(3 * options.big + 128)], timeout=300)
                        found[number][f"{what}, cold"] = _number(code, daemon.mnt / "a" / "big", *words)
            if programs:
                (base / f"alone-{number}").mkdir()
                drop_caches()
                run([sys.executable, "-c", _TOUCH, str(3 * options.big + 128)], timeout=300)
                alone = fetch_alone(case, base / f"alone-{number}", 100)
                sides["ours, erofs"][number]["fetch alone p50 us, cold"] = alone
        report["sides"] = {
            side: {key: statistics.median(each[key] for each in rounds if key in each) for key in rounds[0]}
            for side, rounds in sides.items()
        }
        text = json.dumps(report, indent=1)
        print(text)
        if options.json:
            options.json.write_text(text)
    finally:
        for path in plain.values():
            subprocess.run(["umount", "-l", path], check=False, stderr=subprocess.DEVNULL)
        remove_tree(base)


if __name__ == "__main__":
    main()
