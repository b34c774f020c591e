"""SIGKILL right before every step of every call: what the next start finds agrees, and no hand is ever needed.

A container runs from a lazy image all the time. In CI one step in several, another set each time; `long` takes all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import sqlite3
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from nydusfs.drivers import kernel
from snapshotter.errors import SnapshotterError
from snapshotter.nydusd_api import NydusdApi
from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.process import LabError, kill_together, mounts_below, remove_tree, unmount_below, wait_until, work_dir
from tests.lab.snapshots import PREFIX, REF, Client, mounted, option, pull
from tests.lab.stack import Snapshotter
from tests.lab.steps import Control

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

IMAGE = "127.0.0.1:1/lab/merged:v6"
NEVER = 1 << 60
CASE = "v6-merged3"


class Node:
    """The snapshotter under the stepper, a container on it, and what must hold after any death."""

    def __init__(self, mode: str) -> None:
        self.work = work_dir()
        backend = {"type": "localfs", "config": {"dir": str(image_case(CASE))}}
        config = {"device": {"backend": backend, "cache": {"type": "blobcache"}}, "mode": "direct"}
        self.mode = mode
        self.control = Control(self.work / "control")
        self.ours = Snapshotter(self.work / "s", config, arguments=("--daemon-mode", mode))
        plain = self.ours.argv
        stepper = [sys.executable, "-m", "tests.lab.steps", str(self.work / "control")]
        self.ours.argv = lambda: [*stepper, *plain()[1:]]  # type: ignore[method-assign]
        self.numbers = itertools.count(1)
        self.images = 1

    def start(self) -> None:
        self.control.arm(0)
        self.ours.start(timeout=60)

    def disarm(self) -> bool:
        """Whether it is dead: no step is the last one any more, and one that began to be is over."""
        self.control.disarm()
        time.sleep(0.05)
        return self.dead()

    def dead(self) -> bool:
        child = self.ours._child
        return child is None or not child.alive()

    def base(self) -> None:
        """A layer, and a container on a lazy image."""
        with Client(self.ours.socket) as client:
            client.prepare("k")
            client.commit("base", "k")
            self.meta = pull(client, image_case(CASE), self.work, IMAGE)
            self.container = client.prepare("running", self.meta)
        self.lower = Path(option(self.container[0], "lowerdir"))
        names = [entry["path"] for entry in json.loads((image_case(CASE) / "manifest.json").read_text())["entries"]]
        self.file = next(name.lstrip("/") for name in names if (self.lower / name.lstrip("/")).is_file())
        self.content = (self.lower / self.file).read_bytes()

    def check(self, client: Client, died: str) -> None:
        """`died`: the step, for messages."""
        assert client.mounts("running") == self.container, died
        with open(self.rootfs / self.file, "rb", buffering=0) as file:  # through the mount the container has
            assert file.read() == self.content, died
        client.cleanup()
        try:
            wait_until(lambda: self.disagreement(client) == "", 60, "agreement")
        except LabError:
            raise LabError(f"no agreement after {died}: {self.disagreement(client)}") from None
        expected = 1 if self.mode == "shared" else self.images
        wait_until(lambda: len(self.ours.services()) == expected, 60, f"{expected} nydusd after {died}")

    def disagreement(self, client: Client) -> str:
        """Rows, directories, mounts, daemons and their files; "" when each stands for the others."""
        root = self.ours.root
        database = sqlite3.connect(f"file:{root}/metadata.sqlite?mode=ro", uri=True)
        try:
            rows = dict(database.execute("SELECT id, kind FROM snapshots"))
            instances = {str(row[0]) for row in database.execute("SELECT snapshot FROM instances")}
            daemons = {row[0] for row in database.execute("SELECT id FROM daemons")}
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return "the database is damaged"
            if database.execute("SELECT * FROM gone").fetchall():
                return "not cleaned up"
        finally:
            database.close()
        names = os.listdir(root / "snapshots")
        if set(names) != {str(identity) for identity in rows}:
            return f"directories {sorted(names)}, rows {sorted(rows)}"
        for identity, kind in rows.items():
            inside = set(os.listdir(root / "snapshots" / str(identity)))
            wanted = {"fs", "snapshot.json"} | ({"work"} if kind == 2 else set())
            # a committed one may keep the `work` it had, and what a killed rewrite left is overwritten or deleted
            inside = {name for name in inside if not name.startswith("snapshot.json.")}
            if inside - {"work", "mnt"} != wanted - {"work"} or (kind == 2 and "work" not in inside):
                return f"snapshot {identity} of kind {kind} holds {sorted(inside)}"
        if (root / "trash").exists() and os.listdir(root / "trash"):
            return f"trash {os.listdir(root / 'trash')}"
        found = [(one.mountpoint, one.fstype) for one in kernel.mounts() if one.mountpoint.startswith(f"{root}/")]
        if len(found) != len(set(found)):  # the kernel's mount of an image lies over FUSE's
            return f"mounted twice: {found}"
        mounts = mounts_below(root)
        if self.mode == "shared":
            if set(os.listdir(root / "mnt")) != instances:
                return f"served {os.listdir(root / 'mnt')}, instances {instances}"
        elif {path.split("/")[-2] for path in mounts} != instances:
            return f"mounts {mounts}, instances {instances}"
        for place in ("config", "socket"):
            if not set(os.listdir(root / place)) <= daemons:
                return f"{place} {os.listdir(root / place)}, daemons {daemons}"
        if self.mode == "shared":
            configs = {name for daemon in daemons for name in listing(root / "config" / daemon)}
            if configs != instances:
                return f"configurations {configs}, instances {instances}"
        return ""

    def __enter__(self) -> Node:
        self._exits = contextlib.ExitStack()
        try:
            self.start()
            self.base()
            self.rootfs = self._exits.enter_context(mounted(self.container, self.work / "rootfs"))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._exits.close()
        finally:
            self._end()

    def _end(self) -> None:
        self.ours.kill()
        self.ours.end_daemons()
        unmount_below(self.work)
        remove_tree(self.work)


def listing(path: Path) -> list[str]:
    return os.listdir(path) if path.exists() else []


# ---- calls: `ready` is made in peace, then `call` dies; `again` after the restart must succeed


class Call(ABC):
    images = 0  # mounted besides the container's

    def __init__(self, number: int) -> None:
        self.key = f"default/{number}/k ü"
        self.number = number

    def ready(self, node: Node, client: Client) -> None:  # noqa: B027 - most calls need nothing
        pass

    @abstractmethod
    def call(self, node: Node, client: Client) -> None: ...

    def after(self, node: Node, client: Client) -> None:
        """The call again as a client would; then nothing of it may stay."""
        with contextlib.suppress(grpc.RpcError):
            self.call(node, client)
        client.stat(self.key)
        assert client.mounts(self.key)
        client.remove(self.key)


class Prepare(Call):
    def call(self, node: Node, client: Client) -> None:
        client.prepare(self.key, "base", {"containerd.io/snapshot/x": "y" * 3000})


class View(Call):
    def call(self, node: Node, client: Client) -> None:
        client.view(self.key, "base")


class Skipped(Call):
    def call(self, node: Node, client: Client) -> None:
        labels = {REF: f"sha256:{self.number}", PREFIX + "nydus-blob": "true"}
        with contextlib.suppress(grpc.RpcError):
            client.prepare(self.key, "base", labels)
            raise AssertionError("a data layer is never prepared")
        if node.dead():
            raise ConnectionError

    def after(self, node: Node, client: Client) -> None:
        self.call(node, client)
        (found,) = client.list(f'labels."{REF}"==sha256:{self.number},parent=="base"')
        client.remove(found.name)


class Commit(Call):
    def ready(self, node: Node, client: Client) -> None:
        client.prepare(self.key, "base")

    def call(self, node: Node, client: Client) -> None:
        client.commit(f"name {self.number}", self.key, {"l": str(self.number)})

    def after(self, node: Node, client: Client) -> None:
        with contextlib.suppress(grpc.RpcError):
            self.call(node, client)
        made = client.stat(f"name {self.number}")
        assert (made.parent, made.kind, dict(made.labels)) == ("base", 3, {"l": str(self.number)})
        with pytest.raises(grpc.RpcError, match="not found"):
            client.stat(self.key)
        client.remove(f"name {self.number}")


class Update(Call):
    def call(self, node: Node, client: Client) -> None:
        client.update("base", {"l": str(self.number)})

    def after(self, node: Node, client: Client) -> None:
        self.call(node, client)
        assert client.stat("base").labels["l"] == str(self.number)


class Remove(Call):
    def ready(self, node: Node, client: Client) -> None:
        client.prepare(self.key, "base")

    def call(self, node: Node, client: Client) -> None:
        client.remove(self.key)

    def after(self, node: Node, client: Client) -> None:
        with contextlib.suppress(grpc.RpcError):
            self.call(node, client)
        with pytest.raises(grpc.RpcError, match="not found"):
            client.stat(self.key)


class Cleanup(Remove):
    def ready(self, node: Node, client: Client) -> None:
        for number in range(2):
            client.prepare(f"{self.key}{number}")
            identity = option_id(client.mounts(f"{self.key}{number}")[0])
            (node.ours.root / "snapshots" / identity / "fs" / "file").write_text("x")
            client.remove(f"{self.key}{number}")

    def call(self, node: Node, client: Client) -> None:
        client.cleanup()

    def after(self, node: Node, client: Client) -> None:
        client.cleanup()


class Image(Call):
    """The first container of an image: nydusd is started where it is one's own, the image mounted."""

    def ready(self, node: Node, client: Client) -> None:
        self.meta = pull(client, image_case(CASE), node.work, IMAGE, tag=f"t{self.number}-")

    def call(self, node: Node, client: Client) -> None:
        client.prepare(self.key, self.meta)

    def after(self, node: Node, client: Client) -> None:
        with contextlib.suppress(grpc.RpcError):
            self.call(node, client)
        lower = Path(option(client.mounts(self.key)[0], "lowerdir"))
        assert (lower / node.file).read_bytes() == node.content
        client.remove(self.key)
        remove_image(client, self.meta)


