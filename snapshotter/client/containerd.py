"""containerd's own gRPC services over its unix socket, as few typed calls.

Every call has a deadline and raises ContainerdError, AlreadyExists or Missing; nothing of grpc gets out.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from nydusfs.errors import NydusError
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.diff.v1 import diff_pb2, diff_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.types import descriptor_pb2
from snapshotter.client.plan import Descriptor

CALL_TIMEOUT = 60.0  # seconds; a Prepare that mounts waits for a daemon to start
UNPACK_TIMEOUT = 1800.0  # seconds for one layer, written to a busy disk
_PIECE = 1 << 20  # containerd's servers take messages of at most 16 MiB; 1 MiB is what its own clients send
_LEASE_LIFE = 24 * 3600


class ContainerdError(NydusError):
    """containerd does not answer or refused a call; the message is its own with the call's purpose before it."""


class AlreadyExists(ContainerdError):
    """The object is there already: for a snapshot, the layer needs no download."""


class Missing(ContainerdError):
    """No such object in this namespace."""


class Containerd:
    """A connection; use as a context manager."""

    def __init__(self, address: str, namespace: str) -> None:
        self.address, self.namespace = address, namespace
        path = address.removeprefix("unix://")
        # Go servers refuse the escaped socket path that grpc would send as :authority.
        options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", 16 << 20)]
        self._channel = grpc.insecure_channel(f"unix://{path}", options=options)
        self._content = _stub(content_pb2_grpc.ContentStub, self._channel)
        self._diff = _stub(diff_pb2_grpc.DiffStub, self._channel)
        self._images = _stub(images_pb2_grpc.ImagesStub, self._channel)
        self._leases = _stub(leases_pb2_grpc.LeasesStub, self._channel)
        self._snapshots = _stub(snapshots_pb2_grpc.SnapshotsStub, self._channel)
        self._lease = ""

    def __enter__(self) -> Containerd:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def _metadata(self) -> list[tuple[str, str]]:
        metadata = [("containerd-namespace", self.namespace)]
        return [*metadata, ("containerd-lease", self._lease)] if self._lease else metadata

    def _call(self, what: str, call: Callable[..., Any], request: Any, timeout: float = CALL_TIMEOUT) -> Any:
        try:
            return call(request, timeout=timeout, metadata=self._metadata())
        except grpc.RpcError as error:
            raise self._error(what, error) from None

    def _error(self, what: str, error: grpc.RpcError) -> ContainerdError:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.ALREADY_EXISTS:
            return AlreadyExists(f"{what}: {details}")
        if code == grpc.StatusCode.NOT_FOUND:
            return Missing(f"{what}: {details}")
        if code == grpc.StatusCode.UNAVAILABLE and "dial" not in details and "snapshotter" not in details:
            reason = details.rpartition("error: ")[2]  # gRPC wraps the kernel's words three times
            hint = "run as root" if reason.startswith("Permission denied") else "is it running? See --address"
            return ContainerdError(f"containerd does not answer at {self.address} ({reason}): {hint}")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return ContainerdError(f"{what}: no answer from containerd in time")
        return ContainerdError(f"{what}: {details or code.name}")

    # -- leases

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keeps everything made inside from containerd's garbage collector; it runs out by itself after a day."""
        name = f"ctr-remote-{int(time.time())}-{secrets.token_hex(4)}"
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _LEASE_LIFE))
        request = leases_pb2.CreateRequest(id=name, labels={"containerd.io/gc.expire": end})
        self._call("creating a lease", self._leases.Create, request)
        self._lease = name
        try:
            yield
        finally:
            self._lease = ""
            try:
                self._call("ending a lease", self._leases.Delete, leases_pb2.DeleteRequest(id=name))
            except ContainerdError:
                pass  # it expires; the pull's own outcome is what counts

    # -- content

    def has_content(self, digest: str) -> bool:
        try:
            self._call(f"looking for {digest}", self._content.Info, content_pb2.InfoRequest(digest=digest))
        except Missing:
            return False
        return True

    def write_content(
        self,
        what: str,
        blob: Descriptor,
        pieces: Iterator[bytes],
        labels: Mapping[str, str],
        timeout: float = UNPACK_TIMEOUT,
    ) -> None:
        """Stores a blob; containerd checks size and digest. Errors of `pieces` come out as they are.

        What is there already is kept and gets the labels.
        """
        reference = f"ctr-remote-{blob.digest}"
        failure: list[BaseException] = []

        def requests() -> Iterator[content_pb2.WriteContentRequest]:
            offset = 0
            write, commit = content_pb2.WRITE, content_pb2.COMMIT
            try:
                yield content_pb2.WriteContentRequest(
                    action=write, ref=reference, total=blob.size, expected=blob.digest, offset=0, data=b""
                )
                for piece in pieces:
                    yield content_pb2.WriteContentRequest(
                        action=write, ref=reference, total=blob.size, expected=blob.digest, offset=offset, data=piece
                    )
                    offset += len(piece)
                yield content_pb2.WriteContentRequest(
                    action=commit,
                    ref=reference,
                    total=blob.size,
                    expected=blob.digest,
                    offset=offset,
                    labels=dict(labels),
                )
            except NydusError as error:
                # grpc would only log it; the stream ends here without a commit
                failure.append(error)

        self._abort(reference)  # what a killed pull left under this name would have another offset
        try:
            for _ in self._content.Write(requests(), timeout=timeout, metadata=self._metadata()):
                pass
        except grpc.RpcError as error:
            mapped = self._error(f"storing {what}", error)
            if not isinstance(mapped, AlreadyExists):
                self._abort(reference)
                raise failure[0] if failure else mapped from None
            self.label_content(blob.digest, labels)
        if failure:
            self._abort(reference)
            raise failure[0]

    def _abort(self, reference: str) -> None:
        try:
            self._call("ending an upload", self._content.Abort, content_pb2.AbortRequest(ref=reference))
        except ContainerdError:
            pass  # nothing of that name

    def label_content(self, digest: str, labels: Mapping[str, str]) -> None:
        if labels:
            request = content_pb2.UpdateRequest(
                info=content_pb2.Info(digest=digest, labels=dict(labels)),
                update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
            )
            self._call(f"labelling {digest}", self._content.Update, request)

    # -- snapshots

    def has_snapshot(self, snapshotter: str, name: str) -> bool:
        try:
            request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=name)
            self._call(f"looking for snapshot {name}", self._snapshots.Stat, request)
        except Missing:
            return False
        return True

    def prepare(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> list[Any]:
        """Mounts of a new writable snapshot; AlreadyExists when the snapshotter has the layer without a download."""
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=snapshotter, key=key, parent=parent, labels=dict(labels)
        )
        return list(self._call(f"preparing a snapshot with {snapshotter}", self._snapshots.Prepare, request).mounts)

    def commit(self, snapshotter: str, key: str, name: str, labels: Mapping[str, str]) -> None:
        request = snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, key=key, name=name, labels=dict(labels))
        self._call(f"committing snapshot {name}", self._snapshots.Commit, request)

    def remove_snapshot(self, snapshotter: str, key: str) -> None:
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        self._call(f"removing snapshot {key}", self._snapshots.Remove, request)

    def apply(self, layer: Descriptor, mounts: list[Any]) -> str:
        """Unpacks a stored layer into mounts; the diff id of what was unpacked."""
        request = diff_pb2.ApplyRequest(diff=_descriptor(layer), mounts=mounts)
        return str(
            self._call(f"unpacking layer {layer.digest}", self._diff.Apply, request, UNPACK_TIMEOUT).applied.digest
        )

    # -- images

    def record_image(self, name: str, target: Descriptor) -> None:
        """Creates the image record, or points an existing one to `target`."""
        image = images_pb2.Image(name=name, target=_descriptor(target))
        try:
            self._call(f"recording image {name}", self._images.Create, images_pb2.CreateImageRequest(image=image))
        except AlreadyExists:
            request = images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target"]))
            self._call(f"recording image {name}", self._images.Update, request)


def _stub(factory: Any, channel: grpc.Channel) -> Any:
    """The generated classes carry no types."""
    return factory(channel)


def read_pieces(stream: Any, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a stream in messages of the size containerd's own clients use."""
    with stream:
        while True:
            piece = bytearray()
            while len(piece) < _PIECE and (part := stream.read(_PIECE - len(piece))):
                piece += part
            if not piece:
                return
            progress(len(piece))
            yield bytes(piece)


def _descriptor(found: Descriptor) -> Any:
    return descriptor_pb2.Descriptor(
        media_type=found.media_type, digest=found.digest, size=found.size, annotations=dict(found.annotations)
    )
