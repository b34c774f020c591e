"""Segments on the local disk: `CacheStore(work_dir).blob(blob_id)`."""

from nydusfs.cache.quota import Limit
from nydusfs.cache.store import BlobCache, CacheStore

__all__ = ["BlobCache", "CacheStore", "Limit"]
