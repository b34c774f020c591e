"""Routes, bodies, status codes and error texts of the API, against answers recorded from nydusd v2.4.4."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from nydusfs.daemon.api import Api
from nydusfs.daemon.errors import MountFailedError, UnexpectedEventError, UnsupportedError
from nydusfs.daemon.http import Request, Response
from nydusfs.daemon.logs import ErrorRing, set_level
from nydusfs.daemon.mounted import MountedImage, MountRequest
from nydusfs.daemon.state import Event, State, StateMachine
from nydusfs.drivers.fuse import InFlightInfo
from nydusfs.errors import CacheError


class Mounts:
    def __init__(self) -> None:
        self.images: dict[str, MountedImage] = {}
        self.asked: list[MountRequest] = []

    def get(self, mountpoint: str) -> None:
        return None

    async def mount(self, request: MountRequest, *, later: bool) -> None:
        self.asked.append(request)

    async def mount_all(self, requests: list[MountRequest]) -> list[MountFailedError | None]:
        self.asked += requests
        return [MountFailedError("no") if request.source == "/none" else None for request in requests]


class Caches:
    def report(self) -> dict[str, Any]:
        return {"stores": [], "images": []}

    async def drop(self, path: str, blob_id: str, names: list[str], *, damaged: bool) -> dict[str, Any]:
        if path != "/cache":
            raise CacheError(f"cache {path} is not one of this nydusd")
        return {"dropped": [blob_id, *names, damaged]}

    async def adopt(self, path: str, blob_id: str, names: list[str], staged: str) -> dict[str, Any]:
        return {"adopted": [blob_id, *names], "refused": staged}


class Control:
    """A daemon without images."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.supervisor: str | None = None
        self.mounts: Any = Mounts()
        self.events = ErrorRing()
        self.machine = StateMachine()
        self.values: dict[str, dict[str, str]] = {}
        for event in (Event.MOUNT, Event.START):
            self.machine.step(event)

    @property
    def state(self) -> State:
        return self.machine.state

    def start(self) -> None:
        self.machine.step(Event.START)

    async def exit(self) -> Callable[[], None]:
        self.machine.exit()
        return lambda: None

    @property
    def keeper_pid(self) -> int | None:
        return None

    async def send_fd(self) -> None:
        raise UnsupportedError()

    async def take_over(self) -> None:
        raise UnsupportedError()

    async def upgrade(self) -> Callable[[], None]:
        raise UnsupportedError()

    def inflight(self) -> list[InFlightInfo]:
        return []

    def sources(self) -> list[dict[str, Any]]:
        return [{"address": "http://127.0.0.1:65001", "state": "up"}]

    @property
    def caches(self) -> Any:
        return Caches()

    def set_log_level(self, level: str) -> None:
        set_level(level)

    def set_runtime_config(self, config_id: str, values: dict[str, str]) -> None:
        self.values.setdefault(config_id, {}).update(values)

    def runtime_config(self, config_id: str) -> dict[str, str]:
        return self.values.get(config_id, {})


async def ask(method: str, target: str, body: bytes | str = b"", control: Control | None = None) -> Response:
    path, _, query = target.partition("?")
    values = dict(part.split("=", 1) for part in query.split("&") if part)
    data = body.encode() if isinstance(body, str) else body
    return await Api(control or Control()).handle(Request(method, f"/api/v1/{path}", values, data))


