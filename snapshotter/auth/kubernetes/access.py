"""How to reach an API server: from a kubeconfig, or as a pod. Key material never touches the disk."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshotter.auth.documents import load
from snapshotter.errors import SettingsError

log = logging.getLogger(__name__)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_SECONDS = 60.0  # a projected token is replaced by kubelet well before it ends
EXEC_SECONDS = 60.0
_EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class AccessError(Exception):
    """The credentials for the API server cannot be had now."""


@dataclass(frozen=True, slots=True)
class Access:
    """`authorization` is called before each request (it may renew); "" for none. `tls` is called for each connection
    pool. `proxy`: URL or ""."""

    server: str
    source: str
    tls: Callable[[], ssl.SSLContext] = field(repr=False)
    authorization: Callable[[], str] = field(repr=False)
    refused: Callable[[], None] = field(default=lambda: None, repr=False)
    proxy: str = ""


def find(kubeconfig: str) -> Access:
    """From the configured file, else $KUBECONFIG, else ~/.kube/config, else the pod's service account.

    Raises SettingsError for a configured file that cannot be used.
    """
    if kubeconfig:
        return from_kubeconfig([Path(kubeconfig)])
    if named := os.environ.get("KUBECONFIG"):
        return from_kubeconfig([Path(one) for one in named.split(os.pathsep) if one])
    home = Path(os.path.expanduser("~")) / ".kube" / "config"
    return from_kubeconfig([home]) if home.exists() else in_cluster()


def in_cluster(folder: Path = SERVICE_ACCOUNT) -> Access:
    """Raises SettingsError outside of a pod."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (folder / "token").exists():
        raise SettingsError(
            "enable_kubeconfig_keychain: no cluster to be found: neither kubeconfig_path, $KUBECONFIG, ~/.kube/config "
            f"nor a service account in {folder}"
        )
    address = f"[{host}]" if ":" in host else host

    def tls() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(folder / "ca.crt"))

    return Access(f"https://{address}:{port}", f"service account {folder}", tls, _token_file(folder / "token"))


def from_kubeconfig(paths: list[Path]) -> Access:
    """The current context. Of several files the first that names something wins, as in kubectl.

    Raises SettingsError.
    """
    documents = [(path, load(path, "kubeconfig")) for path in paths if path.exists() or len(paths) == 1]
    where = ", ".join(str(path) for path in paths)
    chosen = next((doc["current-context"] for _, doc in documents if doc.get("current-context")), None)
    if not chosen:
        raise SettingsError(f"kubeconfig {where}: has no current-context")
    context, _ = _named(documents, "contexts", "context", chosen, where)
    cluster, at = _named(documents, "clusters", "cluster", str(context.get("cluster", "")), where)
    user: Mapping[str, Any] = {}
    user_at = at
    if context.get("user"):
        user, user_at = _named(documents, "users", "user", str(context["user"]), where)
    server = str(cluster.get("server") or "")
    if not server.startswith(("https://", "http://")):
        raise SettingsError(f"kubeconfig {where}: cluster {context.get('cluster')}: server {server!r} is no address")
    exec_plugin = _Exec(user["exec"], server, user_at) if isinstance(user.get("exec"), dict) else None

    def tls() -> ssl.SSLContext:
        return _tls(cluster, at, user, user_at, exec_plugin)

    if server.startswith("https://"):
        try:
            tls() if exec_plugin is None else None  # what is wrong in the file is said at the start
        except (OSError, ssl.SSLError, ValueError, AccessError) as error:
            raise SettingsError(f"kubeconfig {where}: certificates cannot be used: {error}") from None
    return Access(
        server.rstrip("/"),
        f"kubeconfig {where}, context {chosen}",
        tls,
        _authorization(user, user_at, exec_plugin),
        exec_plugin.forget if exec_plugin else lambda: None,
        str(cluster.get("proxy-url") or ""),
    )


def _named(
    documents: list[tuple[Path, dict[str, Any]]], group: str, kind: str, name: str, where: str
) -> tuple[Mapping[str, Any], Path]:
    for path, document in documents:
        for entry in document.get(group) or []:
            if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(kind), dict):
                return entry[kind], path.parent
    raise SettingsError(f"kubeconfig {where}: {group} holds no {name!r}")


