"""The source that a backend's configuration describes."""

from __future__ import annotations

from nydusfs.config import BackendConfig, HttpProxyBackend, LocalDiskBackend, LocalFsBackend, RegistryBackend
from nydusfs.sources.base import Source
from nydusfs.sources.hub import SourceHub
from nydusfs.sources.localfs import LocalFsSource
from nydusfs.sources.registrysource import RegistrySource


def open_source(backend: BackendConfig, hub: SourceHub) -> Source:
    """A source for one image's blobs. Sources of one process share a hub (connections, tokens, standing of mirrors).

    Raises `ConfigError` for a configuration that cannot be used. What few nodes have is imported when it is met: 20 ms
    that the start of a daemon does without.
    """
    if isinstance(backend, RegistryBackend):
        return RegistrySource(backend, hub)
    if isinstance(backend, LocalFsBackend):
        return LocalFsSource(backend)
    if isinstance(backend, LocalDiskBackend):
        from nydusfs.sources.localdisk import LocalDiskSource

        return LocalDiskSource(backend)
    from nydusfs.sources.plain import open_http_proxy, open_objects

    if isinstance(backend, HttpProxyBackend):
        return open_http_proxy(backend, hub)
    return open_objects(backend, hub)