# (method, target, body, status, message) as upstream's daemon answered
REFUSALS = [
    ("GET", "nope", "", 404, "NoRoute"),
    ("GET", "daemon/", "", 404, "NoRoute"),
    ("PATCH", "daemon", "", 400, "BadRequest"),
    ("PUT", "daemon", "", 400, "BadRequest"),
    ("GET", "daemon", "{}", 400, "BadRequest"),
    ("PUT", "daemon/start", "{}", 400, "BadRequest"),
    ("PUT", "daemon/start", "", 400, 'Configure(DaemonAbnormal(UnexpectedEvent("Start")))'),
    ("PUT", "daemon/fuse/takeover", "", 400, 'Upgrade(DaemonAbnormal(UnexpectedEvent("Takeover")))'),
    ("PUT", "daemon/fuse/sendfd", "", 501, "Upgrade(DaemonAbnormal(Unsupported))"),
    ("PUT", "daemon", '{"log_level":"zzz"}', 500, "Configure(ResponsePayloadType)"),
    ("PUT", "daemon", '{"x":"zzz"}', 400, 'ParseBody(Error("missing field `log_level`", line: 1, column: 11))'),
    ("PUT", "daemon", "zz", 400, 'ParseBody(Error("expected value", line: 1, column: 1))'),
    ("GET", "daemon/backend", "", 400, "QueryString(\"'mountpoint' should be specified in query string\")"),
    ("GET", "daemon/backend?mountpoint=/zz", "", 500,
     'FsBackendInfo(Metrics(Daemon(Other("object or filesystem doesn\'t exist"))))'),
    ("GET", "metrics", "", 404, "GlobalMetrics(Metrics(Stats(NoCounter)))"),
    ("GET", "metrics?id=zz", "", 404, "GlobalMetrics(Metrics(Stats(NoCounter)))"),
    ("GET", "metrics/files?id=zz", "", 404, "FsFilesMetrics(Metrics(Stats(NoCounter)))"),
    ("GET", "metrics/pattern?id=zz", "", 404, "Pattern(Metrics(Stats(NoCounter)))"),
    ("GET", "metrics/backend?id=zz", "", 404, "BackendMetrics(Metrics(Stats(NoCounter)))"),
    ("GET", "metrics/blobcache?id=zz", "", 404, "BlobcacheMetrics(Metrics(Stats(NoCounter)))"),
    ("POST", "mount", "{}", 400, "QueryString(\"'mountpoint' should be specified in query string\")"),
    ("POST", "mount?mountpoint=/q", "{}", 400, 'ParseBody(Error("missing field `source`", line: 1, column: 2))'),
    ("POST", "mount?mountpoint=/q", '{"source":"/nope","fs_type":"","config":"{}"}', 500,
     ("Mount(MountFilesystem(Other(\"invalid argument `only 'rafs' and 'passthrough_fs' are supported, but  was "
      'specified`")))')),
    ("PUT", "config", '{"x":"zzz"}', 500, "Configure(ResponsePayloadType)"),
]  # fmt: skip


@pytest.mark.trio
@pytest.mark.parametrize(("method", "target", "body", "status", "message"), REFUSALS)
async def test_refusals_are_upstreams_word_for_word(
    method: str, target: str, body: str, status: int, message: str
) -> None:
    answer = await ask(method, target, body)
    assert answer.status == status
    assert json.loads(answer.body) == {"code": "UNDEFINED", "message": message}


@pytest.mark.trio
async def test_bodies_no_client_should_send_are_refused_without_a_trace_of_internals() -> None:
    for body in ("[]", "5", "null", '{"log_level":5}', "{" * 100_000, b"\xff\xfe{}", '{"log_level":null}'):
        answer = await ask("PUT", "daemon", body)
        assert answer.status == 400, body
        assert json.loads(answer.body)["message"].startswith("ParseBody(Error(")
    for config in ('""', '"[]"', '"{}"', "7", '"device = 1"'):
        answer = await ask("POST", "mount?mountpoint=/q", f'{{"source":"/b","fs_type":"rafs","config":{config}}}')
        assert answer.status in (400, 500)
        assert b"Traceback" not in answer.body


@pytest.mark.trio
async def test_half_a_surrogate_pair_in_a_body_is_answered() -> None:
    """JSON may hold one; it is no text, and to say so ended the daemon."""
    bodies = [
        ("POST", "mount?mountpoint=/q", r'{"source":"/b","fs_type":"\ud800","config":"{}"}'),
        ("PUT", "cache", r'{"store":"\ud800","blob_id":"b","drop":[]}'),
    ]
    for method, target, body in bodies:
        answer = await ask(method, target, body)
        assert answer.status == 500
        assert "\ud800" in json.loads(answer.body.decode())["message"]


@pytest.mark.trio
async def test_daemon_information_has_upstreams_shape() -> None:
    info = json.loads((await ask("GET", "daemon")).body)
    assert info["version"].keys() == {"package_ver", "git_commit", "build_time", "profile", "rustc"}
    assert {k: v for k, v in info.items() if k != "version"} == {
        "id": None, "supervisor": None, "state": "RUNNING", "backend_collection": {},
        "keeper_pid": None, "worker_pid": os.getpid(),
    }  # fmt: skip
    second = await Api(Control()).handle(Request("GET", "/api/v2/daemon"))
    assert json.loads(second.body)["backend_collection"] is None
    assert (await ask("GET", "metrics/inflight")).status == 204
    events = json.loads((await ask("GET", "daemon/events")).body)
    assert events == {"max_errors": 500, "total_errors": 0, "max_size": 51200, "total_size": 0, "errors": []}


