"""Where a registry may have user and password sent."""

from __future__ import annotations

import trio

from nydusfs.config.model import ConnectionConfig
from nydusfs.errors import AuthError
from nydusfs.http import HttpError, Origin, Response, Url
from nydusfs.http.connection import Tls
from nydusfs.sources import SourceHub


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
