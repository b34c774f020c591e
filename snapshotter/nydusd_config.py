"""The nydusd configuration of one image: the operator's template plus what only the image knows (snapshotter.md 4.6).

The template is version 1 JSON. Keys this program does not know pass through unchanged (upstream drops them, and with
them `mirrors`).

The blob cache is the snapshotter's (`--cache-dir`, `cache_manager.cache_dir`, else `<root>/cache`): it replaces the
template's `work_dir` as in upstream, also for a template of `--config-path`. Two snapshotters on one machine then never
share a cache by accident, and everything an instance keeps lies below its root.
"""

from __future__ import annotations

import copy
import ipaddress
import json
import logging
import os
import socket
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nydusfs.config import FsDriver, load_config
from nydusfs.errors import NydusError
from nydusfs.registry.credentials import Credentials, decode_auth
from nydusfs.registry.reference import DOCKER_HUB, Reference
from snapshotter.directories import make_private
from snapshotter.errors import InvalidArgument, SettingsError
from snapshotter.settings import Settings

log = logging.getLogger(__name__)

HUB_API = "index.docker.io"
PROBE_SECONDS = 1.0
MAX_TEMPLATE = 1 << 20
# Registries whose addresses are the node's alone; the rest of the backends carry their own address in the template.
_ONLY_ID_AND_CACHE = ("localfs", "localdisk", "oss", "s3", "http-proxy")


@dataclass(frozen=True)
class Template:
    """A checked template: `device.backend.type` is known, every known key has the right type."""

    path: Path
    document: Mapping[str, Any]

    @property
    def work_dir(self) -> Path | None:
        cache = self.document["device"].get("cache") or {}
        value = (cache.get("config") or {}).get("work_dir")
        return Path(value) if value else None

    @property
    def fs_driver(self) -> FsDriver:
        return self.named_driver or "auto"

    @property
    def named_driver(self) -> FsDriver | None:
        """What the file says itself."""
        value: FsDriver | None = self.document.get("fs_driver") or None
        return value

    def with_hosts_dir(self, folder: str) -> Template:
        """`remote.mirrors_config.dir`: hosts.toml files for registries, unless the template names a folder."""
        document = copy.deepcopy(dict(self.document))
        backend = document["device"]["backend"]
        if backend.get("type") == "registry":
            backend["config"] = {"hosts_dir": folder, **(backend.get("config") or {})}
        return Template(self.path, document)

    @property
    def registry(self) -> Mapping[str, Any]:
        """Settings of the registry backend; empty for another backend."""
        backend = self.document["device"]["backend"]
        return (backend.get("config") or {}) if backend.get("type") == "registry" else {}


NO_TEMPLATE = Template(Path("/dev/null"), {"device": {"backend": {"type": "registry", "config": {}}}})


def template_of(settings: Settings) -> Template:
    """The one that the settings name, with what they say of registries. Raises SettingsError."""
    # with the proxy driver no image is read here, and nobody writes such a file
    unread = settings.proxy and not settings.template.exists()
    template = NO_TEMPLATE if unread else load_template(settings.template)
    return template.with_hosts_dir(settings.hosts_dir) if settings.hosts_dir else template


