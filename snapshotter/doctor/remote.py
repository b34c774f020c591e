"""Registries, mirrors and proxies: can they be reached, how long does it take, and are the credentials right?"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from nydusfs.config import RegistryBackend, load_config
from nydusfs.errors import AuthError, NydusError, RegistryError
from nydusfs.registry.client import RegistryClient
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.hosts import ClientOptions, route
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
    verify: bool = True
    ca_files: tuple[str, ...] = ()


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
            backends.append(template)
    except (NydusError, SnapshotterError, OSError):
        pass  # said by another check
    found: dict[tuple[str, str], _Server] = {}
    for backend in backends:
        connection = backend.connection
        verify, ca_files = not connection.skip_verify, connection.ca_cert_files
        for mirror in connection.mirrors:
            server = _Server("mirror", _base(mirror.host), tuple(mirror.headers.items()), verify, ca_files)
            found.setdefault((server.kind, server.url), server)
        if connection.proxy.url:
            server = _Server("proxy", _base(connection.proxy.url))
            found.setdefault((server.kind, server.url), server)
        if backend.host:
            options = ClientOptions(
                insecure=connection.skip_verify, plain_http=connection.scheme == "http", hosts_dir=backend.hosts_dir
            )
            try:
                way = route(backend.host, options)
            except NydusError:
                way = None
            ours = f"{connection.scheme}://{backend.host}"
            found.setdefault(("registry", ours), _Server("registry", ours, (), verify, ca_files))
            for endpoint in way.mirrors if way is not None else ():
                if endpoint.host != backend.host:
                    server = _Server(
                        "mirror", _base(endpoint.url), endpoint.headers, endpoint.verify, endpoint.ca_files
                    )
                    found.setdefault((server.kind, server.url), server)
    return list(found.values())


def _base(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"https://{url}")
    return f"{parts.scheme}://{parts.netloc}"


def _ask(server: _Server) -> tuple[float, str]:
    """Milliseconds until it answered anything, and what is wrong."""
    context: ssl.SSLContext | bool = server.verify
    if server.verify and server.ca_files:
        context = ssl.create_default_context()
        try:
            for path in server.ca_files:
                context.load_verify_locations(path)
        except (OSError, ssl.SSLError) as failure:
            return 0.0, f"CA file: {failure}"
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
            what = f"{server.kind} {server.url}"
            if problem and server.kind == "registry":
                node.unreachable.add(urlsplit(server.url).netloc)
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
    images = [image for image in _images(node, extra) if image.backend.host not in node.unreachable][:MAX_IMAGES]
    with ThreadPoolExecutor(4) as pool:
        for image, problem, refused in pool.map(_try, images):
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
    connection = image.backend.connection
    options = ClientOptions(
        insecure=connection.skip_verify,
        plain_http=connection.scheme == "http",
        connect_timeout=SECONDS,
        read_timeout=SECONDS,
        retries=1,
    )
    reference = Reference.parse(image.name)
    try:
        with RegistryClient(image.backend.host, options, lambda: image.credentials) as client:
            if client.manifest_digest(reference.repository, reference.digest or reference.tag) is None:
                return image, "it is not there any more", False
    except AuthError as failure:
        return image, str(failure), True
    except RegistryError as failure:
        return image, str(failure), False
    return image, "", False


CHECKS = (reachability, credentials)
