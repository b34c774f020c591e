"""nydusify copy: images as they are, between registries, archives and layouts; and out of storage backends."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nydusfs.registry import mediatypes as mt
from nydusfs.registry.client import RegistryClient
from tests.lab.images import Image, ImageLayout, entry, fetch_manifest
from tests.lab.nydusify import nydusify, upstream_nydusify
from tests.lab.registry import Registry, find_program

pytestmark = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")

SIZE = 300_000


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("other")) as running:
        yield running


@dataclass(frozen=True)
class Sample:
    """`lab/app:all`: an index of amd64, an attestation of it, and arm64. `lab/app:nydus` refers to the amd64 image."""

    amd64: Image
    arm64: Image
    index: str
    attestation: str
    nydus: str


def _image(folder: Path, architecture: str) -> Image:
    layout = ImageLayout(folder)
    data = hashlib.shake_128(architecture.encode()).digest(SIZE)
    layer = layout.add_layer([entry("data", data), entry("arch", architecture)])
    return layout.finish([layer], cmd=["x"], architecture=architecture)


@pytest.fixture(scope="module")
def sample(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    images = {name: _image(tmp_path_factory.mktemp(name), name) for name in ("amd64", "arm64")}
    for name, image in images.items():
        image.push(registry.host, "lab/app", name)
    with RegistryClient(registry.host) as client:
        statement = b'{"_type": "https://in-toto.io/Statement/v0.1"}'
        digest = f"sha256:{hashlib.sha256(statement).hexdigest()}"
        client.push_blob("lab/app", digest, len(statement), lambda: io.BytesIO(statement))
        attested = {
            "schemaVersion": 2,
            "mediaType": mt.OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": len(statement)},
            "layers": [{"mediaType": "application/vnd.in-toto+json", "digest": digest, "size": len(statement)}],
        }
        body = json.dumps(attested).encode()
        attestation = client.push_manifest(
            "lab/app", f"sha256:{hashlib.sha256(body).hexdigest()}", mt.OCI_MANIFEST, body
        )
        entries = [
            {**image.manifest.descriptor(), "platform": {"os": "linux", "architecture": name}}
            for name, image in images.items()
        ]
        entries.insert(1, {
            "mediaType": mt.OCI_MANIFEST, "digest": attestation, "size": len(body),
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {"vnd.docker.reference.digest": images["amd64"].manifest.digest},
        })  # fmt: skip
        text = json.dumps({"schemaVersion": 2, "mediaType": mt.OCI_INDEX, "manifests": entries}, indent=5).encode()
        index = client.push_manifest("lab/app", "all", mt.OCI_INDEX, text)
    nydusify(
        "convert", "--source", f"{registry.host}/lab/app:amd64", "--target", f"{registry.host}/lab/app:nydus",
        "--with-referrer", "--work-dir", tmp_path_factory.mktemp("convert"),
    )  # fmt: skip
    nydus, _ = fetch_manifest(registry.host, "lab/app", "nydus")
    return Sample(images["amd64"], images["arm64"], index, attestation, nydus)


def copy(source: str, target: str, work: Path, *flags: str | Path, **options: Any) -> Any:
    done = nydusify("copy", "--source", source, "--target", target, "--work-dir", work / "work", *flags, **options)
    assert not (work / "work").exists()
    return done


def test_all_platforms_keep_their_digest(registry: Registry, other: Registry, sample: Sample, tmp_path: Path) -> None:
    source, target = f"{registry.host}/lab/app:all", f"{other.host}/mirror/app:all"
    done = copy(source, target, tmp_path, "--all-platforms", "--push-chunk-size", "100kB")
    assert done.stdout.strip() == sample.index
    log = other.log.read_text()
    assert log.count('"PATCH /v2/mirror/app/blobs/uploads/') >= 6, "two layers of 300 kB in pieces of 100 kB"
    with RegistryClient(other.host) as client:
        for digest in (sample.amd64.manifest.digest, sample.arm64.manifest.digest, sample.attestation):
            assert client.manifest("mirror/app", digest)
        assert [one["digest"] for one in client.referrers("mirror/app", sample.amd64.manifest.digest)] == [sample.nydus]
        assert client.manifest("mirror/app", sample.nydus)
    mark = registry.mark()
    again = copy(source, target, tmp_path, "--all-platforms")
    assert ", 0 sent, " in again.stderr
    assert registry.since(mark).blobs().count == 0, "what is there is not read again"


def test_one_platform_with_its_attestation(registry: Registry, other: Registry, sample: Sample, tmp_path: Path) -> None:
    source = f"{registry.host}/lab/app:all"
    copy(source, f"{other.host}/one/app:1", tmp_path, "--platform", "linux/amd64", "--no-referrers")
    _, index = fetch_manifest(other.host, "one/app", "1")
    assert [one["digest"] for one in index["manifests"]] == [sample.amd64.manifest.digest, sample.attestation]
    copy(source, f"{other.host}/one/app:2", tmp_path, "--platform", "arm64")
    digest, _ = fetch_manifest(other.host, "one/app", "2")
    assert digest == sample.arm64.manifest.digest
    with RegistryClient(other.host) as client:
        assert client.referrers("one/app", sample.amd64.manifest.digest) == []
    done = copy(source, f"{other.host}/one/app:3", tmp_path, "--platform", "s390x", check=False)
    assert done.returncode == 1
    assert "has no image for linux/s390x; it has: linux/amd64, linux/arm64" in done.stderr


def test_within_a_registry_blobs_are_mounted(registry: Registry, sample: Sample, tmp_path: Path) -> None:
    mark = registry.mark()
    done = copy(f"{registry.host}/lab/app:nydus", f"{registry.host}/moved/app:nydus", tmp_path)
    assert done.stdout.strip() == sample.nydus
    traffic = registry.since(mark)
    assert traffic.blobs().count == 0
    assert not [one for one in traffic.requests if one.method in ("PATCH", "PUT") and "/blobs/" in one.path]


def test_into_an_archive_and_back(registry: Registry, other: Registry, sample: Sample, tmp_path: Path) -> None:
    """Through an archive and a layout directory into another registry: the same image, byte for byte."""
    archive, layout = tmp_path / "image.tar", tmp_path / "layout"
    copy(f"{registry.host}/lab/app:nydus", f"file://{archive}", tmp_path)
    copy(f"file://{archive}", f"file://{layout}", tmp_path)
    done = copy(f"file://{layout}", f"{other.host}/back/app:1", tmp_path)
    assert done.stdout.strip() == sample.nydus
    check = nydusify(
        "check", "--target", f"{other.host}/back/app:1", "--source", f"{registry.host}/lab/app:amd64", "--no-mount",
        "--work-dir", tmp_path / "output",
    )  # fmt: skip
    assert "verified image" in check.stderr
    copy(f"{registry.host}/lab/app:all", f"file://{tmp_path}/all.tar", tmp_path, "--all-platforms")
    back = copy(f"file://{tmp_path}/all.tar", f"{other.host}/back/app:all", tmp_path, "--all-platforms")
    assert back.stdout.strip() == sample.index


@pytest.mark.interop
def test_archives_work_in_both_directions(registry: Registry, sample: Sample, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    work = ["--source-insecure", "--target-insecure", "--work-dir", tmp_path / "up"]
    copy(f"{registry.host}/lab/app:nydus", f"file://{ours}", tmp_path)
    done = upstream_nydusify(
        tmp_path, "copy", "--source", f"file://{ours}", "--target", f"{registry.host}/up/app:1", *work
    )
    assert done.returncode == 0, done.stderr
    assert fetch_manifest(registry.host, "up/app", "1")[0] == sample.nydus
    done = upstream_nydusify(
        tmp_path, "copy", "--source", f"{registry.host}/lab/app:nydus", "--target", f"file://{theirs}", *work
    )
    assert done.returncode == 0, done.stderr
    back = copy(f"file://{theirs}", f"{registry.host}/up/app:2", tmp_path)
    assert back.stdout.strip() == sample.nydus


def test_blobs_of_a_reference_image_move_along(
    registry: Registry, other: Registry, sample: Sample, tmp_path: Path
) -> None:
    """The plain layer that a reference layer points to is in no manifest: without it the copy could not be read."""
    _, manifest = fetch_manifest(registry.host, "lab/app", "nydus")
    plain = sample.amd64.layers[0].blob
    manifest["layers"][0]["annotations"][mt.ANNOTATION_REF] = plain.digest
    with RegistryClient(registry.host) as client:
        client.push_manifest("lab/app", "ref", mt.OCI_MANIFEST, json.dumps(manifest).encode())
    copy(f"{registry.host}/lab/app:ref", f"{other.host}/ref/app:1", tmp_path, "--no-referrers")
    with RegistryClient(other.host) as client:
        assert client.blob_size("ref/app", plain.digest) == plain.size


def test_blobs_of_a_backend_become_layers(registry: Registry, other: Registry, sample: Sample, tmp_path: Path) -> None:
    _, full = fetch_manifest(registry.host, "lab/app", "nydus")
    blobs, bare = tmp_path / "blobs", dict(full)
    blobs.mkdir()
    with RegistryClient(registry.host) as client:
        for layer in full["layers"][:-1]:
            with client.open_blob("lab/app", layer["digest"]) as stream:
                (blobs / layer["digest"].removeprefix("sha256:")).write_bytes(stream.read())
        config = json.loads(client.blob("lab/app", full["config"]["digest"], 1 << 20))
        config["rootfs"]["diff_ids"] = config["rootfs"]["diff_ids"][-1:]
        body = json.dumps(config).encode()
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        client.push_blob("lab/app", digest, len(body), lambda: io.BytesIO(body))
        bare["layers"] = full["layers"][-1:]
        bare["config"] = {**full["config"], "digest": digest, "size": len(body)}
        bare.pop("subject")
        client.push_manifest("lab/app", "bare", mt.OCI_MANIFEST, json.dumps(bare).encode())
    backend = ["--source-backend-type", "localfs", "--source-backend-config", json.dumps({"dir": str(blobs)})]
    copy(f"{registry.host}/lab/app:bare", f"{other.host}/filled/app:1", tmp_path, *backend)
    _, filled = fetch_manifest(other.host, "filled/app", "1")
    assert filled["layers"] == full["layers"]
    nydusify(
        "check", "--target", f"{other.host}/filled/app:1", "--source", f"{registry.host}/lab/app:amd64", "--no-mount",
        "--work-dir", tmp_path / "output",
    )  # fmt: skip
    for path in blobs.iterdir():
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    target = f"{other.host}/damaged/app:1"
    done = copy(f"{registry.host}/lab/app:bare", target, tmp_path, *backend, check=False)
    assert done.returncode == 1
    assert "layers are named by their digest" in done.stderr
    shutil.rmtree(blobs)
    done = copy(f"{registry.host}/lab/app:bare", target, tmp_path, *backend, check=False)
    assert "does not exist in" in done.stderr
    with pytest.raises(OSError, match="404"):
        fetch_manifest(other.host, "damaged/app", "1")


def test_wrong_use_is_one_clear_line(registry: Registry, sample: Sample, tmp_path: Path) -> None:
    source = f"{registry.host}/lab/app:all"
    for flags, code, said in (
        (["--source", source], 2, "--target is required"),
        (["--source", source, "--target", "x:1", "--platform", "amd64", "--all-platforms"], 2, "exclude each other"),
        (["--source", source, "--target", f"{source}@{sample.index}"], 1, "a digest cannot be pushed to"),
        (["--source", f"file://{tmp_path}/none.tar", "--target", source], 1, "none.tar"),
        (["--source", source, "--target", "x:1", "--source-backend-type", "nfs"], 1, "'nfs' is not one of"),
        (["--source", source, "--target", "x:1", "--source-backend-type", "oss"], 1, "needs --source-backend-config"),
        (["--source", source, "--target", "x:1", "--push-chunk-size", "big"], 2, "'big' is not a size"),
    ):  # fmt: skip
        done = nydusify("copy", *flags, "--work-dir", tmp_path / "w", check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr


@pytest.mark.parametrize(
    "document",
    [
        {"layers": {"a": 1}},
        {"layers": [5]},
        {"config": 5},
        {"config": {"digest": "sha256:0", "size": 1}},
        {"layers": [{"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": -1}]},
        {"manifests": {}},
        {"manifests": [{"mediaType": mt.OCI_MANIFEST, "digest": f"sha256:{'0' * 64}", "size": 2, "annotations": 3}]},
        {"schemaVersion": 1, "fsLayers": []},
        [],
    ],
)
def test_hostile_manifests_are_one_clear_line(document: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from nydusfs.convert.cli import cli
    from nydusfs.errors import NydusError

    layout = ImageLayout(tmp_path / "layout")
    kind = mt.OCI_INDEX if isinstance(document, dict) and "manifests" in document else mt.OCI_MANIFEST
    layout.finish([])
    blob = layout.add_blob(json.dumps(document).encode(), kind)
    (tmp_path / "layout" / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [blob.descriptor()]}))
    target = tmp_path / "target"
    done = CliRunner().invoke(
        cli,
        ["copy", "--source", f"oci:{layout.directory}", "--target", f"oci:{target}", "--work-dir", str(tmp_path / "w")],
    )
    assert isinstance(done.exception, NydusError), done.exception
    assert str(layout.directory) in str(done.exception)
    assert not (target / "index.json").exists()
