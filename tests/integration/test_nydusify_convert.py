"""nydusify convert with every kind of result and place, against what upstream makes of the same source."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nydusfs.convert.endpoints import Connections, parse_location
from nydusfs.convert.images import load_images
from nydusfs.convert.progress import Quiet
from nydusfs.convert.sourcetree import Node
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.client import RegistryClient
from tests.lab.forward import forwarding
from tests.lab.httpd import Handler, body_of, reply
from tests.lab.images import Image, ImageLayout, entry, fetch_manifest
from tests.lab.nydusify import failed, nydusify, start_nydusify, upstream_nydusify
from tests.lab.objects import object_server
from tests.lab.process import wait_until
from tests.lab.registry import Registry, find_program

pytestmark = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")

PREFIX = "containerd.io/snapshot/nydus-"
SIZE = 200_000


def _noise(size: int, seed: int) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def image(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Three gzip layers: data, a whiteout and nothing else, small files that batches like. Also as `docker` in Docker's
    media types."""
    layout = ImageLayout(tmp_path_factory.mktemp("image"))
    bottom = layout.add_layer([
        entry("bin", mode=0o755), entry("bin/tool", _noise(SIZE, 1), mode=0o4755), entry("gone", "x"),
        entry("bin/same", kind=tarfile.LNKTYPE, link="bin/tool", mode=0o4755), entry("lib", link="usr/lib"),
        entry("usr"), entry("usr/lib"), entry("usr/lib/a", "text " * 5000),
    ])  # fmt: skip
    middle = layout.add_layer([entry(".wh.gone", "")])
    top = layout.add_layer(
        [entry("etc"), *(entry(f"etc/{n}", f"{n} " * 300, xattrs={"user.n": "1"}) for n in range(9))]
    )
    built = layout.finish([bottom, middle, top], entrypoint=["/bin/tool"], cmd=["x"])
    built.push(registry.host, "lab/app", "oci")
    document = json.loads(built.manifest.path.read_bytes())
    document["mediaType"] = mt.DOCKER_MANIFEST
    document["config"]["mediaType"] = mt.DOCKER_CONFIG
    for layer in document["layers"]:
        layer["mediaType"] = mt.DOCKER_LAYER_GZIP
    arm = ImageLayout(tmp_path_factory.mktemp("arm"))
    other = arm.finish([arm.add_layer([entry("arm", "64")])], architecture="arm64")
    other.push(registry.host, "lab/app", "arm64")
    listed = [(built, "amd64"), (other, "arm64")]
    with RegistryClient(registry.host) as client:
        body = json.dumps(document).encode()
        docker = client.push_manifest("lab/app", "docker", mt.DOCKER_MANIFEST, body)
        entries = [
            {**one.manifest.descriptor(), "platform": {"architecture": name, "os": "linux"}} for one, name in listed
        ]
        _push_index(client, "multi", mt.OCI_INDEX, entries)
        entry_ = {"mediaType": mt.DOCKER_MANIFEST, "size": len(body), "digest": docker}
        _push_index(
            client, "docker-list", mt.DOCKER_LIST, [{**entry_, "platform": {"architecture": "amd64", "os": "linux"}}]
        )
    convert(registry, tmp_path_factory.mktemp("5"), "app:oci", "app:5", "--fs-version", "5")
    return built


def _push_index(client: RegistryClient, tag: str, media_type: str, entries: list[dict[str, Any]]) -> None:
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries, "annotations": {"a": "b"}}
    client.push_manifest("lab/app", tag, media_type, json.dumps(document).encode())


def convert(registry: Registry, work: Path, source: str, target: str, *flags: str | Path) -> None:
    nydusify(
        "convert", "--source", f"{registry.host}/lab/{source}", "--target", f"{registry.host}/lab/{target}",
        "--work-dir", work / "work", *flags,
    )  # fmt: skip


