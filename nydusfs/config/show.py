"""What may be shown of a configuration: the line people grep for, and the copy without secrets for the API."""

from __future__ import annotations

import json
from typing import Any

from nydusfs.config.model import (
    Config,
    ConnectionConfig,
    HttpProxyBackend,
    LocalDiskBackend,
    LocalFsBackend,
    MirrorConfig,
    RegistryBackend,
)
from nydusfs.redact import public_header, public_url


def _text(value: str) -> str:
    """A string as Rust's `{:?}` prints it, near enough for header values and URLs."""
    return json.dumps(value, ensure_ascii=False)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _mirror(mirror: MirrorConfig) -> str:
    headers = ", ".join(f"{_text(name)}: {_text(public_header(name, value))}" for name, value in mirror.headers.items())
    fields = [
        f"host: {_text(public_url(mirror.host))}",
        f"headers: {{{headers}}}",
        f"auth_through: {_flag(mirror.auth_through)}",
    ]
    if mirror.health_keys_given:  # upstream 2.1.1 to 2.1.6 added these three behind
        fields += [
            f"health_check_interval: {mirror.health_check_interval}",
            f"failure_limit: {mirror.failure_limit}",
            f"ping_url: {_text(public_url(mirror.ping_url))}",
        ]
    return f"MirrorConfig {{ {', '.join(fields)} }}"


def connection_debug(config: Config) -> str:
    """The `backend config: ConnectionConfig { ... }` line of upstream 2.1.0; "" for a backend without connections."""
    if isinstance(config.backend, LocalFsBackend | LocalDiskBackend):
        return ""
    connection: ConnectionConfig = config.backend.connection
    proxy = connection.proxy
    return (
        "backend config: ConnectionConfig { "
        f"proxy: ProxyConfig {{ url: {_text(public_url(proxy.url))}, "
        f"ping_url: {_text(public_url(proxy.ping_url))}, "
        f"fallback: {_flag(proxy.fallback)}, check_interval: {proxy.check_interval}, "
        f"use_http: {_flag(proxy.use_http)} }}, "
        f"mirrors: [{', '.join(_mirror(mirror) for mirror in connection.mirrors)}], "
        f"skip_verify: {_flag(connection.skip_verify)}, timeout: {connection.timeout}, "
        f"connect_timeout: {connection.connect_timeout}, retry_limit: {connection.retry_limit} }}"
    )


def public_config(config: Config) -> dict[str, Any]:
    """The configuration in version 2 shape without secrets, as the daemon's API shows it."""
    backend: dict[str, Any] = {"type": config.backend.type}
    if isinstance(config.backend, LocalFsBackend):
        backend["localfs"] = {
            "blob_file": config.backend.blob_file,
            "dir": config.backend.dir,
            "alt_dirs": list(config.backend.alt_dirs),
        }
    elif isinstance(config.backend, LocalDiskBackend):
        backend["localdisk"] = {
            "device_path": config.backend.device_path,
            "disable_gpt": config.backend.disable_gpt,
        }
    else:
        connection = config.backend.connection
        common: dict[str, Any] = {
            "scheme": connection.scheme,
            "skip_verify": connection.skip_verify,
            "ca_cert_files": list(connection.ca_cert_files),
            "timeout": connection.timeout,
            "connect_timeout": connection.connect_timeout,
            "retry_limit": connection.retry_limit,
            "proxy": {
                "url": public_url(connection.proxy.url),
                "ping_url": public_url(connection.proxy.ping_url),
                "fallback": connection.proxy.fallback,
                "check_interval": connection.proxy.check_interval,
                "use_http": connection.proxy.use_http,
            },
            # Header values may carry credentials of a mirror: only their names are public.
            "mirrors": [
                {
                    "host": public_url(mirror.host),
                    "headers": dict.fromkeys(mirror.headers, ""),
                    "auth_through": mirror.auth_through,
                }
                for mirror in connection.mirrors
            ],
        }
        if isinstance(config.backend, RegistryBackend):
            backend["registry"] = {"host": config.backend.host, "repo": config.backend.repo, **common}
        elif isinstance(config.backend, HttpProxyBackend):
            backend["http-proxy"] = {"addr": public_url(config.backend.addr), "path": config.backend.path, **common}
        else:
            store = config.backend
            backend[store.type] = {
                "endpoint": store.endpoint,
                "bucket_name": store.bucket_name,
                "object_prefix": store.object_prefix,
                **({"region": store.region} if store.type == "s3" else {}),
                **common,
            }
    prefetch = config.prefetch
    return {
        "version": 2,
        "id": config.id,
        "backend": backend,
        "cache": {
            "type": config.cache.type,
            "compressed": config.cache.compressed,
            "validate": config.cache.validate,
            "filecache": {"work_dir": config.cache.work_dir},
        },
        "rafs": {
            "mode": config.mode,
            "batch_size": config.amplify_io,
            "validate": config.digest_validate,
            "enable_xattr": config.enable_xattr,
            "iostats_files": config.iostats_files,
            "access_pattern": config.access_pattern,
            "latest_read_files": config.latest_read_files,
            "prefetch": {
                "enable": prefetch.enable,
                "threads": prefetch.threads,
                "batch_size": prefetch.merging_size,
                "bandwidth_limit": prefetch.bandwidth_rate,
                "prefetch_all": prefetch.prefetch_all,
            },
        },
    }
