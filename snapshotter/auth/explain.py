"""`nydusctl auth explain`: the question on the snapshotter's socket, its answer in JSON, and the words for people."""

from __future__ import annotations

import json
from typing import Any

import grpc

from nydusfs.errors import NydusError
from nydusfs.registry.reference import Reference
from snapshotter.auth.chain import Chain
from snapshotter.auth.vault import image_key
from snapshotter.errors import InvalidArgument, sentence
from snapshotter.labels import image_label
from snapshotter.store import Store

METHOD = "/nydus.snapshotter.v1.Auth/Explain"


class ExplainService(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """One method beside the snapshots service: an image reference in, JSON out."""

    def __init__(self, chain: Chain, store: Store) -> None:
        self._chain, self._store = chain, store

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return grpc.unary_unary_rpc_method_handler(self._explain) if details.method == METHOD else None

    def _explain(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        image = request.decode(errors="replace")
        try:
            return json.dumps(self._chain.explain(image, self._labels(image))).encode()
        except InvalidArgument as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence(str(error)))
            raise AssertionError("abort always raises") from None

    def _labels(self, image: str) -> dict[str, str]:
        """Labels of a snapshot of this image, of those that were stored before secrets were kept apart as well."""
        try:
            wanted = image_key(Reference.parse(image))
        except NydusError:
            return {}
        for snapshot in self._store.all():
            try:
                if (text := image_label(snapshot.labels)) and image_key(Reference.parse(text)) == wanted:
                    return dict(snapshot.labels)
            except NydusError:
                continue
        return {}


def ask(address: str, image: str, timeout: float = 90.0) -> dict[str, Any]:
    """The running snapshotter's answer. Raises grpc.RpcError."""
    with grpc.insecure_channel(f"unix://{address}", options=[("grpc.default_authority", "localhost")]) as channel:
        call = channel.unary_unary(METHOD, None, None)
        answer: dict[str, Any] = json.loads(call(image.encode(), timeout=timeout))
        return answer


def lines(answer: dict[str, Any]) -> list[str]:
    """For a terminal."""
    import time

    if answer["source"] is None:
        head = "no credentials: the registry is asked anonymously"
    else:
        who = f" of {answer['username']!r}" if answer["username"] else ""
        head = f"{answer['kind']}{who} from {answer['source']}"
        if answer["expires"]:
            head += f", renewed at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(answer['expires']))}"
    width = max(len(step["source"]) for step in answer["steps"])
    return [
        f"{answer['image']}: {head}",
        *(f"  {step['source']:<{width}}  {step['outcome']:<9}  {step['reason']}" for step in answer["steps"]),
    ]
