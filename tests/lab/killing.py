"""SIGKILL of nydusd's worker at random moments, under readers that verify every byte: what did they notice?

    python -m tests.lab.killing [--kills 1000] [--readers 8] [--seed N] [--fs-driver erofs|auto [--delay MS]]

Several images with prefetch on, from a registry with a mirror before it that answers 503, wrong bytes and nothing in
turn. Readers hash files in random order, drop the pages again so that each read asks the daemon, and cached segments
are deleted all the while, so that fetches, cache writes and reads are all hit. A stall is the longest that any one call
went on after a kill that met it; `waits` are the calls of more than 20 ms that no kill met. With `auto`, readers rest
before every fourth kill, as long as it takes until the kernel's mounts are made, so that some kills meet that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bootstrap.build import build_directory
from bootstrap.options import BuildOptions
from tests.lab.daemon import Nydusd
from tests.lab.erofs import is_erofs
from tests.lab.faulty import Request, faulty_server
from tests.lab.process import LabError, matching, remove_tree, run, wait_until, work_dir

READER = """
import errno, json, os, random, sys, time
from hashlib import blake2b
files, seen = [], 0
stop, rng = sys.argv[2], random.Random(int(sys.argv[3]))
pause = float(sys.argv[4]) if sys.argv[4:] else 0.002
told = sys.argv[5] if sys.argv[5:] else ""
reads = wrong = errors = 0
slow, said = [], []
def timed(call, *words):
    began = time.time()
    try:
        return call(*words)
    finally:
        if time.time() - began > 0.02: slow.append((began, time.time()))
while not os.path.exists(stop):
    if os.path.exists(stop + ".quiet"):
        time.sleep(0.01)
        continue
    if (changed := os.stat(sys.argv[1]).st_mtime_ns) != seen:
        files, seen = list(json.load(open(sys.argv[1])).items()), changed
        if told:
            with open(told, "w") as out: out.write(str(seen))
    path, expected = rng.choice(files)
    try:
        fd = timed(os.open, path, os.O_RDONLY)
        try:
            digest = blake2b(digest_size=16)
            while data := timed(os.read, fd, 1 << 17): digest.update(data)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        reads += 1
        if digest.hexdigest() != expected:
            wrong += 1
            said.append("wrong " + path)
    except OSError as error:
        errors += 1
        said.append(f"{errno.errorcode.get(error.errno)} {path}")
    time.sleep(pause)
print(json.dumps({"reads": reads, "wrong": wrong, "errors": errors, "slow": slow, "said": said[:5]}))
"""
"""Arguments: the list of files with what they hold, the file whose presence ends it, a seed; if wanted a pause, and
where it writes which list (its mtime) it has read, so that nobody reads any more what that list is without."""
_HASH_ALL = """
import json, sys
from hashlib import blake2b
found = {}
for path in json.load(open(sys.argv[1])):
    try:
        found[path] = blake2b(open(path, "rb").read(), digest_size=16).hexdigest()
    except OSError as error:
        found[path] = str(error)