def upstream(registry: Registry, work: Path, source: str, target: str, *flags: str | Path) -> None:
    done = upstream_nydusify(
        work, "convert", "--source", f"{registry.host}/lab/{source}", "--target", f"{registry.host}/lab/{target}",
        "--source-insecure", "--target-insecure", "--work-dir", work / "up", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


class Seen:
    """An image as one document: all that is named by digest put in its place, but for what may differ, which is the
    compression of the bootstrap layer and the builder's version."""

    def __init__(self, registry: Registry, repository: str) -> None:
        self.client = RegistryClient(registry.host)
        self.repository = f"lab/{repository}"

    def image(self, selector: str) -> Any:
        found = self.client.manifest(self.repository, selector)
        document = json.loads(found.body)
        compact = "manifests" in document and "mediaType" in document  # but a merged index is not
        form = {"separators": (",", ":")} if compact else {"indent": 2}
        assert found.body == json.dumps(document, ensure_ascii=False, **form).encode(), "upstream's form"  # type: ignore[arg-type]
        if "manifests" in document:
            listed = [self._listed(one) for one in document["manifests"]]
            return {**document, "mediaType": found.media_type, "manifests": listed}
        config = document["config"]
        body = self.blob(config.pop("digest"))
        config["content"], config["size"] = json.loads(body), len(body)
        assert body in (
            json.dumps(config["content"], separators=(",", ":"), ensure_ascii=False).encode(),
            json.dumps(config["content"], indent=2, ensure_ascii=False).encode(),
        )
        last = document["layers"][-1]
        if last.get("annotations", {}).get(f"{PREFIX}bootstrap"):
            layer = gzip.decompress(self.blob(last.pop("digest")))
            last["size"] = "?"
            with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
                members = archive.getmembers()
                last["boot"] = archive.extractfile("image/image.boot").read()  # type: ignore[union-attr]
                last["tar"] = [(one.name, one.mode, one.uid, one.mtime, one.size) for one in members]
        document.get("annotations", {}).pop(f"{PREFIX}builder-version", None)
        return document

    def _listed(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "digest": self.image(one["digest"]), "size": "?"}

    def blob(self, digest: str) -> bytes:
        return self.client.blob(self.repository, digest, 1 << 26)


SAME = {
    "v6-lz4": ["--compressor", "lz4_block"],
    "v6-none-64k": ["--compressor", "none", "--chunk-size", "0x10000"],
    "v5-aligned": ["--compressor", "none", "--fs-version", "5", "--fs-align-chunk", "--chunk-size", "0x1000"],
    "v6-batch": ["--compressor", "lz4_block", "--batch-size", "0x10000"],
    "oci-ref": ["--oci-ref"],
    "merged": ["--compressor", "none", "--merge-platform", "--with-referrer"],
    "docker": ["--compressor", "none", "--merge-platform"],
    "docker-to-oci": ["--compressor", "none", "--oci", "--merge-platform"],
    "multi": ["--compressor", "none", "--all-platforms"],
    "multi-merged": ["--compressor", "none", "--all-platforms", "--merge-platform"],
    "docker-list": ["--compressor", "none", "--all-platforms"],
    "docker-list-to-oci": ["--compressor", "none", "--all-platforms", "--oci"],
    "backend": ["--compressor", "none", "--backend-type", "localfs"],
    "dictionary": ["--compressor", "none", "--chunk-dict"],
}


@pytest.mark.interop
@pytest.mark.parametrize("case", SAME)
def test_upstream_makes_the_same_image(case: str, registry: Registry, image: Image, tmp_path: Path) -> None:
    """Blobs, manifests, configs, indexes: the same but for the compression of the bootstrap layer. `/` is upstream's
    list of what to fetch ahead when none is given; ours is empty."""
    sources = {"docker-list": "app:docker-list", "docker": "app:docker", "multi": "app:multi"}
    source = next((source for start, source in sources.items() if case.startswith(start)), "app:oci")
    made: list[Any] = []
    for number, (run, more) in enumerate(((upstream, ()), (convert, ("--prefetch-dir", "/")))):
        flags: list[str | Path] = [*more, *SAME[case]]
        if case == "backend":
            flags += ["--backend-config", json.dumps({"dir": str(tmp_path / f"blobs-{number}")})]
        if case == "dictionary":
            if number == 0:
                run(registry, tmp_path, "app:oci", "dictionary:x", "--compressor", "none", "--chunk-size", "0x20000")
            flags += [f"bootstrap:registry:{registry.host}/lab/dictionary:x", "--chunk-dict-insecure"]
            flags += ["--chunk-size", "0x20000"]
        run(registry, tmp_path, source, f"{case}-{number}:x", *flags)
        made.append(Seen(registry, f"{case}-{number}").image("x"))
    if case in ("v6-lz4", "v6-batch"):  # upstream leaves out chunk tables that lz4 compressed
        _forget_tables(made)
    assert made[0] == made[1]
    if case == "backend":
        theirs, ours = ({path.name: path.read_bytes() for path in (tmp_path / f"blobs-{n}").iterdir()} for n in (0, 1))
        assert theirs == ours


def _forget_tables(images: list[Any]) -> None:
    for one in images:
        del one["layers"][-1]["tar"]
        one["config"]["content"]["rootfs"]["diff_ids"].pop()


@pytest.mark.root
@pytest.mark.interop
@pytest.mark.parametrize("case", ["v6-batch", "oci-ref", "dictionary"])
def test_both_programs_check_it(case: str, registry: Registry, image: Image, tmp_path: Path) -> None:
    """Through a mount: upstream's nydusd reads what ours wrote, ours too."""
    flags: list[str | Path] = list(SAME[case])
    if case == "dictionary":
        convert(registry, tmp_path, "app:oci", "app:some", "--compressor", "none")
        flags += [f"bootstrap:registry:{registry.host}/lab/app:some"]
    convert(registry, tmp_path, "app:oci", f"app:{case}", *flags)
    arguments = ["check", "--source", f"{registry.host}/lab/app:oci", "--target", f"{registry.host}/lab/app:{case}"]
    done = nydusify(*arguments, "--work-dir", tmp_path / "ours")
    assert done.returncode == 0, done.stdout + done.stderr
    insecure = ("--source-insecure", "--target-insecure")
    done = upstream_nydusify(tmp_path, *arguments, *insecure, "--work-dir", tmp_path / "theirs")
    assert done.returncode == 0, done.stdout + done.stderr


# -- back again


def tree(reference: str) -> dict[str, Any]:
    """What a plain image unpacks to, by our own model of OCI layering."""
    from nydusfs.convert.check import source_tree

    def flat(node: Node, path: str) -> Iterator[tuple[str, Any]]:
        yield path, node.facts
        for name, child in (node.children or {}).items():
            yield from flat(child, f"{path}/{os.fsdecode(name)}")

    with Connections() as connections:
        endpoint = parse_location(reference).open(connections)
        return dict(flat(source_tree(load_images(endpoint, None).images[0], Quiet()), ""))


@pytest.mark.parametrize("kind", ["v6", "v5", "oci-ref", "dictionary", "backend"])
def test_reverse_gives_the_source_back(kind: str, registry: Registry, image: Image, tmp_path: Path) -> None:
    config = json.dumps({"dir": str(tmp_path / "blobs")})
    flags = {
        "v6": ["--batch-size", "0x10000"],
        "v5": ["--fs-version", "5"],
        "oci-ref": ["--oci-ref"],
        "dictionary": ["--chunk-dict", f"bootstrap:registry:{registry.host}/lab/app:some"],
        "backend": ["--backend-type", "localfs", "--backend-config", config],
    }[kind]
    if kind == "dictionary":
        convert(registry, tmp_path, "app:oci", "app:some", "--compressor", "none")
    convert(registry, tmp_path, "app:oci", f"app:n-{kind}", *flags)
    more = ["--source-backend-type", "localfs", "--source-backend-config", config] if kind == "backend" else []
    convert(registry, tmp_path, f"app:n-{kind}", f"app:r-{kind}", "--reverse", *more)
    assert tree(f"{registry.host}/lab/app:r-{kind}") == tree(f"{registry.host}/lab/app:oci")
    manifest = fetch_manifest(registry.host, "lab/app", f"r-{kind}")[1]
    with RegistryClient(registry.host) as client:
        after = json.loads(client.blob("lab/app", manifest["config"]["digest"], 1 << 20))
    before = json.loads(image.config.path.read_bytes())
    assert {**after, "rootfs": 0, "history": 0} == {**before, "rootfs": 0, "history": 0}
    assert len(manifest["layers"]) == len(after["rootfs"]["diff_ids"]) == len(after["history"])
    if kind != "backend":
        assert after["history"] == before["history"]
    if kind == "oci-ref":
        assert [one["digest"] for one in manifest["layers"]] == [layer.blob.digest for layer in image.layers]
    if kind == "backend":
        done = nydusify(
            "convert", "--source", f"{registry.host}/lab/app:n-backend", "--target", f"{registry.host}/lab/app:x",
            "--reverse", "--work-dir", tmp_path / "w", check=False,
        )  # fmt: skip
        failed(done, "--source-backend-type")


# -- places


@pytest.mark.interop
def test_layouts_and_archives_are_places_like_registries(registry: Registry, image: Image, tmp_path: Path) -> None:
    """One source in four places, one target in three: the same image everywhere; upstream reads our archive."""
    archive, save, layout = tmp_path / "a.tar", tmp_path / "save.tar.gz", tmp_path / "layout"
    subprocess.run(["tar", "-C", image.directory, "-cf", archive, "."], check=True, timeout=60)
    _docker_save(image, save)
    name = f"{registry.host}/lab/app:oci"
    targets = {"r": f"{registry.host}/lab/places:x", "l": f"oci:{layout}:x", "a": f"{tmp_path}/out.tar"}
    digests = set()
    for number, (source, target, flags) in enumerate([
        (name, targets["r"], []),
        (f"oci:{image.directory}", targets["l"], []),
        (name, targets["a"], ["--source-archive", archive]),
        (name, "x.io/y:z", ["--source-archive", f"oci:{image.directory}", "--target-archive", tmp_path / "b.tar"]),
    ]):  # fmt: skip
        done = nydusify("convert", "--source", source, "--target", target, "--work-dir", tmp_path / "w",
                        "--compressor", "none", *flags)  # fmt: skip
        assert done.returncode == 0, done.stderr
        digests.add(done.stderr.rpartition("sha256:")[2][:64] if number != 1 else "")
    assert len(digests - {""}) == 1, "the source's name is part of the image, its place is not"
    blobs = fetch_manifest(registry.host, "lab/places", "x")[1]["layers"][:3]
    assert all((layout / "blobs" / "sha256" / blob["digest"][7:]).exists() for blob in blobs)
    with tarfile.open(tmp_path / "b.tar") as made:
        assert {f"blobs/sha256/{blob['digest'][7:]}" for blob in blobs} < set(made.getnames())

    nydusify("convert", "--source", f"docker-archive:{save}", "--target", f"{tmp_path}/d.tar", "--compressor",
                    "none", "--work-dir", tmp_path / "w")  # fmt: skip
    with Connections() as connections:
        saved = load_images(parse_location(f"{tmp_path}/d.tar").open(connections), None).images[0]
    assert [layer.digest for layer in saved.layers[:3]] == [blob["digest"] for blob in blobs]
    assert saved.media_type == mt.DOCKER_MANIFEST

    nydusify("convert", "--reverse", "--source", targets["a"], "--target", f"{tmp_path}/plain.tar",
                    "--work-dir", tmp_path / "w")  # fmt: skip
    assert tree(f"{tmp_path}/plain.tar") == tree(name)
    done = upstream_nydusify(
        tmp_path, "convert", "--source", "x.io/plain:1", "--target", "x.io/n:1",
        "--source-archive", tmp_path / "plain.tar", "--target-archive", tmp_path / "theirs.tar",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = nydusify("check", "--no-mount", "--source", f"{tmp_path}/plain.tar", "--target", f"{tmp_path}/theirs.tar",
                    "--work-dir", tmp_path / "o")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def _docker_save(image: Image, path: Path) -> None:
    item: dict[str, Any] = {"Config": "config.json", "RepoTags": ["app:saved"], "Layers": []}
    with tarfile.open(path, "w:gz") as archive:
        for number, layer in enumerate(image.layers):
            plain = gzip.decompress(layer.blob.path.read_bytes())
            info = tarfile.TarInfo(f"{number}/layer.tar")
            info.size = len(plain)
            archive.addfile(info, io.BytesIO(plain))
            item["Layers"].append(info.name)
        archive.add(image.config.path, "config.json")
        info = tarfile.TarInfo("manifest.json")
        body = json.dumps([item]).encode()
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))


