"""Containers, their processes and their writable layers, as `nydusify commit` sees them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nydusfs.containerd.client import Containerd
from nydusfs.containerd.connection import ContainerdError, Missing, stub
from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2
from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.containerd.types import task_pb2

_NERDCTL_NAME = "nerdctl/name"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Container:
    """`image` is the name of its image record; `snapshot_key` names its writable layer in `snapshotter`; `spec`: the
    OCI runtime's, JSON."""

    id: str
    image: str
    snapshotter: str
    snapshot_key: str
    spec: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Task:
    """`pid` is that of the container's first process on this machine; 0: none is alive."""

    pid: int
    running: bool
    paused: bool


@dataclass(frozen=True, slots=True)
class Mount:
    type: str
    source: str
    options: tuple[str, ...]

    def option(self, name: str) -> str:
        """Value of `name=value`, "" without it."""
        return next((one.partition("=")[2] for one in self.options if one.startswith(f"{name}=")), "")


class Containers(Containerd):
    """Use as a context manager. Every call raises ContainerdError."""

    def __init__(self, address: str, namespace: str, program: str) -> None:
        super().__init__(address, namespace, program)
        self._containers = stub(containers_pb2_grpc.ContainersStub, self._channel)
        self._tasks = stub(tasks_pb2_grpc.TasksStub, self._channel)

    def find(self, name: str) -> Container:
        """By id, by nerdctl's name or by the beginning of an id that fits no other container."""
        filters = [f"id=={_quoted(name)}", f'labels."{_NERDCTL_NAME}"=={_quoted(name)}']
        found = self._list(filters) or self._list([f"id~={_quoted('^' + re.escape(name))}"])
        if not found:
            known = self._list([])
            listed = ", ".join(one.id for one in known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
            raise Missing(f"no container {name} in namespace {self.namespace} (it has: {listed or 'none'})")
        if len(found) > 1:
            listed = ", ".join(one.id for one in found[:_SHOWN])
            raise ContainerdError(f"container {name} is ambiguous, it may be {listed}: give more of its id")
        return found[0]

    def all(self) -> list[Container]:
        """Of this namespace."""
        return self._list([])

    def _list(self, filters: Sequence[str]) -> list[Container]:
        request = containers_pb2.ListContainersRequest(filters=filters)
        reply = self.call("listing containers", self._containers.List, request)
        return [
            Container(one.id, one.image, one.snapshotter, one.snapshot_key, one.spec.value) for one in reply.containers
        ]

    def task(self, container: str) -> Task:
        """All zero for a container without a process."""
        try:
            request = tasks_pb2.GetRequest(container_id=container)
            process = self.call(f"looking at container {container}", self._tasks.Get, request).process
        except Missing:
            return Task(0, False, False)
        paused = process.status in (task_pb2.PAUSED, task_pb2.PAUSING)
        running = process.status == task_pb2.RUNNING
        return Task(process.pid if running or paused else 0, running, paused)

    def pause(self, container: str) -> None:
        request = tasks_pb2.PauseTaskRequest(container_id=container)
        self.call(f"pausing container {container}", self._tasks.Pause, request)

    def resume(self, container: str) -> None:
        request = tasks_pb2.ResumeTaskRequest(container_id=container)
        self.call(f"resuming container {container}", self._tasks.Resume, request)

    def snapshot_parent(self, snapshotter: str, key: str) -> str:
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key)
        return str(self.call(f"looking for snapshot {key}", self._snapshots.Stat, request).info.parent)

    def mounts(self, snapshotter: str, key: str) -> list[Mount]:
        request = snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key)
        reply: Any = self.call(f"asking for the mounts of snapshot {key}", self._snapshots.Mounts, request)
        return [Mount(one.type, one.source, tuple(one.options)) for one in reply.mounts]


def _quoted(text: str) -> str:
    """A value of containerd's filter language: a Go string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