print(json.dumps(found))
"""
MOUNTS = 16  # of EROFS, at the same time
REST = 0.9, 1.6  # seconds; auto has the kernel's mounts made when nobody waited for one
FAULTS = ("503", "wrong-bytes", "short-body", "early-close")


@dataclass
class Report:
    kills: int
    reads: int
    wrong: int
    errors: int
    stuck: int
    stall_p50_ms: float
    stall_p99_ms: float
    stall_max_ms: float
    waits_p50_ms: float  # calls that took more than 20 ms and that no kill met: what fetching costs here anyway
    waits_p99_ms: float
    said: list[str]
    replaced: int = 0  # mounts of auto that FUSE showed first and the kernel in the end


def make_image(root: Path, seed: int, out: Path, blobs: dict[str, bytes]) -> tuple[Path, dict[str, str]]:
    """The bootstrap of a tree of 120 files, and what they hold; its blob goes to `blobs`."""
    rng = random.Random(seed)
    expected: dict[str, str] = {}
    for number in range(120):
        folder = root / f"d{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        size = rng.choice((0, 100, 5_000, 70_000)) if number else 3 << 20
        data = rng.randbytes(size // 2) + bytes(size - size // 2)
        (folder / f"f{number}").write_bytes(data)
        expected[f"d{number % 7}/f{number}"] = blake2b(data, digest_size=16).hexdigest()
    with out.open("w+b") as file:
        result = build_directory(os.fspath(root), file, BuildOptions(chunk_size=0x10000))
    blobs[result.blob_id] = out.read_bytes()
    bootstrap = out.with_suffix(".boot")
    bootstrap.write_bytes(result.bootstrap)
    return bootstrap, expected


class _Mounts:
    """The images under test, and the list of their files that readers follow.

    FUSE is asked by each read. EROFS asks once for each segment of a mount: each mount has a cold cache of its own, and
    new ones follow with each kill, while the oldest go when nobody reads them any more.
    """

    def __init__(self, daemon: Nydusd, images: list[tuple[Path, dict[str, str]]], base: Path, config: dict[str, Any]):
        self._daemon, self._images, self._base, self._config = daemon, images, base, config
        self._live: list[int] = []
        self._shown: set[int] = set()  # by FUSE at first
        self.replaced: set[int] = set()
        self._leaving: list[tuple[int, int]] = []  # and the list of files from which on nobody is sent there
        self._next = 0

    def add(self, count: int, *, cold: bool) -> None:
        for _ in range(count):
            number, self._next = self._next, self._next + 1
            cache = self._base / (f"cache{number}" if cold else "cache")
            self._config["device"]["cache"]["config"]["work_dir"] = str(cache)
            bootstrap, _ = self._images[number % len(self._images)]
            answer = self._daemon.mount(f"/{number}", bootstrap, json.dumps(self._config))
            assert answer.status == 204, answer
            self._live.append(number)
            if not is_erofs(self._daemon.mnt / str(number)):
                self._shown.add(number)
        old = self._live[:-MOUNTS]
        del self._live[:-MOUNTS]
        files = {
            str(self._daemon.mnt / str(number) / name): value
            for number in self._live
            for name, value in self._images[number % len(self._images)][1].items()
        }
        (self._base / "files.new").write_text(json.dumps(files))
        self._leaving += [(number, (self._base / "files.new").stat().st_mtime_ns) for number in old]
        (self._base / "files.new").rename(self._base / "files.json")
        self.look()
        known = self._known()
        while self._leaving and self._leaving[0][1] <= known:
            number, _ = self._leaving.pop(0)
            self._shown.discard(number)
            assert self._daemon.umount(f"/{number}").status == 204
            remove_tree(self._base / f"cache{number}")

    def told(self, reader: int) -> Path:
        """Where a reader says which list he has read."""
        return self._base / f"told{reader}"

    def _known(self) -> int:
        """The list that all readers have read, or a later one."""
        try:
            return min((int(path.read_text()) for path in matching(self._base, "told*")), default=0)
        except ValueError:
            return 0  # it is being written

    def look(self) -> bool:
        """Whether `replaced` has any by now."""
        self.replaced.update(number for number in self._shown if is_erofs(self._daemon.mnt / str(number)))
        return bool(self.replaced)


def kill_workers(
    kills: int,
    readers: int = 8,
    seed: int = 1,
    every: tuple[float, float] = (0.05, 0.4),
    fs_driver: str = "fuse",
    delay: float = 0.06,
    local: bool = False,
) -> Report:
    """`every`: bounds of the random pause between two kills, seconds. For EROFS the registry and the mirror take
    `delay` seconds to answer and there is no prefetch, so that there is something to ask all the time: a reader then
    waits for at least one of those once more, two where the mirror fails, whatever the death itself costs. `local`:
    blobs are files in a directory, which whoever answers a reader fetches from by himself."""
    cold = fs_driver != "fuse" or local
    rng = random.Random(seed)
    base = work_dir()
    blobs: dict[str, bytes] = {}
    try:
        images = [make_image(base / f"t{n}", seed + n, base / f"b{n}", blobs) for n in range(3)]
        faults = random.Random(seed)

        def slow(_: Request) -> str:
            if cold:
                time.sleep(delay)
            return "ok"

        def choose(request: Request) -> str:
            slow(request)
            return faults.choice(FAULTS) if faults.random() < 0.2 else "ok"

        with (
            faulty_server(blobs, choose=slow) as registry,
            faulty_server(blobs, choose=choose) as mirror,
            Nydusd("--fs-driver", fs_driver) as daemon,
        ):
            config: dict[str, Any] = {
                "device": {
                    "backend": {
                        "type": "registry",
                        "config": {
                            "scheme": "http", "host": registry.netloc, "repo": "a/b", "timeout": 5,
                            "connect_timeout": 5, "retry_limit": 2, "mirrors": [{"host": mirror.url}],
                        },
                    },
                    "cache": {"type": "blobcache", "config": {"work_dir": str(base / "cache")}},
                },
                "mode": "direct",
                "fs_prefetch": {"enable": not cold, "learn": False, "threads_count": 4, "prefetch_all": True},
            }  # fmt: skip
            if local:
                (base / "blobs").mkdir()
                for blob_id, blob in blobs.items():
                    (base / "blobs" / blob_id).write_bytes(blob)
                config["device"]["backend"] = {"type": "localfs", "config": {"dir": str(base / "blobs")}}
            mounts = _Mounts(daemon, images, base, config)
            mounts.add(12 if cold else 3, cold=cold)
            for number in range(readers):
                mounts.told(number).write_text("0")
            processes = [
                subprocess.Popen(
                    [
                        *(sys.executable, "-c", READER, base / "files.json", base / "stop", str(seed + number)),
                        *("0.002", mounts.told(number)),
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for number in range(readers)
            ]
            moments: list[float] = []
            resting = base / "stop.quiet"
            try:
                time.sleep(0.5)
                for number in range(kills):
                    if cold:
                        mounts.add(1, cold=cold)
                    if fs_driver == "auto" and number % 4 == 3:
                        resting.touch()
                        time.sleep(rng.uniform(*REST))
                    else:
                        time.sleep(rng.uniform(*every))
                    cached = sorted(matching(base, "cache*/*/*-*"))
                    for victim in rng.sample(cached, min(1, len(cached))):
                        victim.unlink(missing_ok=True)
                    pid = daemon.worker_pid
                    moments.append(time.time())
                    os.kill(pid, signal.SIGKILL)
                    resting.unlink(missing_ok=True)
                    # the next one answers, before it may be killed as well
                    wait_until(lambda pid=pid: daemon.running() and daemon.worker_pid != pid, 60, "the next worker")
                    if number % 100 == 99:
                        print(f"{number + 1} kills", file=sys.stderr, flush=True)
                if fs_driver == "auto":  # on a slow machine no rest was long enough until now
                    resting.touch()
                    wait_until(mounts.look, 60, "a mount of the kernel's")
                    resting.unlink()
                time.sleep(0.3)
            except LabError as error:
                raise LabError(f"{error}; the end of its log:\n{daemon.log_text()[-4000:]}") from None
            finally:
                (base / "stop").touch()
            results, stuck = [], 0
            for process in processes:
                try:
                    results.append(json.loads(process.communicate(timeout=60)[0]))
                except subprocess.TimeoutExpired:
                    stuck += 1
                    process.kill()
            spans = [tuple(span) for result in results for span in result["slow"]]
            stalls = sorted(
                max([0.0, *(end - moment for start, end in spans if start <= moment + 0.02 and end > moment)])
                for moment in moments
            )
            calm = sorted(
                end - start for start, end in spans if not any(start <= at + 0.02 and end > at for at in moments)
            )
            return Report(
                kills=kills,
                reads=sum(result["reads"] for result in results),
                wrong=sum(result["wrong"] for result in results),
                errors=sum(result["errors"] for result in results),
                stuck=stuck,
                stall_p50_ms=round(stalls[len(stalls) // 2] * 1000, 1),
                stall_p99_ms=round(stalls[min(len(stalls) - 1, len(stalls) * 99 // 100)] * 1000, 1),
                stall_max_ms=round(stalls[-1] * 1000, 1),
                waits_p50_ms=round(calm[len(calm) // 2] * 1000, 1) if calm else 0,
                waits_p99_ms=round(calm[len(calm) * 99 // 100] * 1000, 1) if calm else 0,
                said=[line for result in results for line in result["said"]][:10],
                replaced=len(mounts.replaced),
            )
    finally:
        remove_tree(base)


def kill_everything(rounds: int, readers: int = 4, seed: int = 1) -> Report:
    """All processes of a daemon with an EROFS mount killed at one moment, under readers of a mount that stays held.

    Errors are allowed until the next daemon has mounted the image; then every file of the held mount must be right,
    whatever the kernel kept in its pages. `errors` counts files that are not; `wrong` any wrong byte at any time.
    """
    rng = random.Random(seed)
    base = work_dir()
    blobs: dict[str, bytes] = {}
    report = Report(rounds, 0, 0, 0, 0, 0, 0, 0, 0, 0, [])
    bootstrap, expected = make_image(base / "t", seed, base / "b", blobs)
    held = base / "held"
    held.mkdir()
    files = {str(held / name): value for name, value in expected.items()}
    (base / "files.json").write_text(json.dumps(files))

    def slow(_: Request) -> str:
        time.sleep(0.08)
        return "ok"

    def config(cache: Path) -> str:
        backend = {"scheme": "http", "host": registry.netloc, "repo": "a/b", "timeout": 5, "connect_timeout": 5}
        device = {
            "backend": {"type": "registry", "config": backend},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        }
        return json.dumps({"device": device, "mode": "direct", "fs_prefetch": {"learn": False}})

    try:
        with faulty_server(blobs, choose=slow) as registry, Nydusd("--fs-driver", "erofs") as daemon:
            for number in range(rounds):
                cache, stop = base / f"cache{number}", base / f"stop{number}"
                answer = daemon.mount("/a", bootstrap, config(cache))
                assert answer.status == 204, answer
                run(["mount", "--bind", daemon.mnt / "a", held])
                processes = [
                    subprocess.Popen(
                        [sys.executable, "-c", READER, base / "files.json", stop, str(rng.randrange(1 << 30))],
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    for _ in range(readers)
                ]
                try:
                    time.sleep(rng.uniform(0.1, 0.8))
                    daemon.kill_all()
                    time.sleep(0.1)
                    daemon.start()
                    answer = daemon.mount("/a", bootstrap, config(cache))
                    assert answer.status == 204, answer
                    stop.touch()
                    for process in processes:
                        result = json.loads(process.communicate(timeout=60)[0])
                        report.reads += result["reads"]
                        report.wrong += result["wrong"]
                    found = json.loads(run([sys.executable, "-c", _HASH_ALL, base / "files.json"], timeout=60).stdout)
                    bad = [f"round {number}: {path}: {found[path]}" for path in files if found[path] != files[path]]
                    report.errors += len(bad)
                    report.said += bad[:5]
                finally:
                    for process in processes:
                        process.kill()
                    run(["umount", "-l", held])
                daemon.umount("/a")
                remove_tree(cache)
        return report
    finally:
        remove_tree(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fs-driver", default="fuse")
    parser.add_argument("--delay", type=float, default=60, help="milliseconds until registry and mirror answer, EROFS")
    parser.add_argument("--everything", action="store_true", help="all processes at once, EROFS; --kills rounds")
    options = parser.parse_args()
    if options.everything:
        print(json.dumps(asdict(kill_everything(options.kills, options.readers, options.seed)), indent=1))
        return
    report = kill_workers(
        options.kills, options.readers, options.seed, fs_driver=options.fs_driver, delay=options.delay / 1000
    )
    print(json.dumps(asdict(report), indent=1))


if __name__ == "__main__":
    main()
