"""What the API can refuse, in upstream's words. `detail` is the inner part of the message of an error answer."""

from __future__ import annotations

import json

from nydusfs.errors import NydusError


def rust_string(text: str) -> str:
    """A text as Rust's `{:?}` prints it; scripts match these messages literally."""
    return json.dumps(text, ensure_ascii=False)


class ApiError(NydusError):
    """An error with an HTTP status. `outer` (the route's name) is wrapped around `detail` when there is one."""

    status = 500

    def __init__(self, detail: str, status: int | None = None) -> None:
        self.detail = detail
        if status is not None:
            self.status = status
        super().__init__(detail)


class BadRequestError(ApiError):
    """Wrong method, a body where none belongs, or none where one does. Not wrapped in a route's name."""

    status = 400


class NoRouteError(ApiError):
    status = 404


class NoCounterError(ApiError):
    """A metrics id nobody has, or none given while there are several."""

    status = 404

    def __init__(self) -> None:
        super().__init__("Metrics(Stats(NoCounter))")


class UnexpectedEventError(ApiError):
    """An event the state machine has no transition for."""

    status = 400

    def __init__(self, event: str) -> None:
        super().__init__(f"DaemonAbnormal(UnexpectedEvent({rust_string(event)}))")


class UnsupportedError(ApiError):
    status = 501

    def __init__(self) -> None:
        super().__init__("DaemonAbnormal(Unsupported)")


class MountFailedError(ApiError):
    """A mount, remount or umount that did not happen; nothing of it is left."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(f"MountFilesystem(Other({rust_string(message)}))")


ALREADY_EXISTS = "object or filesystem already exists"
DOES_NOT_EXIST = "object or filesystem doesn't exist"
