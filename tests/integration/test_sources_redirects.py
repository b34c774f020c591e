"""Where a registry leads its readers: redirects to storage, and plain HTTP instead of TLS."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.errors import SourceError
from nydusfs.sources import SourceHub, open_source, registry
from tests.integration import test_sources_mirrors
from tests.integration.test_sources_mirrors import AUTH, BLOB_ID, backend, read, run
from tests.lab.faulty import self_signed

server, patience = test_sources_mirrors.server, test_sources_mirrors.patience  # fixtures


def test_redirects_go_where_the_configuration_says(server: Any) -> None:
    """`blob_url_scheme` and `blob_redirected_host`: storage that is known by another name inside."""
    store = server()
    origin = server(redirect="https://storage.invalid:444")

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, blob_url_scheme="http", blob_redirected_host=store.netloc), hub))
        assert [request.target for request in store.requests] == [f"/signed/blobs/{BLOB_ID}?sig=1"]

    run(scenario)


@pytest.mark.parametrize(
    "keys", [{"blob_url_scheme": "http"}, {"blob_url_scheme": "http", "blob_redirected_host": "127.0.0.1"}]
)
def test_the_port_of_a_redirect_stays_where_none_is_configured(server: Any, keys: dict[str, str]) -> None:
    store = server()
    origin = server(redirect=f"https://localhost:{store.port}")

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, **keys), hub))
        assert len(store.requests) == 1

    run(scenario)


def test_a_redirect_that_cannot_be_followed_is_named_without_its_secrets(server: Any) -> None:
    origin = server(redirect="ftp://user:hush@h")

    async def scenario(hub: SourceHub) -> None:
        with pytest.raises(SourceError, match=r"redirect to 'ftp://.*@h/signed/") as caught:
            await read(open_source(backend(origin), hub))
        assert "hush" not in str(caught.value)

    run(scenario)


def test_a_stranger_that_redirects_to_itself_gets_no_credentials(server: Any) -> None:
    """The token is the registry's: whoever that one leads to may not have it by leading on to itself."""
    stranger = server()
    stranger.redirect = f"http://localhost:{stranger.port}"
    origin = server(auth="bearer", redirect=stranger.redirect)

    async def scenario(hub: SourceHub) -> None:
        with pytest.raises(SourceError):
            await read(open_source(backend(origin, auth=AUTH), hub))

    run(scenario)
    assert len(stranger.requests) == registry.MAX_REDIRECTS
    assert all("authorization" not in request.headers for request in stranger.requests)


def test_a_broken_handshake_is_no_reason_for_plain_http_for_ever(server: Any, tmp_path: Path) -> None:
    """A registry with TLS that restarts, or a balancer before it with nobody behind."""

    class Restarting(ssl.SSLContext):
        down = True

        def wrap_socket(self, *given: Any, **named: Any) -> ssl.SSLSocket:
            if self.down:
                raise OSError("not up yet")
            return super().wrap_socket(*given, **named)

    context = Restarting(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))
    origin = server(tls=context)

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, skip_verify=True), hub)
        with pytest.raises(SourceError, match="TLS handshake failed"):
            await read(source)
        context.down = False
        await read(source)

    run(scenario)


def test_plain_http_instead_of_tls_is_for_all_readers_at_once(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With a token nobody goes ahead: the second one to meet the missing TLS is as well off as the first."""
    origin = server(latency=0.2)

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, scheme="https", skip_verify=True, registry_token="given"), hub)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(read, source, 4096 * number)
        assert sum("does not speak TLS" in record.getMessage() for record in caplog.records) == 1

    run(scenario)


def test_a_signed_redirect_is_not_used_beyond_its_time(server: Any) -> None:
    store = server()
    origin = server(redirect=store.url, redirect_query=f"Expires={int(time.time()) + 21}&Signature=x")

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin), hub)
        await read(source)
        await read(source, 4096)
        assert len(origin.requests) == 1
        await trio.sleep(6.5)  # it still works for 15 s, but a long read must not meet its end
        await read(source, 8192)
        assert len(origin.requests) == 2

    run(scenario)


@pytest.mark.parametrize("mode", ["404", "503", "empty", "early-close", "hang-headers"])
def test_a_remembered_redirect_that_fails_costs_no_reader_an_error(server: Any, mode: str) -> None:
    first, second = server(), server()
    origin = server(redirect=first.url)

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, retry_limit=0, timeout=3), hub)
        await read(source)
        first.mode, origin.redirect = mode, second.url
        await read(source, 4096)
        assert len(second.requests) == 1 and len(origin.requests) == 2
        assert hub.report()[0]["state"] == "up"

    run(scenario)
