"""The backend's table of a configuration: where blobs come from, and how to talk to it (reference 1.3)."""

from __future__ import annotations

import base64
import binascii
import os
from urllib.parse import urlsplit

from nydusfs.config.model import (
    MIB,
    BackendConfig,
    ConnectionConfig,
    DiskBlob,
    HttpProxyBackend,
    LocalDiskBackend,
    LocalFsBackend,
    MirrorConfig,
    ObjectBackend,
    ProxyConfig,
    RegistryBackend,
)
from nydusfs.config.section import Section
from nydusfs.redact import public_url

KINDS = ("registry", "localfs", "oss", "s3", "localdisk", "http-proxy")
_MIN_PART = 5 * MIB  # the smallest part S3 takes
_MAX_PART = 5 << 30


def parse_backend(parent: Section, kind: str, options: Section, template: bool) -> BackendConfig:
    """`options` is the backend's own table; errors about `kind` name the parent's `type`. Raises `ConfigError`."""
    backend: BackendConfig
    if kind == "registry":
        backend = _registry(options, template)
    elif kind == "localfs":
        backend = LocalFsBackend(options.text("blob_file"), options.text("dir"), options.texts("alt_dirs"))
        options.known("readahead", "readahead_sec")
        if not backend.blob_file and not backend.dir and not template:
            raise options.error("dir", "is missing: localfs needs blob_file or dir")
    elif kind == "localdisk":
        backend = _local_disk(options, template)
    elif kind == "http-proxy":
        backend = _http_proxy(options, template)
    elif kind in ("oss", "s3"):
        backend = _objects(options, kind, template)
    else:
        raise parent.error("type", f"{kind!r} is not a backend type, expected one of {', '.join(KINDS)}")
    options.warn_unknown()
    return backend


def _registry(options: Section, template: bool) -> RegistryBackend:
    backend = RegistryBackend(
        host=options.text("host"),
        repo=options.text("repo"),
        auth=options.text("auth"),
        registry_token=options.text("registry_token"),
        blob_url_scheme=options.text("blob_url_scheme"),
        blob_redirected_host=options.text("blob_redirected_host"),
        hosts_dir=options.text("hosts_dir", RegistryBackend().hosts_dir),
        connection=_connection(options),
    )
    if not template:
        for key in ("host", "repo"):
            if not getattr(backend, key):
                raise options.error(key, "is missing: a registry needs its host and repository")
    if backend.auth and (reason := bad_auth(backend.auth)):
        raise options.error("auth", reason)
    if not all("!" <= char <= "~" for char in backend.registry_token):
        raise options.error("registry_token", "holds blanks, line breaks or letters that no token has")
    return backend


def _local_disk(options: Section, template: bool) -> LocalDiskBackend:
    table = options.section("blobs")
    blobs: dict[str, DiskBlob] = {}
    for blob_id in table.values() if table else ():
        assert table is not None
        place = table.section(blob_id)
        if place is None:
            raise table.error(blob_id, "expected a table with offset and size")
        limit = (1 << 63) - 1
        blobs[blob_id] = DiskBlob(place.number("offset", 0, high=limit), place.number("size", 0, high=limit))
        place.warn_unknown()
        if not blobs[blob_id].size:
            raise place.error("size", "is missing or 0")
    backend = LocalDiskBackend(options.text("device_path"), options.flag("disable_gpt"), blobs)
    if not backend.device_path and not template:
        raise options.error("device_path", "is missing: localdisk needs a block device or disk image")
    if blobs and not backend.disable_gpt:
        raise options.error("blobs", "needs disable_gpt: the partition table says where blobs are")
    return backend


def _http_proxy(options: Section, template: bool) -> HttpProxyBackend:
    backend = HttpProxyBackend(options.text("addr"), options.text("path"), _connection(options))
    addr = backend.addr
    if addr.startswith(("http://", "https://")):
        _check_url(options, "addr", addr)
    elif not template and not (os.path.isabs(addr) and os.path.exists(addr)):
        shown = public_url(addr)
        raise options.error("addr", f"{shown!r} is neither an http(s) URL nor the absolute path of a unix socket")
    return backend


