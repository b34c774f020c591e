"""Time to the first line of a container's output: plain OCI, our stack, upstream's stack, side by side in one run.

    python -m tests.bench.bench_start [--repeat 3] [--mbit 40] [--rtt-ms 20] [--json FILE]

Every side gets a fresh node (empty containerd, snapshotter and blobcache) for its cold start and pulls through the same
shaped link from the same registry. `cached` is the second container of the same image on the same node. Absolute
seconds depend on the machine: read the ratios. The sides without their programs are left out, loudly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.paths import ref_bin
from tests.lab.process import drop_caches, tail
from tests.lab.registry import Registry
from tests.lab.sample import COMMAND, sample_image
from tests.lab.stack import Stack, StackOptions, daemon_config


@dataclass
class Start:
    side: str
    state: str
    seconds: float
    bytes: int
    requests: int


def first_line(argv: list[str], timeout: float = 300.0) -> float:
    """Seconds from the start of the process to its first line on stdout."""
    begin = time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        seconds = time.monotonic() - begin
        rest, errors = child.communicate(timeout=timeout)
    if not line or child.returncode:
        raise SystemExit(f"{' '.join(argv)} failed with {child.returncode}: {errors[-800:]}{rest[-200:]}")
    return seconds


def start(stack: Stack, ref: str, snapshotter: str) -> float:
    """One start through nerdctl where there is one, else through ctr-remote and ctr."""
    nerdctl = ref_bin("nerdctl")
    if nerdctl is not None:
        return first_line(
            stack.containerd.nerdctl_argv(
                nerdctl, "run", "--rm", "-q", "--net", "host", ref, *COMMAND, snapshotter=snapshotter
            )
        )
    begin = time.monotonic()
    stack.rpull(ref, snapshotter=snapshotter, timeout=600)
    pulled = time.monotonic() - begin
    name = f"b{time.monotonic_ns()}"
    return pulled + first_line(
        stack.containerd.ctr_argv("run", "--rm", "--net-host", "--snapshotter", snapshotter, ref, name, *COMMAND)
    )


def measure(stack: Stack, registry: Registry, side: str, ref: str, snapshotter: str) -> list[Start]:
    results = []
    for state in ("cold", "cached"):
        if state == "cold":
            subprocess.run(["sync"], check=True, timeout=60)
            drop_caches()
        mark = registry.mark()
        seconds = start(stack, ref, snapshotter)
        traffic = registry.since(mark)
        results.append(Start(side, state, round(seconds, 3), traffic.bytes, traffic.count))
        print(
            f"  {side:10} {state:7} {seconds:7.2f} s {traffic.bytes / 1e6:8.2f} MB {traffic.count:5d} requests",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mbit", type=float, default=40.0)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--sides", default="oci,ours,upstream", help="comma list of oci, ours, erofs (ours with EROFS mounts), upstream"
    )
    parser.add_argument("--prefetch", action="store_true", help="fs_prefetch on, as in the scenario's file")
    parser.add_argument("--logs", action="store_true", help="print the end of nydusd's log")
    options = parser.parse_args()
    image = sample_image(print)
    sides = options.sides.split(",")
    if "upstream" in sides and ref_bin("nydusd") is None:
        print("interop: the reference programs are not here, upstream is left out", file=sys.stderr)
        sides.remove("upstream")
    results: list[Start] = []
    first_upstream = not {"ours", "erofs"} & set(sides)
    with Stack(
        StackOptions(upstream=first_upstream, rtt_ms=options.rtt_ms, mbit=options.mbit, prefetch=options.prefetch)
    ) as stack:
        registry = stack.registry
        image.push(registry.host, "lab/py", "oci")
        if not first_upstream:
            stack.convert("lab/py:oci", "lab/py:ours")
        if "upstream" in sides:
            stack.convert("lab/py:oci", "lab/py:upstream", upstream=True)
        for number in range(options.repeat):
            for side in sides:
                stack.options.upstream = side == "upstream" or first_upstream
                config = daemon_config(prefetch=options.prefetch, work_dir=str(stack.work / f"cache-{side}-{number}"))
                stack.new_node({**config, "fs_driver": "erofs"} if side == "erofs" else config)
                tag = "ours" if side == "erofs" else side
                results += measure(
                    stack, registry, side, f"{stack.host}/lab/py:{tag}", "overlayfs" if side == "oci" else "nydus"
                )
                if options.logs and side in ("ours", "erofs"):
                    for log in stack.snapshotter.root.glob("logs/**/*.log"):
                        print(tail(log, 2000))
    medians = {
        (side, state): statistics.median(r.seconds for r in results if (r.side, r.state) == (side, state))
        for side in sides
        for state in ("cold", "cached")
    }
    print(
        f"image: {image.blob_bytes / 1e6:.0f} MB compressed, {image.content / 1e6:.0f} MB, "
        f"{image.files} files; medians of {options.repeat}"
    )
    for side in sides:
        cold, cached = medians[side, "cold"], medians[side, "cached"]
        ratio = (
            f"  cold/oci {cold / medians['oci', 'cold']:.3f}  cached/oci {cached / medians['oci', 'cached']:.2f}"
            if "oci" in sides
            else ""
        )
        print(f"{side:10} cold {cold:7.2f} s  cached {cached:6.2f} s{ratio}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
