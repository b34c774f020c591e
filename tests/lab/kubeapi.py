"""An API server of a cluster, as far as secrets go: kubectl and watching clients find what a real one would tell them.

Resource versions count over all objects. Lists come in pages of one version; watches replay what happened since theirs,
with bookmarks and an end after `timeoutSeconds`; what is older than `compact()` is Gone, in the event stream and for
continued lists. TLS, with bearer tokens or certificates of the authority.
"""

from __future__ import annotations

import base64
import copy
import http.server
import json
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab.authority import Authority
from tests.lab.process import free_port

Object = dict[str, Any]
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class Refusal(Exception):
    """A Status instead of an answer."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                       "message": message, "reason": reason, "code": code}  # fmt: skip


@dataclass
class Asked:
    """A request as it came; `query` with one value per name."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)

    @property
    def watch(self) -> bool:
        return self.query.get("watch") in ("1", "true")


class KubeApi:
    """`tokens`: bearer tokens that are accepted (name -> may read secrets)."""

    def __init__(self, work: Path, *, page: int = 500, bookmark_seconds: float = 60.0) -> None:
        self.work, self.page, self.bookmark_seconds = work, page, bookmark_seconds
        self.authority = Authority(work / "pki")
        self.tokens: dict[str, bool] = {"admin-token": True, "nobody-token": False}
        self.asked: list[Asked] = []
        self.bookmarks = 0
        self.watching = 0  # watches that began: no later `compact` is about their version
        self._changed = threading.Condition()
        self._version = 100
        self._oldest = 100
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[tuple[int, str, Object]] = []
        self._connections: set[socket.socket] = set()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                owner._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exc_info()[1], OSError):
                    super().handle_error(request, client_address)  # OSError: clients that went away or were cut off

        self._context = self.authority.server_context("kube-apiserver")
        self._context.load_verify_locations(self.authority.certificate)
        self._context.verify_mode = ssl.CERT_OPTIONAL
        self._handler, self._server_class = Handler, Server
        self._server: Server | None = None
        self.port = 0

    # ---- for tests

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def put(self, namespace: str, name: str, auths: dict[str, Any] | None, type_: str = "") -> None:
        """Creates or replaces a pull secret; `auths` None deletes it."""
        key = namespace, name
        if auths is None:
            self._delete(key)
            return
        data = base64.b64encode(json.dumps({"auths": auths}).encode()).decode()
        secret: Object = {
            "kind": "Secret",
            "apiVersion": "v1",
            "metadata": {"name": name, "namespace": namespace},
            "type": type_ or "kubernetes.io/dockerconfigjson",
            "data": {".dockerconfigjson": data},
        }
        self._store(secret)

    def compact(self) -> None:
        """Forgets what happened before now: watchers and lists of earlier versions are Gone."""
        with self._changed:
            self._version += 1
            self._oldest = self._version
            self._history.clear()

    def cut(self) -> None:
        """Breaks every connection in mid answer."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def kubeconfig(self, path: Path, *, token: str = "", certificate: bool = False, data: bool = True) -> Path:
        """One whose current context reaches this server; with material inside, or as files beside."""

        def material(name: str, file: Path) -> str:
            if data:
                return f"{name}-data: {base64.b64encode(file.read_bytes()).decode()}"
            return f"{name}: {file}"

        user = f"    token: {token}\n" if token else ""
        if certificate:
            cert, key = self.authority.issue("kube-client")
            user += f"    {material('client-certificate', cert)}\n    {material('client-key', key)}\n"
        path.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\nclusters:\n- name: one\n  cluster:\n"
            f"    server: {self.url}\n    {material('certificate-authority', self.authority.certificate)}\n"
            "contexts:\n- name: lab\n  context: {cluster: one, user: me}\n"
            f"users:\n- name: me\n  user:\n{user}"
        )
        return path

    def start(self) -> KubeApi:
        # none that the kernel gives to others between `stop` and `start`
        self.port = self.port or free_port()
        server = self._server = self._server_class(("127.0.0.1", self.port), self._handler)
        server.socket = self._context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """The objects stay: `start` brings the same cluster back on the same port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.cut()

    def __enter__(self) -> KubeApi:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- objects

    def _store(self, secret: Object, *, create: bool = False) -> Object:
        metadata = secret["metadata"]
        key = metadata["namespace"], metadata["name"]
        with self._changed:
            if create and key in self._objects:
                raise Refusal(409, "AlreadyExists", f'secrets "{key[1]}" already exists')
            self._version += 1
            kind = "MODIFIED" if key in self._objects else "ADDED"
            metadata["resourceVersion"] = str(self._version)
            metadata.setdefault("uid", f"0000-{key[0]}-{key[1]}")
            metadata.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            self._objects[key] = secret
            self._history.append((self._version, kind, copy.deepcopy(secret)))
            self._changed.notify_all()
        return secret

    def _delete(self, key: tuple[str, str]) -> Object:
        with self._changed:
            gone = self._objects.pop(key, None)
            if gone is None:
                raise Refusal(404, "NotFound", f'secrets "{key[1]}" not found')
            self._version += 1
            gone["metadata"]["resourceVersion"] = str(self._version)
            self._history.append((self._version, "DELETED", gone))
            self._changed.notify_all()
            return gone

    # ---- requests

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query).items()}
        asked = Asked(request.command, url.path, query)
        self.asked.append(asked)
        self._connections.add(request.connection)
        body = _body(request)
        try:
            self._authenticate(request, asked)
            if asked.watch:
                self._watch(request, asked)
                return
            self._send(request, 201 if asked.method == "POST" else 200, self._route(asked, body))
        except Refusal as refusal:
            self._send(request, refusal.code, refusal.status)
        finally:
            self._connections.discard(request.connection)

    def _authenticate(self, request: http.server.BaseHTTPRequestHandler, asked: Asked) -> None:
        bearer = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        connection = request.connection
        certificate = isinstance(connection, ssl.SSLSocket) and connection.getpeercert()
        if not certificate and bearer not in self.tokens:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        if "secrets" in asked.path and not certificate and not self.tokens[bearer]:
            raise Refusal(403, "Forbidden", 'secrets is forbidden: User "nobody" cannot list resource "secrets"')

    def _route(self, asked: Asked, body: bytes) -> Object:
        parts = asked.path.strip("/").split("/")
        if asked.path == "/version":
            return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        if asked.path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        if asked.path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": []}
        if asked.path == "/api/v1":
            secrets = {"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret",
                       "verbs": _VERBS}  # fmt: skip
            return {"kind": "APIResourceList", "groupVersion": "v1", "resources": [secrets]}
        match asked.method, parts:
            case "GET", ["api", "v1", "secrets"]:
                return self._list(asked, "")
            case "GET", ["api", "v1", "namespaces", namespace, "secrets"]:
                return self._list(asked, namespace)
            case "POST", ["api", "v1", "namespaces", namespace, "secrets"]:
                secret = json.loads(body)
                secret["metadata"]["namespace"] = namespace
                return self._store(secret, create=True)
            case "GET", ["api", "v1", "namespaces", namespace, "secrets", name]:
                if (namespace, name) not in self._objects:
                    raise Refusal(404, "NotFound", f'secrets "{name}" not found')
                return self._objects[namespace, name]
            case "PUT", ["api", "v1", "namespaces", namespace, "secrets", name]:
                return self._store(json.loads(body))
            case "DELETE", ["api", "v1", "namespaces", namespace, "secrets", name]:
                self._delete((namespace, name))
                return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        raise Refusal(404, "NotFound", "the server could not find the requested resource")

    def _list(self, asked: Asked, namespace: str) -> Object:
        with self._changed:
            version, start = self._version, ""
            if token := asked.query.get("continue"):
                version, start = json.loads(base64.b64decode(token))
                if version < self._oldest:
                    raise Refusal(410, "Expired", "The provided continue parameter is too old")
            names = sorted(
                key for key, secret in self._objects.items()
                if _selected(secret, asked, namespace) and json.dumps(key) > start
            )  # fmt: skip
            limit = min(int(asked.query.get("limit") or self.page), self.page)
            metadata: Object = {"resourceVersion": str(version)}
            if len(names) > limit:
                next_ = json.dumps([version, json.dumps(names[limit - 1])])
                metadata["continue"] = base64.b64encode(next_.encode()).decode()
                metadata["remainingItemCount"] = len(names) - limit
            items = [copy.deepcopy(self._objects[key]) for key in names[:limit]]
        for item in items:  # as in a real list, the kind is told once
            item.pop("kind", None)
            item.pop("apiVersion", None)
        return {"kind": "SecretList", "apiVersion": "v1", "metadata": metadata, "items": items}

    def _watch(self, request: http.server.BaseHTTPRequestHandler, asked: Asked) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for event in self._events(asked):
            data = json.dumps(event).encode() + b"\n"
            half = len(data) // 2  # an event is seldom one packet
            for piece in (data[:half], data[half:]):
                request.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                request.wfile.flush()
        request.wfile.write(b"0\r\n\r\n")

    def _events(self, asked: Asked) -> Iterator[Object]:
        seen = int(asked.query.get("resourceVersion") or 0)
        end = time.monotonic() + float(asked.query.get("timeoutSeconds") or 1800)
        bookmarks = asked.query.get("allowWatchBookmarks") in ("1", "true")
        namespace = parts[3] if len(parts := asked.path.strip("/").split("/")) > 4 else ""
        with self._changed:
            oldest = self._oldest
            self.watching += seen >= oldest
        if seen < oldest:
            gone = Refusal(410, "Expired", f"too old resource version: {seen} ({oldest})")
            yield {"type": "ERROR", "object": gone.status}
            return
        while time.monotonic() < end:
            with self._changed:
                fresh = [entry for entry in self._history if entry[0] > seen]
                if not fresh:
                    wait = min(self.bookmark_seconds, end - time.monotonic())
                    if not self._changed.wait(wait) and bookmarks and time.monotonic() < end:
                        seen = self._version
                        self.bookmarks += 1
                        metadata = {"resourceVersion": str(seen), "creationTimestamp": None}
                        yield {"type": "BOOKMARK", "object": {"kind": "Secret", "metadata": metadata}}
                    continue
            for version, kind, secret in fresh:
                seen = version
                if _selected(secret, asked, namespace):
                    yield {"type": kind, "object": secret}

    def _send(self, request: http.server.BaseHTTPRequestHandler, status: int, body: Object) -> None:
        data = json.dumps(body).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


def _body(request: http.server.BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline().split(b";")[0], 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def _selected(secret: Object, asked: Asked, namespace: str) -> bool:
    wanted = dict(one.split("=", 1) for one in (asked.query.get("fieldSelector") or "").split(",") if one)
    if "type" in wanted and secret.get("type") != wanted["type"]:
        return False
    return not namespace or secret["metadata"]["namespace"] == namespace
