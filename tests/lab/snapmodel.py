"""A model of the snapshots service, and random calls that go to both: `Comparison(...).run(steps)`.

The rules are containerd's (core/snapshots/storage and the remote-snapshotter labels), written down without a database:
a dictionary of snapshots, and for every call its answer or the code it is refused with.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from tests.lab.snapshots import CALL_SECONDS, PREFIX, REF, Client, clean, option
from tests.lab.stack import Snapshotter

VIEW, ACTIVE, COMMITTED = 1, 2, 3
NAMES = ["a", "b", "default/1/c", "ü/ö", "x y", "sha256:1", "sha256:2", "d", "e", "%", "g", "j", "k/l", "f,g", 'h"i']
LABELS = ["containerd.io/gc.root", "l", "l.1/2", "ü"]
BLOB, META = PREFIX + "nydus-blob", PREFIX + "nydus-bootstrap"
WEIGHTS = {"prepare": 20, "view": 6, "commit": 16, "remove": 13, "update": 8, "stat": 8, "list": 4, "usage": 6}
WEIGHTS |= {"mounts": 8, "cleanup": 1.5, "write": 6, "all": 0.5}
Code = grpc.StatusCode
Request = tuple[str, dict[str, Any]]


@dataclass
class Snap:
    parent: str
    kind: int
    labels: dict[str, str]
    number: int  # order of creation
    id: int = 0  # 0: not told yet
    created: int = 0
    updated: int = 0
    files: int = 0  # written into it
    usage: tuple[int, int] = (0, 0)  # of a committed one


class Refused(Exception):
    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code


@dataclass
class Model:
    snaps: dict[str, Snap] = field(default_factory=dict)
    made: int = 0
    unmounted: bool = False  # no call came as far as to mount an image

    def apply(self, name: str, given: Mapping[str, Any]) -> None:
        """Raises Refused, with nothing changed."""
        getattr(self, f"_{name}")(**given)

    def chain(self, key: str) -> list[str]:
        keys = []
        while key:
            keys.append(key)
            key = self.snaps[key].parent
        return keys

    def lazy(self, parent: str) -> bool:
        """On an image that cannot be mounted: none of them brings an image reference."""
        return any(META in self.snaps[up].labels for up in self.chain(parent))

    def children(self, key: str) -> int:
        return sum(snap.parent == key for snap in self.snaps.values())

    def _prepare(self, key: str, parent: str, labels: dict[str, str], kind: int = ACTIVE) -> None:
        if not key:
            raise Refused(Code.INVALID_ARGUMENT)
        if parent and parent not in self.snaps:
            raise Refused(Code.NOT_FOUND)
        if parent and self.snaps[parent].kind != COMMITTED:
            raise Refused(Code.INVALID_ARGUMENT)
        if key in self.snaps:
            raise Refused(Code.ALREADY_EXISTS)
        kept = {name: value for name, value in labels.items() if value}
        if kind == ACTIVE and kept.get(REF) and BLOB in labels and META not in labels:
            same = [s for s in self.snaps.values() if s.labels.get(REF) == kept[REF] and s.parent == parent]
            if not any(s.kind == COMMITTED for s in same):
                self._add(kept[REF] if kept[REF] not in self.snaps else "?", Snap(parent, COMMITTED, kept, 0))
            raise Refused(Code.ALREADY_EXISTS)
        if self.lazy(parent) and not self.unmounted:
            raise Refused(Code.NOT_FOUND)
        self._add(key, Snap(parent, kind, kept, 0))

    def _view(self, key: str, parent: str, labels: dict[str, str]) -> None:
        self._prepare(key, parent, labels, VIEW)

    def _add(self, key: str, snap: Snap) -> None:
        self.made += 1
        snap.number = self.made
        self.snaps[key] = snap

    def _commit(self, name: str, key: str, labels: dict[str, str], parent: str) -> None:
        if not name or not key:
            raise Refused(Code.INVALID_ARGUMENT)
        if key not in self.snaps:
            raise Refused(Code.NOT_FOUND)
        if name in self.snaps:
            raise Refused(Code.ALREADY_EXISTS)
        snap = self.snaps[key]
        if snap.kind != ACTIVE:
            raise Refused(Code.FAILED_PRECONDITION)
        if parent:
            if parent not in self.snaps:
                raise Refused(Code.NOT_FOUND)
            if self.snaps[parent].kind != COMMITTED:
                raise Refused(Code.FAILED_PRECONDITION)
            if snap.parent not in ("", parent):
                raise Refused(Code.INVALID_ARGUMENT)
        del self.snaps[key]
        kept = {label: value for label, value in labels.items() if value}
        self.snaps[name] = replace(snap, kind=COMMITTED, labels=kept, parent=parent or snap.parent)

    def _remove(self, key: str) -> None:
        if not key:
            raise Refused(Code.INVALID_ARGUMENT)
        if key not in self.snaps:
            raise Refused(Code.NOT_FOUND)
        if self.children(key):
            raise Refused(Code.FAILED_PRECONDITION)
        del self.snaps[key]

    def _update(self, key: str, labels: dict[str, str], mask: Sequence[str]) -> None:
        if any(path != "labels" and not path.startswith("labels.") for path in mask):
            raise Refused(Code.INVALID_ARGUMENT)
        if key not in self.snaps:
            raise Refused(Code.NOT_FOUND)
        snap = self.snaps[key]
        changed = dict(snap.labels)
        for path in mask or ["labels"]:
            if path == "labels":
                changed = dict(labels)
            else:
                changed[path[7:]] = labels.get(path[7:], "")
        snap.labels = {name: value for name, value in changed.items() if value}


class Comparison:
    """Random calls to a real service and to the model; an AssertionError tells the seed and the last calls."""

    def __init__(self, ours: Snapshotter, seed: int, kill_every: int = 400) -> None:
        self.ours, self.seed, self.kill_every = ours, seed, kill_every
        self.random = random.Random(seed)
        self.model = Model()
        self.client = Client(ours.socket)
        self.told: deque[str] = deque(maxlen=25)
        self.deaths = self.done = self.refused = 0

    def run(self, steps: int) -> None:
        try:
            for _ in range(steps):
                self._step()
                self.done += 1
            self._all()
        except Exception as error:
            calls = "\n".join(self.told)
            raise AssertionError(f"seed {self.seed}, step {self.done}: {error!r}\n{calls}") from error
        finally:
            self.client.channel.close()

    # ---- what is called

    def _step(self) -> None:
        dice = self.random
        if dice.random() < 1 / self.kill_every:
            return self._die()
        kind = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind in ("prepare", "view", "commit", "remove", "update"):
            return self._change(self._request(kind))
        self.told.append(kind)
        return getattr(self, f"_{kind}")()  # type: ignore[no-any-return]

    def _name(self) -> str:
        return "" if self.random.random() < 0.02 else self.random.choice(NAMES)

    def _known(self, *kinds: int) -> str:
        """Mostly of a snapshot that is there, of these kinds."""
        found = [key for key, snap in self.model.snaps.items() if not kinds or snap.kind in kinds]
        return self.random.choice(sorted(found)) if found and self.random.random() < 0.85 else self._name()

    def _labels(self) -> dict[str, str]:
        dice = self.random
        labels = {name: dice.choice(["1", "2", "", "ü" * 100]) for name in LABELS if dice.random() < 0.3}
        if dice.random() < 0.2:
            labels[REF] = dice.choice(["sha256:1", "sha256:2", "sha256:3"])
            if dice.random() < 0.7:
                labels[BLOB] = dice.choice(["true", "false", "1"])
        if dice.random() < 0.03:
            labels[META] = "true"
        return labels

    def _request(self, kind: str) -> Request:
        dice = self.random
        if kind in ("prepare", "view"):
            parent = self._known(COMMITTED) if dice.random() < 0.7 else ""
            return kind, {"key": self._name(), "parent": parent, "labels": self._labels()}
        if kind == "commit":
            parent = self._known(COMMITTED) if dice.random() < 0.3 else ""
            return kind, {"name": self._name(), "key": self._known(ACTIVE), "labels": self._labels(), "parent": parent}
        if kind == "remove":
            leaves = [key for key in self.model.snaps if not self.model.children(key)]
            key = dice.choice(sorted(leaves)) if leaves and dice.random() < 0.7 else self._known()
            return kind, {"key": key}
        masks = [[], ["labels"], ["labels.l"], ["labels.l.1/2", "labels.ü"], ["labels.l", "kind"], ["parent"]]
        return kind, {"key": self._known(), "labels": self._labels(), "mask": dice.choice(masks)}

    def _send(self, request: Request) -> Any:
        """The future of a call."""
        name, given = request
        stub, given = self.client.stub, dict(given)
        if name == "update":
            info = pb.Info(name=given["key"], parent="bogus", labels=given["labels"])
            message = pb.UpdateSnapshotRequest(info=info)
            message.update_mask.paths.extend(given["mask"])
            return stub.Update.future(message, timeout=CALL_SECONDS)
        kinds = {
            "prepare": (stub.Prepare, pb.PrepareSnapshotRequest),
            "view": (stub.View, pb.ViewSnapshotRequest),
            "commit": (stub.Commit, pb.CommitSnapshotRequest),
            "remove": (stub.Remove, pb.RemoveSnapshotRequest),
        }
        call, kind = kinds[name]
        return call.future(kind(snapshotter="any", **given), timeout=CALL_SECONDS)

    def _change(self, request: Request) -> None:
        self.told.append(f"{request[0]} {request[1]}")
        before = time.time_ns()
        wanted = self._expect(request)
        try:
            answer = self._send(request).result()
        except grpc.RpcError as error:
            assert error.code() == wanted, f"{error.code()} ({error.details()}), the model says {wanted}"
            self.refused += 1
            self._settle_names()
            return
        assert wanted is None, f"done, the model says {wanted}"
        key = request[1].get("name") or request[1]["key"]
        if request[0] == "remove":
            return
        snap = self.model.snaps[key]
        info = self.client.stat(key)
        assert before <= nanoseconds(info.updated_at) <= time.time_ns()
        if request[0] == "update":
            assert answer.info == info
            assert nanoseconds(info.created_at) == snap.created
        else:
            assert nanoseconds(info.updated_at) == nanoseconds(info.created_at)
            snap.created = nanoseconds(info.created_at)
        snap.updated = nanoseconds(info.updated_at)
        self._same(key, info)
        if request[0] in ("prepare", "view"):
            self._check_mounts(key, list(answer.mounts))
        if request[0] == "commit":
            snap.usage = usage_of(self._upper(snap)) if snap.id else self.client.usage(key)
            assert self.client.usage(key) == snap.usage

    def _expect(self, request: Request) -> grpc.StatusCode | None:
        try:
            self.model.apply(*request)
        except Refused as refused:
            return refused.code
        return None

    def _begin_only(self, without: Model, request: Request) -> None:
        """A snapshot is there before its image is mounted, or nobody would keep the image. What dies before it finds
        that it cannot leaves it: nobody was answered, and containerd's collector removes what it does not know."""
        begun = copy.deepcopy(without)
        begun.unmounted = True
        try:
            begun.apply(*request)
        except Refused:
            return
        begun.unmounted = False
        self.model = begun

    def _settle_names(self) -> None:
        """A skipped layer may have got a name of the service's choice, and its times are the service's."""
        for key, snap in list(self.model.snaps.items()):
            if snap.created:
                continue
            if key == "?":
                (info,) = (
                    info
                    for info in self.client.list(f'labels."{REF}"=={snap.labels[REF]},kind==committed')
                    if info.parent == snap.parent and info.name not in self.model.snaps
                )
                del self.model.snaps["?"]
                self.model.snaps[info.name] = snap
                key = info.name
            info = self.client.stat(key)
            snap.created = snap.updated = nanoseconds(info.created_at)
            snap.usage = (0, 0)
            self._same(key, info)

    # ---- what is only looked at

    def _same(self, key: str, info: Any) -> None:
        snap = self.model.snaps[key]
        found = (info.name, info.parent, info.kind, dict(info.labels))
        assert found == (key, snap.parent, snap.kind, snap.labels), f"{found}, the model: {snap}"
        assert (nanoseconds(info.created_at), nanoseconds(info.updated_at)) == (snap.created, snap.updated)

    def _stat(self) -> None:
        key = self._known()
        try:
            info = self.client.stat(key)
        except grpc.RpcError as error:
            assert error.code() == Code.NOT_FOUND
            assert key not in self.model.snaps
            return
        self._same(key, info)

    def _list(self) -> None:
        dice, snaps = self.random, self.model.snaps
        name, ref, label = self._known(), dice.choice(["sha256:1", "sha256:2"]), dice.choice(["1", "2"])
        quoted = '"' + name.replace('"', '\\"') + '"'
        filters, wanted = dice.choice(
            [
                ([f"name=={quoted}"], [name]),
                ([f"parent=={quoted}"], [key for key, snap in snaps.items() if snap.parent == name]),
                (
                    [f'labels."{REF}"=={ref},parent=={quoted}'],
                    [key for key, snap in snaps.items() if snap.labels.get(REF) == ref and snap.parent == name],
                ),
                ([f"labels.l=={label}"], [key for key, snap in snaps.items() if snap.labels.get("l") == label]),
                (
                    [f"name=={quoted}", "kind==view"],
                    [key for key, snap in snaps.items() if key == name or snap.kind == VIEW],
                ),
                (['parent!=""'], [key for key, snap in snaps.items() if snap.parent]),
            ]
        )
        found = [info.name for info in self.client.list(*filters)]
        assert found == sorted(set(wanted) & set(snaps), key=str.encode), f"{filters}: {found}, the model: {wanted}"

    def _all(self) -> None:
        infos = self.client.list()
        assert [info.name for info in infos] == sorted(self.model.snaps, key=str.encode)
        for info in infos:
            self._same(info.name, info)
        for snap in self.model.snaps.values():
            if snap.id:
                assert len(os.listdir(self._upper(snap))) == snap.files

    def _usage(self) -> None:
        key = self._known()
        try:
            found = self.client.usage(key)
        except grpc.RpcError as error:
            assert error.code() == Code.NOT_FOUND
            assert key not in self.model.snaps
            return
        snap = self.model.snaps[key]
        if snap.kind == COMMITTED:
            assert found == snap.usage
        elif snap.kind == VIEW:
            assert found == (0, 0)
        elif snap.id:
            assert found == usage_of(self._upper(snap))

    def _mounts(self) -> None:
        key = self._known(ACTIVE, VIEW)
        snap = self.model.snaps.get(key)
        wanted = None
        if snap is None or self.model.lazy(snap.parent):
            wanted = Code.NOT_FOUND
        if snap is not None and snap.kind == COMMITTED:
            wanted = Code.FAILED_PRECONDITION
        try:
            mounts = self.client.mounts(key)
        except grpc.RpcError as error:
            assert error.code() == wanted, f"{error.code()} ({error.details()}), the model says {wanted}"
            return
        assert wanted is None, f"done, the model says {wanted}"
        self._check_mounts(key, mounts)

    def _check_mounts(self, key: str, mounts: list[Any]) -> None:
        """containerd's forms; an id that the model was not told yet is learned."""
        (mount,) = mounts
        chain = [self.model.snaps[name] for name in self.model.chain(key)]
        own, parents = chain[0], chain[1:]
        if len(parents) < (2 if own.kind == VIEW else 1):
            assert (mount.type, list(mount.options)) == ("bind", ["ro" if own.kind == VIEW else "rw", "rbind"])
            self._learn(parents[0] if parents else own, mount.source)
            return
        assert (mount.type, mount.source) == ("overlay", "overlay")
        if own.kind == ACTIVE:
            self._learn(own, option(mount, "upperdir"))
            assert option(mount, "workdir") == str(self._upper(own).parent / "work")
        names = [text.partition("=")[0] for text in mount.options]
        assert names == (["workdir", "upperdir", "lowerdir"] if own.kind == ACTIVE else ["lowerdir"])
        lower = option(mount, "lowerdir").split(":")
        assert len(lower) == len(parents)
        for snap, path in zip(parents, lower, strict=True):
            self._learn(snap, path)

    def _learn(self, snap: Snap, path: str) -> None:
        identity = int(path.split("/")[-2])
        assert path == f"{self.ours.root}/snapshots/{identity}/fs"
        assert snap.id in (0, identity)
        snap.id = identity
        others = [one for one in self.model.snaps.values() if one is not snap and one.id]
        assert all((one.id < identity) == (one.number < snap.number) for one in others)

    def _upper(self, snap: Snap) -> Path:
        return self.ours.root / "snapshots" / str(snap.id) / "fs"

    def _write(self) -> None:
        """Into an active snapshot, as a container does."""
        found = [snap for snap in self.model.snaps.values() if snap.kind == ACTIVE and snap.id]
        if found:
            snap = self.random.choice(found)
            (self._upper(snap) / f"file{snap.files}").write_bytes(b"x" * self.random.choice([0, 1, 5000]))
            snap.files += 1

    def _cleanup(self) -> None:
        names = clean(self.client, self.ours.root)
        assert all(name.isdecimal() for name in names), names
        assert len(names) == len(self.model.snaps), f"{names}, the model: {self.model.snaps}"
        assert {str(snap.id) for snap in self.model.snaps.values() if snap.id} <= set(names)

    # ---- death

    def _die(self) -> None:
        """SIGKILL, now or in the middle of a call: which was then done, or not; if it was answered, it was done."""
        self.deaths += 1
        request = self._request(self.random.choice(["prepare", "view", "commit", "remove", "update"]))
        self.told.append(f"SIGKILL during {request}")
        without = copy.deepcopy(self.model)
        wanted = self._expect(request)
        future = self._send(request)
        time.sleep(self.random.choice([0, 0.0005, 0.001, 0.002, 0.003, 0.005]))
        self.ours.kill()
        code: grpc.StatusCode | None = None
        try:
            future.result()
        except grpc.RpcError as error:
            code = error.code()
        self.client.channel.close()
        self.ours.start()
        self.client = Client(self.ours.socket)
        if code not in (Code.UNAVAILABLE, Code.CANCELLED, Code.UNKNOWN):
            assert code == wanted, f"answered {code} before the death, the model says {wanted}"
        infos = {info.name: info for info in self.client.list()}
        as_before = self._equal(without, infos)
        if code is not None and not as_before and not self._equal(self.model, infos):
            self._begin_only(without, request)
        assert as_before or self._equal(self.model, infos), (
            f"neither before nor after {request}, which was answered {code}:\n"
            f"{infos}\nbefore: {without.snaps}\nafter: {self.model.snaps}"
        )
        if code is None:
            assert self._equal(self.model, infos), "answered and lost"
        elif as_before:
            self.model = without
        self._settle_names()
        for key, info in infos.items():
            snap = self.model.snaps[key]
            snap.created, snap.updated = nanoseconds(info.created_at), nanoseconds(info.updated_at)
            if snap.kind == COMMITTED:
                snap.usage = self.client.usage(key)
        self._all()
        self._cleanup()

    @staticmethod
    def _equal(model: Model, infos: Mapping[str, Any]) -> bool:
        """But for names that the service chose."""
        wanted = [(k if k != "?" else "", s.parent, s.kind, s.labels) for k, s in model.snaps.items()]
        known = {key for key in model.snaps if key != "?"}
        found = [(k if k in known else "", i.parent, i.kind, dict(i.labels)) for k, i in infos.items()]
        return sorted(wanted, key=repr) == sorted(found, key=repr)


def nanoseconds(stamp: Any) -> int:
    return int(stamp.seconds) * 10**9 + int(stamp.nanos)


def usage_of(path: Path) -> tuple[int, int]:
    """Of a directory without links: bytes on disk, inodes."""
    stats = [os.stat(path), *(os.stat(path / name) for name in os.listdir(path))]
    return sum(stat.st_blocks * 512 for stat in stats), len(stats)