@pytest.mark.parametrize("kind", ["s3", "oss"])
def test_blobs_in_buckets(kind: str, registry: Registry, image: Image, tmp_path: Path) -> None:
    """There, not sent again unless forced, and read back."""
    with object_server(kind) as bucket:
        config = json.dumps(bucket.config(object_prefix="nydus/"))
        flags = ("--backend-type", kind, "--backend-config", config)

        def puts() -> int:
            return sum(one.method == "PUT" for one in bucket.requests)

        convert(registry, tmp_path, "app:oci", f"app:{kind}", *flags)
        assert len(bucket.objects) == puts() == 3 and all(key.startswith("nydus/") for key in bucket.objects)
        convert(registry, tmp_path, "app:oci", f"app:{kind}", *flags)
        assert puts() == 3
        convert(registry, tmp_path, "app:oci", f"app:{kind}", *flags, "--backend-force-push")
        assert puts() == 6
        source = ("--source-backend-type", kind, "--source-backend-config", config)
        convert(registry, tmp_path, f"app:{kind}", f"app:plain-{kind}", "--reverse", *source)
    assert len(fetch_manifest(registry.host, "lab/app", kind)[1]["layers"]) == 1
    assert tree(f"{registry.host}/lab/app:plain-{kind}") == tree(f"{registry.host}/lab/app:oci")


