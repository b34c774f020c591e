"""What `examples/quickstart` does once everything is installed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab.coldstart import Start, start
from tests.lab.images import image_bytes
from tests.lab.process import (
    LabError,
    end_processes,
    processes_mentioning,
    remove_tree,
    run,
    unmount_below,
    work_dir,
)
from tests.lab.sample import COMMAND, sample_image
from tests.lab.stack import Stack, StackOptions

REPOSITORY = "sample/python"
KEPT = "quickstart.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="examples/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Converts a real image, starts a container from it before its data is here, shows what that saves.",
        epilog="Runs a private registry behind a slow link, a mirror, containerd and this project's snapshotter\n"
        "under one directory in /tmp, on loopback; nothing of it is left at the end, also after Ctrl-C.\n"
        "A system containerd is not touched. What was installed and built is kept in ~/.cache/nydus-py for\n"
        "the next run.",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures of the table to FILE")
    parser.add_argument("--keep", action="store_true", help="leave everything running and print commands to play with")
    parser.add_argument("--stop", metavar="DIR", help="end what an earlier --keep left running in DIR")
    parser.add_argument("--rtt-ms", type=float, default=20.0, help="round trip to the registry in milliseconds (20)")
    parser.add_argument("--mbit", type=float, default=40.0, help="rate of the link to the registry in Mbit/s (40)")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        if options.stop:
            return stop(Path(options.stop))
        return quickstart(options)
    except KeyboardInterrupt:
        print("interrupted: everything was taken down", file=sys.stderr)
        return 130
    except (LabError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Quiet:
    """No second interruption while things are taken down: a half-done clean-up leaves mounts."""

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        pass


def quickstart(options: argparse.Namespace) -> int:
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {text}", file=sys.stderr, flush=True)

    nerdctl = find_nerdctl()
    say("sample image (Debian, Python 3.11, numpy, scipy, pandas, scikit-learn)")
    image = sample_image(say)
    say(
        f"  {image.content / 1e6:.0f} MB in {image.files:,} files, {len(image.layers)} layers, "
        f"{image.blob_bytes / 1e6:.0f} MB compressed"
    )
    work = work_dir()
    stack = Stack(StackOptions(rtt_ms=options.rtt_ms, mbit=options.mbit, mirror=True), work)
    kept = False
    try:
        say(
            f"starting registry, link ({options.rtt_ms:g} ms, {options.mbit:g} Mbit/s), mirror, snapshotter, "
            f"containerd in {work}"
        )
        stack.__enter__()
        results = measure(stack, image, say, nerdctl)
        figures = {
            **{name: result.figures() for name, result in results.items()},
            "image_bytes": image_bytes(stack.registry.host, REPOSITORY, "oci"),
        }
        show(results, image.blob_bytes)
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
        say("done")
        if options.keep:
            keep(stack, nerdctl)
            kept = True
        return 0
    finally:
        if not kept:
            with _Quiet():
                stack.__exit__(None, None, None)
                shutil.rmtree(work, ignore_errors=True)


def find_nerdctl() -> Path | None:
    named = os.environ.get("NYDUS_REF_BIN")
    if named and (Path(named) / "nerdctl").exists():
        return Path(named) / "nerdctl"
    found = shutil.which("nerdctl")
    return Path(found) if found else None


def measure(stack: Stack, image: object, say: Callable[[str], None], nerdctl: Path | None) -> dict[str, Start]:
    from tests.lab.images import Image

    assert isinstance(image, Image)
    say("pushing it as an ordinary OCI image")
    image.push(stack.registry.host, REPOSITORY, "oci")
    say("converting it: nydusify convert")
    stack.convert(f"{REPOSITORY}:oci", f"{REPOSITORY}:nydus")
    client = f"nerdctl ({nerdctl})" if nerdctl else "ctr-remote and ctr"
    say(f"starting containers with {client}: plain OCI on overlayfs")
    results = {"oci": start(stack, f"{REPOSITORY}:oci", COMMAND, snapshotter="overlayfs", nerdctl=nerdctl)}
    results["oci_cached"] = start(
        stack, f"{REPOSITORY}:oci", COMMAND, snapshotter="overlayfs", nerdctl=nerdctl, cold=False
    )
    say("the same from the Nydus image, nothing cached")
    results["nydus_cold"] = start(stack, f"{REPOSITORY}:nydus", COMMAND, nerdctl=nerdctl)
    say("once more, cached")
    results["nydus_cached"] = start(stack, f"{REPOSITORY}:nydus", COMMAND, nerdctl=nerdctl, cold=False)
    return results


def show(results: dict[str, Start], total: int) -> None:
    from rich.console import Console
    from rich.table import Table

    names = {
        "oci": "plain OCI on overlayfs, cold",
        "oci_cached": "plain OCI on overlayfs, pulled before",
        "nydus_cold": "Nydus, cold",
        "nydus_cached": "Nydus, cached",
    }
    table = Table(title="Container start over the shaped link")
    table.add_column("")
    for column in ("seconds to first line", "MB from registry", "requests", "share of image"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        share = f"{100 * result.bytes / total:.1f} %"
        table.add_row(names[name], f"{result.seconds:.2f}", f"{result.bytes / 1e6:.1f}", str(result.requests), share)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def keep(stack: Stack, nerdctl: Path | None) -> None:
    containerd = stack.containerd
    state = {"socket": str(containerd.socket), "namespace": containerd.namespace, "ctr": str(containerd.ctr_binary)}
    (stack.work / KEPT).write_text(json.dumps(state))
    reference = f"{stack.host}/{REPOSITORY}:nydus"
    ctr = " ".join(containerd.ctr_argv())
    print(f"""
Left running in {stack.work}. Try:
  {ctr} run --rm -t --net-host --snapshotter nydus {reference} play bash
  {ctr} snapshots --snapshotter nydus ls
  grep -h mirrors {stack.snapshotter.root}/logs/*/*log
  tail -f {stack.registry.log}
  tail -f {stack.snapshotter.log}""")
    if nerdctl:
        print(
            "  " + " ".join(containerd.nerdctl_argv(nerdctl, "run", "--rm", "-it", "--net", "host", reference, "bash"))
        )
    print(f"End it all:\n  examples/quickstart --stop {stack.work}")


def stop(work: Path) -> int:
    """Takes down what --keep left: containers, then every process of the work directory, mounts, files."""
    try:
        state = json.loads((work / KEPT).read_text())
    except (OSError, ValueError):
        print(f"error: {work}: no quickstart was kept there (no {KEPT})", file=sys.stderr)
        return 1
    prefix = [state["ctr"], "-a", state["socket"], "-n", state["namespace"]]
    with _Quiet():
        for task in run([*prefix, "tasks", "ls", "-q"], timeout=30, check=False).stdout.split():
            run([*prefix, "tasks", "rm", "-f", task], timeout=30, check=False)
        for pattern in (f"{work}/n", str(work)):  # containerd and snapshotter before the registry they use
            end_processes([pid for pid in processes_mentioning(pattern) if pid != os.getpid()])
        unmount_below(work)
        for folder in [
            *Path("/sys/fs/cgroup").glob(f"*/{state['namespace']}"),
            Path(f"/run/containerd/runc/{state['namespace']}"),
        ]:
            try:
                folder.rmdir()
            except OSError:
                pass
        remove_tree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
