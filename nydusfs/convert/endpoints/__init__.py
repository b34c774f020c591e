"""Images wherever they lie: registries, OCI layouts, OCI and docker archives. See `base`."""

from nydusfs.convert.endpoints.archive import ArchiveLocation
from nydusfs.convert.endpoints.base import Endpoint, Location, copy_blob
from nydusfs.convert.endpoints.connections import Connections
from nydusfs.convert.endpoints.layout import LayoutLocation
from nydusfs.convert.endpoints.parse import is_local, parse_location
from nydusfs.convert.endpoints.registry import RegistryEndpoint, RegistryLocation

__all__ = [
    "ArchiveLocation",
    "Connections",
    "Endpoint",
    "LayoutLocation",
    "Location",
    "RegistryEndpoint",
    "RegistryLocation",
    "copy_blob",
    "is_local",
    "parse_location",
]