def test_the_source_knows_its_nydus_image(registry: Registry, image: Image, tmp_path: Path) -> None:
    convert(registry, tmp_path, "app:oci", "app:referring", "--with-referrer")
    with RegistryClient(registry.host) as client:
        found = client.referrers("lab/app", image.manifest.digest)
        assert [one["digest"] for one in found] == [client.manifest_digest("lab/app", "referring")]


def test_a_layer_may_come_twice(registry: Registry, tmp_path: Path) -> None:
    layout = ImageLayout(tmp_path / "image")
    one, other = layout.add_layer([entry("a", "1" * 9000)]), layout.add_layer([entry(".wh.a", "")])
    layout.finish([one, other, one]).push(registry.host, "lab/twice", "oci")
    convert(registry, tmp_path, "twice:oci", "twice:n")
    digests = [layer["digest"] for layer in fetch_manifest(registry.host, "lab/twice", "n")[1]["layers"]]
    assert digests[0] == digests[2] and len(digests) == 4
    nydusify("check", "--no-mount", "--source", f"{registry.host}/lab/twice:oci", "--target",
             f"{registry.host}/lab/twice:n", "--work-dir", tmp_path / "o")  # fmt: skip
    convert(registry, tmp_path, "twice:n", "twice:r", "--reverse")
    assert tree(f"{registry.host}/lab/twice:r") == tree(f"{registry.host}/lab/twice:oci")


