"""The snapshots service on the wire: messages in and out, errors to gRPC codes, the unix socket. No decisions here."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc
from protos.containerd.types import mount_pb2
from snapshotter import crowd, errors
from snapshotter.directories import make_private
from snapshotter.flow import Snapshotter
from snapshotter.mounts import Mount
from snapshotter.store import Snapshot
from snapshotter.tally import tally

log = logging.getLogger(__name__)

THREADS = 512  # made when needed; calls that wait for a mount occupy one each, and others must not wait for them
MAX_MESSAGE = 16 << 20  # containerd's own limit
LIST_BATCH = 100
LIST_BYTES = 4 << 20  # what clients take that set no limit of their own
GRACE_SECONDS = 5.0
T = TypeVar("T")

_CODES = (
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
)
# containerd asks before it knows, and its collector removes parents before it knows of children
_EXPECTED = (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)


class Service(rpc.SnapshotsServicer):
    """`snapshotter` in requests is any text and ignored."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def Prepare(self, request: Any, context: grpc.ServicerContext) -> Any:
        labels = dict(request.labels)
        mounts = _answer(context, "Prepare", lambda: self._snapshotter.prepare(request.key, request.parent, labels))
        return pb.PrepareSnapshotResponse(mounts=map(_mount, mounts))

    def View(self, request: Any, context: grpc.ServicerContext) -> Any:
        labels = dict(request.labels)
        mounts = _answer(context, "View", lambda: self._snapshotter.view(request.key, request.parent, labels))
        return pb.ViewSnapshotResponse(mounts=map(_mount, mounts))

    def Mounts(self, request: Any, context: grpc.ServicerContext) -> Any:
        mounts = _answer(context, "Mounts", lambda: self._snapshotter.mounts(request.key))
        return pb.MountsResponse(mounts=map(_mount, mounts))

    def Commit(self, request: Any, context: grpc.ServicerContext) -> Any:
        labels = dict(request.labels)
        _answer(context, "Commit", lambda: self._snapshotter.commit(request.name, request.key, labels, request.parent))
        return Empty()

    def Remove(self, request: Any, context: grpc.ServicerContext) -> Any:
        _answer(context, "Remove", lambda: self._snapshotter.remove(request.key))
        return Empty()

    def Stat(self, request: Any, context: grpc.ServicerContext) -> Any:
        found = _answer(context, "Stat", lambda: self._snapshotter.stat(request.key))
        return pb.StatSnapshotResponse(info=_info(found))

    def Update(self, request: Any, context: grpc.ServicerContext) -> Any:
        name, labels, mask = request.info.name, dict(request.info.labels), list(request.update_mask.paths)
        changed = _answer(context, "Update", lambda: self._snapshotter.update(name, labels, mask))
        return pb.UpdateSnapshotResponse(info=_info(changed))

    def List(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        found = _answer(context, "List", lambda: self._snapshotter.find(list(request.filters)))
        for at in range(0, len(found), LIST_BATCH):
            yield from _listed(found[at : at + LIST_BATCH])

    def Usage(self, request: Any, context: grpc.ServicerContext) -> Any:
        size, inodes = _answer(context, "Usage", lambda: self._snapshotter.usage(request.key))
        return pb.UsageResponse(size=size, inodes=inodes)

    def Cleanup(self, request: Any, context: grpc.ServicerContext) -> Any:
        _answer(context, "Cleanup", self._snapshotter.cleanup)
        return Empty()


def _answer(context: grpc.ServicerContext, what: str, call: Callable[[], T]) -> T:
    began = time.monotonic()
    crowd.enter()
    try:
        return call()
    except errors.SnapshotterError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
        level = (
            logging.DEBUG if code in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.NOT_FOUND) else logging.WARNING
        )
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.INTERNAL
        level, message = logging.ERROR, f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    except Exception as error:
        log.exception("%s failed", what)
        code, level, message = grpc.StatusCode.INTERNAL, 0, f"{what}: internal error: {type(error).__name__}"
    finally:
        crowd.leave()
        tally.operation(what.upper(), time.monotonic() - began)
    if code not in _EXPECTED:
        tally.count("snapshotter_snapshot_operation_errors_total", what.upper(), code.name)
    message = errors.sentence(message)
    log.log(level, "%s: %s", what, message)
    context.abort(code, message)
    raise AssertionError("abort always raises")


def _mount(mount: Mount) -> Any:
    return mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options)


def _listed(snapshots: Sequence[Snapshot]) -> Iterator[Any]:
    """One message, or more where labels are many: an image's manifest may bring thousands."""
    response = pb.ListSnapshotsResponse()
    for snapshot in snapshots:
        _fill(response.info.add(), snapshot)
    if len(snapshots) > 1 and response.ByteSize() > LIST_BYTES:
        half = len(snapshots) // 2
        yield from _listed(snapshots[:half])
        yield from _listed(snapshots[half:])
    else:
        yield response


def _info(snapshot: Snapshot) -> Any:
    info = pb.Info()
    _fill(info, snapshot)
    return info


def _fill(info: Any, snapshot: Snapshot) -> None:
    # one field after the other takes half as long as all of them given to the constructor
    info.name, info.parent, info.kind = snapshot.key, snapshot.parent, int(snapshot.kind)
    info.labels.update(snapshot.labels)
    created, updated = info.created_at, info.updated_at
    created.seconds, created.nanos = divmod(snapshot.created, 10**9)
    updated.seconds, updated.nanos = divmod(snapshot.updated, 10**9)


# ---- the socket


def claim_address(path: Path) -> None:
    """Makes the path free for a new socket. Raises StartError if somebody answers there, or it is no socket."""
    make_private(path.parent)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise errors.StartError(f"{path} exists and is not a socket: move it away or choose another --address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise errors.StartError(f"{path}: cannot tell whether it is served: {error}") from None
    raise errors.StartError(f"{path} is served by a living process: stop it first, or choose another --address")


def serve(
    service: Service,
    path: Path,
    uid: int = 0,
    gid: int = 0,
    handlers: Sequence[grpc.GenericRpcHandler[Any, Any]] = (),
) -> grpc.Server:
    """A running server on a fresh socket of mode 0600. Raises StartError."""
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="grpc"),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)],
    )
    rpc.add_SnapshotsServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    server.add_generic_rpc_handlers(tuple(handlers))
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        os.chown(path, uid, gid)
    except (RuntimeError, OSError) as error:
        raise errors.StartError(f"{path}: cannot be served: {error}") from None
    finally:
        os.umask(umask)
    before = set(threading.enumerate())
    server.start()
    crowd.handed_out_by(set(threading.enumerate()) - before)
    return server
