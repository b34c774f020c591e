"""Where requests for a registry go: scheme, TLS settings and containerd's `certs.d` folders.

`<folder>/<host[:port]>/hosts.toml` (or `host_port_`, or `_default`) may name hosts to pull from first, with
`capabilities`, `skip_verify` and `ca`, and a `server` to ask in place of the registry. Without one, plain HTTP is used
for the machine's own addresses and where it was asked for, HTTPS for everything else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from nydusfs.config.backends import bad_header
from nydusfs.errors import ConfigError
from nydusfs.redact import public_url
from nydusfs.registry.reference import DOCKER_HUB, DOCKER_HUB_ENDPOINT, DOCKER_HUB_HOSTS, is_loopback

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One base address (`https://host:port`, maybe with a path) and how to talk to it. `client`: certificate and key
    files ("": key in the same file) to show; `override_path`: the path stands for `/v2`; `query`: says which registry
    is meant to a machine that is another."""

    url: str
    verify: bool = True
    ca_files: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    override_path: bool = False
    query: str = ""
    can_pull: bool = True
    can_push: bool = True

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def address(self, path: str) -> str:
        """`path` starts with /v2/."""
        bare = self.url + (path.removeprefix("/v2") if self.override_path else path)
        return f"{bare}{'&' if '?' in path else '?'}{self.query}" if self.query else bare


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How to reach one registry; plain data, so that worker processes can be given it. Holds no secrets.

    insecure: do not verify certificates, and use plain HTTP if the server does not speak TLS.
    plain_http: plain HTTP only.
    ca_files: authorities besides the system's, for a registry without a folder in `hosts_dir`.
    """

    insecure: bool = False
    plain_http: bool = False
    hosts_dir: str = ""
    ca_files: tuple[str, ...] = ()
    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    retries: int = 3
    retry_delay: float = 0.5


@dataclass(frozen=True, slots=True)
class Route:
    """`mirrors` are tried in order for pulls, then the server. `server` lists its possible addresses: the first that
    talks our protocol is taken."""

    server: list[Endpoint]
    mirrors: list[Endpoint] = field(default_factory=list)

    def origin(self, url: str) -> Endpoint:
        """The server, for who knows that the registry itself would be asked at `url`."""
        return next((one for one in self.server if one.url == url), self.server[0])


def route(endpoint: str, options: ClientOptions) -> Route:
    """Addresses for host[:port] of an image. Raises ConfigError for a hosts.toml that cannot be used."""
    folder = _folder(endpoint, options.hosts_dir)
    endpoint = DOCKER_HUB_ENDPOINT if endpoint == DOCKER_HUB else endpoint
    if folder is not None and (folder / "hosts.toml").exists():
        return _from_hosts_toml(endpoint, folder / "hosts.toml", options)
    return Route(_candidates(endpoint, options, *(_docker_files(folder) if folder is not None else ((), ()))))


def _docker_files(folder: Path) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Docker's form of the folder: `*.crt` are authorities, `NAME.cert` with `NAME.key` is what the client shows."""
    authorities = tuple(str(path) for path in sorted(folder.glob("*.crt")))
    pairs = tuple((str(path), str(path.with_suffix(".key"))) for path in sorted(folder.glob("*.cert")))
    return authorities, pairs


def _candidates(
    endpoint: str,
    options: ClientOptions,
    authorities: tuple[str, ...] = (),
    client: tuple[tuple[str, str], ...] = (),
) -> list[Endpoint]:
    authorities += options.ca_files
    https = Endpoint(f"https://{endpoint}", verify=not options.insecure, ca_files=authorities, client=client)
    http = Endpoint(f"http://{endpoint}")
    if options.plain_http and endpoint not in DOCKER_HUB_HOSTS:  # a flag for private registries
        return [http]
    if is_loopback(endpoint):
        return [https, http] if authorities or client else [http, https]
    return [https, http] if options.insecure else [https]


def _folder(endpoint: str, hosts_dir: str) -> Path | None:
    if not hosts_dir:
        return None
    host, colon, port = endpoint.rpartition(":")
    whole = DOCKER_HUB if endpoint in DOCKER_HUB_HOSTS else endpoint
    for name in [f"{host}_{port}_" if colon else whole, whole, "_default"]:
        folder = Path(hosts_dir) / name
        if folder.is_dir():
            return folder
    return None


