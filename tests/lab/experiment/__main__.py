"""The command line; `python -m tests.lab.experiment --help`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lab.experiment import images, report, scenarios
from tests.lab.experiment.images import CASES, SMALL, Case
from tests.lab.experiment.scenarios import (
    ALONE,
    LINKS,
    PLAIN,
    SCENARIOS,
    SHARED,
    SIDES,
    WARM_STARTS,
    Bench,
    Link,
    Result,
    repeats_of,
)
from tests.lab.process import LabError, remove_tree, run, work_dir
from tests.lab.registry import Registry
from tests.lab.sample import cache_dir
from tests.lab.stack import program

Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        if not options.report:
            measure(options, say)
        own = options.out / "results.jsonl"
        results = report.load(*(path for path in [own, *options.merge] if path.exists() or path != own))
        written = report.write(results, options.out)
        if options.into is not None:
            written += report.into(results, options.into)
    except KeyboardInterrupt:
        print("interrupted: everything was taken down, results so far are kept", file=sys.stderr)
        return 130
    except (LabError, OSError, ValueError) as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 1
    print(report.table(results))
    print(report.conditions(results))
    if not any(path.suffix == ".png" for path in written):
        say("no chart: matplotlib is not installed (pip install nydus-py[bench])")
    say("written: " + ", ".join(str(path) for path in written))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.experiment", description="Times six ways to start four images over two links."
    )

    def some(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return names

        return parse

    cases = [case.name for case in CASES]
    parser.add_argument("--cases", type=some(cases), default=cases, metavar="LIST", help=", ".join(cases))
    parser.add_argument("--links", type=some(list(LINKS)), default=list(LINKS), metavar="LIST", help=", ".join(LINKS))
    parser.add_argument("--scenarios", type=some(list(SCENARIOS)), default=list(SCENARIOS), metavar="LIST",
                        help="; ".join(f"{name}: {what}" for name, what in SCENARIOS.items()))  # fmt: skip
    parser.add_argument("--sides", type=some(SIDES), default=["oci", "ours"], metavar="LIST", help=", ".join(SIDES))
    parser.add_argument("--upstream", action="store_true", help="upstream's snapshotter and nydusd as well")
    parser.add_argument("--repeats", type=int, default=3, metavar="N",
                        help=f"nodes, which start what is here {WARM_STARTS} times (%(default)s)")  # fmt: skip
    parser.add_argument("--dragonfly-prefetch", action="store_true", help="dfdaemons fetch whole blobs behind a read")
    parser.add_argument("--convert", default="", metavar="ARGS", help="for nydusify convert; wants another --out")
    parser.add_argument("--out", type=Path, default=cache_dir() / "experiment", metavar="DIR",
                        help="results and the registry's storage, kept for the next run (%(default)s)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure anew what is kept; the last of each start counts")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE",
                        help="results.jsonl of other runs, for table and chart")  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="DIR", help="write tables and charts into these docs as well")
    parser.add_argument("--quick", action="store_true", help="a small image over one link, once: shows that it works")
    parser.add_argument("--report", action="store_true", help="only write table and chart of the kept results")
    options = parser.parse_args(argv)
    if options.upstream and "upstream" not in options.sides:
        options.sides.append("upstream")
    return options


def measure(options: argparse.Namespace, say: Say) -> None:
    """Keeps each start in results.jsonl as soon as it was made."""
    cases = [SMALL] if options.quick else [case for case in CASES if case.name in options.cases]
    links = [Link(20, 200)] if options.quick else [LINKS[name] for name in options.links]
    wanted = list(options.scenarios)
    if os.geteuid() != 0:
        raise LabError("needs root: it mounts")
    absent = scenarios.missing(wanted, "upstream" in options.sides)
    if absent:
        raise LabError(f"interop: reference programs that are not here: {', '.join(absent)}")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "results.jsonl"
    done = {result.key for result in report.load(kept)} if kept.exists() and not options.again else set()
    repeats = range(1 if options.quick else options.repeats)

    def lacking(case: Case, link: Link, side: str, names: Sequence[str], repeat: int) -> list[str]:
        names = [name for name in names if name in wanted and not (side == "upstream" and name == "learned")]
        return [
            name
            for name in names
            if any((case.name, link.name, side, name, each) not in done for each in repeats_of(name, repeat))
        ]

    def keep(found: list[Result], names: Sequence[str]) -> None:
        with kept.open("a") as file:
            for result in found:
                if result.scenario in names:
                    file.write(json.dumps(result.as_json()) + "\n")
                    say(
                        f"{result.case:15}{result.link:18}{result.side:9}{result.scenario:12}{result.seconds:7.2f} s "
                        f"{result.bytes / 1e6:7.2f} MB in {result.requests:3d}, load {result.load:.1f}"
                    )

    work = work_dir()
    try:
        with Registry(out / "registry") as registry:
            prepare(registry, sorted({case.image for case in cases}), options.convert, out, say)
            for link in links:
                with Bench(work / f"l{link.mbit:.0f}", registry, link) as bench:
                    for repeat in repeats:
                        for case in cases:
                            for side in options.sides:
                                alone = lacking(case, link, side, PLAIN if side == "oci" else ALONE, repeat)
                                if alone:
                                    keep(bench.alone(case, side, repeat, alone), alone)
                                shared = [] if side == "oci" else lacking(case, link, side, SHARED, repeat)
                                if shared:
                                    keep(bench.shared(case, side, repeat, shared, options.dragonfly_prefetch), shared)
    finally:
        remove_tree(work)


def prepare(registry: Registry, names: Sequence[str], arguments: str, out: Path, say: Say) -> None:
    """Pushes and converts what the registry's storage does not hold yet."""
    for name in names:
        mark = out / f"{name}.ready"
        if mark.exists():
            continue
        image = images.build(name, out, say)
        say(f"{name}: pushing and converting {image.blob_bytes / 1e6:.0f} MB in {len(image.layers)} layers")
        image.push(registry.host, f"lab/{name}", "oci")
        words = f"--source {registry.host}/lab/{name}:oci --target {registry.host}/lab/{name}:nydus"
        words += f" --nydus-image {program('nydus-image')} --source-insecure --target-insecure {arguments}"
        argv: list[str | Path] = [program("nydusify"), "convert", "--work-dir", out / "nydusify", *words.split()]
        run(argv, timeout=600, env=os.environ)
        mark.write_text(f"{image.manifest.digest}\n")


if __name__ == "__main__":
    sys.exit(main())
