"""Daemons under mixed load for a long time: does memory, or anything else that is counted, grow?

    python -m tests.lab.soak --seconds 3600 [--every 15] [--out samples.jsonl]

Three daemons on one registry with tokens that expire, behind a mirror that lies and fails: `steady` is never killed,
so that its worker shows leaks; of `killed` the worker dies every minute, and keeper, zygote and code are replaced now
and then, so that what outlives workers shows its; `erofs` has the kernel serve. Each serves four images that readers
hash all the while, with a cache too small for them, and has others mounted, verified, remounted and unmounted, its
settings and log level changed, its metrics read.

Every series is judged by a line fitted through its second half. Exit status 1: something grew, or a reader saw a wrong
byte or an error.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.daemon import Nydusd
from tests.lab.faulty import FaultyServer, Request, faulty_server
from tests.lab.killing import READER, make_image
from tests.lab.process import LabError, processes_mentioning, remove_tree, wait_until, work_dir

_CHECK = """
import json, random, sys
from hashlib import blake2b
root, files = sys.argv[1], list(json.load(open(sys.argv[2])).items())
for name, expected in random.sample(files, int(sys.argv[3])):
    data = open(root + "/" + name, "rb").read()
    if blake2b(data, digest_size=16).hexdigest() != expected: print("wrong", name)
