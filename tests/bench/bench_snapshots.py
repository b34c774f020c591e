"""The snapshots service: ours, upstream's containerd-nydus-grpc and containerd's overlayfs, side by side in one run.

    python -m tests.bench.bench_snapshots [--many 10000] [--calls 2000] [--sides ours,upstream,overlayfs] [--json FILE]

Prepare, Commit and Remove with one client and with 64 on one connection, with 10 snapshots there and with many; List of
all; a container of a known image from Prepare to mounted; memory; start-up with 1,000 snapshots and 100 images mounted.
The snapshotters run with the environment that the unit file sets.
overlayfs is asked through containerd, the only way there is: its metadata store has a part in the figures. Times
depend on the disk and on who else uses it: read the ratios. Sides whose programs are missing are left out, loudly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from snapshotter.system import detach, mount
from tests.lab.cases import case
from tests.lab.containerd import Containerd, find_containerd
from tests.lab.grpcwire import Failed, Wire
from tests.lab.paths import ref_bin
from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.snapshots import Client, pull
from tests.lab.stack import Snapshotter, unit_environment

IMAGE = "127.0.0.1:1/lab/merged:v6"
LABELS = {"containerd.io/gc.root": "2026-01-01T00:00:00Z", "containerd.io/snapshot.ref": "sha256:" + "0" * 64}


@dataclass
class Latency:
    p50: float  # ms
    p99: float
    rate: float  # calls a second
    cpu: float  # ms of the server's CPU a call


@dataclass
class Side:
    name: str
    calls: dict[str, Latency] = field(default_factory=dict)  # "Prepare x64 at 10000"
    values: dict[str, float] = field(default_factory=dict)


class Server:
    """What all sides have: a socket, a process, and the name and metadata their calls want."""

    def __init__(self, socket: Path, pid: int, snapshotter: str, prefix: str, metadata: dict[str, str]) -> None:
        self.socket, self.pid, self.snapshotter, self.prefix = socket, pid, snapshotter, prefix
        self.wire = Wire(socket, metadata)

    def request(self, call: str, key: str, name: str = "", parent: str = "") -> tuple[str, bytes]:
        key, common = self.prefix + key, {"snapshotter": self.snapshotter}
        message: Any
        if call == "Prepare":
            message = pb.PrepareSnapshotRequest(key=key, parent=parent, labels=LABELS, **common)
        elif call == "Commit":
            message = pb.CommitSnapshotRequest(key=key, name=self.prefix + name, labels=LABELS, **common)
        elif call == "Remove":
            message = pb.RemoveSnapshotRequest(key=key, **common)
        else:
            message = pb.ListSnapshotsRequest(**common)
        return call, message.SerializeToString()

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """MB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.contextmanager
def server(side: str, work: Path) -> Iterator[Server]:
    if side == "overlayfs":
        with Containerd(work / "c", None, ref_bin("containerd") or find_containerd()) as running:
            metadata = {"containerd-namespace": "bench"}
            yield Server(running.socket, running.pid, "overlayfs", "", metadata)
        return
    with Snapshotter(work / "s", template(), upstream=side == "upstream", env=unit_environment()) as ours:
        time.sleep(1)  # nydusd starts behind the socket
        yield Server(ours.socket, ours.pid, "nydus", "bench/1/", {"containerd-namespace": "bench"})


def template() -> dict[str, Any]:
    backend = {"type": "localfs", "config": {"dir": str(case("v6-merged3"))}}
    return {"device": {"backend": backend, "cache": {"type": "blobcache"}}, "mode": "direct"}


