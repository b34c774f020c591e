"""What a pull needs of containerd: content, snapshots, images, unpacking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from nydusfs.containerd.connection import CALL_TIMEOUT, AlreadyExists, Connection, ContainerdError, Missing, stub
from nydusfs.errors import NydusError
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.diff.v1 import diff_pb2, diff_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.types import descriptor_pb2

UNPACK_TIMEOUT = 1800.0  # seconds for one layer, written to a busy disk
_PIECE = 1 << 20  # containerd's servers take messages of at most 16 MiB; 1 MiB is what its own clients send


class Described(Protocol):
    """A descriptor, whoever parsed it."""

    @property
    def media_type(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def annotations(self) -> Mapping[str, str]: ...


class Containerd(Connection):
    """A connection; use as a context manager."""

    def __init__(self, address: str, namespace: str, program: str = "ctr-remote") -> None:
        super().__init__(address, namespace, program)
        self._content = stub(content_pb2_grpc.ContentStub, self._channel)
        self._diff = stub(diff_pb2_grpc.DiffStub, self._channel)
        self._images = stub(images_pb2_grpc.ImagesStub, self._channel)
        self._snapshots = stub(snapshots_pb2_grpc.SnapshotsStub, self._channel)

    # -- content

    def read_content(self, digest: str, limit: int) -> bytes:
        """A stored blob of at most `limit` bytes; Missing if containerd does not have it."""
        what = f"reading {digest}"
        data = bytearray()
        try:
            for reply in self._content.Read(
                content_pb2.ReadContentRequest(digest=digest), timeout=CALL_TIMEOUT, metadata=self.metadata()
            ):
                data += reply.data
                if len(data) > limit:
                    raise ContainerdError(f"{what}: it is larger than {limit} bytes")
        except grpc.RpcError as error:
            raise self.wrapped(what, error) from None
        return bytes(data)

    def has_content(self, digest: str) -> bool:
        try:
            self.call(f"looking for {digest}", self._content.Info, content_pb2.InfoRequest(digest=digest))
        except Missing:
            return False
        return True

    def write_content(
        self,
        what: str,
        blob: Described,
        pieces: Iterator[bytes],
        labels: Mapping[str, str],
        timeout: float = UNPACK_TIMEOUT,
    ) -> None:
        """Stores a blob; containerd checks size and digest. Errors of `pieces` come out as they are.

        What is there already is kept and gets the labels.
        """
        reference = f"{self.program}-{blob.digest}"
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
            for _ in self._content.Write(requests(), timeout=timeout, metadata=self.metadata()):
                pass
        except grpc.RpcError as error:
            mapped = self.wrapped(f"storing {what}", error)
            if not isinstance(mapped, AlreadyExists):
                self._abort(reference)
                raise failure[0] if failure else mapped from None
            self.label_content(blob.digest, labels)
        if failure:
            self._abort(reference)
            raise failure[0]

    def _abort(self, reference: str) -> None:
        try:
            self.call("ending an upload", self._content.Abort, content_pb2.AbortRequest(ref=reference))
        except ContainerdError:
            pass  # nothing of that name

    def label_content(self, digest: str, labels: Mapping[str, str]) -> None:
        if labels:
            request = content_pb2.UpdateRequest(
                info=content_pb2.Info(digest=digest, labels=dict(labels)),
                update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
            )
            self.call(f"labelling {digest}", self._content.Update, request)

    # -- snapshots

    def has_snapshot(self, snapshotter: str, name: str) -> bool:
        try:
            request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=name)
            self.call(f"looking for snapshot {name}", self._snapshots.Stat, request)
        except Missing:
            return False
        return True

    def prepare(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> list[Any]:
        """Mounts of a new writable snapshot; AlreadyExists when the snapshotter has the layer without a download."""
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=snapshotter, key=key, parent=parent, labels=dict(labels)
        )
        return list(self.call(f"preparing a snapshot with {snapshotter}", self._snapshots.Prepare, request).mounts)

    def commit(self, snapshotter: str, key: str, name: str, labels: Mapping[str, str]) -> None:
        request = snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, key=key, name=name, labels=dict(labels))
        self.call(f"committing snapshot {name}", self._snapshots.Commit, request)

    def remove_snapshot(self, snapshotter: str, key: str) -> None:
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        self.call(f"removing snapshot {key}", self._snapshots.Remove, request)

    def snapshots(self, snapshotter: str) -> dict[str, str]:
        """Key -> parent, "" for none, of all in this namespace."""
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter)
        try:
            replies = self._snapshots.List(request, timeout=CALL_TIMEOUT, metadata=self.metadata())
            return {one.name: one.parent for reply in replies for one in reply.info}
        except grpc.RpcError as error:
            raise self.wrapped(f"listing the snapshots of {snapshotter}", error) from None

    def apply(self, layer: Described, mounts: list[Any]) -> str:
        """Unpacks a stored layer into mounts; the diff id of what was unpacked."""
        request = diff_pb2.ApplyRequest(diff=_descriptor(layer), mounts=mounts)
        return str(
            self.call(f"unpacking layer {layer.digest}", self._diff.Apply, request, UNPACK_TIMEOUT).applied.digest
        )

    # -- images

    def image_target(self, name: str) -> Any:
        """The descriptor that an image record points to."""
        request = images_pb2.GetImageRequest(name=name)
        return self.call(f"looking for image {name}", self._images.Get, request).image.target

    def image_names(self, digest: str = "") -> list[str]:
        """Names of all images with this target, or of all there are."""
        request = images_pb2.ListImagesRequest(filters=[f'target.digest=="{digest}"'] if digest else [])
        return [image.name for image in self.call("listing images", self._images.List, request).images]

    def record_image(self, name: str, target: Described) -> None:
        """Creates the image record, or points an existing one to `target`."""
        image = images_pb2.Image(name=name, target=_descriptor(target))
        try:
            self.call(f"recording image {name}", self._images.Create, images_pb2.CreateImageRequest(image=image))
        except AlreadyExists:
            request = images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target"]))
            self.call(f"recording image {name}", self._images.Update, request)


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


def _descriptor(found: Described) -> Any:
    return descriptor_pb2.Descriptor(
        media_type=found.media_type, digest=found.digest, size=found.size, annotations=dict(found.annotations)
    )
