"""A registry seen through a proxy that can fail: requests are passed on, or what a function says happens to them."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.lab.httpd import Handler, Server, body_of, reply, serve

Trouble = Callable[[Handler], bool]
"""True: the request was dealt with (or its connection left to break)."""


@contextmanager
def forwarding(registry: str, trouble: Trouble) -> Iterator[Server]:
    """`registry` is host:port. Upload locations are rewritten to lead here."""

    def answer(handler: Handler) -> None:
        if trouble(handler):
            return
        here = handler.headers["Host"]
        upstream = http.client.HTTPConnection(registry, timeout=30)
        try:
            kept = {
                name: value for name, value in handler.headers.items() if name.lower() not in ("host", "connection")
            }
            upstream.request(handler.command, handler.path, body_of(handler), {**kept, "Host": registry})
            got = upstream.getresponse()
            wanted = ("content-type", "location", "docker-content-digest", "range", "content-range")
            headers = {
                name.replace("-", "_"): value.replace(registry, here)
                for name, value in got.getheaders()
                if name.lower() in wanted
            }
            if handler.command == "HEAD" and got.getheader("Content-Length"):
                handler.send_response(got.status)
                for name, value in got.getheaders():
                    handler.send_header(name, value)
                handler.end_headers()
            else:
                reply(handler, got.status, got.read(), **headers)
        finally:
            upstream.close()

    with serve(answer) as server:
        yield server
