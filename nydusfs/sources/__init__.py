"""Where blob bytes come from: `open_source(backend, hub) -> Source`."""

from nydusfs.sources.base import Buffer, Check, FileSource, Priority, Source, ThreadSource, WrongBytes
from nydusfs.sources.hub import SourceHub
from nydusfs.sources.opening import open_source
from nydusfs.sources.registrysource import RegistrySource

__all__ = [
    "Buffer", "Check", "FileSource", "Priority", "RegistrySource", "Source", "SourceHub", "ThreadSource",
    "WrongBytes", "open_source",
]  # fmt: skip
