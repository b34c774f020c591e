"""What may be shown of a configuration: the line people grep for, and the copy without secrets for the API."""

from __future__ import annotations

import json
from typing import Any

from nydusfs.config.model import (
    BackendConfig,
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


_BACKENDS = ("localdisk", "localfs", "oss", "s3", "registry", "http-proxy")


def public_config(config: Config) -> dict[str, Any]:
    """The configuration in version 2 shape, as the daemon's API shows it: all of upstream's keys, no secret."""
    cache = config.cache
    prefetch = {
        "enable": config.prefetch.enable,
        "threads": config.prefetch.threads,
        "batch_size": config.prefetch.merging_size,
        "bandwidth_limit": config.prefetch.bandwidth_rate,
        "prefetch_all": config.prefetch.prefetch_all,
        "stream_prefetch": False,
    }
    files = {
        "work_dir": cache.work_dir,
        "disable_indexed_map": False,
        "enable_encryption": False,
        "enable_convergent_encryption": False,
        "encryption_key": "",
    }
    return {
        "version": 2,
        "id": config.id,
        "backend": {
            "type": config.backend.type,
            **dict.fromkeys(_BACKENDS),
            config.backend.type: _public_backend(config.backend),
        },
        "external_backends": [],
        "cache": {
            "type": cache.type,
            "compressed": cache.compressed,
            "validate": cache.validate,
            "prefetch": prefetch,
            "filecache": files if cache.persistent else None,
            "fscache": None,
        },
        "rafs": {
            "mode": config.mode,
            "batch_size": config.amplify_io,
            "validate": config.digest_validate,
            "enable_xattr": config.enable_xattr,
            "iostats_files": config.iostats_files,
            "access_pattern": config.access_pattern,
            "latest_read_files": config.latest_read_files,
            "prefetch": prefetch,
        },
        "overlay": None,
    }


def _public_backend(backend: BackendConfig) -> dict[str, Any]:
    """Secrets are left as if they were not set."""
    if isinstance(backend, LocalFsBackend):
        return {"blob_file": backend.blob_file, "dir": backend.dir, "alt_dirs": list(backend.alt_dirs)}
    if isinstance(backend, LocalDiskBackend):
        return {"device_path": backend.device_path, "disable_gpt": backend.disable_gpt}
    common = _public_connection(backend.connection)
    if isinstance(backend, RegistryBackend):
        own = {
            "host": backend.host,
            "repo": backend.repo,
            "auth": None,
            "registry_token": None,
            "blob_url_scheme": backend.blob_url_scheme,
            "blob_redirected_host": backend.blob_redirected_host,
        }
        return {"scheme": backend.connection.scheme, **own, **common}
    if isinstance(backend, HttpProxyBackend):
        return {"addr": public_url(backend.addr), "path": backend.path, **common}
    store = {
        "scheme": backend.connection.scheme,
        "endpoint": backend.endpoint,
        "bucket_name": backend.bucket_name,
        "object_prefix": backend.object_prefix,
        "access_key_id": "",
        "access_key_secret": "",
        **common,
    }
    return store | ({"region": backend.region} if backend.type == "s3" else {})


def _public_connection(connection: ConnectionConfig) -> dict[str, Any]:
    proxy = connection.proxy
    return {
        "skip_verify": connection.skip_verify,
        "ca_cert_files": list(connection.ca_cert_files),
        "timeout": connection.timeout,
        "connect_timeout": connection.connect_timeout,
        "retry_limit": connection.retry_limit,
        "proxy": {
            "url": public_url(proxy.url),
            "ping_url": public_url(proxy.ping_url),
            "fallback": proxy.fallback or not proxy.url,
            "check_interval": proxy.check_interval,
            "use_http": proxy.use_http,
            "check_pause_elapsed": proxy.check_pause_elapsed,
            "dragonfly_scheduler_endpoint": "",
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
