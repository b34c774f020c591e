"""Mount options for runtimes that bring an image into a virtual machine themselves (snapshotter.md 2.7).

`extraoption` describes a Nydus image to upstream's drivers, `io.katacontainers.volume` any kind of volume to Kata
Containers. Both are base64 of JSON. `nydus-overlayfs` takes them out again where an overlay is mounted after all.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotter.labels import IMAGE_REF, LAYER_DIGEST, PROXY

MOUNT_TYPE = "nydus-overlayfs"
NO_IMAGE = "dummy-image-reference"  # Kata takes the image from the container's annotations then
_V6_AT, _V6_MAGIC = 1024, b"\xe2\xe1\xf5\xe0"


@dataclass(frozen=True)
class VolumeSettings:
    extra: bool = False  # `extraoption` with every Nydus image
    kata: bool = False  # `io.katacontainers.volume` where there is a volume
    helper: str = ""  # name or path of the mount helper

    @property
    def mount_type(self) -> str:
        return f"fuse.{self.helper or MOUNT_TYPE}"


def extra_option(bootstrap: Path, config: str, directory: Path) -> str:
    """`config` is nydusd's JSON and may hold a registry password: so does what is returned."""
    with bootstrap.open("rb") as file:
        file.seek(_V6_AT)
        version = "v6" if file.read(4) == _V6_MAGIC else "v5"
    described = {"source": str(bootstrap), "config": config, "snapshotdir": str(directory), "fs_version": version}
    return f"extraoption={_encode(described)}"


def guest_pull(labels: Mapping[str, str]) -> str:
    """The image is pulled in the guest. `labels`: of its top layer."""
    told = {key: labels[key] for key in (LAYER_DIGEST, PROXY) if key in labels}
    volume: dict[str, Any] = {"volume_type": "image_guest_pull", "source": labels.get(IMAGE_REF) or NO_IMAGE}
    if told:
        volume["options"] = [f"{key}={value}" for key, value in told.items()]
    volume["image_pull"] = {"metadata": told}
    return _kata(volume)


def raw_block(kind: str, disk: Path, verity: Mapping[str, Any] | None) -> str:
    """`kind`: image or layer. `disk`: an EROFS image that the guest gets as a block device."""
    volume = {"volume_type": f"{kind}_raw_block", "source": str(disk), "fs_type": "erofs", "options": ["ro"]}
    return _kata({**volume, "dm_verity": dict(verity)} if verity else volume)


def _kata(volume: Mapping[str, Any]) -> str:
    return f"io.katacontainers.volume={_encode(volume)}"


def _encode(value: Mapping[str, Any]) -> str:
    return base64.b64encode(json.dumps(value, separators=(",", ":")).encode()).decode()