def test_references_need_gzip(registry: Registry, tmp_path: Path) -> None:
    """Told by the media type, and by the bytes where that lies."""
    layout = ImageLayout(tmp_path / "image")
    layer = layout.add_layer([entry("a", "x" * 9000)], "zstd")
    layout.finish([layer]).push(registry.host, "lab/zstd", "honest")
    lying = replace(layer, blob=replace(layer.blob, media_type=mt.OCI_LAYER_GZIP))
    layout.finish([lying]).push(registry.host, "lab/zstd", "lying")
    for name in ("honest", "lying"):
        done = nydusify(
            "convert", "--source", f"{registry.host}/lab/zstd:{name}", "--target", f"{registry.host}/lab/zstd:n",
            "--work-dir", tmp_path / "w", "--oci-ref", check=False,
        )  # fmt: skip
        failed(done, layer.blob.digest, "zstd", "no random access")


def test_references_elsewhere_take_the_layers_along(registry: Registry, image: Image, tmp_path: Path) -> None:
    """Upstream leaves an OCI-ref image in another repository without its data."""
    convert(registry, tmp_path, "app:oci", "elsewhere:ref", "--oci-ref")
    with RegistryClient(registry.host) as client:
        for layer in image.layers:
            assert client.has_blob("lab/elsewhere", layer.blob.digest)


# -- interruptions


