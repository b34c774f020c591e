"""The snapshots service driven as containerd drives it: labels, order of calls, applying layers into the mounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from nydusfs.containerd.chain import chain_ids
from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc
from tests.lab.process import wait_until

CALL_SECONDS = 60.0
PREFIX = "containerd.io/snapshot/"
REF = "containerd.io/snapshot.ref"


class Client:
    """Plain calls; errors come out as grpc.RpcError."""

    def __init__(self, socket: Path, metadata: Mapping[str, str] | None = None, snapshotter: str = "nydus") -> None:
        self.channel: grpc.Channel = grpc.insecure_channel(f"unix:{socket}")
        self.snapshotter = snapshotter
        if metadata:
            self.channel = grpc.intercept_channel(self.channel, _Metadata(metadata))
        self.stub = rpc.SnapshotsStub(self.channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Any]:
        request = pb.PrepareSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=dict(labels or {})
        )
        return list(self.stub.Prepare(request, timeout=CALL_SECONDS).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Any]:
        request = pb.ViewSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=dict(labels or {})
        )
        return list(self.stub.View(request, timeout=CALL_SECONDS).mounts)

    def mounts(self, key: str) -> list[Any]:
        return list(self.stub.Mounts(pb.MountsRequest(key=key), timeout=CALL_SECONDS).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        request = pb.CommitSnapshotRequest(
            snapshotter=self.snapshotter, name=name, key=key, labels=dict(labels or {}), parent=parent
        )
        self.stub.Commit(request, timeout=CALL_SECONDS)

    def remove(self, key: str) -> None:
        self.stub.Remove(pb.RemoveSnapshotRequest(key=key), timeout=CALL_SECONDS)

    def stat(self, key: str) -> Any:
        return self.stub.Stat(pb.StatSnapshotRequest(key=key), timeout=CALL_SECONDS).info

    def list(self, *filters: str) -> list[Any]:
        stream = self.stub.List(pb.ListSnapshotsRequest(filters=filters), timeout=CALL_SECONDS)
        return [info for reply in stream for info in reply.info]

    def update(self, key: str, labels: Mapping[str, str], mask: Sequence[str] = ()) -> Any:
        request = pb.UpdateSnapshotRequest(info=pb.Info(name=key, labels=dict(labels)))
        request.update_mask.paths.extend(mask)
        return self.stub.Update(request, timeout=CALL_SECONDS).info

    def usage(self, key: str) -> tuple[int, int]:
        reply = self.stub.Usage(pb.UsageRequest(key=key), timeout=CALL_SECONDS)
        return reply.size, reply.inodes

    def cleanup(self) -> None:
        self.stub.Cleanup(pb.CleanupRequest(), timeout=CALL_SECONDS)


def clean(client: Client, root: Path) -> list[str]:
    """Cleanup, and all that it does: it answers after two seconds, whatever is left for later. What stays of
    `snapshots`."""
    client.cleanup()
    rows = len(client.list())
    wait_until(
        lambda: len(os.listdir(root / "snapshots")) <= rows and not os.listdir(root / "trash"), 60, "what was removed"
    )
    return os.listdir(root / "snapshots")


class _Metadata(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = list(metadata.items())

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=[*(details.metadata or ()), *self._metadata]), request)


def option(mount: Any, name: str) -> str:
    """Value of `name=` in a mount's options; "" if it is not there."""
    return next((text.partition("=")[2] for text in mount.options if text.startswith(f"{name}=")), "")


@contextlib.contextmanager
def mounted(mounts: Sequence[Any], target: Path) -> Iterator[Path]:
    """What containerd does with the one mount it is given."""
    (mount,) = mounts
    target.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", mount.type, mount.source, str(target), "-o", ",".join(mount.options)]
    if mount.type == "bind":
        command = ["mount", "--rbind", mount.source, str(target)]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True, timeout=30, stdin=subprocess.DEVNULL)


def pull(client: Client, case: Path, work: Path, image: str, tag: str = "") -> str:
    """A merged reference image as containerd's unpacker brings it; the committed name of its meta layer.

    `tag` makes another image of it: other chain ids, which are not those of its layers, so their digests are not said.
    """
    blobs = sorted(name for name in os.listdir(case) if len(name) == 64)
    parent = ""
    for blob, chain in zip(blobs, chain_ids([f"sha256:{blob}" for blob in blobs]), strict=True):
        ref = f"sha256:{tag}{blob}" if tag else chain
        labels = {REF: ref, PREFIX + "cri.image-ref": image, PREFIX + "nydus-blob": "true"}
        if not tag:
            labels[PREFIX + "cri.layer-digest"] = f"sha256:{blob}"
        with contextlib.suppress(grpc.RpcError):
            client.prepare(f"default/1/extract-{tag}{blob[:8]} {ref}", parent, labels)
            raise AssertionError("a data layer must be answered with AlreadyExists")
        (info,) = client.list(f'labels."{REF}"=={ref},parent=="{parent}"')
        parent = info.name
    ref = f"sha256:{tag}meta"
    labels = {REF: ref, PREFIX + "cri.image-ref": image, PREFIX + "nydus-bootstrap": "true"}
    key, name = f"default/2/extract-{tag}meta {ref}", f"default/3/{ref}"
    mounts = client.prepare(key, parent, labels)
    with mounted(mounts, work / f"unpack{tag}") as target:
        (target / "image").mkdir()
        shutil.copyfile(case / "image.boot", target / "image" / "image.boot")
    client.commit(name, key, labels)
    return name
