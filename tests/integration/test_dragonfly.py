"""Our daemon through real Dragonfly of both generations, with the deployment's configuration: what one node fetched
another gets from its peers, and no fault of Dragonfly's costs a reader more than two seconds or a right byte."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from nydusfs.sources.dragonfly import PIECE
from tests.lab.daemon import Nydusd, can_mount_fuse
from tests.lab.dragonfly import CLASSIC, FLAVORS, MODERN, Dragonfly, Program, missing
from tests.lab.faulty import FaultyServer, Request, faulty_server
from tests.lab.process import remove_tree, unmount_below, wait_until, work_dir
from tests.lab.stack import daemon_config
from tests.lab.timedreads import Figures, TimedReads
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(bool(can_mount_fuse()), reason=can_mount_fuse() or "-"),
]
BOUND = 2.0  # seconds of a read while something is broken
LONG_SECONDS = 240
KIB, MIB = 1 << 10, 1 << 20


class Lab:
    """A registry that records what it is asked for, Dragonfly with two peers, and nodes with a daemon each."""

    def __init__(self, flavor: str, stack: ExitStack) -> None:
        self.work = work_dir()
        stack.callback(self._clean)
        self.stack = stack
        self.registry: FaultyServer = stack.enter_context(faulty_server({}))
        self.dragonfly = stack.enter_context(Dragonfly(self.work / "d", self.registry.url, flavor=flavor, peers=2))
        self._images = 0

    def _clean(self) -> None:
        unmount_below(self.work)
        remove_tree(self.work)

    def image(self, mib: int, files: int = 40) -> TinyImage:
        """A fresh one: no peer has anything of it."""
        self._images += 1
        seed = 1000 * self._images
        rng = random.Random(seed)
        sizes = [rng.randrange(1, 2 * mib * MIB // files) for _ in range(files)]
        built = tiny_image(self.work, {f"f{n:03}": noise(size, seed + n) for n, size in enumerate(sizes)})
        self.registry.blobs[built.blob_id] = built.blob
        return built

    def node(self, image: TinyImage, number: int = 0, *, prefetch: bool = False, proxy: bool = False) -> Nydusd:
        """With the deployment's configuration, and nothing cached; with `proxy` the peer is not a mirror but that."""
        name = f"{image.blob_id[:6]}-{number}-{time.monotonic_ns()}"
        peer = self.dragonfly.peers[number]
        way = {"proxy": {"url": peer.url, "ping_url": peer.ping_url, "fallback": True}} if proxy else {}
        config = daemon_config(
            [] if proxy else [self.dragonfly.mirror(number)],
            work_dir=str(self.work / f"cache-{name}"),
            host=self.registry.netloc,
            repo="lab/image",
            prefetch=prefetch,
            **way,
        )
        path = self.work / f"{name}.json"
        path.write_text(json.dumps(config))
        return Nydusd("--config", path, "--bootstrap", image.bootstrap)

    def read(
        self, node: Nydusd, image: TinyImage, seed: int = 0, files: Mapping[str, bytes] | None = None
    ) -> TimedReads:
        return TimedReads(node.mnt, files or image.files, node.dir, seed)

    def asked(self, image: TinyImage) -> tuple[list[Request], list[Request]]:
        """What the registry was asked for of this image: by Dragonfly, which passes on the headers it got, and by
        daemons."""
        found = [one for one in self.registry.data_requests if one.span and one.target.endswith(image.blob_id)]
        ours = [one for one in found if not any(name.startswith("x-dragonfly-") for name in one.headers)]
        return [one for one in found if one not in ours], ours

    def complaints(self, node: Nydusd) -> str:
        """For messages of failed assertions."""
        lines = [line for line in node.log_text().splitlines() if "irror" in line and "backend config" not in line]
        return "\n".join(lines[-10:])

    def peer_state(self, node: Nydusd) -> str:
        """What the daemon thinks of the first peer."""
        known = {one["address"]: str(one["state"]) for one in node.get("metrics/sources").body}
        return known[self.dragonfly.peers[0].url]