"""
FAULTS = ("503", "wrong-bytes", "short-body", "early-close", "empty", "garbage", "wrong-range")
AUTH = base64.b64encode(b"user:secret").decode()
CACHE_LIMIT = 10 << 20  # of some 20 MiB that the images hold
METRICS = (
    "daemon", "daemon/events", "metrics?id=/0", "metrics/backend?id=/0", "metrics/sources", "metrics/inflight",
    "metrics/files?id=/0", "metrics/pattern?id=/0",
)  # fmt: skip
STEADY = 4  # images each daemon always serves
# What a series may grow by over the half that is judged, whatever its size: below this is noise.
ALLOWED = {"anon_kb": 1024, "pss_kb": 2048, "fds": 5, "threads": 2}
ALLOWED_SHARE = 0.04


@dataclass
class Subject:
    name: str
    daemon: Nydusd
    config: str
    images: list[tuple[Path, Path]]  # bootstrap, and the file with what its files hold
    readers: list[subprocess.Popen[str]] = field(default_factory=list)
    actions: int = 0
    said: list[str] = field(default_factory=list)


def grown(series: list[tuple[float, float]]) -> float:
    """How much the line fitted through the second half of (time, value) rises from its start to its end."""
    half = series[len(series) // 2 :]
    if len(half) < 3:
        return 0.0
    mean_x = sum(x for x, _ in half) / len(half)
    mean_y = sum(y for _, y in half) / len(half)
    spread = sum((x - mean_x) ** 2 for x, _ in half)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in half) / spread
    return slope * (half[-1][0] - half[0][0])


def process_figures(pid: int) -> dict[str, float]:
    rollup = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    status = Path(f"/proc/{pid}/status").read_text()
    anon = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "anon_kb": anon,
        "pss_kb": int(rollup["Pss:"]),
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def sample(subject: Subject) -> dict[str, float]:
    """Figures by `role.name`; empty when a process is just being replaced."""
    daemon = subject.daemon
    figures: dict[str, float] = {}
    try:
        info = daemon.get("daemon").body
        roles = {"keeper": info["keeper_pid"], "worker": info["worker_pid"]}
        others = set(processes_mentioning(str(daemon.sock))) - set(roles.values())
        if len(others) == 1:
            roles["zygote"] = others.pop()
        for role, pid in roles.items():
            figures |= {f"{role}.{name}": value for name, value in process_figures(pid).items()}
        figures["processes"] = len(roles) + len(others)
    except (OSError, StopIteration, KeyError, TypeError, ValueError):
        return {}
    kept = {"segments": 0, "other": 0}  # bytes of disk: what the limit counts, and what it does not
    for folder, _, names in os.walk(daemon.dir / "cache"):
        for name in names:
            try:
                used = os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
            kept["other" if "/." in folder else "segments"] += used
    figures |= {f"cache.{name}": value for name, value in kept.items()}
    mounts = Path("/proc/self/mounts").read_text()
    figures["mounts"] = sum(str(daemon.dir) in line for line in mounts.splitlines())
    return figures


def churn(subject: Subject, rng: random.Random) -> None:
    """One of the things operators and snapshotters do, at random."""
    daemon = subject.daemon
    bootstrap, expected = rng.choice(subject.images)
    at = f"/churn/{rng.randrange(1 << 30)}"
    if rng.random() < 0.25:
        level = rng.choice(["info", "warn"])
        _checked(subject, daemon.call("PUT", "config?id=soak", {"registry_auth": AUTH}).status == 204)
        _checked(subject, daemon.call("PUT", "daemon", {"log_level": level}).status == 204)
        for path in METRICS:
            _checked(subject, daemon.get(path).status in (200, 204), path)
        return
    mounted = daemon.mount(at, bootstrap, subject.config)
    _checked(subject, mounted.status == 204, f"mount: {mounted}")
    if rng.random() < 0.3:
        body = {"source": str(bootstrap), "fs_type": "rafs", "config": subject.config}
        answer = daemon.call("PUT", f"mount?mountpoint={at}", body)
        _checked(subject, answer.status == 204, f"remount: {answer}")
    done = subprocess.run(
        [sys.executable, "-E", "-S", "-c", _CHECK, str(daemon.mnt) + at, expected, "4"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    _checked(subject, not done.stdout and not done.stderr, f"read of a fresh mount: {done.stdout}{done.stderr}")
    gone = daemon.umount(at)
    _checked(subject, gone.status == 204, f"umount: {gone}")


def _checked(subject: Subject, right: bool, what: str = "a setting was refused") -> None:
    if not right:
        subject.said.append(f"{time.strftime('%H:%M:%S')} {what[-600:]}")


def strike(subject: Subject, number: int) -> None:
    """Replace a process of this daemon; which one goes round."""
    daemon = subject.daemon
    info = daemon.get("daemon").body
    changes = "worker_pid"
    if number % 10 == 4:
        daemon.call("PUT", "daemon/upgrade", timeout=60)
    elif number % 10 == 7:
        os.kill(info["keeper_pid"], signal.SIGKILL)
        changes = "keeper_pid"
    elif number % 10 == 9:
        for pid in set(processes_mentioning(str(daemon.sock))) - {info["keeper_pid"], info["worker_pid"]}:
            os.kill(pid, signal.SIGKILL)
        os.kill(info["worker_pid"], signal.SIGKILL)
    else:
        os.kill(info["worker_pid"], signal.SIGKILL)
    try:
        wait_until(lambda: daemon.running() and daemon.get("daemon").body[changes] != info[changes], 60, changes)
    except LabError as error:
        subject.said.append(str(error))


def set_up(
    stack: ExitStack, base: Path, name: str, args: tuple[str, ...], servers: tuple[FaultyServer, FaultyServer],
    images: list[tuple[Path, Path]],
) -> Subject:  # fmt: skip
    registry, mirror = servers
    daemon = stack.enter_context(Nydusd(*args))
    backend = {"scheme": "http", "host": registry.netloc, "repo": "a/b", "auth": AUTH, "timeout": 5,
               "connect_timeout": 5, "retry_limit": 2, "mirrors": [{"host": mirror.url}]}  # fmt: skip
    cache = {"type": "blobcache", "config": {"work_dir": str(daemon.dir / "cache"), "limit": CACHE_LIMIT}}
    config = json.dumps({
        "device": {"id": "soak", "backend": {"type": "registry", "config": backend}, "cache": cache},
        "mode": "direct", "iostats_files": True, "access_pattern": True,
        "fs_prefetch": {"enable": True, "threads_count": 2, "prefetch_all": True, "bandwidth_rate": 16 << 20},
    })  # fmt: skip
    subject = Subject(name, daemon, config, images)
    files: dict[str, str] = {}
    for number in range(STEADY):
        bootstrap, expected = images[number]
        answer = daemon.mount(f"/{number}", bootstrap, config)
        if answer.status != 204:
            raise LabError(f"{name}: mount: {answer}")
        files |= {f"{daemon.mnt}/{number}/{file}": value for file, value in json.loads(expected.read_text()).items()}
    wanted = base / f"{name}.json"
    wanted.write_text(json.dumps(files))
    for number in range(2):
        subject.readers.append(subprocess.Popen(
            [sys.executable, "-E", "-S", "-c", READER, wanted, base / "stop", str(number), "0.7"],
            stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
    return subject


def soak(seconds: float, every: float, out: Path | None, seed: int = 1) -> dict[str, Any]:
    base = work_dir()
    rng = random.Random(seed)
    series: dict[str, list[tuple[float, float]]] = {}
    try:
        blobs: dict[str, bytes] = {}
        images = []
        for number in range(STEADY + 2):
            bootstrap, expected = make_image(base / f"t{number}", seed + number, base / f"b{number}", blobs)
            (base / f"x{number}.json").write_text(json.dumps(expected))
            images.append((bootstrap, base / f"x{number}.json"))
        faults = random.Random(seed)

        def choose(_: Request) -> str:
            return faults.choice(FAULTS) if faults.random() < 0.15 else "ok"

        with ExitStack() as stack:
            registry = stack.enter_context(faulty_server(blobs, auth="bearer", token_life=40))
            mirror = stack.enter_context(faulty_server(blobs, choose=choose))
            kinds = {"steady": (), "killed": (), "erofs": ("--fs-driver", "erofs")}
            subjects = [set_up(stack, base, name, args, (registry, mirror), images) for name, args in kinds.items()]
            killed = next(subject for subject in subjects if subject.name == "killed")
            began = time.monotonic()
            next_sample, next_strike, strikes = began, began + 60, 0
            while (now := time.monotonic()) < began + seconds:
                if now >= next_sample:
                    next_sample += every
                    for server in (registry, mirror):
                        server.requests.clear()
                        server.tokens.clear()
                    for subject in subjects:
                        figures = sample(subject)
                        for name, value in figures.items():
                            series.setdefault(f"{subject.name}.{name}", []).append((now - began, value))
                        if out is not None and figures:
                            line = json.dumps({"t": round(now - began, 1), "daemon": subject.name} | figures)
                            with out.open("a") as file:
                                file.write(line + "\n")
                if now >= next_strike:
                    next_strike += 60
                    strike(killed, strikes)
                    strikes += 1
                subject = rng.choice(subjects)
                churn(subject, rng)
                subject.actions += 1
                time.sleep(1.0)
            (base / "stop").touch()
            report = conclude(subjects, series)
            report["seconds"], report["strikes"] = round(time.monotonic() - began), strikes
            for subject in subjects:
                if subject.said:
                    print(
                        f"--- the end of the log of {subject.name}:", subject.daemon.log_text()[-3000:], file=sys.stderr
                    )
            return report
    finally:
        (base / "stop").touch()
        remove_tree(base)


def conclude(subjects: list[Subject], series: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    report: dict[str, Any] = {"reads": 0, "wrong": 0, "errors": 0, "stuck": 0, "said": []}
    for subject in subjects:
        for process in subject.readers:
            try:
                result = json.loads(process.communicate(timeout=30)[0])
            except subprocess.TimeoutExpired:
                report["stuck"] += 1
                process.kill()
                continue
            for name in ("reads", "wrong", "errors"):
                report[name] += result[name]
            subject.said += result["said"]
        report["said"] += [f"{subject.name}: {line}" for line in subject.said[:10]]
    report["actions"] = sum(subject.actions for subject in subjects)
    report["grew"] = {}
    report["figures"] = {}
    for name, points in sorted(series.items()):
        half = [value for _, value in points[len(points) // 2 :]]
        mean, growth = sum(half) / len(half), grown(points)
        allowed = max(ALLOWED.get(name.rpartition(".")[2], 0), ALLOWED_SHARE * mean, 1)
        report["figures"][name] = {"mean": round(mean, 1), "max": max(v for _, v in points), "grew": round(growth, 1)}
        if growth > allowed:
            report["grew"][name] = f"{growth:.0f} beyond a mean of {mean:.0f} in the second half"
    report["flat"] = not report["grew"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--every", type=float, default=15, help="seconds between samples")
    parser.add_argument("--out", type=Path, help="append every sample here, one JSON object a line")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the clean-up
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
    report = soak(options.seconds, options.every, options.out, options.seed)
    print(json.dumps(report, indent=1))
    bad = report["wrong"] or report["errors"] or report["stuck"] or report["said"] or not report["flat"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
