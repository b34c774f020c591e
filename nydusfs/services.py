"""What all images of one worker share, and how an image is opened with it.

async with open_services() as services:
    reader = await services.open_image("image.boot", config, name="/4")
    data = await reader.read(ino, 0, 4096)
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from weakref import WeakKeyDictionary

import trio

from bootstrap.base import Bootstrap
from bootstrap.chunkmap import ChunkMap
from bootstrap.errors import RafsError
from bootstrap.reader import open_bootstrap
from nydusfs.cache import CacheStore, Limit
from nydusfs.config import Config, connection_debug
from nydusfs.counters import CacheCounters
from nydusfs.fetch import FetchScheduler
from nydusfs.image_reader import ImageReader
from nydusfs.profile import ProfileStore
from nydusfs.sources import RegistrySource, SourceHub, open_source

log = logging.getLogger("nydusfs")


class Services:
    """Use `open_services`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.hub = SourceHub(nursery)
        self.scheduler = FetchScheduler(nursery)
        self._nursery = nursery
        self._stores: dict[str, CacheStore] = {}
        self._auth: dict[str, str] = {}
        self._registries: WeakKeyDictionary[RegistrySource, str] = WeakKeyDictionary()

    def store(self, work_dir: str) -> CacheStore:
        """One store per directory, whatever it is called. Raises `CacheError`."""
        key = os.path.realpath(work_dir)
        if key not in self._stores:
            store = self._stores[key] = CacheStore(work_dir)
            self._nursery.start_soon(store.sync_forever)
        return self._stores[key]

    def set_registry_auth(self, config_id: str, auth: str) -> None:
        """Credentials that replace those of the configurations with this id ("": of all that have none of their own),
        for mounted images and later ones. `auth`: base64 of user:password, "" to go back to the configuration's."""
        self._auth[config_id] = auth
        for source, identity in list(self._registries.items()):
            source.use_auth(self._registry_auth(identity))

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
        source = open_source(config.backend, self.hub)
        if isinstance(source, RegistrySource):
            source.use_auth(self._registry_auth(config.id))
            self._registries[source] = config.id
        if line := connection_debug(config):
            log.info("%s", line)
        store = self.store(config.cache.work_dir) if config.cache.persistent else None
        if store is not None and (config.cache.limit or config.cache.min_free):
            await trio.to_thread.run_sync(store.set_limit, Limit(config.cache.limit, config.cache.min_free))
        bootstrap, chunks = await trio.to_thread.run_sync(_open, bootstrap_path, store)
        reader = ImageReader(name, bootstrap, chunks, source, self.scheduler, store, config, counters)
        if store is not None and config.prefetch.learn:
            reader.profiles = ProfileStore(config.cache.work_dir)
        return reader

    async def drop_blob(self, blob_id: str) -> None:
        """Delete what all caches hold of a blob that no image uses any more."""
        for store in self.stores():
            await trio.to_thread.run_sync(store.remove_blob, blob_id)

    async def aclose(self) -> None:
        self.hub.close()
        for store in self._stores.values():
            await trio.to_thread.run_sync(store.close)


@asynccontextmanager
async def open_services() -> AsyncIterator[Services]:
    """At the end every fetch is cancelled and what is cached made durable."""
    async with trio.open_nursery() as nursery:
        services = Services(nursery)
        try:
            yield services
        finally:
            for store in services.stores():
                store.stop_syncing()  # a thread at it holds up the end
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await services.aclose()


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
            if path is None or not isinstance(error.__cause__, OSError):
                raise
            # a full disk costs the map's next use, not the image: the map is small against the room for temporary files
            log.warning("%s: going on with a temporary one for %s", error, bootstrap_path)
            return bootstrap, ChunkMap.open(bootstrap, None)
    except BaseException:
        bootstrap.close()
        raise