def _from_hosts_toml(endpoint: str, path: Path, options: ClientOptions) -> Route:
    import tomllib  # 4 ms that a start without such a file does without

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("", f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("", f"{path} is not TOML: {error}") from error
    server = document.get("server", "")
    if not isinstance(server, str):
        raise ConfigError("server", "must be a string", str(path))
    mirrors: list[Endpoint] = []
    hosts = document.get("host", {})
    if not isinstance(hosts, dict):
        raise ConfigError("host", "must be a table", str(path))
    for url, entry in hosts.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"host.{public_url(url)}", "must be a table", str(path))
        mirrors.append(_endpoint(url, entry, path, options, endpoint))
    named = _endpoint(server or endpoint, document, path, options, endpoint)
    servers = [named]
    if not server:
        found = _candidates(endpoint, options, named.ca_files, named.client)
        servers = [replace(one, verify=one.verify and named.verify, headers=named.headers) for one in found]
    # an entry for the server's own address carries its settings
    addresses = {one.url for one in servers}
    own = [mirror for mirror in mirrors if mirror.url.removesuffix("/v2") in addresses]
    return Route(own[:1] or servers, [mirror for mirror in mirrors if mirror not in own and mirror.can_pull])


def _endpoint(url: str, entry: dict[str, Any], path: Path, options: ClientOptions, registry: str) -> Endpoint:
    text = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("host", f"{public_url(url)!r} is not an http or https address", str(path))
    capabilities = entry.get("capabilities", ["pull", "resolve", "push"])
    certificates = entry.get("ca", [])
    certificates = [certificates] if isinstance(certificates, str) else certificates
    headers = entry.get("header", {})
    if not isinstance(capabilities, list) or not isinstance(certificates, list) or not isinstance(headers, dict):
        raise ConfigError(f"host.{public_url(url)}", "capabilities, ca and header have the wrong type", str(path))
    override = entry.get("override_path") is True
    pairs: list[tuple[str, str]] = []
    for name, value in headers.items():
        pairs += [(str(name), str(one)) for one in (value if isinstance(value, list) else [value])]
    for name, one in pairs:
        if reason := bad_header(name, one):
            raise ConfigError(f"host.{public_url(url)}.header.{ascii(name)[1:-1]}", reason, str(path))
    host = parts.netloc.rpartition("@")[2].lower()
    if host == DOCKER_HUB:  # as containerd's own examples have it, though nobody answers there
        host, text = DOCKER_HUB_ENDPOINT, urlunsplit(parts._replace(netloc=DOCKER_HUB_ENDPOINT))
    hub = registry in DOCKER_HUB_HOSTS
    itself = host == registry.lower() or (hub and host in DOCKER_HUB_HOSTS)
    return Endpoint(
        text.rstrip("/") if override else text.rstrip("/").removesuffix("/v2"),
        verify=not (entry.get("skip_verify") is True or options.insecure),
        ca_files=tuple(str(path.parent / str(name)) for name in certificates),
        client=_client_pairs(entry.get("client"), url, path),
        override_path=override,
        headers=tuple(pairs),
        query="" if itself else f"ns={quote(DOCKER_HUB if hub else registry, safe='')}",
        can_pull="pull" in capabilities,
        can_push="push" in capabilities,
    )


def _client_pairs(value: object, url: str, path: Path) -> tuple[tuple[str, str], ...]:
    """`client` of hosts.toml: a file, a list of files, or a list of [certificate, key]."""
    found: list[tuple[str, str]] = []
    for one in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
        names = [one] if isinstance(one, str) else one
        if not isinstance(names, list) or not 1 <= len(names) <= 2 or not all(isinstance(name, str) for name in names):
            key = f"host.{public_url(url)}.client"
            raise ConfigError(key, "want a file, or pairs of certificate and key files", str(path))
        files = [str(path.parent / name) if name else "" for name in names]
        found.append((files[0], files[1] if len(files) == 2 else ""))
    return tuple(found)