def _authorization(user: Mapping[str, Any], at: Path, plugin: _Exec | None) -> Callable[[], str]:
    if user.get("tokenFile"):
        return _token_file(at / str(user["tokenFile"]))
    if user.get("token"):
        return lambda: f"Bearer {user['token']}"
    if user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}"
        return lambda: f"Basic {base64.b64encode(pair.encode()).decode()}"
    if plugin is not None:
        return lambda: f"Bearer {token}" if (token := plugin.status().get("token")) else ""
    if user.get("auth-provider"):
        log.warning("kubeconfig: auth-provider was removed from Kubernetes and is not used: use an exec plugin")
    return lambda: ""


def _token_file(path: Path) -> Callable[[], str]:
    read_at, header = float("-inf"), ""

    def read() -> str:
        nonlocal read_at, header
        if time.monotonic() - read_at > TOKEN_SECONDS:
            try:
                header = f"Bearer {path.read_text().strip()}"
            except OSError as error:
                raise AccessError(f"token {path}: {error.strerror}") from None
            read_at = time.monotonic()
        return header

    return read


def _tls(
    cluster: Mapping[str, Any], at: Path, user: Mapping[str, Any], user_at: Path, plugin: _Exec | None
) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif cluster.get("certificate-authority-data") or cluster.get("certificate-authority"):
        context = ssl.create_default_context(cadata=_material(cluster, "certificate-authority", at).decode())
    certificate = _material(user, "client-certificate", user_at)
    key = _material(user, "client-key", user_at)
    if not certificate and plugin is not None:
        status = plugin.status()
        certificate = str(status.get("clientCertificateData") or "").encode()
        key = str(status.get("clientKeyData") or "").encode()
    if certificate:
        with_descriptor = os.memfd_create("kube-client", os.MFD_CLOEXEC)
        try:
            os.write(with_descriptor, certificate + b"\n" + key)
            context.load_cert_chain(f"/proc/self/fd/{with_descriptor}")
        finally:
            os.close(with_descriptor)
    return context


def _material(entry: Mapping[str, Any], name: str, at: Path) -> bytes:
    """`NAME-data` in base64, else the file NAME, relative to the kubeconfig. Raises OSError, ValueError."""
    if data := entry.get(f"{name}-data"):
        try:
            return base64.b64decode(str(data), validate=True)
        except binascii.Error:
            raise ValueError(f"{name}-data is not base64") from None
    return (at / str(entry[name])).read_bytes() if entry.get(name) else b""


class _Exec:
    """A client-go credential plugin (`exec` of a user)."""

    def __init__(self, entry: Mapping[str, Any], server: str, at: Path) -> None:
        self._entry, self._server, self._at = entry, server, at
        self._status: dict[str, Any] = {}
        self._ends_at = float("-inf")  # seconds since the epoch
        if entry.get("apiVersion") not in _EXEC_VERSIONS:
            raise SettingsError(f"kubeconfig: exec.apiVersion {entry.get('apiVersion')!r}: use {_EXEC_VERSIONS[0]}")

    def forget(self) -> None:
        self._ends_at = float("-inf")

    def status(self) -> dict[str, Any]:
        """Raises AccessError."""
        if time.time() < self._ends_at - 10:
            return self._status
        entry = self._entry
        command = str(entry.get("command", ""))
        if "/" in command:
            command = str(self._at / command)
        info = {"apiVersion": entry["apiVersion"], "kind": "ExecCredential", "spec": {"interactive": False}}
        env = {str(one.get("name")): str(one.get("value")) for one in entry.get("env") or []}
        try:
            done = subprocess.run(
                [command, *map(str, entry.get("args") or [])],
                env={**os.environ, **env, "KUBERNETES_EXEC_INFO": json.dumps(info)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=EXEC_SECONDS,
                check=False,
            )
            if done.returncode:
                raise AccessError(f"{command}: exit status {done.returncode}")
            status = json.loads(done.stdout)["status"]
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AccessError(f"{command}: {getattr(error, 'strerror', None) or 'no answer'}") from None
        except (ValueError, RecursionError, KeyError, TypeError):
            raise AccessError(f"{command}: its answer is not an ExecCredential") from None
        if not isinstance(status, dict):
            raise AccessError(f"{command}: its answer has no status")
        self._status = status
        self._ends_at = _timestamp(status.get("expirationTimestamp"))
        return status


def _timestamp(text: object) -> float:
    """RFC 3339; without one a plugin's answer holds as long as the process."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(str(text)).timestamp() if text else float("inf")
    except ValueError:
        return time.time() + TOKEN_SECONDS