@pytest.fixture(scope="module")
def large(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Large enough for worker processes, layers of different sizes."""
    layout = ImageLayout(tmp_path_factory.mktemp("large"))
    layers = [layout.add_layer([entry(f"f{n}", _noise((n + 1) << 20, n))], level=1) for n in range(4)]
    built = layout.finish(layers)
    built.push(registry.host, "lab/large", "oci")
    return built


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_conversion_goes_on_where_it_was(
    how: signal.Signals, registry: Registry, large: Image, tmp_path: Path
) -> None:
    """The second blob that is pushed hangs; the program is killed; the next one needs neither build nor push again what
    was there, and nothing was tagged in between."""
    name = f"interrupted{how.value}"
    hanging, go = threading.Event(), threading.Event()
    puts: list[str] = []

    def trouble(handler: Handler) -> bool:
        if handler.command == "PUT" and "/uploads/" in handler.path and f"/{name}/" in handler.path:
            puts.append(handler.path)
            if len(puts) == 2:
                hanging.set()
                go.wait(100)
                handler.close_connection = True
                return True
        return False

    with forwarding(registry.host, trouble) as proxy:
        arguments = [
            "convert", "--source", f"{proxy.host}/lab/large:oci", "--target", f"{proxy.host}/lab/{name}:n",
            "--build-cache", f"{proxy.host}/lab/{name}-cache:c", "--work-dir", tmp_path / "w", "--compressor", "none",
        ]  # fmt: skip
        running = start_nydusify(*arguments)
        assert hanging.wait(60), "no second blob was pushed"
        with RegistryClient(registry.host) as client:
            _until_stored(client, f"lab/{name}-cache")
            running.send_signal(how)
            errors = running.communicate(timeout=30)[1]
            go.set()
            assert running.returncode == (130 if how == signal.SIGINT else -9), errors
            assert client.manifest_digest(f"lab/{name}", "n") is None
        if how == signal.SIGINT:
            assert not (tmp_path / "w").exists(), "the working folder is removed"
        mark = registry.mark()
        done = nydusify(*arguments)
        assert done.returncode == 0, done.stderr
    cached = int(done.stderr.partition("(cached ")[2].partition("/")[0])
    assert 1 <= cached <= 3, done.stderr
    requests = registry.since(mark).requests
    sources = [one.path.rpartition("/")[2] for one in registry.since(mark).blobs().requests if one.size > 1 << 20]
    assert len(set(sources) & {layer.blob.digest for layer in large.layers}) == 4 - cached, "known layers stay unread"
    again = [one.path for one in requests if one.method == "PUT" and f"/{name}/blobs/uploads" in one.path]
    first = puts[0].rpartition("digest=")[2]
    assert not [path for path in again if first in path], "what was pushed is not pushed again"
    done = nydusify("check", "--no-mount", "--source", f"{registry.host}/lab/large:oci", "--target",
                    f"{registry.host}/lab/{name}:n", "--work-dir", tmp_path / "o")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def _until_stored(client: RegistryClient, repository: str) -> None:
    wait_until(lambda: client.manifest_digest(repository, "c") is not None, 50, "the first layer's record")


def test_a_registry_that_fails_midway_leaves_no_image(registry: Registry, large: Image, tmp_path: Path) -> None:
    refused: list[str] = []

    def trouble(handler: Handler) -> bool:
        if handler.command == "PUT" and "/uploads/" in handler.path and len(refused) < 99:
            body_of(handler)
            refused.append(handler.path)
            reply(handler, 507, b'{"errors": [{"code": "UNKNOWN", "message": "disk full"}]}')
            return True
        return False

    with forwarding(registry.host, trouble) as proxy:
        done = nydusify(
            "convert", "--source", f"{proxy.host}/lab/large:oci", "--target", f"{proxy.host}/lab/midway:n",
            "--work-dir", tmp_path / "w", "--push-retry-count", "1", "--push-retry-delay", "10ms", check=False,
        )  # fmt: skip
    failed(done, "507", "disk full")
    assert not (tmp_path / "w").exists()
    with RegistryClient(registry.host) as client:
        assert client.manifest_digest("lab/midway", "n") is None


def test_wrong_bytes_of_a_source_are_fetched_again(registry: Registry, image: Image, tmp_path: Path) -> None:
    """Once the layer comes damaged (as broken proxies do it), then well; a source that stays wrong is named."""
    layer = image.layers[0].blob
    lies = 1

    def trouble(handler: Handler) -> bool:
        nonlocal lies
        if handler.command == "GET" and handler.path.endswith(layer.digest) and lies:
            lies -= 1
            data = bytearray(layer.path.read_bytes())
            data[len(data) // 2] ^= 1
            reply(handler, 200, bytes(data))
            return True
        return False

    with forwarding(registry.host, trouble) as proxy:
        arguments = ("convert", "--source", f"{proxy.host}/lab/app:oci", "--target", f"{registry.host}/lab/lied:n",
                     "--work-dir", tmp_path / "w")  # fmt: skip
        done = nydusify(*arguments)
        assert done.returncode == 0, done.stderr
        assert "again" in done.stderr
        lies = 99
        failed(nydusify(*arguments, check=False), layer.digest, "the bytes received have digest")


# -- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", "0x1001"], "batch size"),
        (["--batch-size", "0x1000", "--fs-version", "5"], "RAFS version 6"),
        (["--oci-ref", "--fs-version", "5"], "--fs-version 6"),
        (["--oci-ref", "--chunk-dict", "bootstrap:local:x"], "exclude"),
        (["--chunk-dict", "x"], "bootstrap:registry:REFERENCE or bootstrap:local:FILE"),
        (["--chunk-dict", "bootstrap:local:/nonexistent"], "/nonexistent"),
        (["--chunk-dict", f"bootstrap:local:{sys.executable}"], "chunk dictionary"),
        (["--chunk-dict", "bootstrap:registry:{host}/lab/app:5"], "RAFS version 5 instead of 6"),
        (
            ["--chunk-dict", "bootstrap:registry:{host}/lab/app:5", "--fs-version", "5", "--chunk-size", "0x1000"],
            "chunk size 0x100000 instead of 0x1000",
        ),
        (["--chunk-dict", "bootstrap:registry:{host}/lab/app:oci"], "is not a Nydus image"),
        (["--oci-ref", "--backend-type", "oss"], "exclude"),
        (["--backend-type", "tape"], "oss, s3, localfs"),
        (["--backend-type", "oss"], "--backend-config"),
        (["--backend-type", "oss", "--backend-config", "{"], "JSON"),
        (["--backend-type", "localfs", "--backend-config", "{}"], "dir"),
        (["--build-cache", "a", "--build-cache-tag", "b"], "exclude"),
        (["--reverse"], "not a Nydus image"),
        (["--reverse", "--oci-ref"], "exclude"),
        (["--output-json", "/nonexistent/x"], "no such directory"),
        (["--source-archive", "/nonexistent.tar"], "/nonexistent.tar"),
        (["--source-archive", sys.executable], "not a tar archive"),
        (["--target-archive", "/nonexistent/x.tar"], "/nonexistent"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    flags: list[str], said: str, registry: Registry, image: Image, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from nydusfs.convert.cli import cli
    from nydusfs.errors import NydusError

    flags = [flag.replace("{host}", registry.host) for flag in flags]
    arguments = ["convert", "--source", f"{registry.host}/lab/app:oci", "--target", f"{registry.host}/lab/bad:x",
                 "--work-dir", str(tmp_path / "w"), *flags]  # fmt: skip
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, SystemExit | NydusError | OSError), repr(done.exception)
    assert said in (done.output if isinstance(done.exception, SystemExit) else str(done.exception))
    assert not (tmp_path / "w").exists()
    with RegistryClient(registry.host) as client:
        assert client.manifest_digest("lab/bad", "x") is None


def test_a_local_dictionary_needs_its_blobs(registry: Registry, image: Image, tmp_path: Path) -> None:
    convert(registry, tmp_path, "app:oci", "app:dict", "--compressor", "none")
    boot = Seen(registry, "app").image("dict")["layers"][-1]["boot"]
    (tmp_path / "dict.boot").write_bytes(boot)
    flags = ("--compressor", "none", "--chunk-dict", f"bootstrap:local:{tmp_path}/dict.boot")
    convert(registry, tmp_path, "app:oci", "app:with-dict", *flags)
    layers = fetch_manifest(registry.host, "lab/app", "with-dict")[1]["layers"]
    assert len(layers) > 4, "the dictionary's blobs are layers of the image"
    done = nydusify("convert", "--source", f"{registry.host}/lab/app:oci", "--target", f"{registry.host}/lab/none:x",
                    "--work-dir", tmp_path / "w", *flags, check=False)  # fmt: skip
    failed(done, "its blob sha256:", "bootstrap:registry:")


def test_the_work_folder_of_others_stays(registry: Registry, image: Image, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine").touch()
    convert(registry, tmp_path, "app:oci", "app:w")
    assert [one.name for one in (tmp_path / "work").iterdir()] == ["mine"]
    shutil.rmtree(tmp_path / "work")
