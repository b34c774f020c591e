"""The snapshots service on the wire."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import grpc
import pytest

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc
from snapshotter.flow import Snapshotter
from snapshotter.nydusd_api import ApiUnreachable
from snapshotter.service import Service, serve
from snapshotter.store import Kind, Snapshot

CONTAINERDS_LIMIT = 16 << 20


def test_list_answers_whatever_labels_images_brought(tmp_path: Path) -> None:
    """containerd's collector asks for all of them: what it cannot be told of one it never removes of any."""
    many = {f"containerd.io/snapshot/{number}": "y" * 4000 for number in range(45)}
    there = [Snapshot(one, f"k{one}", "", Kind.ACTIVE, 1, 1, 0, 0, many if one < 110 else {}) for one in range(250)]
    flow = cast(Snapshotter, SimpleNamespace(find=lambda filters: there))
    server = serve(Service(flow), tmp_path / "s.sock")
    options = [("grpc.max_receive_message_length", CONTAINERDS_LIMIT)]
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/s.sock", options=options) as channel:
            stub: Any = rpc.SnapshotsStub(channel)  # type: ignore[no-untyped-call]
            messages = [list(message.info) for message in stub.List(pb.ListSnapshotsRequest(), timeout=30)]
    finally:
        server.stop(0)
    assert [info.name for infos in messages for info in infos] == [one.key for one in there]
    assert max(map(len, messages)) <= 100
    assert len(messages[-1]) == 50  # no more messages than are needed


def test_a_nydusd_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    """Worth another try, which unknown errors are not."""

    def prepare(*_: object) -> NoReturn:
        raise ApiUnreachable("POST /api/v1/mount on api.sock: timed out")

    server = serve(Service(cast(Snapshotter, SimpleNamespace(prepare=prepare))), tmp_path / "s.sock")
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
            stub: Any = rpc.SnapshotsStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as failed:
                stub.Prepare(pb.PrepareSnapshotRequest(key="k"), timeout=30)
    finally:
        server.stop(0)
    error: Any = failed.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
