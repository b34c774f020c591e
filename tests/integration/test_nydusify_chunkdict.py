"""nydusify chunkdict generate: a dictionary of several images, used by the next conversion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.images import ImageLayout, entry, fetch_manifest
from tests.lab.nydusify import nydusify
from tests.lab.registry import Registry, find_program

pytestmark = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")


def noise(seed: str, size: int = 2 << 20) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def images(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three images that each have a file of their own; the runtime is in all, in layers that are not equal."""
    names = []
    for number in range(3):
        layout = ImageLayout(tmp_path_factory.mktemp(f"image{number}"))
        layer = layout.add_layer([entry("runtime", noise("runtime")), entry("own", noise(f"own{number}", 300_000))])
        layout.finish([layer], cmd=["x"]).push(registry.host, f"lab/app{number}", "plain")
        names.append(f"{registry.host}/lab/app{number}")
    for name in names[:2]:
        nydusify("convert", "--source", f"{name}:plain", "--target", f"{name}:nydus", "--chunk-size", "0x10000",
                 "--work-dir", tmp_path_factory.mktemp("convert"))  # fmt: skip
    return names


def test_the_next_image_stores_only_what_is_new(registry: Registry, images: list[str], tmp_path: Path) -> None:
    target, work = f"{registry.host}/lab/dict:1", tmp_path / "output"
    mark = registry.mark()
    done = nydusify(
        "chunkdict", "generate", "--sources", f"{images[0]}:nydus,{images[1]}:nydus", "--target", target,
        "--work-dir", work,
    )  # fmt: skip
    assert registry.since(mark).blobs().bytes < 200_000, "bootstraps alone are read"
    digest, manifest = fetch_manifest(registry.host, "lab/dict", "1")
    assert done.stdout.strip() == digest
    assert len(manifest["layers"]) == 2
    names = {path.name for path in work.iterdir()}
    assert {"chunkdict_bootstrap", "database.db", "nydus_bootstrap_output.json"} < names
    folder = work / f"{images[0]}:nydus".replace("/", ":")
    assert json.loads((folder / "nydus_manifest.json").read_text())["layers"]
    assert (folder / "image" / "image.boot").exists()

    nydusify(
        "convert", "--source", f"{images[2]}:plain", "--target", f"{images[2]}:nydus", "--chunk-size", "0x10000",
        "--chunk-dict", f"bootstrap:registry:{target}", "--work-dir", tmp_path / "convert",
    )  # fmt: skip
    _, made = fetch_manifest(registry.host, "lab/app2", "nydus")
    assert manifest["layers"][0]["digest"] in [layer["digest"] for layer in made["layers"]]
    assert made["layers"][0]["size"] < 400_000, "its own file, not the runtime"
    nydusify("check", "--source", f"{images[2]}:plain", "--target", f"{images[2]}:nydus", "--no-mount",
             "--work-dir", tmp_path / "check")  # fmt: skip


def test_wrong_use_is_one_clear_line(registry: Registry, images: list[str], tmp_path: Path) -> None:
    nydusify("convert", "--source", f"{images[0]}:plain", "--target", f"{images[0]}:v5", "--fs-version", "5",
             "--work-dir", tmp_path / "convert")  # fmt: skip
    alone = nydusify("chunkdict", "generate", "--sources", f"{images[0]}:nydus", "--work-dir", tmp_path / "o")
    assert "shares no chunk with another image" in alone.stderr
    target = f"{registry.host}/lab/dict:never"
    for flags, code, said in (
        ([], 2, "--sources is required"),
        (["--sources", f"{images[0]}:plain"], 1, "is not a Nydus image"),
        (["--sources", f"{images[0]}:nydus", "--target", target], 1, "no dictionary to push"),
        (["--sources", f"{images[0]}:nydus", "--sources", f"{images[0]}:v5"], 1, "RAFS version 5 instead of 6"),
    ):
        done = nydusify("chunkdict", "generate", *flags, "--work-dir", tmp_path / "o", check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