def _objects(options: Section, kind: str, template: bool) -> ObjectBackend:
    endpoint = options.text("endpoint").rstrip("/")
    scheme, mark, host = endpoint.partition("://")
    if mark:  # nydusify's OSS library takes a URL here
        endpoint = host
    backend = ObjectBackend(
        type=kind,
        endpoint=endpoint or ("s3.amazonaws.com" if kind == "s3" else ""),
        bucket_name=options.text("bucket_name"),
        region=options.text("region"),
        access_key_id=options.text("access_key_id"),
        access_key_secret=options.text("access_key_secret"),
        session_token=options.text("session_token"),
        credentials_file=options.text("credentials_file"),
        object_prefix=options.text("object_prefix"),
        part_size=options.number("part_size", 64 * MIB, low=_MIN_PART, high=_MAX_PART),
        upload_threads=options.number("num_upload_threads", 5, low=1, high=64),
        connection=_connection(options, scheme if mark else ""),
    )
    for key in ("bucket_name", "region" if kind == "s3" else "endpoint"):
        if not getattr(backend, key) and not template:
            raise options.error(key, f"is missing: {kind} needs it")
    for key in ("region", "access_key_id", "access_key_secret", "session_token"):
        if reason := bad_header(key, getattr(backend, key)):
            raise options.error(key, reason)
    if bool(backend.access_key_id) != bool(backend.access_key_secret):
        missing = "access_key_secret" if backend.access_key_id else "access_key_id"
        raise options.error(missing, "is missing: the two keys belong together")
    return backend


def bad_auth(auth: str) -> str:
    """What is wrong with the base64 of user:password, "" for nothing."""
    try:
        decoded = base64.b64decode(auth, validate=True)
    except (binascii.Error, ValueError):
        return "is not base64 of user:password"
    return "" if b":" in decoded else "has no colon between user and password"


def _connection(options: Section, scheme: str = "") -> ConnectionConfig:
    """`scheme`: what another key said already; the key `scheme` counts more."""
    scheme = options.text("scheme", scheme or "https")
    if scheme not in ("", "http", "https"):
        raise options.error("scheme", f"{scheme!r} is not a scheme, expected 'http' or 'https'")
    proxy = _proxy(options.section("proxy"))
    mirrors = tuple(mirror for mirror in map(_mirror, options.sections("mirrors")) if mirror is not None)
    if proxy.url and mirrors:
        raise options.error("proxy", "connection: proxy and mirrors cannot be configured at the same time.")
    return ConnectionConfig(
        scheme=scheme or "https",
        skip_verify=options.flag("skip_verify"),
        ca_cert_files=options.texts("ca_cert_files"),
        timeout=options.number("timeout", 5),
        connect_timeout=options.number("connect_timeout", 5),
        retry_limit=options.number("retry_limit", 0, high=255),
        proxy=proxy,
        mirrors=mirrors,
        origin_rate_limit=options.number("origin_rate_limit", 100),
    )


def _proxy(section: Section | None) -> ProxyConfig:
    if section is None:
        return ProxyConfig()
    proxy = ProxyConfig(
        url=section.text("url"),
        ping_url=section.text("ping_url"),
        fallback=section.flag("fallback", True),
        check_interval=section.number("check_interval", 5),
        check_pause_elapsed=section.number("check_pause_elapsed", 300),
        use_http=section.flag("use_http"),
    )
    section.known("dragonfly_scheduler_endpoint")
    if proxy.url:
        _check_url(section, "url", proxy.url)
        if proxy.ping_url:
            _check_url(section, "ping_url", proxy.ping_url)
    section.warn_unknown()
    return proxy


def _mirror(section: Section) -> MirrorConfig | None:
    """None for an element without a host: upstream drops those too."""
    health = ("ping_url", "health_check_interval", "failure_limit", "health_check_pause_elapsed")
    mirror = MirrorConfig(
        host=section.text("host").rstrip("/"),
        headers=section.text_map("headers"),
        auth_through=section.flag("auth_through"),
        ping_url=section.text("ping_url"),
        health_check_interval=section.number("health_check_interval", 5),
        failure_limit=section.number("failure_limit", 5, high=255),
        health_check_pause_elapsed=section.number("health_check_pause_elapsed", 300),
        health_keys_given=any(key in section for key in health),
        ns=section.flag("ns"),
    )
    section.warn_unknown()
    if not mirror.host:
        return None
    _check_url(section, "host", mirror.host)
    if mirror.ping_url:
        _check_url(section, "ping_url", mirror.ping_url)
    for name, value in mirror.headers.items():
        if reason := bad_header(name, value):
            raise section.error(f"headers.{ascii(name)[1:-1]}", reason)
    return mirror


def bad_header(name: str, value: str) -> str:
    """Why no request can carry it, "" for no reason. Says nothing of the value, which may be secret."""
    if not _is_token(name):
        return "is not a legal header name"
    if any(char in value for char in "\r\n\0"):
        return "holds a line break"
    return "" if all(char <= "\xff" for char in value) else "holds characters that no HTTP header can have"


def _is_token(name: str) -> bool:
    return bool(name) and all(char.isascii() and (char.isalnum() or char in "!#$%&'*+-.^_`|~") for char in name)


def _check_url(section: Section, key: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        usable = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
        usable = usable and not any(char <= " " or char in '\\"<>' for char in host)  # as `parse_url` has it
    except ValueError:
        usable = False
    if not usable:
        raise section.error(key, f"{public_url(url)!r} is not a URL such as http://127.0.0.1:65001")
