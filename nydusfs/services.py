"""What all images of one worker share, and how an image is opened with it.

async with open_services() as services:
    reader = await services.open_image("image.boot", config, name="/4")
    data = await reader.read(ino, 0, 4096)
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

import trio

from bootstrap.base import Bootstrap
from bootstrap.chunkmap import ChunkMap
from bootstrap.errors import RafsError
from bootstrap.reader import open_bootstrap
from nydusfs.cache import CacheStore, Limit
from nydusfs.cache.devices import device_key
from nydusfs.cachetools.places import WORKER
from nydusfs.config import Config, connection_debug
from nydusfs.counters import CacheCounters
from nydusfs.errors import CacheDiskError, NydusError
from nydusfs.fetch import FetchScheduler
from nydusfs.image_reader import ImageReader
from nydusfs.profile import ProfileStore
from nydusfs.sources import RegistrySource, SourceHub, open_source

log = logging.getLogger("nydusfs")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to open; see `Services.open_image`."""

    bootstrap: str
    config: Config
    name: str
    counters: CacheCounters | None = None


class Services:
    """Use `open_services`. `claims`: on cache directories, of the process before this one, by `device_key`; `claimed`
    is called for each of this one's."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.hub = SourceHub(nursery)
        self.scheduler = FetchScheduler(nursery)
        self._nursery = nursery
        self._stores: dict[str, CacheStore] = {}
        self._named: dict[str, CacheStore] = {}  # by what configurations call it
        self._auth: dict[str, str] = {}
        self._registries: WeakKeyDictionary[RegistrySource, str] = WeakKeyDictionary()
        self._readers: WeakSet[ImageReader] = WeakSet()
        self._leaving: dict[str, trio.Event] = {}  # blobs that are being deleted
        self.claims: dict[str, int] = {}
        self.claimed: Callable[[str, int], None] = lambda *_: None

    def store(self, work_dir: str) -> CacheStore:
        """One store per directory, whatever it is called. Raises `CacheError`."""
        if (known := self._named.get(work_dir)) is not None:
            return known
        key = os.path.realpath(work_dir)
        if key not in self._stores:
            store = self._stores[key] = CacheStore(work_dir, claims=self.claims)
            self.claimed(device_key(store.path), store.claim)
            self._nursery.start_soon(store.sync_forever)
        store = self._named[work_dir] = self._stores[key]
        return store

    def reopen_claimed(self) -> None:
        """Stores of the last worker that no image has now: nobody but who has the claim may delete what is in them."""
        for fd in list(self.claims.values()):
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            folder = path.parent if path.name == ".lock" else path  # see `nydusfs.cache.claim`
            work_dir = folder.parent if WORKER.fullmatch(folder.name) else folder
            if folder.is_dir():
                try:
                    self.store(str(work_dir))
                except NydusError as error:
                    log.warning("what is in cache %s cannot be removed: %s", folder, error)

    def _usable_store(self, config: Config, name: str) -> CacheStore | None:
        if not config.cache.persistent:
            return None
        try:
            return self.store(config.cache.work_dir)
        except CacheDiskError as error:
            log.warning("image %s: %s: its data is served without being kept", name, error)
            return None

    def set_registry_auth(self, config_id: str, auth: str) -> None:
        """Credentials that replace those of the configurations with this id ("": of all that have none of their own),
        for mounted images and later ones. `auth`: base64 of user:password, "" to go back to the configuration's."""
        self._auth[config_id] = auth
        for source, identity in list(self._registries.items()):
            source.use_auth(self._registry_auth(identity))

    def forget_registry_auth(self, config_id: str) -> None:
        """No image has this id any more."""
        self._auth.pop(config_id, None)

    def _registry_auth(self, config_id: str) -> str:
        return self._auth.get(config_id) or self._auth.get("", "")

    def stores(self) -> list[CacheStore]:
        return list(self._stores.values())

    async def open_image(
        self, bootstrap_path: str, config: Config, *, name: str, counters: CacheCounters | None = None
    ) -> ImageReader:
        """Open an image for reading; `name` stands for it in logs.

        Raises `ConfigError`, `CacheError`, and `bootstrap.errors.RafsError` for an unusable bootstrap.
        """
        (found,) = await self.open_images([Wanted(bootstrap_path, config, name, counters)])
        if isinstance(found, Exception):
            raise found
        return found

    async def open_images(self, wanted: Sequence[Wanted]) -> list[ImageReader | Exception]:
        """Many at once: the readers, or what `open_image` would have raised. All files are opened in one visit to a
        thread: after the death of a worker with 300 images a visit each took longer than everything else."""
        stores: list[CacheStore | Exception | None] = []
        for image in wanted:
            try:
                stores.append(self._usable_store(image.config, image.name))
            except NydusError as error:
                stores.append(error)

        def open_all() -> list[tuple[Bootstrap, ChunkMap] | Exception]:
            return [
                store if isinstance(store, Exception) else _try_open(image, store)
                for image, store in zip(wanted, stores, strict=True)
            ]

        opened = await trio.to_thread.run_sync(open_all)
        readers: list[ImageReader | Exception] = []
        for image, store, found in zip(wanted, stores, opened, strict=True):
            if readers:
                await trio.lowlevel.checkpoint()  # a millisecond each, and readers of others may be waiting
            if isinstance(found, Exception):
                readers.append(found)
                continue
            for blob in found[0].blobs:
                while (left := self._leaving.get(blob.id)) is not None:
                    await left.wait()
            readers.append(self._reader(image, store, *found))
        return readers

    def _reader(
        self, image: Wanted, store: CacheStore | Exception | None, bootstrap: Bootstrap, chunks: ChunkMap
    ) -> ImageReader | Exception:
        assert not isinstance(store, Exception)
        config = image.config
        try:
            source = open_source(config.backend, self.hub)
        except NydusError as error:
            bootstrap.close()
            return error
        if isinstance(source, RegistrySource):
            source.use_auth(self._registry_auth(config.id))
            self._registries[source] = config.id
        if line := connection_debug(config):
            log.info("%s", line)
        reader = ImageReader(image.name, bootstrap, chunks, source, self.scheduler, store, config, image.counters)
        self._readers.add(reader)
        if store is not None and config.prefetch.learn:
            reader.profiles = ProfileStore(config.cache.work_dir)
        return reader

    def open_now(self) -> list[ImageReader]:
        """Images that are read from or may be: mounted ones, and those that are opened ahead of their mount."""
        return [reader for reader in self._readers if not reader.closed]

    async def drop_blob(self, blob_id: str) -> bool:
        """Delete what all caches hold of a blob. False: an image that is open has it, and it stays."""
        while (left := self._leaving.get(blob_id)) is not None:
            await left.wait()
        if any(blob_id == blob.id for reader in self.open_now() for blob in reader.bootstrap.blobs):
            return False
        # whoever opens an image with it meanwhile waits: files must not vanish under it
        left = self._leaving[blob_id] = trio.Event()
        try:
            with trio.CancelScope(shield=True):
                for store in self.stores():
                    await trio.to_thread.run_sync(store.remove_blob, blob_id)
        finally:
            del self._leaving[blob_id]
            left.set()
        return True

    async def aclose(self) -> None:
        self.hub.close()
        for store in self._stores.values():
            await trio.to_thread.run_sync(store.close)


