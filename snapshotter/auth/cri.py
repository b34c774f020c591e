"""The CRI image service beside the snapshots service: passes everything on and remembers what PullImage carries.

Kubelet's `--image-service-endpoint` points here. Calls go on as bytes, so any message of any CRI release passes; only
four fields of PullImage and RemoveImage are read. `v1alpha2` goes on as `v1` where the runtime has only that
(containerd 2.x): the messages are the same on the wire.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from nydusfs.errors import NydusError
from nydusfs.registry.credentials import Credentials, decode_auth
from nydusfs.registry.reference import Reference
from snapshotter.auth.vault import CRI, Vault
from snapshotter.auth.wire import WireError, fields, message, text

log = logging.getLogger(__name__)

SERVICES = ("runtime.v1.ImageService", "runtime.v1alpha2.ImageService")
THREADS = 512  # made when needed: a pull occupies one for minutes, and other calls must not wait for it
MAX_MESSAGE = 16 << 20
_OWN_METADATA = ("user-agent", "te", "content-type", "grpc-")


def auth_config(data: bytes) -> Credentials | None:
    """runtime.v1.AuthConfig. Raises WireError."""
    found = fields(data)
    user, password = text(found, 1), text(found, 2)
    if text(found, 6):
        return Credentials(registry_token=text(found, 6))
    if user and password:
        return Credentials(user, password)
    if auth := text(found, 3):
        return decode_auth(auth)
    return Credentials(user, "", text(found, 5)) if text(found, 5) else None


def pull_request(data: bytes) -> tuple[Reference, Credentials | None] | None:
    """(image, credentials) of a PullImageRequest or RemoveImageRequest; None if it names no image."""
    try:
        found = fields(data)
        image = text(fields(message(found, 1)), 1)
        credentials = auth_config(message(found, 2))
        return (Reference.parse(image), credentials) if image else None
    except (WireError, NydusError) as error:
        log.debug("a CRI request is passed on unread: %s", error)
        return None


class CriImageService(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Handler for a `grpc.Server`. `address` is the runtime's socket; it may come and go, calls then fail as there.

    Threads of its own: a pull waits for calls to the snapshots service, which must find free ones.
    """

    def __init__(self, address: Path, vault: Vault) -> None:
        self._vault = vault
        self._address = address
        # Go's server refuses the escaped socket path that grpc would send as :authority.
        self._channel = grpc.insecure_channel(
            f"unix://{address}",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                ("grpc.max_reconnect_backoff_ms", 3000),
            ],
        )
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cri")

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = details.method or ""
        service, _, name = method.lstrip("/").rpartition("/")
        if service not in SERVICES:
            return None

        def behave(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._pass_on(service, name, requests, context)

        behave.experimental_thread_pool = self._pool  # type: ignore[attr-defined]
        # One message each way is a stream as well: this serves unary and streaming calls alike.
        return grpc.stream_stream_rpc_method_handler(behave)

    def close(self) -> None:
        self._channel.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pass_on(
        self, service: str, name: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        sent = list(requests)  # of the image service every request is one message
        asked = pull_request(sent[0]) if sent and name in ("PullImage", "RemoveImage") else None
        credentials = asked[1] if asked is not None and name == "PullImage" else None
        before = None
        if asked is not None and credentials is not None:
            # before the pull: the layers that it prepares need them
            before = self._vault.remember(CRI, asked[0], credentials)
        try:
            yield from self._call(service, name, sent, context)
        except grpc.RpcError as error:
            if asked is not None and credentials is not None:
                self._vault.restore(CRI, asked[0], before)
            self._fail(error, context)
        if asked is not None and name == "RemoveImage":
            self._vault.forget(CRI, asked[0])

    def _call(self, service: str, name: str, sent: Sequence[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Raises RpcError."""
        metadata = [
            (key, value) for key, value in context.invocation_metadata() if not key.startswith((":", *_OWN_METADATA))
        ]
        tries = [service, SERVICES[0]] if service != SERVICES[0] else [service]
        for number, target in enumerate(tries):
            call = self._channel.stream_stream(f"/{target}/{name}", None, None)(
                iter(sent), timeout=context.time_remaining(), metadata=tuple(metadata)
            )
            if not context.add_callback(call.cancel):
                call.cancel()  # type: ignore[no-untyped-call]
            try:
                yield from call
                context.set_trailing_metadata(_pairs(call.trailing_metadata()))
                return
            except grpc.RpcError as error:
                if number + 1 == len(tries) or error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise

    def _fail(self, error: grpc.RpcError, context: grpc.ServicerContext) -> None:
        code, said = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNAVAILABLE and not self._address.exists():
            said = f"no container runtime at {self._address} (remote.auth.image_service_address): {said}"
        context.set_trailing_metadata(_pairs(error.trailing_metadata()))
        context.abort(code, said)


def _pairs(metadata: Iterable[Any] | None) -> tuple[tuple[str, str | bytes], ...]:
    """Not grpc's own: those are set by this server again."""
    return tuple((key, value) for key, value in metadata or () if not key.startswith(_OWN_METADATA[:-1]))
