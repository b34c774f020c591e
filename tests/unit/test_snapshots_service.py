"""The snapshots service on the wire."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc
from snapshotter.flow import Snapshotter
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