@pytest.mark.trio
async def test_mount_request_carries_everything_over() -> None:
    control = Control()
    config = {"device": {"id": "/4", "backend": {"type": "localfs", "config": {"dir": "/b"}}}, "mode": "direct"}
    body = {"source": "/boot", "fs_type": "rafs", "config": json.dumps(config), "prefetch_files": ["/bin"]}
    assert (await ask("POST", "mount?mountpoint=/4", json.dumps(body), control)).status == 204
    (request,) = control.mounts.asked
    assert (request.mountpoint, request.source, request.prefetch_files) == ("/4", "/boot", ("/bin",))
    assert request.config.id == "/4"


@pytest.mark.trio
async def test_many_mounts_in_one_request_fail_one_by_one() -> None:
    control = Control()
    config = {"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}}, "mode": "direct"}
    body = {"source": "/boot", "fs_type": "rafs", "config": json.dumps(config)}
    items = [{**body, "mountpoint": "/4"}, body, {**body, "mountpoint": "/5", "source": "/none"},
             {**body, "mountpoint": "/6", "config": "{}"},
             {**body, "mountpoint": "/7", "prefetch_files": ["/a"]}]  # fmt: skip
    answer = await ask("POST", "mounts", json.dumps(items), control)
    assert answer.status == 200
    said = json.loads(answer.body)
    assert [one is None for one in said] == [True, False, False, False, True]
    assert "'mountpoint' should be specified" in said[1]
    assert said[2] == 'Mount(MountFilesystem(Other("no")))'
    assert "Failed to load config" in said[3]
    assert [one.mountpoint for one in control.mounts.asked] == ["/4", "/5", "/7"]
    assert control.mounts.asked[-1].prefetch_files == ("/a",)
    for wrong in ("{}", "[1]", "zz", "null"):
        assert (await ask("POST", "mounts", wrong)).status == 400


@pytest.mark.trio
async def test_runtime_settings_are_kept_per_id_and_secrets_never_shown() -> None:
    control = Control()
    assert (
        await ask("PUT", "config?id=/4", '{"registry_auth":"c2VjcmV0","proxy_url":"http://p"}', control)
    ).status == 204
    answer = await ask("GET", "config?id=/4", control=control)
    assert json.loads(answer.body) == {"registry_auth": "(hidden)", "proxy_url": "http://p"}
    assert json.loads((await ask("GET", "config", control=control)).body) == {}
    assert control.values["/4"]["registry_auth"] == "c2VjcmV0"


@pytest.mark.trio
async def test_segments_that_a_tool_drops_or_brings() -> None:
    assert json.loads((await ask("GET", "cache")).body) == {"stores": [], "images": []}
    body = {"store": "/cache", "blob_id": "b", "drop": ["0-00"], "damaged": True}
    assert json.loads((await ask("PUT", "cache", json.dumps(body))).body) == {"dropped": ["b", "0-00", True]}
    body = {"store": "/cache", "blob_id": "b", "adopt": ["0-00"], "staged": "s"}
    assert json.loads((await ask("PUT", "cache", json.dumps(body))).body) == {"adopted": ["b", "0-00"], "refused": "s"}
    refused = await ask("PUT", "cache", json.dumps({"store": "/other", "blob_id": "b", "drop": []}))
    assert (refused.status, b"not one of this nydusd" in refused.body) == (500, True)
    for wrong in ({"store": "/cache", "blob_id": "b"}, {"store": "/c", "blob_id": "b", "drop": [1]}, {"store": "/c"}):
        assert (await ask("PUT", "cache", json.dumps(wrong))).status == 400


def test_state_machine_allows_exactly_the_documented_transitions() -> None:
    allowed = {
        (State.INIT, Event.MOUNT): State.READY,
        (State.INIT, Event.TAKEOVER): State.READY,
        (State.INIT, Event.STOP): State.STOPPED,
        (State.READY, Event.START): State.RUNNING,
        (State.READY, Event.STOP): State.STOPPED,
        (State.READY, Event.EXIT): State.STOPPED,
        (State.RUNNING, Event.STOP): State.READY,
    }
    for state in State:
        for event in Event:
            machine = StateMachine()
            machine.state = state
            if (state, event) in allowed:
                machine.step(event)
                assert machine.state is allowed[state, event]
            else:
                with pytest.raises(UnexpectedEventError):
                    machine.step(event)
                assert machine.state is state
    for state in State:
        machine = StateMachine()
        machine.state = state
        machine.stop()
        assert machine.state is State.STOPPED
