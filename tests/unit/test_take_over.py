"""What a worker does with what the last one left to it."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.cache.devices import device_key
from nydusfs.config import ConnectionConfig, load_config
from nydusfs.daemon import handover
from nydusfs.daemon.handover import KeptMount, KeptState
from nydusfs.daemon.logs import ErrorRing
from nydusfs.daemon.mounted import MountRequest
from nydusfs.daemon.options import Options
from nydusfs.daemon.service import Daemon
from nydusfs.drivers.erofs.answers import Answers
from nydusfs.http import Origin, Response, Url, parse_url
from nydusfs.http.connection import Tls
from nydusfs.sources.auth import Authenticator
from nydusfs.sources.hub import SourceHub
from tests.lab.daemon import localfs_config
from tests.lab.httpd import Handler, reply, serve


def test_settings_of_the_last_worker_are_taken_over_with_its_mounts() -> None:
    """A worker that dies while it takes over leaves to the next what it was left."""
    saved: list[KeptState] = []

    class Anything:
        """The driver, the services and the mounts of a daemon that gets no further."""

        loop: Any = None
        mountpoint, numbering = "/m", (0, 0)

        def __getattr__(self, _: str) -> Any:
            return self

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

        def numbers(self) -> tuple[list[tuple[str, int]], int]:
            return [], 2

        def kept(self) -> list[KeptMount]:
            return []

        async def restore(self, *_: Any) -> None:
            raise RuntimeError("killed")

    class Link:
        held: dict[str, int] = {"fuse": 9}  # noqa: RUF012

        def save(self, state: bytes) -> None:
            saved.append(handover.decode(state))

    daemon = Daemon(Options("/m"), ErrorRing(), Link())  # type: ignore[arg-type]
    nothing: Any = Anything()
    daemon._driver = daemon._services = daemon._erofs = daemon.mounts = nothing
    kept = KeptState("/m", [KeptMount("/a", "/b", localfs_config(Path("/")), (), 1, 0, time.time_ns())], runtime={
        "": {"registry_auth": "dTpw"}, "\0log": {"log_level": "info"}})  # fmt: skip

    async def take_over() -> None:
        with pytest.raises(RuntimeError, match="killed"):
            await daemon._restore(kept, 9)

    trio.run(take_over)
    assert saved == []
    assert daemon.runtime_config("") == {"registry_auth": "dTpw"}


def test_images_come_back_in_the_order_in_which_readers_ask_for_them(tmp_path: Path) -> None:
    """Nine EROFS mounts, a cache each: the fourth is asked for before, the eighth meanwhile. One more is FUSE's."""
    events: list[str] = []
    pairs: list[Any] = []
    for number in range(10):
        text = localfs_config(tmp_path, work_dir=tmp_path / str(number))
        config = load_config(text, "test")
        kept = KeptMount(f"/{number}", "/b", text, (), number, 0, 0)
        pairs.append((MountRequest(f"/{number}", "/b", config, (), text), kept))

    class Erofs:
        wanted = {device_key(tmp_path / "3")}  # noqa: RUF012

        def had(self, where: str) -> bool:
            return where != "/9"

        async def asked(self, until: float) -> None:
            pass

        def unknown(self) -> set[str]:
            return self.wanted

    class Mounts:
        async def restore(self, images: list[tuple[MountRequest, KeptMount]]) -> None:
            events.append(" ".join(kept.mountpoint for _, kept in images))
            erofs.wanted = {device_key(tmp_path / "7")} if len(events) == 1 else set()

    daemon, erofs = Daemon(Options("/m"), ErrorRing()), Erofs()
    daemon._erofs, daemon.mounts = erofs, Mounts()  # type: ignore[assignment]

    async def go() -> None:
        assert await daemon._restore_asked(pairs) == pairs[9:]

    trio.run(go)
    assert events == ["/3", "/7", "/0 /1 /2 /4 /5 /6 /8"]


def test_an_image_that_is_unmounted_while_its_files_are_looked_at_ends_no_daemon() -> None:
    class Image:
        where = "/a"

        def know_files(self) -> None:
            raise ValueError("mmap closed or invalid")

    async def go() -> None:
        image: Any = Image()
        nobody: Any = None
        await Answers(nobody, nobody)._learn_files(image)

    trio.run(go)


