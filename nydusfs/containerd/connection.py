"""A connection to containerd's unix socket. Every call has a deadline; nothing of grpc gets out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import grpc

from nydusfs.errors import NydusError
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc

CALL_TIMEOUT = 60.0  # seconds; a Prepare that mounts waits for a daemon to start
_LEASE_LIFE = 24 * 3600


class ContainerdError(NydusError):
    """containerd does not answer or refused a call; the message is its own with the call's purpose before it."""


class AlreadyExists(ContainerdError):
    """The object is there already: for a snapshot, the layer needs no download."""


class Missing(ContainerdError):
    """No such object in this namespace."""


class Connection:
    """Use as a context manager. `program` names it in leases."""

    def __init__(self, address: str, namespace: str, program: str = "nydus") -> None:
        self.address, self.namespace, self.program = address, namespace, program
        path = address.removeprefix("unix://")
        # Go servers refuse the escaped socket path that grpc would send as :authority.
        options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", 16 << 20)]
        self._channel = grpc.insecure_channel(f"unix://{path}", options=options)
        self._leases = stub(leases_pb2_grpc.LeasesStub, self._channel)
        self._lease = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def stub(self, factory: Any) -> Any:
        """Of a service that only its caller needs."""
        return stub(factory, self._channel)

    def metadata(self) -> list[tuple[str, str]]:
        metadata = [("containerd-namespace", self.namespace)]
        return [*metadata, ("containerd-lease", self._lease)] if self._lease else metadata

    def call(self, what: str, call: Callable[..., Any], request: Any, timeout: float = CALL_TIMEOUT) -> Any:
        try:
            return call(request, timeout=timeout, metadata=self.metadata())
        except grpc.RpcError as error:
            raise self.wrapped(what, error) from None

    def stream(self, what: str, call: Callable[..., Any], request: Any, timeout: float = CALL_TIMEOUT) -> Iterator[Any]:
        try:
            yield from call(request, timeout=timeout, metadata=self.metadata())
        except grpc.RpcError as error:
            raise self.wrapped(what, error) from None

    def namespaces(self) -> list[str]:
        """All there are, this connection's first, whether it exists or not."""
        service = self.stub(namespace_pb2_grpc.NamespacesStub)
        reply = self.call("listing namespaces", service.List, namespace_pb2.ListNamespacesRequest())
        return [self.namespace, *sorted({one.name for one in reply.namespaces} - {self.namespace})]

    def wrapped(self, what: str, error: grpc.RpcError) -> ContainerdError:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.ALREADY_EXISTS:
            return AlreadyExists(f"{what}: {details}")
        if code == grpc.StatusCode.NOT_FOUND:
            return Missing(f"{what}: {details}")
        if code == grpc.StatusCode.UNAVAILABLE and "dial" not in details and "snapshotter" not in details:
            reason = details.rpartition("error: ")[2]  # gRPC wraps the kernel's words three times
            hint = "run as root" if reason.startswith("Permission denied") else "is it running, is that its socket?"
            return ContainerdError(f"containerd does not answer at {self.address} ({reason}): {hint}")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return ContainerdError(f"{what}: no answer from containerd in time")
        return ContainerdError(f"{what}: {details or code.name}")

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keeps everything made inside from containerd's garbage collector; it runs out by itself after a day."""
        name = f"{self.program}-{int(time.time())}-{secrets.token_hex(4)}"
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _LEASE_LIFE))
        request = leases_pb2.CreateRequest(id=name, labels={"containerd.io/gc.expire": end})
        self.call("creating a lease", self._leases.Create, request)
        self._lease = name
        try:
            yield
        finally:
            self._lease = ""
            try:
                self.call("ending a lease", self._leases.Delete, leases_pb2.DeleteRequest(id=name))
            except ContainerdError:
                pass  # it expires; the caller's own outcome is what counts

    def hold(self, kind: str, name: str) -> None:
        """Adds something to the lease, such as `snapshots/overlayfs` and a key."""
        request = leases_pb2.AddResourceRequest(id=self._lease, resource=leases_pb2.Resource(id=name, type=kind))
        self.call(f"holding {kind} {name}", self._leases.AddResource, request)


def stub(factory: Any, channel: grpc.Channel) -> Any:
    """The generated classes carry no types."""
    return factory(channel)
