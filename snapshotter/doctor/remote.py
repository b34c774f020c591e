"""Registries, mirrors and proxies: can they be reached, how long does it take, and are the credentials right?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from nydusfs.config import RegistryBackend, load_config
from nydusfs.errors import AuthError, NydusError, RegistryError
from nydusfs.http import ConnectFailed
from nydusfs.http.connection import Tls, tls_context
from nydusfs.redact import public_url
from nydusfs.registry.client import RegistryClient
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.hosts import ClientOptions, Endpoint, route
from nydusfs.registry.reference import Reference
from snapshotter.doctor.finding import Finding, error, note, ok, warning
from snapshotter.errors import SnapshotterError
from snapshotter.node import Node
from snapshotter.nydusd_config import credentials_of, derive

SECONDS = 5.0
MAX_IMAGES = 20  # whose credentials are tried, one per repository
SLOW_MS = 1000.0


@dataclass(frozen=True)
class _Server:
    kind: str  # registry, mirror, proxy
    url: str  # scheme://host:port
    headers: tuple[tuple[str, str], ...] = ()
    tls: Tls = field(default_factory=Tls)


@dataclass
class _Image:
    name: str
    backend: RegistryBackend
    credentials: Credentials | None = field(repr=False)


def _images(node: Node, extra: tuple[str, ...]) -> list[_Image]:
    """Mounted images with the configuration that nydusd has of them, one per repository; then those asked for."""
    shared = {one.id: one.shared for one in node.daemons()}
    found: dict[str, _Image] = {}
    texts = []
    for one in node.instances():
        path = node.instance_config(one, shared.get(one.daemon, True))
        try:
            texts.append((one.image, path.read_text()))
        except OSError:
            continue
    for name in extra:
        text = derive(node.template, image=name, instance="0", cache_dir=Path("/"), credentials=None)
        texts.append((name, text))
    for name, text in texts:
        try:
            config = load_config(text, name)
            reference = Reference.parse(name)
            if isinstance(config.backend, RegistryBackend):
                found.setdefault(reference.name, _Image(name, config.backend, credentials_of(text)))
        except (NydusError, ValueError):
            continue
    return list(found.values())


def _servers(node: Node, images: list[_Image]) -> list[_Server]:
    backends = [image.backend for image in images]
    try:
        template = load_config(Path(node.template.path).read_text(), "template", template=True).backend
        if isinstance(template, RegistryBackend):
            backends.append(replace(template, host=""))  # each image's own takes its place
    except (NydusError, SnapshotterError, OSError):
        pass  # said by another check
    found: dict[tuple[str, str], _Server] = {}
    for backend in backends:
        connection = backend.connection
        tls = Tls(connection.ca_cert_files, connection.skip_verify)
        servers = [
            _Server("mirror", _base(mirror.host), tuple(mirror.headers.items()), tls) for mirror in connection.mirrors
        ]
        if connection.proxy.url:
            servers.append(_Server("proxy", _base(connection.proxy.url)))
        if backend.host:
            itself, listed = _listed(backend)
            tls = Tls((*connection.ca_cert_files, *itself.ca_files), not itself.verify, itself.client)
            servers.append(_Server("registry", _base(itself.url), itself.headers, tls))
            servers += [
                _Server("mirror", _base(one.url), one.headers, Tls(one.ca_files, not one.verify, one.client))
                for one in listed
            ]
        for server in servers:
            found.setdefault((server.kind, server.url), server)
    return list(found.values())


def _options(backend: RegistryBackend) -> ClientOptions:
    connection = backend.connection
    return ClientOptions(
        insecure=connection.skip_verify,
        plain_http=connection.scheme == "http",
        hosts_dir=backend.hosts_dir,
        ca_files=connection.ca_cert_files,
        connect_timeout=SECONDS,
        read_timeout=SECONDS,
        retries=1,
    )


def _listed(backend: RegistryBackend) -> tuple[Endpoint, list[Endpoint]]:
    """Who is asked for the registry, and the mirrors of hosts.toml."""
    url = f"{backend.connection.scheme}://{backend.host}"
    try:
        found = route(backend.host, _options(backend))
    except NydusError:
        return Endpoint(url, verify=not backend.connection.skip_verify), []
    return found.origin(url), found.mirrors


def _base(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"https://{url}")
    return f"{parts.scheme}://{parts.netloc}"


def _ask(server: _Server) -> tuple[float, str]:
    """Milliseconds until it answered anything, and what is wrong."""
    try:
        context = tls_context(server.tls)
    except ConnectFailed as failure:
        return 0.0, str(failure)
    try:
        with httpx.Client(verify=context, timeout=SECONDS, trust_env=False) as client:
            began = time.monotonic()
            client.get(f"{server.url}/v2/", headers=dict(server.headers))
            return 1000 * (time.monotonic() - began), ""
    except (httpx.HTTPError, httpx.InvalidURL) as failure:
        return 0.0, str(failure) or type(failure).__name__


def reachability(node: Node, extra: tuple[str, ...] = ()) -> Iterator[Finding]:
    node.need()
    servers = _servers(node, _images(node, extra))
    if not servers:
        yield note(
            "registry.reach", "no mirror is configured and no image mounted: name one with --image to try its registry"
        )
        return
    with ThreadPoolExecutor(8) as pool:
        for server, (took, problem) in zip(servers, pool.map(_ask, servers), strict=True):
            what = f"{server.kind} {public_url(server.url)}"
            if problem and server.kind == "registry":
                node.unreachable.add(server.url)
                yield error(
                    "registry.reach",
                    f"{what} cannot be reached: {problem}",
                    "network, name, scheme and port; its own state",
                )
            elif problem:
                yield warning(
                    f"{server.kind}.reach",
                    f"{what} cannot be reached: {problem}; reads go on from the next source",
                    f"start the {server.kind}, or take it out of the configuration",
                )
            elif took > SLOW_MS:
                yield warning(
                    f"{server.kind}.slow",
                    f"{what} answers after {took:.0f} ms",
                    "another mirror, or its load and network",
                )
            else:
                yield ok(f"{server.kind}.reach", f"{what} answers within {took:.0f} ms")


def credentials(node: Node, extra: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Each mounted image's manifest is asked for with what its nydusd has been given."""
    node.need()
    images = [one for one in _images(node, extra) if _base(_listed(one.backend)[0].url) not in node.unreachable]
    with ThreadPoolExecutor(4) as pool:
        for image, problem, refused in pool.map(_try, images[:MAX_IMAGES]):
            if refused:
                yield error(
                    "registry.credentials",
                    f"the registry refuses what nydusd has for {image.name}: {problem}",
                    f"nydusctl auth explain {image.name} says where it comes from",
                )
            elif problem:
                yield warning("registry.image", f"{image.name}: {problem}", "the image may be gone from the registry")
            else:
                how = "with credentials" if image.credentials else "without credentials"
                yield ok("registry.credentials", f"{image.name} can be read {how}")


def _try(image: _Image) -> tuple[_Image, str, bool]:
    reference = Reference.parse(image.name)
    try:
        with RegistryClient(image.backend.host, _options(image.backend), lambda: image.credentials) as client:
            if client.manifest_digest(reference.repository, reference.digest or reference.tag) is None:
                return image, "it is not there any more", False
    except AuthError as failure:
        return image, str(failure), True
    except RegistryError as failure:
        return image, str(failure), False
    return image, "", False


CHECKS = (reachability, credentials)
