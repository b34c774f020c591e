"""What the bars mean, and how each start is made and timed."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.lab.dragonfly import Dragonfly
from tests.lab.experiment.images import Case
from tests.lab.paths import ref_bin
from tests.lab.process import LabError, drop_caches, mounts_below, run, unmount_below, wait_until
from tests.lab.registry import Registry
from tests.lab.stack import REPO, Stack, StackOptions, daemon_config

NODE = "a node without the image and without its data"
SCENARIOS = {
    "oci": f"containerd's overlayfs, the ordinary image, {NODE}",
    "cold": f"Nydus, {NODE}, nothing cached anywhere",
    "dragonfly": f"Nydus through the mirror, {NODE}, Dragonfly empty",
    "remote": f"{NODE}; another peer has what it needs",
    "local": f"{NODE}; this node's dfdaemon has what it needs",
    "local-image": "image pulled before, our cache empty; this node's dfdaemon has what it needs",
    "cache": "image pulled before, our cache has what it needs",
    "learned": f"{NODE}; what an earlier start read is known",
    "overlayfs": "the ordinary image, pulled and unpacked before",
}
ALONE = ("cold", "cache", "learned")
SHARED = ("dragonfly", "remote", "local", "local-image")
PLAIN = ("oci", "overlayfs")


@dataclass(frozen=True, slots=True)
class Link:
    rtt_ms: float
    mbit: float

    @property
    def name(self) -> str:
        return f"{self.mbit:g} Mbit/s, {self.rtt_ms:g} ms"


LINKS = {"slow": Link(20, 40), "fast": Link(5, 1000)}
SIDES = ("oci", "ours", "fuse", "erofs", "auto", "upstream")
"""`fuse`, `erofs`, `auto`: ours with that `fs_driver`; `ours` alone is with the default."""
# Seconds that a node's services run before a container is asked for, after their start and after another container:
# what they do behind that (ours import what images may need, 0.2 s) is not the container's.
SETTLE = 2.0
WARM = ("cache", "overlayfs")
# Starts of each node of these: they take little time, and two of them differ by a half as easily as not.
WARM_STARTS = 3


@dataclass(frozen=True, slots=True)
class Result:
    """One start. `seconds` from the start of `nerdctl run` to its end; `bytes` and `requests` are those that the
    registry answered meanwhile, `data_bytes` and `data_requests` those of them for ranges of blobs; `load` of this
    machine at the start, `when` it was (UTC), `commit` of what was measured."""

    case: str
    link: str
    side: str
    scenario: str
    repeat: int
    seconds: float
    bytes: int
    requests: int
    data_bytes: int
    data_requests: int
    load: float
    when: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return (self.case, self.link, self.side, self.scenario, self.repeat)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def repeats_of(scenario: str, repeat: int) -> range:
    """Numbers of the starts that one node makes of a scenario."""
    starts = WARM_STARTS if scenario in WARM else 1
    return range(starts * repeat, starts * (repeat + 1))


@cache
def commit() -> str:
    """Of this tree, with a plus if it is changed; empty outside of a repository."""
    try:
        found = run(["git", "-C", REPO, "describe", "--always", "--dirty=+", "--exclude=*"], timeout=20, check=False)
    except LabError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def missing(scenarios: Sequence[str], upstream: bool) -> list[str]:
    """Programs that these scenarios need and that are not here."""
    names = ["nerdctl"]
    if any(name in SHARED for name in scenarios):
        names += ["dfget", "scheduler", "labmanager"]
    if upstream:
        names += ["containerd-nydus-grpc", "nydusd", "nydusd-2.2.5", "nydus-image"]
    return [name for name in names if ref_bin(name) is None]


class Bench:
    """Registry and link are up; each scenario gets the nodes it needs."""

    def __init__(self, work: Path, registry: Registry, link: Link, *, prefetch: bool = True, timeout: float = 400.0):
        self.registry, self.link, self.timeout, self.prefetch = registry, link, timeout, prefetch
        self.stack = Stack(StackOptions(rtt_ms=link.rtt_ms, mbit=link.mbit, registry=registry, prefetch=prefetch), work)
        nerdctl = ref_bin("nerdctl")
        if nerdctl is None:
            raise LabError("interop: nerdctl is not here")
        self._nerdctl = nerdctl
        self._numbers = 10

    def __enter__(self) -> Bench:
        self.stack.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(None, None, None)

    # Nodes

    def node(self, side: str, mirrors: list[dict[str, Any]] | None = None, profiles: Path | None = None) -> None:
        """A new node: empty containerd, snapshotter, blobcache. `profiles`: what another node has learned."""
        stack = self.stack
        stack.end_node()
        shutil.rmtree(stack.node, ignore_errors=True)  # unpacked images, gigabytes of them
        stack.options.upstream = side == "upstream"
        # 2.2.5 is the last that knows mirrors.
        stack.options.nydusd = "nydusd-2.2.5" if mirrors else "nydusd"
        self._numbers += 1
        if profiles is not None:
            shutil.copytree(profiles, self._profiles(stack.work / f"n{self._numbers}"))
        config = daemon_config(mirrors, prefetch=self.prefetch)
        if side in ("fuse", "erofs", "auto"):
            config["fs_driver"] = side
        stack.new_node(config, number=self._numbers)
        time.sleep(SETTLE)

    @staticmethod
    def _profiles(node: Path) -> Path:
        return node / "s" / "r" / "cache.profiles"

    def empty_cache(self) -> None:
        """The blobcache of a node whose image stays: the daemons end, the cache goes, they start again."""
        stack = self.stack
        stack.snapshotter.stop()
        stack.snapshotter.end_daemons()
        unmount_below(stack.snapshotter.root)
        for name in ("cache", "cache.profiles"):
            shutil.rmtree(stack.snapshotter.root / name, ignore_errors=True)
        stack.snapshotter.start()
        wait_until(self._answers, 30, "the snapshotter, for containerd")
        wait_until(lambda: bool(mounts_below(stack.snapshotter.root)), 30, "the image's mount")
        time.sleep(SETTLE)

    def _answers(self) -> bool:
        """containerd keeps away from a snapshotter that was gone for up to 3 s."""
        key, ctr = f"probe-{time.monotonic_ns()}", self.stack.containerd.ctr
        if ctr("snapshots", "--snapshotter", "nydus", "prepare", key, timeout=30, check=False).returncode:
            return False
        ctr("snapshots", "--snapshotter", "nydus", "rm", key, timeout=30)
        return True

    # Starts

    def run(self, case: Case, side: str, scenario: str, repeat: int) -> Result:
        """Page cache dropped, but for the programs that every container start runs."""
        stack = self.stack
        plain = side == "oci"
        reference = f"{stack.host}/lab/{case.image}:{'oci' if plain else 'nydus'}"
        drop_caches()
        self._warm_programs()
        argv = stack.containerd.nerdctl_argv(
            self._nerdctl,
            *("run", "--rm", "--quiet", "--net", "host", reference, *case.command),
            snapshotter="overlayfs" if plain else "nydus",
        )
        path = f"{stack.containerd.binary.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        env = {"PATH": path, "HOME": str(stack.work), "DOCKER_CONFIG": str(stack.work)}
        load = os.getloadavg()[0]
        mark = self.registry.mark()
        begin = time.monotonic()
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.timeout, env=env, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(argv)}: no end after {self.timeout:.0f} s") from None
        seconds = time.monotonic() - begin
        output = done.stdout.decode(errors="replace")
        if done.returncode or not output.startswith(case.says):
            errors = done.stderr[-800:].decode(errors="replace")
            raise LabError(f"{' '.join(argv)}: exit code {done.returncode}, {output[:200]!r}, {errors}")
        traffic = self.registry.since(mark)
        data = [request for request in traffic.requests if request.status == 206]
        return Result(
            *(case.name, self.link.name, side, scenario, repeat, round(seconds, 3)),
            *(traffic.bytes, traffic.count, sum(request.size for request in data), len(data), round(load, 2)),
            *(time.strftime("%Y-%m-%d %H:%M", time.gmtime()), commit()),
        )

    def pull(self, case: Case) -> None:
        """The ordinary image, past the link: to time what comes after it."""
        ctr, stack = self.stack.containerd.ctr, self.stack
        near, far = (f"{host}/lab/{case.image}:oci" for host in (stack.registry.host, stack.host))
        ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", near, timeout=self.timeout)
        ctr("images", "tag", near, far)

    def _warm_programs(self) -> None:
        """A node that runs containers has their programs in memory."""
        containerd = self.stack.containerd.binary
        for program in (str(self._nerdctl), "runc", str(containerd.with_name("containerd-shim-runc-v2"))):
            try:
                subprocess.run(
                    [program, "-v" if "shim" in program else "--version"], capture_output=True, timeout=20, check=False
                )
            except OSError:
                pass
        # Read, not run: it may be a Go program whose start says little.
        for path in (containerd, shutil.which("runc")):
            if path is not None:
                with open(path, "rb") as file:
                    while file.read(1 << 20):
                        pass

    # Scenarios, in the order in which they build on each other

    def alone(self, case: Case, side: str, repeat: int, wanted: Sequence[str]) -> list[Result]:
        """The starts without Dragonfly."""
        results: list[Result] = []
        if side == "oci":
            self.node("ours")
            if "oci" in wanted:
                results.append(self.run(case, side, "oci", repeat))
            else:
                self.pull(case)
            if "overlayfs" in wanted:
                results += self.warm(case, side, "overlayfs", repeat)
            return [result for result in results if result.scenario in wanted]
        self.node(side)
        results.append(self.run(case, side, "cold", repeat))
        if "cache" in wanted:
            results += self.warm(case, side, "cache", repeat)
        if "learned" in wanted and side != "upstream":
            self.stack.end_node()  # a run's profile is complete when the image is let go of
            kept = self.stack.work / "profiles"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self._profiles(self.stack.node), kept)
            self.node(side, profiles=kept)
            results.append(self.run(case, side, "learned", repeat))
        return [result for result in results if result.scenario in wanted]

    def warm(self, case: Case, side: str, scenario: str, repeat: int) -> list[Result]:
        """What is here is started a few times."""
        results = []
        for number in repeats_of(scenario, repeat):
            time.sleep(SETTLE)
            results.append(self.run(case, side, scenario, number))
        return results

    def shared(self, case: Case, side: str, repeat: int, wanted: Sequence[str], prefetch: bool) -> list[Result]:
        """The starts through Dragonfly: two nodes, each with a peer, and a seed peer."""
        results: list[Result] = []
        folder = self.stack.work / f"d{self._numbers}"
        with Dragonfly(folder, f"http://{self.stack.host}", peers=2, prefetch=prefetch) as dragonfly:
            self.node(side, [dragonfly.mirror(0)])
            results.append(self.run(case, side, "dragonfly", repeat))
            for scenario in ("remote", "local"):
                self.node(side, [dragonfly.mirror(1)])
                results.append(self.run(case, side, scenario, repeat))
            if "local-image" in wanted:
                self.empty_cache()
                results.append(self.run(case, side, "local-image", repeat))
            self.stack.end_node()
        shutil.rmtree(folder, ignore_errors=True)
        return [result for result in results if result.scenario in wanted]
