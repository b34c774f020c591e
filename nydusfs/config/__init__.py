"""Daemon configuration: `load_config(text, where) -> Config`, for version 1 JSON and version 2 TOML or JSON."""

from nydusfs.config.backends import bad_auth
from nydusfs.config.model import (
    BackendConfig,
    CacheConfig,
    Config,
    ConnectionConfig,
    DiskBlob,
    FsDriver,
    HttpProxyBackend,
    LocalDiskBackend,
    LocalFsBackend,
    MirrorConfig,
    ObjectBackend,
    PrefetchConfig,
    ProxyConfig,
    RegistryBackend,
)
from nydusfs.config.parse import load_backend, load_config
from nydusfs.config.show import connection_debug, public_config

__all__ = [
    "BackendConfig",
    "CacheConfig",
    "Config",
    "ConnectionConfig",
    "DiskBlob",
    "FsDriver",
    "HttpProxyBackend",
    "LocalDiskBackend",
    "LocalFsBackend",
    "MirrorConfig",
    "ObjectBackend",
    "PrefetchConfig",
    "ProxyConfig",
    "RegistryBackend",
    "bad_auth",
    "connection_debug",
    "load_backend",
    "load_config",
    "public_config",
]
