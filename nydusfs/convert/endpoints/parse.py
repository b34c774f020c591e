"""What people write for an image: a reference, or a place on this machine.

registry.example/app:v1        a registry
oci:DIR[:TAG]                  an OCI layout directory
oci-archive:FILE[:TAG]         an OCI archive
docker-archive:FILE[:NAME]     what `docker save` writes
file:///PATH, /PATH, ./PATH    a directory (layout) or an archive, told by looking at it
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from nydusfs.convert.endpoints.archive import ArchiveLocation, archive_tag
from nydusfs.convert.endpoints.base import Location
from nydusfs.convert.endpoints.layout import LayoutLocation
from nydusfs.convert.endpoints.registry import RegistryLocation
from nydusfs.errors import ConvertError
from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.reference import Reference

_SCHEMES = ("oci:", "oci-archive:", "docker-archive:")


def is_local(text: str) -> bool:
    """Whether this names a place on this machine and not an image of a registry."""
    return text.startswith((*_SCHEMES, "file://", "/", "./", "../"))


def parse_location(
    text: str,
    options: ClientOptions | None = None,
    *,
    reference: str = "",
    create: bool = False,
    chunk_size: int = 0,
) -> Location:
    """`reference` is the image's name for annotations, and in archives that are written. Raises NydusError. `create`:
    for a target, whose tag in a layout or archive is the reference's unless the text has one.
    `chunk_size`: see RegistryLocation. A path that does not exist (a target) is an archive if its name ends in .tar,
    else a layout."""
    if not is_local(text):
        return RegistryLocation(Reference.parse(text), options or ClientOptions(), chunk_size)
    scheme = next((one for one in _SCHEMES if text.startswith(one)), "")
    if scheme:
        place, _, name = text.removeprefix(scheme).partition(":")
    else:
        place, name = (unquote(text.removeprefix("file://")) if text.startswith("file://") else text), ""
    if not place:
        raise ConvertError(f"{text!r} names no path")
    path = Path(place)
    if create and not name and reference:
        name = archive_tag(reference)
    if not reference and "/" in name:
        reference = name
    if scheme == "oci:" or (not scheme and (path.is_dir() or (not path.exists() and path.suffix != ".tar"))):
        return LayoutLocation(path, name, reference)
    return ArchiveLocation(path, name, reference)