class RemoveImage(Image):
    def ready(self, node: Node, client: Client) -> None:
        super().ready(node, client)
        super().call(node, client)
        client.remove(self.key)
        remove_image(client, self.meta)

    def call(self, node: Node, client: Client) -> None:
        client.cleanup()

    def after(self, node: Node, client: Client) -> None:
        client.cleanup()


class NydusdDies(Image):
    """The one of an image of its own, while the snapshotter is there to start it again."""

    def ready(self, node: Node, client: Client) -> None:
        super().ready(node, client)
        super().call(node, client)
        self.lower = Path(option(client.mounts(self.key)[0], "lowerdir"))

    def call(self, node: Node, client: Client) -> None:
        old = self.processes(node)
        kill_together(old)
        wait_until(lambda: node.dead() or self.again(node, old), 60, "the image again")

    def processes(self, node: Node) -> list[int]:
        return [pid for pid in node.ours.daemons() if str(self.lower) in command_line(pid)]

    def again(self, node: Node, old: list[int]) -> bool:
        """The next one says so itself: the kernel's mount, where it came by now, shows its tree without any."""
        for pid in set(self.processes(node)) - set(old):
            words = command_line(pid).split("\0")
            if "--apisock" in words:
                try:
                    state = NydusdApi(Path(words[words.index("--apisock") + 1])).info(timeout=5).get("state")
                except SnapshotterError:
                    return False
                return state == "RUNNING" and os.access(self.lower / node.file, os.R_OK)
        return False

    def after(self, node: Node, client: Client) -> None:
        assert client.mounts(self.key)
        assert (self.lower / node.file).read_bytes() == node.content
        client.remove(self.key)
        remove_image(client, self.meta)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def remove_image(client: Client, meta: str) -> None:
    name = meta
    while name:
        parent = client.stat(name).parent
        try:
            client.remove(name)
        except grpc.RpcError as error:
            assert "with child" in str(error.details())
            return
        name = parent


