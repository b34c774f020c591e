"""Whole conversions: our `nydusify convert` beside upstream's, the same source, registry to registry on this machine.

    python -m tests.bench.bench_nydusify [--image REF] [--rounds 3] [--json FILE] [-- more convert flags]

Without --image it makes one of five gzip layers from this machine's files (about 700 MB, 18,000 files). Each round
converts to a fresh repository, turn about; the best of the rounds counts, since other load only ever adds. `cpu` is
user and system time of all processes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab.images import ImageLayout, Member
from tests.lab.nydusify import upstream_command
from tests.lab.registry import Registry

_PR_SET_CHILD_SUBREAPER = 36
_OWN: set[int] = set()

SOURCES = (
    (Path("/usr/lib/x86_64-linux-gnu"), 150 << 20),
    (Path(sys.prefix) / "lib", 250 << 20),
    (Path("/usr/share"), 60 << 20),
    (Path("/usr/lib/python3"), 30 << 20),
    (Path("/usr/bin"), 80 << 20),
)


def members(top: Path, limit: int) -> Iterator[Member]:
    """A folder and what is below it, until more than `limit` bytes."""
    size = 0
    for folder, subfolders, names in os.walk(top):
        subfolders.sort()
        directory = tarfile.TarInfo(folder.lstrip("/"))
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        yield directory, None
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            info = tarfile.TarInfo(str(path).lstrip("/"))
            info.size, info.mode = path.stat().st_size, path.stat().st_mode & 0o7777
            yield info, path
            size += info.size
            if size > limit:
                return


def _reap() -> None:
    """Wait for what the program left behind: the server that forks our workers ends after its client."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (left := _orphans()):
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _orphans() -> list[int]:
    """Children that this process did not start itself."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in listed if int(pid) not in _OWN]


def measure(command: list[str], env: dict[str, str]) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    wall = time.monotonic() - begun
    _reap()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="host/repository:tag of a registry that needs no TLS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="flags for both programs, behind --")
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, Registry(Path(folder) / "registry") as registry:
        _OWN.update(_orphans())
        work = Path(folder)
        source = given.image
        if source is None:
            layout = ImageLayout(work / "image")
            layers = [layout.add_layer(members(*one), level=3) for one in SOURCES if one[0].is_dir()]
            image = layout.finish(layers)
            image.push(registry.host, "bench/source", "oci")
            source = f"{registry.host}/bench/source:oci"
            print(f"{image.blob_bytes >> 20} MiB of layers, {image.content >> 20} MiB in {image.files} files")
        script = str(Path(sys.executable).with_name("nydusify"))
        theirs = upstream_command(work)
        env = {"PATH": f"{work / 'upstream-bin'}:{os.environ['PATH']}", "HOME": folder, "DOCKER_CONFIG": folder}
        env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        best: dict[str, dict[str, float]] = {}
        for number in range(given.rounds):
            for name, program, more in (
                ("ours", [script], []),
                ("upstream", theirs, ["--source-insecure", "--target-insecure"]),
            ):
                if program is None:
                    continue
                target = f"{registry.host}/bench/{name}-{number}:n"
                command = [
                    *program,
                    "convert",
                    "--source",
                    source,
                    "--target",
                    target,
                    "--work-dir",
                    f"{folder}/{name}",
                ]
                figures = measure([*command, *more, *given.flags], env)
                print(f"{name:9} wall {figures['wall']:6.2f} s   cpu {figures['cpu']:6.2f} s")
                known = best.setdefault(name, figures)
                best[name] = {key: min(known[key], figures[key]) for key in known}
    result: dict[str, Any] = {"best": best, "flags": given.flags}
    if "upstream" in best:
        result["ratio"] = {key: round(best["ours"][key] / best["upstream"][key], 2) for key in ("wall", "cpu")}
        print("ours / upstream:", ", ".join(f"{key} {value}" for key, value in result["ratio"].items()))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
