"""A token server for docker-registry's bearer authentication, with keys made by openssl."""

from __future__ import annotations

import base64
import http.server
import json
import secrets
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.lab.process import run

SERVICE, ISSUER = "lab-registry", "lab-tokens"


class TokenServer:
    """Gives tokens for whatever is asked, to one user; `granted` lists (scope, with credentials?) of every answer."""

    def __init__(self, work: Path, user: str = "robot", password: str | None = None) -> None:
        self.work, self.user, self.password = work, user, password or secrets.token_hex(8)
        self.life = 300  # seconds, as told to clients; the registry itself allows a minute more
        self.granted: list[tuple[str, bool]] = []
        work.mkdir(parents=True, exist_ok=True)
        self.key, self.certificate = work / "key.pem", work / "cert.pem"
        run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=lab", "-keyout",
             self.key, "-out", self.certificate])  # fmt: skip
        body = "".join(self.certificate.read_text().splitlines()[1:-1])
        self._header = {"typ": "JWT", "alg": "RS256", "x5c": [body]}
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            def do_POST(self) -> None:
                # The OAuth form of the request: registries that know only GET answer 404, and clients fall back.
                self.send_error(404)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def realm(self) -> tuple[str, str, str, Path]:
        """What `Registry(token_realm=...)` takes."""
        return f"http://127.0.0.1:{self._server.server_port}/token", SERVICE, ISSUER, self.certificate

    def docker_config(self, folder: Path, host: str) -> Path:
        """A docker configuration directory with this user's login for `host`."""
        folder.mkdir(parents=True, exist_ok=True)
        auth = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
        return folder

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        wanted = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        known = request.headers.get("Authorization") == f"Basic {wanted}"
        scopes = [scope for text in query.get("scope", []) for scope in text.split()]
        self.granted.append((" ".join(scopes), known))
        access = []
        for scope in scopes if known else []:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        if request.headers.get("Authorization") and not known:
            body, status = b'{"errors": [{"code": "UNAUTHORIZED"}]}', 401
        else:
            body, status = json.dumps({"token": self.token(access), "expires_in": self.life}).encode(), 200
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def token(self, access: Sequence[Mapping[str, object]]) -> str:
        now = int(time.time())
        claims = {"iss": ISSUER, "sub": self.user, "aud": SERVICE, "exp": now + 300, "nbf": now - 10, "iat": now - 10,
                  "jti": secrets.token_hex(8), "access": access}  # fmt: skip
        text = f"{_encode(json.dumps(self._header).encode())}.{_encode(json.dumps(claims).encode())}"
        signed = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.key)],
            input=text.encode(),
            capture_output=True,
            timeout=20,
            check=True,
        )
        return f"{text}.{_encode(signed.stdout)}"

    def __enter__(self) -> TokenServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
