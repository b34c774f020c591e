"""A watch on all secrets of type kubernetes.io/dockerconfigjson, as a source of credentials.

List with pages, then watch from the list's resource version with bookmarks; 410 Gone begins anew; a connection that
ends or breaks is taken up where it was (Kubernetes, "Efficient detection of changes").
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from nydusfs.registry.credentials import Credentials, decode_auth
from snapshotter.auth.base import Answer, Question
from snapshotter.auth.kubernetes.access import Access, AccessError
from snapshotter.auth.patterns import best_first, matches

log = logging.getLogger(__name__)

TYPE = "kubernetes.io/dockerconfigjson"
PAGE = 500
FIRST_SECONDS = 5.0  # how long a question waits for the first list after the start
WATCH_SECONDS = 240  # the server ends a watch then; it is also how late a silent connection is found out
CONNECT_SECONDS = 10.0
FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0
SHORT_SECONDS = 1.0  # a watch without an event that ends so soon is none
MAX_LINE = 4 << 20

Keys = dict[str, Credentials]  # key of `auths` -> credentials


class _Gone(Exception):
    """The resource version is too old: list again."""


class SecretsSource:
    """Its thread runs from `start` to `close`. `on_change` is called without arguments after the secrets changed."""

    name = "kubernetes"

    def __init__(self, access: Access) -> None:
        self._access = access
        self.on_change: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._secrets: dict[str, Keys] = {}  # namespace/name
        self._tried = threading.Event()
        self._synced = False
        self._failure = ""
        self._closing = threading.Event()
        self._client: httpx.Client | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="kube-secrets", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        if (client := self._client) is not None:
            client.close()

    def ask(self, question: Question) -> Answer:
        self._tried.wait(FIRST_SECONDS)
        with self._lock:
            secrets, failure, synced = dict(self._secrets), self._failure, self._synced
        found = sorted(
            (name, key) for name, keys in secrets.items() for key in keys if matches(key, question.reference)
        )
        state = f" (out of date: {failure})" if failure else ""
        if not found:
            if not synced:
                return Answer(f"{self._access.server}: {failure or 'no answer yet'}", failed=True)
            text = f"none of {len(secrets)} {TYPE} secrets has a key for this image{state}"
            return Answer(text, failed=bool(failure))
        best = best_first(key for _, key in found)[0]
        names = [name for name, key in found if key == best]
        more = f", the first of {len(names)} by name" if len(names) > 1 else ""
        return Answer(f"secret {names[0]}, key {best}{more}{state}", secrets[names[0]][best])

    # ---- the thread

    def _run(self) -> None:
        pause, version = FIRST_PAUSE, ""
        while not self._closing.is_set():
            try:
                if self._client is None:
                    self._client = self._open()
                if not version:
                    version = self._list(self._client)
                began, quiet = time.monotonic(), True
                for seen in self._watch(self._client, version):
                    version, pause, quiet = seen, FIRST_PAUSE, False
                if quiet and time.monotonic() - began < SHORT_SECONDS:
                    # a proxy that knows no streams, or a server on its way down: not as often as they answer
                    self._closing.wait(pause * random.uniform(0.5, 1.0))
                    pause = min(pause * 2, MAX_PAUSE)
                else:
                    pause = FIRST_PAUSE
                continue
            except _Gone:
                log.debug("secrets: the watch fell behind: listing again")
                version = ""
                continue
            except (KeyError, TypeError, AttributeError) as error:
                self._fail(f"an answer is not of the API's form: {error!r}")
            except httpx.InvalidURL:  # its text may show a part of a proxy's password
                self._fail("the server of the cluster, or its proxy-url, is no address")
            except (httpx.HTTPError, AccessError, ssl.SSLError, OSError, ValueError, ImportError) as error:
                if self._closing.is_set():
                    return
                # an ImportError is of a SOCKS proxy
                self._fail(str(error) or type(error).__name__)
            except RuntimeError:  # the client was closed under it
                return
            self._reset()
            self._closing.wait(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, MAX_PAUSE)

    def _open(self) -> httpx.Client:
        https = self._access.server.startswith("https:")
        return httpx.Client(
            base_url=self._access.server,
            verify=self._access.tls() if https else False,
            proxy=self._access.proxy or None,
            trust_env=False,
            timeout=httpx.Timeout(30.0, connect=CONNECT_SECONDS),
        )

    def _reset(self) -> None:
        """The next try begins with a fresh connection, and with certificates as they are then."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _headers(self) -> dict[str, str]:
        value = self._access.authorization()
        return {"Accept": "application/json", **({"Authorization": value} if value else {})}

    def _list(self, client: httpx.Client) -> str:
        secrets: dict[str, Keys] = {}
        query = {"fieldSelector": f"type={TYPE}", "limit": str(PAGE)}
        while True:
            response = client.get("/api/v1/secrets", params=query, headers=self._headers())
            self._check(response)
            body = response.json()
            metadata = body["metadata"] if isinstance(body, dict) and isinstance(body.get("metadata"), dict) else None
            if metadata is None or not metadata.get("resourceVersion"):
                raise ValueError("the answer to a list is not a SecretList")
            for item in body.get("items") or []:
                name, keys = _read(item)
                if keys:
                    secrets[name] = keys
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        with self._lock:
            changed, self._secrets = self._secrets != secrets, secrets
            first, self._synced, self._failure = not self._synced, True, ""
        self._tried.set()
        if first:
            log.info("watching %d %s secrets of %s", len(secrets), TYPE, self._access.server)
        if changed:
            self.on_change()
        return str(metadata["resourceVersion"])

    def _watch(self, client: httpx.Client, version: str) -> Iterator[str]:
        """The resource version after each event, until the server ends the watch. Raises _Gone."""
        query = {
            "fieldSelector": f"type={TYPE}",
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        timeout = httpx.Timeout(WATCH_SECONDS + 30.0, connect=CONNECT_SECONDS)
        with client.stream("GET", "/api/v1/secrets", params=query, headers=self._headers(), timeout=timeout) as answer:
            self._check(answer)
            with self._lock:
                self._failure = ""
            for line in _lines(answer):
                event = json.loads(line)
                kind, thing = event["type"], event["object"]
                if kind == "ERROR":
                    if thing.get("code") == 410:
                        raise _Gone
                    raise ValueError(f"watch: {thing.get('message') or thing.get('code')}")
                if kind in ("ADDED", "MODIFIED", "DELETED"):
                    self._take(kind, thing)
                yield str(thing["metadata"]["resourceVersion"])

    def _take(self, kind: str, thing: Mapping[str, Any]) -> None:
        name, keys = _read(thing)
        with self._lock:
            before = self._secrets.get(name)
            if kind == "DELETED" or not keys:
                self._secrets.pop(name, None)
                keys = {}
            else:
                self._secrets[name] = keys
        if (before or {}) != keys:
            log.debug("secret %s: %s", name, kind.lower())
            self.on_change()

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == 410:
            raise _Gone
        if response.status_code == 401:
            self._access.refused()
            raise AccessError(f"401: {self._access.source} is not accepted")
        if response.status_code == 403:
            raise AccessError(
                f"403: {self._access.source} may not list and watch secrets (ClusterRole: secrets, list, watch)"
            )
        if response.status_code != 200:
            raise AccessError(f"status {response.status_code}")

    def _fail(self, reason: str) -> None:
        with self._lock:
            said, self._failure = self._failure, reason
        self._tried.set()
        if said != reason:
            log.warning("secrets of %s: %s", self._access.server, reason)


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Whole lines; `iter_lines` of httpx would split at characters inside of strings as well."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line for line in lines if line.strip())
        if len(rest) > MAX_LINE:
            raise ValueError("an event is too long")


def _read(item: Any) -> tuple[str, Keys]:
    """(namespace/name, credentials by key); nothing of a secret that is damaged, which is said once per change."""
    try:
        metadata = item["metadata"]
        name = f"{metadata['namespace']}/{metadata['name']}"
    except (KeyError, TypeError):
        raise ValueError("an item has no name") from None
    if item.get("type", TYPE) != TYPE:
        return name, {}
    try:
        auths = json.loads(base64.b64decode(item["data"][".dockerconfigjson"]))["auths"]
        return name, {str(key): found for key, entry in auths.items() if (found := _credentials(entry))}
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error, RecursionError):
        log.warning("secret %s: .dockerconfigjson is not a docker configuration: ignored", name)
        return name, {}


def _credentials(entry: Mapping[str, Any]) -> Credentials | None:
    if isinstance(auth := entry.get("auth"), str) and (found := decode_auth(auth)):
        return found
    user, password = entry.get("username"), entry.get("password")
    if isinstance(user, str) and isinstance(password, str) and user and password:
        return Credentials(user, password)
    token = entry.get("identitytoken")
    return Credentials("", "", token) if isinstance(token, str) and token else None
