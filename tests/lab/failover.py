"""What readers who verify every byte notice of the ends of nydusd and snapshotter, with `recover_policy` failover: the
snapshotter holds what the kernel's mounts hang on, and the next nydusd goes on with them.

Before each end comes an image nobody has read, from a registry that takes `delay` seconds to answer: some wait then.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshotter.nydusd_api import NydusdApi
from tests.lab.faulty import FaultyServer, Request, faulty_server
from tests.lab.killing import READER, make_image
from tests.lab.process import kill_together, remove_tree, unmount_below, wait_until, work_dir
from tests.lab.snapshots import Client, option, pull
from tests.lab.stack import Snapshotter


@dataclass
class Seen:
    """By readers. `waited`: ends that met one who waited for data; `stall`: the longest that a call went on after one,
    seconds."""

    reads: int = 0
    wrong: int = 0
    errors: int = 0
    waited: int = 0
    stall: float = 0.0
    said: list[str] = field(default_factory=list)


def _killed(ours: Snapshotter) -> None:
    """SIGKILL to every process of nydusd at one moment."""
    old = ours.daemons()
    kill_together(old)
    wait_until(lambda: bool(set(ours.services()) - set(old)), 30, "the next nydusd")


def _upgraded(ours: Snapshotter) -> None:
    """Other code in place of the running one, as after an update of the package."""
    NydusdApi(ours.root / "system.sock").call("PUT", "/api/v1/daemons/upgrade", {"policy": "rolling"}, timeout=60)


def _restarted(ours: Snapshotter) -> None:
    """`systemctl restart`: what the old one held of the mounts is gone, the new one asks for it."""
    ours.stop()
    ours.start()


ENDS = {"kill": _killed, "upgrade": _upgraded, "restart": _restarted}


def survive(*ends: str, mode: str = "shared", readers: int = 4, seed: int = 1, delay: float = 0.1) -> Seen:
    """`ends`: of `ENDS`, one after the other; `mode`: the snapshotter's daemon_mode. The driver is that of the lab."""
    rng, base, blobs = random.Random(seed), work_dir(), dict[str, bytes]()

    def slow(_: Request) -> str:
        time.sleep(delay)
        return "ok"

    seen = Seen()
    try:
        with ExitStack() as stack:
            registry = stack.enter_context(faulty_server(blobs, choose=slow))
            ours = stack.enter_context(Snapshotter(base / "s", _template(), arguments=_arguments(mode)))
            files: dict[str, str] = {}
            stop, moments = base / "stop", list[float]()
            processes: list[subprocess.Popen[str]] = []
            try:
                for number, end in enumerate(ends):
                    files |= _bring(ours, registry, base, number, seed, blobs)
                    (base / "files.new").write_text(json.dumps(files))
                    (base / "files.new").rename(base / "files.json")
                    while len(processes) < readers:
                        words = [sys.executable, "-c", READER, base / "files.json", stop, str(len(processes))]
                        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
                    time.sleep(rng.uniform(0.1, 0.5))
                    moments.append(time.time())
                    ENDS[end](ours)
                    time.sleep(0.5)
                time.sleep(0.5)
                stop.touch()
                results = [json.loads(one.communicate(timeout=60)[0]) for one in processes]
            finally:
                for one in processes:
                    one.kill()
            for result in results:
                seen.reads += result["reads"]
                seen.wrong += result["wrong"]
                seen.errors += result["errors"]
                seen.said += result["said"]
            spans = [tuple(span) for result in results for span in result["slow"]]
            met = [[end - moment for start, end in spans if start <= moment < end] for moment in moments]
            seen.waited = sum(1 for one in met if one)
            seen.stall = max((max(one) for one in met if one), default=0.0)
        return seen
    finally:
        unmount_below(base)
        remove_tree(base)


def _bring(
    ours: Snapshotter, registry: FaultyServer, base: Path, number: int, seed: int, blobs: dict[str, bytes]
) -> dict[str, str]:
    """Another image, pulled and with a container: the paths of its files, and what they hold."""
    case = base / f"case{number}"
    case.mkdir()
    mine = dict[str, bytes]()
    bootstrap, expected = make_image(base / f"t{number}", seed * 1000 + number, base / f"b{number}", mine)
    bootstrap.rename(case / "image.boot")
    for blob_id, data in mine.items():
        (case / blob_id).write_bytes(data)
    blobs.update(mine)
    with Client(ours.socket) as client:
        meta = pull(client, case, base, f"{registry.netloc}/a/b:{number}", tag=f"i{number}")
        lower = option(client.prepare(f"c{number}", meta)[0], "lowerdir")
    return {f"{lower}/{name}": digest for name, digest in expected.items()}


def _template() -> dict[str, Any]:
    backend = {"scheme": "http", "timeout": 5, "connect_timeout": 5, "retry_limit": 2}
    device = {"backend": {"type": "registry", "config": backend}, "cache": {"type": "blobcache"}}
    return {"device": device, "mode": "direct", "fs_prefetch": {"enable": False, "learn": False}}


def _arguments(mode: str) -> tuple[str, ...]:
    return ("--daemon-mode", mode, "--recover-policy", "failover")