@pytest.fixture(scope="module", params=FLAVORS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if reason := missing(request.param):
        pytest.skip(reason)
    with ExitStack() as stack:
        yield Lab(request.param, stack)


@pytest.fixture(autouse=True)
def all_well(lab: Lab) -> Iterator[None]:
    yield
    lab.registry.mode, lab.registry.latency = "ok", 0.0
    for program in lab.dragonfly.programs():
        program.thaw()
        program.start()


def volume(requests: list[Request]) -> int:
    return sum(span[1] - span[0] + 1 for span in (one.span for one in requests) if span)


def twice(requests: list[Request]) -> list[tuple[int, int]]:
    """Ranges of which some byte was in an earlier one."""
    found, behind = [], 0
    for first, last in sorted(one.span for one in requests if one.span):
        if first < behind:
            found.append((first, last))
        behind = max(behind, last + 1)
    return found


def damage(files: Iterable[Path]) -> None:
    assert files
    for path in files:
        path.write_bytes(bytes(path.stat().st_size))


def right(figures: Figures) -> None:
    """Bytes, and seconds: what a loaded machine takes away is not the daemon's."""
    assert not figures.wrong
    assert figures.worst < BOUND + 3 * figures.stall, figures


# -- what is shared


@pytest.mark.parametrize("lab", [CLASSIC], indirect=True)
def test_two_nodes_start_an_image_and_the_registry_sees_each_range_once(lab: Lab) -> None:
    """At the same time, in different orders, one with prefetch as the deployment has it and one through a proxy:
    classic Dragonfly finds only the very same ranges. The totals it invents are no trouble."""
    image = lab.image(5)
    with lab.node(image, 0, prefetch=True) as first, lab.node(image, 1, proxy=True) as second:
        found = [reader.figures() for reader in [lab.read(first, image, 1), lab.read(second, image, 2)]]
    for figures in found:
        right(figures)
    theirs, ours = lab.asked(image)
    assert not twice(theirs)
    assert volume(theirs) > 0.9 * len(image.blob)
    # a loaded machine is helped out by the registry
    assert len(ours) <= len(theirs) // 10 + sum(figures.late for figures in found)


@pytest.mark.parametrize("lab", [MODERN], indirect=True)
def test_a_second_node_gets_from_peers_what_the_first_fetched(lab: Lab) -> None:
    """All but the pieces of each node's first request, which finds out with whom the daemon talks and goes past the
    peers. Asked in small ranges, modern Dragonfly would fetch everything again."""
    image = lab.image(24)
    with lab.node(image, 0) as first:
        right(lab.read(first, image, 1).figures())
    before = volume(lab.asked(image)[0])
    assert before <= 1.1 * len(image.blob)
    with lab.node(image, 1, proxy=True) as second:
        figures = lab.read(second, image, 2).figures()
        right(figures)
        theirs, ours = lab.asked(image)
        assert volume(theirs) - before <= 2 * PIECE + KIB
        assert len(ours) <= 10 + figures.late, lab.complaints(second)


# -- what goes wrong


def test_a_registry_that_ignores_ranges(lab: Lab) -> None:
    """Classic answers then with 206 and the whole blob, modern with 500."""
    image = lab.image(1)
    lab.registry.mode = "whole-200"
    with lab.node(image) as node:
        right(lab.read(node, image).figures())


def test_a_frozen_scheduler(lab: Lab) -> None:
    """Each miss then waits 30 s (modern: 10 s), while the peer's ping is fine."""
    image = lab.image(8)
    half = dict(list(image.files.items())[::2])
    rest = {name: data for name, data in image.files.items() if name not in half}
    with lab.node(image) as node:
        lab.dragonfly.scheduler.freeze()
        right(lab.read(node, image, files=half).figures())
        lab.dragonfly.scheduler.thaw()
        before, _ = lab.asked(image)
        wait_until(lambda: lab.peer_state(node) != "down", 60, "the peer")
        right(lab.read(node, image, 1, files=rest).figures())
        after, _ = lab.asked(image)
        if lab.dragonfly.flavor == CLASSIC:  # the other has all pieces by now
            assert len(after) > len(before)


def test_a_dfdaemon_killed_in_mid_read_comes_back_with_a_damaged_cache(lab: Lab) -> None:
    """Its cache it serves as good."""
    image = lab.image(6 if lab.dragonfly.flavor == CLASSIC else 30, files=100)
    peer = lab.dragonfly.peers[0]
    known = set(peer.stored())
    lab.registry.latency = 0.03
    with lab.node(image) as node:
        reader = lab.read(node, image)
        wait_until(lambda: bool(peer.alive() and set(peer.stored()) - known), 60, "the first request")
        time.sleep(0.3)
        assert reader.running()
        peer.kill()
        damage(set(peer.stored()) - known)
        assert reader.running()
        peer.start()
        right(reader.figures())
    _, before = lab.asked(image)
    with lab.node(image) as node:
        right(lab.read(node, image).figures())
    _, after = lab.asked(image)
    assert len(after) > len(before)  # healed by the registry


@pytest.mark.long
def test_everything_goes_wrong_for_minutes(lab: Lab) -> None:
    """Two nodes read one fresh image after the other, while peers, seed and scheduler are killed, frozen, damaged."""
    rng = random.Random(1)
    dragonfly = lab.dragonfly
    assert dragonfly.seed is not None
    peers = [*dragonfly.peers, dragonfly.seed]
    frozen: list[tuple[float, Program]] = []
    runs: list[tuple[Nydusd, TimedReads] | None] = [None, None]
    images, reads, worst = 0, 0, 0.0
    end = time.monotonic() + LONG_SECONDS
    try:
        while time.monotonic() < end or any(runs):
            for number, run in enumerate(runs):
                if run is not None and not run[1].running():
                    figures = run[1].figures()
                    right(figures)
                    reads, worst = reads + figures.reads, max(worst, figures.worst)
                    run[0].__exit__()
                    runs[number] = run = None
                if run is None and time.monotonic() < end:
                    images += 1
                    image = lab.image(6, files=60)
                    node = lab.node(image, number, prefetch=rng.random() < 0.5, proxy=rng.random() < 0.3)
                    node.__enter__()
                    runs[number] = node, lab.read(node, image)
            time.sleep(rng.uniform(0.1, 1.0))
            while frozen and frozen[0][0] < time.monotonic():
                frozen.pop(0)[1].thaw()
            match rng.choice(["kill", "freeze", "freeze", "damage", "none"]):
                case "kill":
                    peer = rng.choice(peers)
                    peer.kill()
                    time.sleep(rng.uniform(0.0, 1.0))
                    dragonfly.scheduler.thaw()  # without one no dfdaemon starts
                    peer.start()
                case "freeze":
                    program = rng.choice([dragonfly.scheduler, *peers])
                    program.freeze()
                    frozen.append((time.monotonic() + rng.uniform(1, 8), program))
                case "damage":
                    stored = dragonfly.peers[0].stored()
                    damage(rng.sample(stored, min(len(stored), 5)))
    finally:
        for run in runs:
            if run is not None:
                run[1].process.kill()
                run[0].__exit__()
    print(f"{dragonfly.flavor}: {images} images, {reads} reads, the longest {worst:.2f} s")
    assert images > 4
