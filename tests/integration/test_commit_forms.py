"""Layers that commits add, on images of every form that upstream makes: plain, batched, zran, version 5."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from bootstrap.build import build_layer
from nydusfs.convert.commit import NewLayer, assemble, layer_options
from nydusfs.convert.derive import push_layers
from nydusfs.convert.endpoints import Connections, parse_location
from nydusfs.convert.images import load_images
from nydusfs.convert.layers import write_tail
from nydusfs.convert.nydusimage import pick_nydus, unpack_image
from nydusfs.convert.progress import Quiet
from nydusfs.convert.pushing import Pusher
from tests.lab.images import entry
from tests.lab.nydusify import nydusify
from tests.lab.paths import shared_dir

CHANGES = [entry("fresh", b"x" * 200_000), entry(".wh.big1", b""), entry("etc/keep", b"changed")]


@pytest.mark.interop
@pytest.mark.parametrize("name", ["v5", "v6", "index", "zran"])
def test_a_layer_on_top(tmp_path: Path, name: str) -> None:
    shared = shared_dir()
    if shared is None:
        pytest.skip("interop: no reference fixtures here")
    oci = shared / "fixtures" / "reference" / "oci"
    base = oci / name
    if name == "zran":
        base = tmp_path / "zran"
        shutil.copytree(oci / "zran", base)
        shutil.copytree(oci / "oci" / "blobs", base / "blobs", dirs_exist_ok=True)
    target = tmp_path / "made"
    with (
        Connections() as connections,
        parse_location(f"oci:{base}").open(connections) as source,
        parse_location(f"oci:{target}", create=True).open(connections, create=True) as made,
        Pusher(made, Quiet()) as pusher,
    ):
        image, _ = pick_nydus(load_images(source, None))
        below = unpack_image(image, tmp_path / "base")
        push_layers(pusher, source, image)
        layer = _layer(tmp_path, below)
        pusher.file(layer.digest, layer.blob)
        media_type, body = assemble(below, [layer], [], tmp_path, pusher)
        pusher.wait()
        pusher.image(media_type, body)
    done = nydusify(
        "check", "--target", f"oci:{target}", "--source", f"oci:{oci / 'oci'}", "--no-mount", "--work-dir",
        tmp_path / "output", check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "/fresh: only in the target",
        "/big1: missing in the target",
        "/etc/keep: size: source 500, target 7",
        "/etc/keep: mtime: source 1600000000, target 1700000000",
    ], done.stderr


def _layer(folder: Path, below: object) -> NewLayer:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for info, data in CHANGES:
            archive.addfile(info, io.BytesIO(data or b""))
    tar.seek(0)
    with (folder / "blob").open("wb") as out:
        result = build_layer(tar, out, layer_options(below))  # type: ignore[arg-type]
    boot, meta, _ = write_tail(folder / "blob", folder)
    return NewLayer(f"sha256:{result.blob_sha256}", folder / "blob", boot, meta)