def option_id(mount: object) -> str:
    return str(mount.source).split("/")[-2]  # type: ignore[attr-defined]


def steps_of(node: Node, kind: type[Call]) -> int:
    """How many there are."""
    one = kind(next(node.numbers))
    with Client(node.ours.socket) as client:
        one.ready(node, client)
        settle(node, client)
        node.control.arm(NEVER)
        one.call(node, client)
        time.sleep(0.2)  # what goes on behind the answer
        steps = node.control.disarm()
        one.after(node, client)
        node.check(client, "no step")
    return steps


def settle(node: Node, client: Client) -> None:
    """Nothing of the preparation is under way."""
    time.sleep(0.05)


def die(node: Node, kind: type[Call], step: int, *, torn: bool = False) -> bool:
    """False: there is no such step any more."""
    one = kind(next(node.numbers))
    with Client(node.ours.socket) as client:
        one.ready(node, client)
        settle(node, client)
        node.control.arm(step, torn=torn)
        with contextlib.suppress(grpc.RpcError, ConnectionError):
            one.call(node, client)
        deadline = time.monotonic() + 0.3
        while not node.dead() and time.monotonic() < deadline:
            time.sleep(0.005)
    reached = node.dead() or node.disarm()  # what goes on behind the answer may have come to it just now
    died = f"{kind.__name__}, step {node.control.last() or step}{' torn' if torn else ''}"
    if reached:
        node.ours.kill()
        node.start()
    with Client(node.ours.socket) as client:
        try:
            one.after(node, client)
            node.check(client, died)
        except Exception as error:
            raise AssertionError(f"{died}: {error}") from error
    return reached


