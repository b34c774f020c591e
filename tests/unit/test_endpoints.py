"""Image places: layouts and archives written and read back, docker archives, and what people write for them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import resource
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nydusfs.convert.endpoints import (
    ArchiveLocation,
    Connections,
    Endpoint,
    LayoutLocation,
    Location,
    RegistryLocation,
    copy_blob,
    parse_location,
)
from nydusfs.convert.images import load_images
from nydusfs.convert.progress import Bars
from nydusfs.errors import ConvertError, NotFoundError, NydusError
from nydusfs.registry import mediatypes as mt

HERE = Connections()
LAYER = b"a layer" * 999


def _sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _push(target: Endpoint, layer: bytes = LAYER) -> str:
    """A one-layer image; its digest."""
    config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [_sha(layer)]}}).encode()
    for data in (layer, config):
        target.push_bytes(_sha(data), data)
    document = {
        "schemaVersion": 2,
        "mediaType": mt.OCI_MANIFEST,
        "config": {"mediaType": mt.OCI_CONFIG, "digest": _sha(config), "size": len(config)},
        "layers": [{"mediaType": mt.OCI_LAYER, "digest": _sha(layer), "size": len(layer)}],
    }
    return target.push_image(mt.OCI_MANIFEST, json.dumps(document).encode())


@pytest.mark.parametrize("kind", ["layout", "archive"])
def test_an_image_is_seen_when_it_is_whole_and_read_back(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tar" if kind == "archive" else "image")
    location = parse_location(str(path), reference="r.io/app:v1", create=True)
    with location.open(HERE, create=True) as target:
        target.push_bytes(_sha(LAYER), LAYER)
        with pytest.raises((OSError, ConvertError)):
            location.open(HERE).manifest()  # nothing to be seen yet
        with pytest.raises(ConvertError, match="sha256"):
            target.push_bytes(_sha(b"other"), LAYER)
        digest = _push(target)
        assert not target.push_bytes(_sha(LAYER), LAYER), "it was there"
    assert sorted(one.name for one in tmp_path.iterdir()) == [path.name], "no half-written files"
    named = f"oci{'' if kind == 'layout' else '-archive'}:{path}"
    for again in (parse_location(str(path)), parse_location(f"{named}:v1")):
        with again.open(HERE) as source:
            image = load_images(source, None).images[0]
            assert image.digest == digest
            with source.open_blob(_sha(LAYER), len(LAYER)) as stream:
                assert stream.read() == LAYER
            ranged = source.open_blob_ranges(_sha(LAYER), len(LAYER))
            ranged.seek(-5, io.SEEK_END)
            assert ranged.read() == LAYER[-5:]
            with pytest.raises(NotFoundError):
                source.open_blob(_sha(b"none"))
    with pytest.raises(NydusError, match=r"v2.*it has .*v1"):
        parse_location(f"{named}:v2").open(HERE).manifest()


def test_a_layout_holds_several_images_and_an_archive_gives_equal_bytes(tmp_path: Path) -> None:
    for tag in ("one", "two", "one"):
        with LayoutLocation(tmp_path / "l", tag).open(HERE, create=True) as target:
            _push(target, LAYER + tag.encode())
    with LayoutLocation(tmp_path / "l").open(HERE) as source, pytest.raises(ConvertError, match="2 images"):
        source.manifest()
    layer = _sha(LAYER + b"two")
    for number in range(2):
        location = parse_location(str(tmp_path / f"{number}.tar"), reference="r.io/app:v1", create=True)
        with LayoutLocation(tmp_path / "l", "two").open(HERE) as origin, location.open(HERE, create=True) as target:
            if number:
                copy_blob(origin, target, layer, len(LAYER) + 3)
            _push(target, LAYER + b"two")
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        assert archive.getnames()[-3:] == ["index.json", "manifest.json", "oci-layout"]
        listed = archive.extractfile("manifest.json")
        assert listed is not None
        assert json.loads(listed.read())[0]["RepoTags"] == ["r.io/app:v1"]


def test_damage_is_found_when_a_blob_is_read(tmp_path: Path) -> None:
    with LayoutLocation(tmp_path / "l").open(HERE, create=True) as target:
        _push(target)
        blob = tmp_path / "l" / "blobs" / "sha256" / _sha(LAYER)[7:]
        blob.write_bytes(b"A" + LAYER[1:])
        with target.open_blob(_sha(LAYER)) as stream, pytest.raises(ConvertError, match="damaged"):
            stream.read()
        blob.write_bytes(LAYER[1:])
        with pytest.raises(ConvertError, match="descriptor says"):
            target.open_blob(_sha(LAYER), len(LAYER))
        assert not target.has_blob(_sha(LAYER), len(LAYER)), "a cut blob is pushed again"


def _docker_archive(path: Path, layers: list[bytes], packing: str = "", tags: list[str] | None = None) -> None:
    """As `docker save` writes it: a layer that two images share is a symlink."""
    plain = [gzip.decompress(layer) if layer[:2] == b"\x1f\x8b" else layer for layer in layers]
    config = json.dumps(
        {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [_sha(one) for one in plain]}}
    ).encode()
    item = {"Config": "c.json", "RepoTags": tags, "Layers": [f"{number}/layer.tar" for number in range(len(layers))]}
    with tarfile.open(path, f"w{packing}") as archive:

        def add(name: str, data: bytes = b"", link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.linkname, info.type = len(data), link, tarfile.SYMTYPE if link else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(data))

        for number, layer in enumerate(layers):
            if layer in layers[:number]:
                add(f"{number}/layer.tar", link=f"../{layers.index(layer)}/layer.tar")
            else:
                add(f"{number}/layer.tar", layer)
        add("c.json", config)
        add("manifest.json", json.dumps([item]).encode())


@pytest.mark.parametrize("packing", ["", ":gz"])
def test_docker_archives(packing: str, tmp_path: Path) -> None:
    layers = [LAYER, gzip.compress(LAYER + b"2"), LAYER]
    _docker_archive(tmp_path / "d.tar", layers, packing, ["app:v1"])
    location: Location = ArchiveLocation(tmp_path / "d.tar", "v1")
    if packing:
        with pytest.raises(ConvertError, match="compressed"):
            location.open(HERE)
    with location.prepare(tmp_path / "work").open(HERE) as source:
        image = load_images(source, None).images[0]
        assert image.media_type == mt.DOCKER_MANIFEST
        assert [one.media_type for one in image.layers] == [mt.DOCKER_LAYER, mt.DOCKER_LAYER_GZIP, mt.DOCKER_LAYER]
        for layer, data in zip(image.layers, layers, strict=True):
            assert layer.digest == _sha(data)
            assert source.open_blob(layer.digest, layer.size).read() == data
        assert source.name == f"{tmp_path}/d.tar:v1", "not the name of the unpacked file"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no manifest.json"),
        ({"manifest.json": b"]"}, "not JSON"),
        ({"manifest.json": b'[{"Config": "x", "Layers": []}]'}, "'x' of its manifest.json is not in the archive"),
        ({"manifest.json": b'[{"Config": "x", "Layers": ["x"]}]', "x": b"{}"}, "not the config"),
        ({"index.json": b"{}"}, "not an index"),
        ({"index.json": b'{"manifests": []}'}, "lists no image"),
        ({"index.json": b'{"manifests": [{"digest": "../../etc"}]}'}, "does not exist"),
    ],
)
def test_hostile_archives_give_one_sentence(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(NydusError, match=said):
        parse_location(str(tmp_path / "x.tar")).prepare(tmp_path).open(HERE).manifest()
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 99)
    with pytest.raises(NydusError, match="not a tar archive"):
        parse_location(str(tmp_path / "y.tar")).open(HERE)


def test_nothing_is_written_into_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConvertError, match="neither empty nor an OCI layout"):
        LayoutLocation(tmp_path).open(HERE, create=True)


def test_a_layout_begun_on_a_full_disk_is_whole_when_there_is_room_again(tmp_path: Path) -> None:
    text = f"oci:{tmp_path / 'out'}:v1"
    with Connections() as connections:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may have a byte
        try:
            with pytest.raises(OSError, match="large"):
                parse_location(text, create=True).open(connections, create=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (tmp_path / "out" / ".oci-layout-killed.part").touch()  # as a kill leaves it
        parse_location(text, create=True).open(connections, create=True).close()
    assert json.loads((tmp_path / "out" / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


def test_log_lines_go_above_the_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    before, root.handlers = root.handlers, [handler]
    try:
        bars, stream = Bars(), handler.stream
        with bars:
            bars.start("k", "layer", 10)
            assert handler.stream is not stream, "rich's own"
            root.warning("a warning")
            bars.finish("k")
        assert handler.stream is stream
    finally:
        root.handlers = before
    assert "a warning" in capsys.readouterr().err


def test_what_people_write(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    cases: dict[str, Any] = {
        "r.io/app:v1": RegistryLocation,
        "oci:rel/dir:v1": LayoutLocation,
        "oci-archive:rel.x": ArchiveLocation,
        "docker-archive:rel.x:r.io/app:v1": ArchiveLocation,
        "./new.tar": ArchiveLocation,
        "./new": LayoutLocation,
        f"file://{tmp_path}/file": ArchiveLocation,
        f"{tmp_path}/dir": LayoutLocation,
    }
    assert {text: type(parse_location(text)) for text in cases} == cases
    assert len({parse_location(text) for text in cases}) == len(cases), "to be cached by"
    with pytest.raises(ConvertError, match="names no path"):
        parse_location("oci:")