def test_a_worker_that_a_bug_ends_is_followed() -> None:
    """What a task raises ends the others, FUSE's too, as if the worker had died: the mount stays."""

    class Link:
        held: dict[str, int] = {"fuse": 9}  # noqa: RUF012

    class Fuse:
        async def serve(self, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            await trio.sleep_forever()

    daemon = Daemon(Options("/m"), ErrorRing(), Link())  # type: ignore[arg-type]
    daemon._driver = Fuse()  # type: ignore[assignment]

    async def go() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon._serve_fuse, trio.Event())
            nursery.cancel_scope.cancel()

    trio.run(go)
    assert daemon._followed()


@pytest.mark.parametrize("left", [b"", b"[]", b"{", b'{"a": 1}', b'{"a": {"times": [1]}}', b'{"a": {"times": "xy"}}'])
def test_what_another_release_left_of_its_sources_is_ignored(left: bytes) -> None:
    async def take_over() -> None:
        async with trio.open_nursery() as nursery:
            hub = SourceHub(nursery)
            hub.take_over(left)
            assert hub.leave() == b"{}"
            nursery.cancel_scope.cancel()

    trio.run(take_over)


def test_a_token_is_left_for_as_long_as_it_is_good() -> None:
    origin = Origin("http", "r.example", 80)
    realm = Url(origin, "/token")

    def authenticator(hub: SourceHub, repo: str) -> Authenticator:
        return hub.authenticator(ConnectionConfig(), Tls(), origin, repo, "dTpw", "")

    async def live(left: bytes, check: Callable[[SourceHub], Awaitable[None]]) -> bytes:
        async with trio.open_nursery() as nursery:
            hub = SourceHub(nursery)
            hub.take_over(left)
            await check(hub)
            nursery.cancel_scope.cancel()
        return hub.leave()

    async def first(hub: SourceHub) -> None:
        for repo, seconds in (("long", 300.0), ("short", 0.2)):
            authenticator(hub, repo).recall(realm, "s", repo, (f"Bearer {repo}", seconds / 2, seconds))

    async def idle(_: SourceHub) -> None:
        await trio.sleep(0.3)

    async def third(hub: SourceHub) -> None:
        assert [await authenticator(hub, repo).header() for repo in ("long", "short", "other")] == [
            "Bearer long",
            "",
            "",
        ]
        other = hub.authenticator(ConnectionConfig(), Tls(), origin, "long", "b3RoZXI=", "")
        assert await other.header() == ""  # it belongs to whose password got it

    left = trio.run(live, b"", first)
    assert b"dTpw" not in left
    trio.run(live, trio.run(live, left, idle), third)


def test_the_next_worker_renews_a_token_where_the_registry_said() -> None:
    """Some registries tell in the query of the realm whose tokens they are: account, tenant."""

    def answer(request: Handler) -> None:
        reply(request, 200, b'{"token": "t", "expires_in": 300}')

    async def live(left: bytes, check: Callable[[Authenticator], Awaitable[object]]) -> bytes:
        async with trio.open_nursery() as nursery:
            hub = SourceHub(nursery)
            hub.take_over(left)
            with trio.fail_after(30):
                await check(hub.authenticator(ConnectionConfig(), Tls(), Origin("http", "r", 80), "a", "dTpw", ""))
            nursery.cancel_scope.cancel()
        return hub.leave()

    with serve(answer) as server:
        challenge = Response(401, {"www-authenticate": f'Bearer realm="http://{server.host}/t?account=a"'}, b"")

        async def refusal() -> Response:
            return challenge

        left = json.loads(trio.run(live, b"", lambda one: one.answer("", refusal, parse_url("http://r/v2/"))))
        for one in left.values():
            one["times"][0] = 0  # it is due
        trio.run(live, json.dumps(left).encode(), lambda one: one.header())
        assert [path for method, path, _ in server.seen if method == "POST"] == ["/t?account=a"] * 2
