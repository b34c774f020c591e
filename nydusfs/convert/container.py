"""A container of containerd as `commit` needs it: its image, its upper directory and its view of the file system."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nydusfs.containerd.chain import chain_ids
from nydusfs.containerd.connection import Missing
from nydusfs.containerd.containers import Container, Containers
from nydusfs.convert.endpoints import Connections, RegistryEndpoint
from nydusfs.convert.images import Image, load_images
from nydusfs.convert.stored import StoredImage
from nydusfs.convert.upperdir import TRUSTED, USER
from nydusfs.errors import ConvertError
from nydusfs.owners import Range, UserNamespace
from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.reference import Reference, ReferenceError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layers:
    """An overlayfs mount: `lower` is its option as it was given; `marks` begin its attributes."""

    upper: Path
    lower: str
    marks: bytes


def image_of(containers: Containers, container: Container, connections: Connections, client: ClientOptions) -> Image:
    """The Nydus image the container runs, told by the snapshots below it: a tag may have moved since. Raises
    ConvertError, ContainerdError, RegistryError."""
    if not container.image:
        raise ConvertError(f"container {container.id} has no image: only containers of Nydus images can be committed")
    try:
        target = containers.image_target(container.image)
    except Missing:
        raise ConvertError(
            f"image {container.image} of container {container.id} is no longer in containerd: pull it again"
        ) from None
    reference = _reference(containers, container.image, target.digest)
    registry = RegistryEndpoint(connections.client(reference.host, client), reference)
    endpoint = StoredImage(containers, target.media_type, target.digest, registry)
    parent = containers.snapshot_parent(container.snapshotter, container.snapshot_key)
    found = load_images(endpoint, None).images
    for image in found:
        if parent and chain_ids(image.diff_ids)[-1:] == [parent]:
            if not image.is_nydus:
                raise ConvertError(
                    f"container {container.id} runs the plain image {image.name}: only containers of Nydus images can "
                    "be committed (for others there is `nerdctl commit`)"
                )
            return image
    raise ConvertError(
        f"container {container.id} was made from another image than {container.image} names now: its layers differ"
    )


def _reference(containers: Containers, name: str, digest: str) -> Reference:
    """Kubernetes also names images by their config's digest; some other name of the same image says where it is."""
    for candidate in (name, *containers.image_names(digest)):
        try:
            reference = Reference.parse(candidate)
        except ReferenceError:
            continue
        if not candidate.startswith("sha256:"):
            return reference
    raise ConvertError(f"image {name} has no name in a registry: its layers cannot be found")


def layers_of(containers: Containers, container: Container) -> Layers:
    """Raises ConvertError for a container whose writable layer is not overlayfs."""
    mounts = containers.mounts(container.snapshotter, container.snapshot_key)
    mount = mounts[-1] if mounts else None
    upper = mount.option("upperdir") if mount else ""
    if mount is None or not upper:
        kinds = ", ".join(one.type for one in mounts) or "nothing"
        raise ConvertError(
            f"container {container.id} has no overlayfs upper directory: {container.snapshotter} mounts {kinds} for it"
        )
    if not os.path.isdir(upper):
        raise ConvertError(
            f"upper directory {upper} of container {container.id} is not here: run this beside containerd"
        )
    return Layers(Path(upper), mount.option("lowerdir"), USER if "userxattr" in mount.options else TRUSTED)


def user_namespace_of(container: Container) -> UserNamespace:
    """What it was made with. Raises ConvertError."""
    try:
        linux = json.loads(container.spec).get("linux") or {}
        ranges = [
            tuple(Range(one["containerID"], one["hostID"], one["size"]) for one in linux.get(name) or ())
            for name in ("uidMappings", "gidMappings")
        ]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ConvertError(f"container {container.id}: its OCI runtime specification cannot be read") from None
    return UserNamespace(*ranges)


@contextmanager
def merged_view(layers: Layers, folder: Path) -> Iterator[Callable[[], int]]:
    """Gives a function whose first call mounts upper and lower layers, as one and read only, and that returns a
    descriptor of the mount."""
    with ExitStack() as stack:
        opened: list[int] = []

        def view() -> int:
            if not opened:
                opened.append(stack.enter_context(_mounted(layers, folder / "merged")))
            return opened[0]

        yield view


@contextmanager
def _mounted(layers: Layers, at: Path) -> Iterator[int]:
    at.mkdir()
    options = f"ro,lowerdir={layers.upper}:{layers.lower},redirect_dir=follow,metacopy=on"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ConvertError(
            f"the container renamed lower directories, and overlayfs does not show them to us: {done.stderr.strip()}"
        )
    try:
        descriptor = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    finally:
        subprocess.run(["umount", str(at)], capture_output=True, timeout=60, check=False)


@contextmanager
def root_of(container: Container, pid: int) -> Iterator[int]:
    """A descriptor of the container's root directory with all that is mounted in it. Raises ConvertError."""
    try:
        descriptor = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConvertError(f"the root of container {container.id} (pid {pid}): {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
