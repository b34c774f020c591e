"""One daemon under very many mounts, and under very many container starts at once: what does it need?

    python -m tests.lab.crowd [--mounts 1000] [--starts 200] [--images 20] [--latency 5]

`--binary PATH` measures another nydusd (upstream's) in ours' place, as far as that is possible.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.daemon import Nydusd, localfs_config
from tests.lab.faulty import faulty_server
from tests.lab.killing import make_image
from tests.lab.process import processes_mentioning, remove_tree, wait_until, work_dir
from tests.lab.tiny import noise, tiny_image

_READ_ALL = """
import json, os, sys, threading
from hashlib import blake2b
wanted = json.load(open(sys.argv[1]))
wrong, threads, lock = [], [], threading.Lock()
def start(root, files):
    for name, expected in files.items():
        try:
            found = blake2b(open(root + "/" + name, "rb").read(), digest_size=16).hexdigest()
        except OSError as error:
            found = str(error)
        if found != expected:
            with lock: wrong.append(f"{root}/{name}: {found}")
for root, files in wanted: threads.append(threading.Thread(target=start, args=(root, files)))
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(wrong))
"""


def processes(daemon: Nydusd) -> list[int]:
    return processes_mentioning(str(daemon.sock))


def memory(daemon: Nydusd) -> dict[str, float]:
    """MiB over all processes of the daemon: `pss` counts a shared page once, `rss` as often as it is mapped."""
    total = {"rss": 0, "pss": 0, "anon": 0}
    for pid in processes(daemon):
        rollup = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        total["rss"] += int(rollup["Rss:"])
        total["pss"] += int(rollup["Pss:"])
        total["anon"] += int(rollup["Pss_Anon:"])
    return {name: round(value / 1024, 1) for name, value in total.items()}


def peak(pid: int) -> int:
    """The most that was ever resident of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) // 1024


def ticks(daemon: Nydusd) -> dict[int, int]:
    """Processor time of each process in clock ticks."""
    found = {}
    for pid in processes(daemon):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[pid] = int(fields[11]) + int(fields[12])
    return found


def wakeups(daemon: Nydusd) -> dict[str, int]:
    """How often each thread gave the processor up to wait: one that sleeps on does not."""
    found = {}
    for pid in processes(daemon):
        for task in os.listdir(f"/proc/{pid}/task"):
            lines = Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
            found[f"{pid}/{task}"] = next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return found


def until_idle(daemon: Nydusd, timeout: float = 120.0, quiet: float = 6.0) -> float:
    """Seconds until nothing of the daemon ran for `quiet` seconds: longer than a start that is recorded sleeps. What is
    done to the whole machine meanwhile, as to drop its caches, wakes it as well."""

    seen, since = (ticks(daemon), wakeups(daemon)), time.monotonic()

    def idle() -> bool:
        nonlocal seen, since
        if (now := (ticks(daemon), wakeups(daemon))) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since >= quiet

    return wait_until(idle, timeout, "an idle daemon")


@contextmanager
def _images(base: Path, count: int) -> Iterator[list[tuple[Path, dict[str, str]]]]:
    """Images of 120 files each, their blobs in `base/blobs`."""
    blobs: dict[str, bytes] = {}
    images = [make_image(base / f"t{n}", n, base / f"b{n}", blobs) for n in range(count)]
    (base / "blobs").mkdir()
    for blob_id, blob in blobs.items():
        (base / "blobs" / blob_id).write_bytes(blob)
    yield images