@asynccontextmanager
async def open_services() -> AsyncIterator[Services]:
    """At the end every fetch is cancelled and what is cached made durable."""
    services: Services | None = None
    try:
        async with trio.open_nursery() as nursery:
            services = Services(nursery)
            try:
                yield services
            finally:
                for store in services.stores():
                    store.stop_syncing()  # a thread at it holds up the end
                nursery.cancel_scope.cancel()
    finally:
        if services is not None:  # no task writes to its stores any more
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(services.scheduler.lane.close)
                await services.aclose()


def _try_open(image: Wanted, store: CacheStore | None) -> tuple[Bootstrap, ChunkMap] | Exception:
    cache = image.config.cache
    try:
        if store is not None and (cache.limit or cache.min_free):
            store.set_limit(Limit(cache.limit, cache.min_free))
        opened = _open(image.bootstrap, store)
        if store is not None:
            store.count_beside()
        return opened
    except (NydusError, RafsError, OSError) as error:
        return error


def _open(bootstrap_path: str, store: CacheStore | None) -> tuple[Bootstrap, ChunkMap]:
    """In a thread: building the chunk map of a big image takes tenths of a second the first time."""
    bootstrap = open_bootstrap(bootstrap_path)
    try:
        path = None
        if store is not None:
            path = store.map_path(blake2b(os.path.realpath(bootstrap_path).encode(), digest_size=12).hexdigest())
        try:
            return bootstrap, ChunkMap.open(bootstrap, path)
        except RafsError as error:
            if store is None or path is None or not isinstance(error.__cause__, OSError):
                raise
            # a full disk costs the map's next use, not the image: the map is small against the room for temporary files
            store.health.failed(error.__cause__)
            log.info("%s: going on with a temporary one for %s", error, bootstrap_path)
            return bootstrap, ChunkMap.open(bootstrap, None)
    except BaseException:
        bootstrap.close()
        raise
