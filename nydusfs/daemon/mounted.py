"""A mounted image: what was asked for, what was opened, how it is told to the next worker."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import trio

from bootstrap.layout.common import SuperFlags
from nydusfs.config import Config, FsDriver, public_config
from nydusfs.daemon.handover import KeptMount
from nydusfs.drivers.idmap import IdMap
from nydusfs.drivers.stats import FsStats
from nydusfs.drivers.volume import ImageData, ImageVolume, Metadata


class ImageMetadata(Metadata, Protocol):
    @property
    def flags(self) -> SuperFlags: ...
    @property
    def version(self) -> int: ...
    @property
    def data(self) -> Any: ...


class OpenImage(Protocol):
    """An image that can be read: what an opener makes of a bootstrap and a configuration."""

    @property
    def metadata(self) -> ImageMetadata: ...
    @property
    def reader(self) -> ImageData: ...
    def backend_metrics(self) -> dict[str, Any]: ...
    def cache_metrics(self) -> dict[str, Any]: ...
    async def paths(self, inodes: Collection[int]) -> dict[int, str]:
        """Where these files are in the image."""

    async def rest(self) -> None:
        """Until nobody waits for data."""

    async def prefetch(self, *, starting: bool) -> None:
        """Fetch ahead what the configuration asks for; cancelled at umount. `starting`: what is read now is what a
        start of the image reads, to be foreseen and remembered."""

    def blob_ids(self) -> set[str]: ...
    async def profile(self) -> dict[str, Any]:
        """Raises `NydusError` where none is kept."""

    async def set_profile(self, value: bytes) -> None:
        """Raises `NydusError`."""

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MountRequest:
    """`mountpoint`: path in the tree. `source`: bootstrap file. `prefetch_files`: absolute paths inside the image.
    `config_text`: what `config` was parsed from."""

    mountpoint: str
    source: str
    config: Config
    prefetch_files: tuple[str, ...] = ()
    config_text: str = ""

    def at(self, mountpoint: str) -> MountRequest:
        return replace(self, mountpoint=mountpoint)


class KernelMounts(Protocol):
    """Images as mounts that the kernel serves, above what FUSE shows (`drivers.erofs.driver`)."""

    async def begin_image(self, bootstrap: str, store: Any, choice: FsDriver | None, *, enable_xattr: bool) -> Any: ...
    async def prepare(self, reader: Any, choice: FsDriver | None, *, xattrs: bool, making: Any = None) -> None: ...
    async def discard(self, reader: Any) -> None: ...
    async def at_hand(self, where: str, reader: Any, choice: FsDriver | None, *, xattrs: bool) -> bool: ...
    async def make(self, reader: Any, *, xattrs: bool) -> None: ...
    async def stand_by(self, choice: FsDriver | None) -> None: ...
    async def attach(
        self, where: str, volume: ImageVolume, reader: Any, choice: FsDriver | None, *, xattrs: bool
    ) -> None: ...
    async def detach(self, where: str) -> None: ...
    async def restore(self, where: str, volume: ImageVolume, reader: Any) -> None: ...


class Opener(Protocol):
    async def __call__(self, request: MountRequest) -> OpenImage:
        """Raises `NydusError`, `RafsError`, OSError."""

    async def open_all(self, requests: Sequence[MountRequest]) -> list[OpenImage | Exception]:
        """What a call for each would have given or raised, in fewer visits to threads."""

    def expect(self, request: MountRequest) -> None: ...
    async def reopen(self, requests: Sequence[MountRequest]) -> list[OpenImage | Exception]: ...


class MountedImage:
    volume: ImageVolume

    def __init__(self, request: MountRequest, image: OpenImage, stats: FsStats) -> None:
        self.request = request
        self.image = image
        self.stats = stats
        self.idmap = IdMap.of(request.config.id_mapping)
        self.mounted_ns = time.time_ns()
        self.background = trio.CancelScope()
        self.attaching: trio.Event | None = None  # of the kernel's mount, where nobody waited for it
        self.patience: trio.CancelScope | None = None  # of the same, where nobody is to wait either
        self.refused = ""  # why it cannot be, though it must

    async def settled(self) -> None:
        """Until the kernel's mount is there, or will not be."""
        if self.patience is not None:
            self.patience.cancel()
        if self.attaching is not None:
            await self.attaching.wait()

    @property
    def serve_xattrs(self) -> bool:
        return serves_xattrs(self.request.config, self.image.metadata)

    @cached_property
    def kept(self) -> KeptMount:
        """Once it is mounted."""
        request = self.request
        return KeptMount(
            request.mountpoint,
            request.source,
            request.config_text,
            request.prefetch_files,
            self.volume.index,
            self.volume.generation,
            self.mounted_ns,
        )

    def public(self) -> dict[str, Any]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.mounted_ns // 10**9))
        return {
            "backend_type": "Rafs",
            "mountpoint": self.request.mountpoint,
            "mounted_time": f"{when}.{self.mounted_ns % 10**9:09d} +00:00:00",
            "config": public_config(self.request.config),
        }


def serves_xattrs(config: Config, metadata: ImageMetadata) -> bool:
    return config.enable_xattr or bool(metadata.flags & SuperFlags.HAS_XATTR)