CALLS = (Prepare, View, Skipped, Commit, Update, Remove, Cleanup)
IMAGE_CALLS = (Image, RemoveImage)
MODES = [("shared", CALLS), ("shared", IMAGE_CALLS), ("dedicated", (*IMAGE_CALLS, NydusdDies))]


def chosen(steps: int, every: int) -> Iterator[int]:
    return iter(range(random.randrange(1, min(every, steps) + 1), steps + 1, every))


def kill_at(mode: str, kinds: tuple[type[Call], ...], every: int, report: Callable[[str], None] = print) -> int:
    """Deaths."""
    deaths = 0
    with Node(mode) as node:
        for kind in kinds:
            steps = steps_of(node, kind)
            assert steps > 2, f"{kind.__name__}: no steps seen"
            reached = 0
            for step in chosen(steps, every):
                reached += die(node, kind, step)
                if "sqlite" in node.control.last():
                    die(node, kind, step, torn=True)
            deaths += reached
            report(f"{mode} {kind.__name__}: {steps} steps, {reached} deaths")
        if kinds is not IMAGE_CALLS:
            report(f"{mode} start: {die_while_starting(node, every)} deaths")
        with Client(node.ours.socket) as client:
            node.check(client, "all")
    return deaths


def die_while_starting(node: Node, every: int) -> int:
    """At every step of a start that has something to do: a half-made snapshot, removed ones, an image to mount."""
    for deaths in itertools.count():
        step = random.randrange(1, every + 1) + deaths * every
        with Client(node.ours.socket) as client:
            for number in range(2):
                client.prepare(f"s{step}-{number}")
                client.remove(f"s{step}-{number}")
        node.ours.kill()
        (node.ours.root / "snapshots" / "new-half" / "fs").mkdir(parents=True)
        node.control.arm(step)
        with contextlib.suppress(LabError):
            node.ours.start(timeout=60)
            wait_until(node.dead, 0.5, "death")
        died = f"start, step {node.control.last()}"
        if not node.dead() and not node.disarm():
            return deaths
        node.ours.kill()
        node.start()
        with Client(node.ours.socket) as client:
            node.check(client, died)
    raise AssertionError


@pytest.mark.parametrize(("mode", "kinds"), MODES)
def test_death_at_some_steps(mode: str, kinds: tuple[type[Call], ...]) -> None:
    assert kill_at(mode, kinds, every=29)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mode", "kinds"), MODES)
def test_death_at_every_step(mode: str, kinds: tuple[type[Call], ...]) -> None:
    assert kill_at(mode, kinds, every=1)
