"""Reads files of a mount one after the other, in an order of its own, and says how long the longest read took.

    python -m tests.lab.timedreads DIR TRUTH SEED     TRUTH: JSON, file name -> SHA-256 of its content

A process of its own, because it may hang with its mount; `TimedReads` runs it. Read-ahead of the kernel is off, so one
read of 64 KiB is one request to the daemon.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SIZE = 64 * 1024
LATE = 0.4  # seconds, below the daemon's least before it asks an origin as well


@dataclass(frozen=True, slots=True)
class Figures:
    """`wrong`: files that could not be read or have other bytes. `stall`: the longest time this process was not given
    the processor when it wanted it, by which a loaded machine makes reads longer. `late`: reads for which a daemon may
    have asked a second source."""

    reads: int
    seconds: float
    worst: float
    stall: float
    wrong: list[str]
    late: int


class TimedReads:
    """Starts at once; `figures` waits for the end."""

    def __init__(self, root: Path, files: Mapping[str, bytes], work: Path, seed: int = 0) -> None:
        truth = work / f"truth-{seed}.json"
        truth.write_text(json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.timedreads", str(root), str(truth), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def running(self) -> bool:
        return self.process.poll() is None

    def figures(self, timeout: float = 60.0) -> Figures:
        """subprocess.TimeoutExpired when a read hangs."""
        try:
            return Figures(**json.loads(self.process.communicate(timeout=timeout)[0]))
        finally:
            self.process.kill()


def _main(root: str, truth: str, seed: str) -> None:
    wanted = json.loads(Path(truth).read_text())
    names = sorted(wanted)
    random.Random(int(seed)).shuffle(names)
    stall = worst = 0.0

    def watch() -> None:
        nonlocal stall
        while True:
            before = time.monotonic()
            time.sleep(0.02)
            stall = max(stall, time.monotonic() - before - 0.02)

    threading.Thread(target=watch, daemon=True).start()
    reads, late, wrong, begin = 0, 0, [], time.monotonic()
    for name in names:
        hasher, offset = hashlib.sha256(), 0
        file = os.open(os.path.join(root, name), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            while True:
                before = time.monotonic()
                data = os.pread(file, SIZE, offset)
                taken = time.monotonic() - before
                worst, late = max(worst, taken), late + (taken > LATE)
                reads += 1
                if not data:
                    break
                hasher.update(data)
                offset += len(data)
            if hasher.hexdigest() != wanted[name]:
                wrong.append(f"{name}: other bytes")
        except OSError as error:
            wrong.append(f"{name} at {offset}: {error}")
        finally:
            os.close(file)
    print(json.dumps(asdict(Figures(reads, time.monotonic() - begin, worst, stall, wrong, late))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