def many_mounts(count: int, binary: Path | None = None) -> dict[str, Any]:
    """`count` images as sub-mounts of one daemon; seconds, milliseconds, MiB."""
    base = work_dir()
    figures: dict[str, Any] = {}
    try:
        with _images(base, 3) as images, Nydusd(binary=binary) as daemon:
            figures["ready, s"] = round(daemon.ready_seconds, 3)
            until_idle(daemon)
            figures["idle, MiB"] = memory(daemon)
            times = []
            for number in range(count):
                config = localfs_config(base / "blobs", work_dir=base / "cache", config_id=f"/{number}")
                bootstrap = base / f"{number}.boot"  # each image has its own
                shutil.copyfile(images[number % 3][0], bootstrap)
                began = time.perf_counter()
                answer = daemon.mount(f"/{number}", bootstrap, config)
                times.append(time.perf_counter() - began)
                assert answer.status == 204, answer
            tenth = max(1, count // 10)
            for name, part in (("first", times[:tenth]), ("last", times[-tenth:])):
                figures[f"mount, {name} tenth, ms"] = round(statistics.median(part) * 1000, 1)
            figures["with all, MiB"] = memory(daemon)
            figures["descriptors"] = len(os.listdir(f"/proc/{daemon.worker_pid}/fd"))
            wrong = []
            for number in range(count):
                name, expected = next(item for item in images[number % 3][1].items() if item[0].endswith("/f1"))
                wanted = [[f"{daemon.mnt}/{number}", {name: expected}]]
                if number % tenth == 0:
                    wrong += read_all(base, wanted)
            figures["wrong"] = wrong
            if binary is None:
                first = daemon.worker_pid
                (daemon.mnt / "1" / "d0").stat()
                began = time.perf_counter()
                os.kill(first, signal.SIGKILL)
                os.stat(daemon.mnt / "2")  # whose attributes the kernel was not asked for yet
                os.listdir(daemon.mnt / "2" / "d3")
                figures["a dead worker's readers wait, ms"] = round((time.perf_counter() - began) * 1000)
                figures["wrong"] += read_all(base, [[f"{daemon.mnt}/5", images[2][1]]])
                figures["idle after, s"] = round(until_idle(daemon), 1)
                figures["processor time of 10 s idle, ticks"] = _idle_ticks(daemon)
            began = time.perf_counter()
            for number in range(count):
                answer = daemon.umount(f"/{number}")
                assert answer.status == 204, answer
            figures["umount of each, ms"] = round((time.perf_counter() - began) * 1000 / count, 1)
            figures["descriptors after"] = len(os.listdir(f"/proc/{daemon.worker_pid}/fd"))
        return figures
    finally:
        remove_tree(base)


def _idle_ticks(daemon: Nydusd, seconds: float = 10.0) -> int:
    before = ticks(daemon)
    time.sleep(seconds)
    return sum(ticks(daemon).values()) - sum(before.values())


def read_all(base: Path, wanted: list[Any], timeout: float = 300.0) -> list[str]:
    """Every (directory, {name: digest}) in a thread of its own; what was wrong."""
    list_file = base / "wanted.json"
    list_file.write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL, list_file], capture_output=True, text=True, timeout=timeout, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def many_starts(
    starts: int, images: int, latency: float, binary: Path | None = None, *, idle: bool = True
) -> dict[str, Any]:
    """`starts` mounts of `images` images, each with a reader of all its files, all at once; cold, from one registry
    with tokens that takes `latency` seconds for every answer."""
    from hashlib import blake2b

    base = work_dir()
    figures: dict[str, Any] = {}
    try:
        made, blobs = [], {}
        shared = noise(700_000, 99)
        for number in range(images):
            files = {"base": shared} | {f"f{n}": noise(150_000, 100 * number + n) for n in range(4)}
            image = tiny_image(base, files)
            blobs[image.blob_id] = image.blob
            made.append((image.bootstrap, {n: blake2b(d, digest_size=16).hexdigest() for n, d in files.items()}))
        with (
            faulty_server(blobs, auth="bearer", latency=latency) as registry,
            Nydusd(binary=binary) as daemon,
        ):
            backend = {"scheme": "http", "host": registry.netloc, "repo": "a/b", "auth": "dXNlcjpzZWNyZXQ=",
                       "timeout": 60, "connect_timeout": 10, "retry_limit": 2}  # fmt: skip
            wanted = []
            began = time.perf_counter()
            for number in range(starts):
                bootstrap, expected = made[number % images]
                device = {"id": f"/{number}", "backend": {"type": "registry", "config": backend},
                          "cache": {"type": "blobcache", "config": {"work_dir": str(base / "cache")}}}  # fmt: skip
                answer = daemon.mount(f"/{number}", bootstrap, json.dumps({"device": device, "mode": "direct"}))
                assert answer.status == 204, answer
                wanted.append([f"{daemon.mnt}/{number}", expected])
            figures["mounted after, s"] = round(time.perf_counter() - began, 1)
            figures["wrong"] = read_all(base, wanted)
            figures["all read after, s"] = round(time.perf_counter() - began, 1)
            figures["processes"] = len(processes(daemon))
            served = [request for request in registry.data_requests if request.span is not None]
            asked = [(request.target, request.span) for request in served if _authorized(request, registry)]
            figures["requests"], figures["distinct ranges"] = len(asked), len(set(asked))
            figures["requests without a token"] = len(served) - len(asked)
            figures["token requests"] = len(registry.tokens)
            figures["worker's peak, MiB"] = peak(daemon.worker_pid if binary is None else daemon.pid)
            if binary is None and idle:
                figures["idle after, s"] = round(until_idle(daemon), 1)
                figures["processor time of 10 s idle, ticks"] = _idle_ticks(daemon)
            figures["then, MiB"] = memory(daemon)
        return figures
    finally:
        remove_tree(base)


def _authorized(request: Any, registry: Any) -> bool:
    return request.headers.get("authorization", "").removeprefix("Bearer ") in registry.valid_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mounts", type=int, default=1000)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--latency", type=float, default=5.0, help="seconds")
    parser.add_argument("--binary", type=Path)
    options = parser.parse_args()
    if options.mounts:
        print(json.dumps(many_mounts(options.mounts, options.binary), indent=1), flush=True)
    if options.starts:
        figures = many_starts(options.starts, options.images, options.latency, options.binary)
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