def load_template(path: Path) -> Template:
    """Raises SettingsError naming the file and key. Unknown keys are warnings."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEMPLATE + 1).decode()
        if len(text) > MAX_TEMPLATE:
            raise SettingsError(f"{path}: is larger than {MAX_TEMPLATE} bytes")
        document = json.loads(text)
        if not isinstance(document, dict):
            raise SettingsError(f"{path}: expected a JSON object")
        if "device" not in document:
            import difflib

            nearest = difflib.get_close_matches("device", [str(key) for key in document], 1, 0.6)
            hint = f' (there is "{nearest[0]}")' if nearest else ""
            raise SettingsError(
                f'{path}: key "device" is missing{hint}: a nydusd template for the snapshotter is version 1 JSON '
                '({"device": {"backend": ..., "cache": ...}, "mode": "direct", ...})'
            )
        load_config(text, str(path), template=True)
    except OSError as error:
        raise SettingsError(f"{path}: the nydusd configuration cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: is not valid JSON: {error}") from None
    except NydusError as error:
        raise SettingsError(str(error)) from None
    return Template(path, document)


def derive(
    template: Template,
    *,
    image: str,
    instance: str,
    cache_dir: Path,
    credentials: Credentials | None,
    mapping: Sequence[int] | None = None,
) -> str:
    """JSON text for one image. It may hold a registry password: keep it out of logs.

    `instance` is the mount's id (without slash). `credentials` replace whatever the template has. `mapping`:
    container id, host id and length of a user namespace. Raises InvalidArgument for an image reference that is none.
    """
    document: dict[str, Any] = copy.deepcopy(dict(template.document))
    device = document["device"]
    device["id"] = f"/{instance}"  # the slash matters: metrics are asked for by it
    cache = device.setdefault("cache", {"type": "blobcache"})
    cache["config"] = {**(cache.get("config") or {}), "work_dir": str(cache_dir)}
    backend = device["backend"]
    if backend.get("type") == "registry":
        backend["config"] = _registry(dict(template.registry), image, credentials)
    elif backend.get("type") not in _ONLY_ID_AND_CACHE:
        raise InvalidArgument(f"{template.path}: unknown backend type {backend.get('type')!r}")
    document.setdefault("mode", "direct")
    document["fs_driver"] = template.fs_driver  # nydusd's own default is fuse, as upstream's, which ignores this key
    if mapping is not None:
        document["id_mapping"] = list(mapping)
    return json.dumps(document)


def credentials_of(config: str) -> Credentials | None:
    """What `derive` wrote. Raises ValueError for text that is not its."""
    try:
        backend = json.loads(config)["device"]["backend"].get("config") or {}
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not a configuration") from None
    if auth := backend.get("auth"):
        return decode_auth(auth)
    token = backend.get("registry_token")
    return Credentials(registry_token=token) if token else None


def _registry(config: dict[str, Any], image: str, credentials: Credentials | None) -> dict[str, Any]:
    try:
        reference = Reference.parse(image)
    except NydusError as error:
        raise InvalidArgument(f"the image's own label names no image: {error}") from None
    host = HUB_API if reference.host == DOCKER_HUB else reference.host
    config["host"], config["repo"] = host, reference.repository
    # Upstream's snapshotter writes this key even when it is empty, and so switches the default of `fallback`: scripts
    # that read nydusd's "backend config" line expect `fallback: false`.
    config.setdefault("proxy", {"fallback": False})
    if config.get("scheme") in (None, "", "https") and (scheme := loopback_scheme(host)):
        if config.get("scheme") == "https" and scheme != "https":
            log.info("registry %s on this machine speaks plain HTTP: scheme https of the template is not used", host)
        config["scheme"] = scheme
    config.pop("auth", None)
    config.pop("registry_token", None)
    if credentials is not None and credentials.registry_token:
        config["registry_token"] = credentials.registry_token
    elif credentials is not None:
        config["auth"] = credentials.basic
    return config


def loopback_scheme(host: str) -> str:
    """`http` or `https`, as a registry on this machine really speaks; "" for other hosts and when nobody answers.

    nerdctl and docker take plain HTTP for loopback registries without being told, nydusd follows its configuration:
    one image name then works for pulling and fails for reading. A probe settles it, and only for addresses that never
    leave the machine: elsewhere a silent step down from TLS would be an attack's work.
    """
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
    name = name.strip("[]")
    try:
        local = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if not local:
        return ""
    if _speaks_tls(name, int(port or 443)):
        return "https"
    return "http" if _speaks_http(name, int(port or 80)) else ""


def _speaks_tls(name: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only the protocol is asked for
    try:
        with (
            socket.create_connection((name, port), PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            return True
    except ssl.SSLError as error:
        # Any TLS alert (client certificate wanted, ...) is TLS as well.
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _speaks_http(name: str, port: int) -> bool:
    try:
        with socket.create_connection((name, port), PROBE_SECONDS) as plain:
            plain.sendall(f"HEAD /v2/ HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
            return plain.recv(5) == b"HTTP/"
    except OSError:
        return False


def write_private(path: Path, text: str) -> None:
    """A file only root can read, complete or not there."""
    make_private(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
