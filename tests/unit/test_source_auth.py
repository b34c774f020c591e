"""Where a registry may have user and password sent, and for how long it is asked for tokens."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from nydusfs.config.model import ConnectionConfig
from nydusfs.errors import AuthError
from nydusfs.http import HttpError, Origin, Response, Url
from nydusfs.http.connection import Tls
from nydusfs.sources import SourceHub
from nydusfs.sources.tokens import TokenKey, TokenStore


def test_a_password_goes_over_plain_http_only_where_it_may() -> None:
    """To a token server of this machine, of a registry that is plain itself, or with `skip_verify`; nobody's password
    may go anywhere."""
    realms = "http://127.0.0.1:1/t", "http://token.invalid:1/t", "https://token.invalid:1/t"

    async def refused(hub: SourceHub, scheme: str, realm: str, auth: str, skip_verify: bool) -> bool:
        where = Origin(scheme, "r.example", 1)
        settings = ConnectionConfig(skip_verify=skip_verify, connect_timeout=1, timeout=1)
        one = hub.authenticator(settings, Tls(), where, f"{realm} {skip_verify}", auth, "")
        headers = {"www-authenticate": f'Bearer realm="{realm}",service="s",scope="x"'}

        async def refusal() -> Response:
            return Response(401, headers, b"")

        try:
            await one.answer("", refusal, Url(where, "/v2/"))
        except AuthError as error:
            assert "would get user and password over plain HTTP" in str(error)
            return True
        except HttpError:
            return False  # nobody is there, but it was asked
        raise AssertionError("there is no such server")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            hub = SourceHub(nursery)
            assert [await refused(hub, "https", realm, "dTpw", False) for realm in realms] == [False, True, False]
            assert not await refused(hub, "https", realms[1], "", False)
            assert not await refused(hub, "https", realms[1], "dTpw", True)
            assert not await refused(hub, "http", realms[1], "dTpw", False)
            nursery.cancel_scope.cancel()

    trio.run(main)


class Realm:
    """In place of the client that asks a token server. `asked`: when."""

    def __init__(self) -> None:
        self.status, self.asked = 200, list[float]()

    async def request(self, method: str, *_: Any, **__: Any) -> Response:
        if method == "GET":
            self.asked.append(trio.current_time())
        body = b'{"token": "%d", "expires_in": 1000}' % len(self.asked)
        return Response(self.status if method == "GET" else 404, {}, body)


REALM = Url(Origin("https", "token.example", 443), "/t")
KEY = TokenKey(REALM, "s", "repository:a:pull", "Basic dTpw")


@pytest.mark.parametrize("read", ["for good", "until the server refuses", "never"])
def test_a_server_that_refuses_is_asked_for_a_token_only_while_somebody_reads(read: str) -> None:
    """The token is used to its end all the same, and one that has ended is renewed while it is read with."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            store, realm = TokenStore(), Realm()
            nursery.start_soon(store.renew_forever)
            client: Any = realm
            assert await store.replace(KEY, "", client, 1, 1) == "Bearer 1"
            realm.status = 403
            await trio.sleep(850)
            if read != "never":
                assert store.ready(KEY) == "Bearer 1"
            await trio.sleep(145)
            known = store.known(KEY)
            assert known is not None and known[0] == "Bearer 1"
            tried = len(realm.asked) - 1
            assert tried if read != "never" else not tried
            for _ in range(10000 if read == "for good" else 0):
                await store.fresh(KEY)
                await trio.sleep(1)
            realm.asked.clear()
            realm.status = 200
            if read == "for good":
                await trio.sleep(600)
                assert len(realm.asked) == 1 and await store.fresh(KEY) == "Bearer 1"
            else:
                await trio.sleep(80000)
                assert not realm.asked and not store._slots
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_token_whose_password_was_replaced_is_forgotten_at_its_end() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            store, realm = TokenStore(), Realm()
            nursery.start_soon(store.renew_forever)
            client: Any = realm
            await store.replace(KEY, "", client, 1, 1)
            store.retire(KEY)
            await trio.sleep(999)
            assert store.current(KEY) == "Bearer 1"
            await trio.sleep(2)
            assert store.current(KEY) == "" and not store._slots and len(realm.asked) == 1
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
