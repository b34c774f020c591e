"""Segments on the local disk: `CacheStore(work_dir).blob(blob_id)`."""

from nydusfs.cache.blob import BlobCache
from nydusfs.cache.quota import Limit
from nydusfs.cache.store import CacheStore

__all__ = ["BlobCache", "CacheStore", "Limit"]