def timed(there: Server, what: list[tuple[str, bytes]], clients: int) -> Latency:
    cpu, begin = there.cpu(), time.perf_counter()
    done = there.wire.run(what, clients)
    seconds = time.perf_counter() - begin
    failed = sum(one.answer is None for one in done)
    if failed:
        raise Failed(f"{failed} of {len(what)} {what[0][0]}")
    took = sorted(one.seconds * 1000 for one in done)
    used = (there.cpu() - cpu) * 1000 / len(what)
    return Latency(took[len(took) // 2], took[len(took) * 99 // 100], len(what) / seconds, used)


def calls(side: Side, many: int, count: int) -> None:
    work = work_dir()
    try:
        with server(side.name, work) as there:
            present = 0
            for wanted in (10, many):
                fill = [there.request("Prepare", f"fill{number}") for number in range(present, wanted)]
                timed(there, fill, 64)
                present = wanted
                os.sync()  # what the crowd before left to write is nobody's time
                for clients, number in ((1, count // 8), (64, count)):
                    keys = [f"{wanted}-{clients}-{index}" for index in range(number)]
                    for call in ("Prepare", "Commit", "Remove"):
                        prefix = "n" if call == "Remove" else ""
                        what = [there.request(call, prefix + key, f"n{key}") for key in keys]
                        side.calls[f"{call} x{clients} at {wanted}"] = timed(there, what, clients)
                listing = [there.request("List", "")] * 5
                side.values[f"List of {wanted}, ms"] = timed(there, listing, 1).p50
                side.values[f"resident at {wanted}, MB"] = there.resident()
            there.wire.close()
    finally:
        unmount_below(work)
        remove_tree(work)


def known_image(side: Side, repeat: int = 30) -> None:
    """From Prepare to a mounted root file system, median; nydusd serves the image already."""
    work = work_dir()
    try:
        with server(side.name, work) as there:
            there.wire.close()
            if side.name == "overlayfs":
                client = Client(there.socket, {"containerd-namespace": "bench"}, "overlayfs")
                client.prepare("layer")
                client.commit("meta", "layer", {"containerd.io/gc.root": "1"})  # else its collector may take it
                meta = "meta"
            else:
                client = Client(there.socket)
                meta = pull(client, case("v6-merged3"), work, IMAGE)
            target = work / "rootfs"
            target.mkdir()
            took = []
            with client:
                for number in range(repeat + 1):
                    begin = time.perf_counter()
                    (made,) = client.prepare(f"c{number}", meta)
                    options = [text for text in made.options if text not in ("rw", "index=off")]
                    mount(made.type, made.source, str(target), 0, ",".join(options))
                    took.append(time.perf_counter() - begin)
                    detach(str(target))
            side.values["first container of an image, ms"] = took[0] * 1000
            side.values["Prepare to mounted, known image, ms"] = statistics.median(took[1:]) * 1000
    finally:
        unmount_below(work)
        remove_tree(work)


def start_up(side: Side, snapshots: int = 1000, images: int = 100, repeat: int = 5) -> None:
    """Seconds from the start of the process to its socket, to a List, and to the mounts of every container.

    With its nydusd alive, then with all processes and mounts gone, as after a reboot.
    """
    work = work_dir()
    try:
        upstream = side.name == "upstream"
        with Snapshotter(work / "s", template(), upstream=upstream, env=unit_environment(), mode="shared") as ours:
            with Wire(ours.socket) as wire:
                for number in range(snapshots - 5 * images):
                    wire.call("Prepare", pb.PrepareSnapshotRequest(key=f"fill{number}").SerializeToString())
            with Client(ours.socket) as client:
                metas = [pull(client, case("v6-merged3"), work, IMAGE, tag=f"i{number}-") for number in range(images)]
                for meta in metas:
                    client.prepare(f"c {meta}", meta)
                side.values["start-up: snapshots there"] = len(client.list())
            for what in ("nydusd alive", "after a reboot"):
                opened, listed, mounted = [], [], []
                for _ in range(repeat if what == "nydusd alive" else 2):
                    ours.stop()
                    if what != "nydusd alive":
                        ours.end_daemons()
                        unmount_below(ours.root)
                    begin = time.perf_counter()
                    ours.start(timeout=120, longest_pause=0.005)
                    opened.append(time.perf_counter() - begin)
                    with Client(ours.socket) as client:
                        client.list()
                        listed.append(time.perf_counter() - begin)
                        for meta in metas:
                            ready(client, f"c {meta}")
                        mounted.append(time.perf_counter() - begin)
                side.values[f"start-up, {what}: socket, s"] = statistics.median(opened)
                side.values[f"start-up, {what}: List answered, s"] = statistics.median(listed)
                side.values[f"start-up, {what}: {images} Mounts answered, s"] = statistics.median(mounted)
            side.values["start-up: resident, MB"] = Server(ours.socket, ours.pid, "", "", {}).resident()
    finally:
        unmount_below(work)
        remove_tree(work)


def ready(client: Client, key: str) -> None:
    """Upstream answers with an error while an image is not mounted again."""
    deadline = time.monotonic() + 120
    while True:
        try:
            client.mounts(key)
            return
        except grpc.RpcError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def report(sides: list[Side]) -> None:
    ours = sides[0]
    print(f"{'':28}" + "".join(f"{side.name:>34}" for side in sides))
    for what in ours.calls:
        cells = []
        for side in sides:
            one = side.calls[what]
            cells.append(f"{one.p50:7.2f} {one.p99:7.2f} ms {one.rate:6.0f}/s {one.cpu:5.2f}")
        print(f"{what:28}" + "".join(f"{cell:>34}" for cell in cells))
    for what in ours.values:
        print(f"{what:48}" + "".join(f"{side.values.get(what, float('nan')):16.2f}" for side in sides))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--sides", default="ours,upstream,overlayfs")
    parser.add_argument("--only", default="calls,image,start")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sides = []
    for name in options.sides.split(","):
        if name == "upstream" and ref_bin("containerd-nydus-grpc") is None:
            print("interop: upstream's containerd-nydus-grpc is not here", file=sys.stderr)
            continue
        if name == "overlayfs" and (ref_bin("containerd") or find_containerd()) is None:
            print("interop: no containerd here", file=sys.stderr)
            continue
        side = Side(name)
        if "calls" in options.only:
            calls(side, options.many, options.calls)
        if "image" in options.only:
            known_image(side)
        if "start" in options.only and name != "overlayfs":
            start_up(side)
        print(f"{name} done", file=sys.stderr)
        sides.append(side)
    report(sides)
    if options.json:
        options.json.write_text(json.dumps([asdict(side) for side in sides], indent=1))


if __name__ == "__main__":
    main()
