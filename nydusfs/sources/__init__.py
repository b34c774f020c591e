"""Where blob bytes come from: `open_source(backend, hub) -> Source`."""

from __future__ import annotations

from nydusfs.config import BackendConfig, LocalFsBackend, RegistryBackend
from nydusfs.errors import ConfigError
from nydusfs.sources.base import Buffer, Check, Priority, Source, WrongBytes
from nydusfs.sources.hub import SourceHub
from nydusfs.sources.localfs import LocalFsSource
from nydusfs.sources.opening import RegistrySource


def open_source(backend: BackendConfig, hub: SourceHub) -> Source:
    """A source for one image's blobs. Sources of one process should share a hub (connections, tokens, health).

    Raises `ConfigError` for a backend type that is known but not served yet.
    """
    if isinstance(backend, RegistryBackend):
        return RegistrySource(backend, hub)
    if isinstance(backend, LocalFsBackend):
        return LocalFsSource(backend)
    raise ConfigError("device.backend.type", f"{backend.type!r} is not served yet; use registry or localfs")


__all__ = ["Buffer", "Check", "Priority", "RegistrySource", "Source", "SourceHub", "WrongBytes", "open_source"]
