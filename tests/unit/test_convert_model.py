"""Image documents, bootstrap layers and the source model, on upstream's own output where it is here."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from nydusfs.convert import manifests, rules
from nydusfs.convert.bootstrap_layer import chunk_table, unpack_bootstrap_layer, write_bootstrap_layer
from nydusfs.convert.cli import cli
from nydusfs.convert.cmd_convert import command
from nydusfs.convert.compare import compare
from nydusfs.convert.endpoints import Connections, LayoutLocation
from nydusfs.convert.images import Descriptor, Image, load_images, parse_descriptor
from nydusfs.convert.platforms import Platform
from nydusfs.convert.sourcetree import Node, apply_layer, new_root, read_layer
from nydusfs.convert.views import TreeView
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt
from tests.lab.images import entry
from tests.lab.nowhere import Nowhere
from tests.lab.paths import ref_bin, shared_dir

NOWHERE = Nowhere()

interop = pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here")


def _oci(name: str) -> Path:
    shared = shared_dir()
    assert shared is not None
    return shared / "fixtures" / "reference" / "oci" / name


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()


def _images(name: str) -> list[Image]:
    """Every image of a fixture layout."""
    with Connections() as connections:
        location = LayoutLocation(_oci(name), reference="localhost:5000/app:oci")
        return load_images(location.open(connections), None).images


@interop
@pytest.mark.interop
@pytest.mark.parametrize("name", ["v5", "v6", "zran", "index"])
def test_upstream_images_keep_our_rules(name: str) -> None:
    source = _images("oci")[0]
    images = _images(name)
    nydus = [image for image in images if image.is_nydus]
    assert len(nydus) == 1
    assert list(rules.check_manifest(nydus[0])) == []
    assert list(rules.check_config(source, nydus[0])) == []
    if name == "index":
        assert [image.artifact_type for image in images] == ["", mt.NYDUS_MANIFEST_ARTIFACT]
        assert list(rules.check_oci_half(images[0], nydus[0])) == []


@interop
@pytest.mark.interop
def test_documents_equal_upstream_byte_for_byte() -> None:
    """Given upstream's blobs, our manifest, config and plain half of a merged index are upstream's bytes."""
    source = _images("oci")[0]
    nydus = _images("v6")[0]
    data = [manifests.blob_descriptor(layer.digest, layer.size) for layer in nydus.layers[:-1]]
    last = nydus.layers[-1]
    config = manifests.nydus_config(source, nydus.diff_ids)
    assert config == nydus.config_body
    body = manifests.nydus_manifest(
        source,
        Descriptor(manifests.config_media_type(source, oci=False, merged=False), _sha(config), len(config)),
        [*data, manifests.bootstrap_descriptor(source, last.digest, last.size, 6, False)],
        fs_version=6,
        builder_version="v2.4.4",
        oci=False,
    )[1]
    assert body == nydus.manifest_body
    plain = next(image for image in _images("index") if not image.is_nydus)
    half_config, _, half = manifests.oci_half(source)
    assert (half_config, half) == (plain.config_body, plain.manifest_body)
    merged = _images("index")[1]
    platform = {"architecture": "amd64", "os": "linux"}
    notes = {mt.ANNOTATION_SOURCE_DIGEST: source.digest}
    index = manifests.merged_index(
        [
            manifests.index_entry(mt.OCI_MANIFEST, half, platform, annotations=notes),
            manifests.index_entry(
                mt.OCI_MANIFEST, merged.manifest_body, platform, artifact_type=mt.NYDUS_MANIFEST_ARTIFACT
            ),
        ]
    )
    layout = _oci("index")
    assert index == _blob(layout, json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])
    assert _sha(manifests.EMPTY_LAYER) == manifests.EMPTY_LAYER_DIGEST
    assert _sha(gzip.decompress(manifests.EMPTY_LAYER)) == manifests.EMPTY_LAYER_DIFF_ID


@interop
@pytest.mark.interop
@pytest.mark.parametrize("name", ["v5", "v6", "zran"])
def test_bootstrap_layer_equals_upstream(name: str, tmp_path: Path) -> None:
    """Same files in, same tar out: its digest is the diff id that upstream wrote."""
    image = _images(name)[0]
    layout = _oci(name)
    boot = unpack_bootstrap_layer(io.BytesIO(gzip.decompress(_blob(layout, image.layers[-1].digest))), tmp_path, "x")
    metas = []
    for layer in image.layers[:-1]:
        data = _blob(layout, layer.digest)
        table = chunk_table(io.BytesIO(data), len(data))
        assert (table is None) == (name == "v5")
        if table is not None:
            path = tmp_path / layer.hex
            path.write_bytes(table)
            metas.append((layer.hex, path))
    packed = write_bootstrap_layer(boot, metas, tmp_path / "out")
    assert packed.diff_id == image.diff_ids[-1]
    assert packed.digest == _sha(packed.path.read_bytes())
    assert packed.path.read_bytes()[:10] == bytes.fromhex("1f8b08000000000000ff")


def test_docker_sources_stay_docker_unless_asked() -> None:
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]}}
    layer = Descriptor(mt.DOCKER_LAYER_GZIP, "sha256:" + "2" * 64, 5)
    source = Image(NOWHERE, "sha256:" + "3" * 64, mt.DOCKER_MANIFEST, {}, b"{}", config, b"{}",
                   Descriptor(mt.DOCKER_CONFIG, "sha256:" + "4" * 64, 2), [layer])  # fmt: skip
    for oci, manifest, config_type, boot in [
        (False, mt.DOCKER_MANIFEST, mt.DOCKER_CONFIG, mt.DOCKER_LAYER_GZIP),
        (True, mt.OCI_MANIFEST, mt.OCI_CONFIG, mt.OCI_LAYER_GZIP),
    ]:
        assert manifests.config_media_type(source, oci=oci, merged=False) == config_type
        last = manifests.bootstrap_descriptor(source, layer.digest, 1, 6, oci)
        assert last.media_type == boot
        kind, body = manifests.nydus_manifest(
            source, source.config_descriptor, [last], fs_version=6, builder_version="x", oci=oci
        )
        assert kind == manifest == json.loads(body)["mediaType"]


def test_rules_name_what_is_wrong() -> None:
    layers = [
        Descriptor(mt.OCI_LAYER, _name(5), 1),
        manifests.blob_descriptor(_name(6), 1),
        Descriptor(mt.OCI_LAYER_GZIP, _name(7), 1, {mt.ANNOTATION_BOOTSTRAP: "true"}),
    ]
    config = {"rootfs": {"diff_ids": ["x", "y", "z"]}}
    image = Image(
        NOWHERE, _name(3), mt.OCI_MANIFEST, {}, b"", config, b"", Descriptor("", _name(4), 2), layers
    )  # fmt: skip
    text = "\n".join(rules.check_manifest(image))
    assert "layer 0" in text and "media type" in text and "lacks the annotation" in text and "diff id y" in text


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"digest": "sha256:12", "size": 1},
        {"digest": "sha256:" + "a" * 64, "size": -1},
        {"digest": "sha256:" + "a" * 64, "size": True},
        {"digest": "sha256:" + "a" * 64, "size": 1, "annotations": {"a": 1}},
    ],
)
def test_hostile_descriptors_are_refused(value: object) -> None:
    with pytest.raises(ConvertError):
        parse_descriptor(value, "x")


def test_platforms() -> None:
    assert Platform.parse("amd64") == Platform("linux", "amd64")
    assert Platform.parse("linux/arm64").matches(Platform("linux", "arm64", "v8"))
    assert not Platform.parse("linux/arm").matches(Platform("linux", "arm", "v6"))
    for bad in ("", "a/b/c/d", "linux/"):
        with pytest.raises(ConvertError):
            Platform.parse(bad)


# -- the model of a source


def _layer(*members: tuple[tarfile.TarInfo, bytes | None]) -> Node:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, body in members:
            tar.addfile(info, io.BytesIO(body) if body is not None else None)
    return read_layer(io.BytesIO(out.getvalue()), "layer")


def _paths(node: Node, path: bytes = b"") -> list[bytes]:
    found = []
    for name, child in sorted((node.children or {}).items()):
        found += [path + b"/" + name, *_paths(child, path + b"/" + name)]
    return found


def test_whiteouts_remove_only_what_lies_below() -> None:
    root = new_root()
    apply_layer(
        root, _layer(entry("d", mode=0o700), entry("d/old", "1"), entry("gone", "x"), entry("o/a", "1"), entry("f"))
    )
    apply_layer(root, _layer(
        entry(".wh.gone", ""), entry("d/.wh.old", ""), entry("d/old", "new"), entry("o/.wh..wh..opq", ""),
        entry("o/b", "2"), entry("f", "now a file"), entry("a", "1"), entry("l", kind=tarfile.LNKTYPE, link="a"),
    ))  # fmt: skip
    assert _paths(root) == [b"/a", b"/d", b"/d/old", b"/f", b"/l", b"/o", b"/o/b"]
    assert root.children is not None
    directory = root.children[b"d"]
    assert stat.S_IMODE(directory.facts.mode) == 0o700, "a directory the upper layer does not name keeps its attributes"
    assert directory.children is not None
    assert directory.children[b"old"].facts.sha256 == hashlib.sha256(b"new").hexdigest()
    assert root.children[b"a"] is root.children[b"l"]


def test_links_lead_through_symbolic_links_of_the_layer() -> None:
    root = _layer(
        entry("usr/lib/a", "1"), entry("lib", kind=tarfile.SYMTYPE, link="usr/lib"),
        entry("lib/b", kind=tarfile.LNKTYPE, link="lib/a"),
    )  # fmt: skip
    assert _paths(root) == [b"/lib", b"/usr", b"/usr/lib", b"/usr/lib/a", b"/usr/lib/b"]
    assert root.children is not None
    usr = root.children[b"usr"].children
    assert usr is not None and (files := usr[b"lib"].children) is not None and files[b"a"] is files[b"b"]


def test_entries_that_lead_out_are_refused() -> None:
    with pytest.raises(ConvertError, match="leads out"):
        _layer(entry("../x", "1"))
    with pytest.raises(ConvertError, match="hard link"):
        _layer(entry("l", kind=tarfile.LNKTYPE, link="nothing"))


def test_every_kind_of_difference_is_reported() -> None:
    def tree(*changed: tuple[tarfile.TarInfo, bytes | None]) -> Node:
        base = [
            entry("same", "1"), entry("mode", "1"), entry("owner", "1"), entry("content", "abc"), entry("size", "1"),
            entry("time", "1"), entry("link", link="x"), entry("xattr", "1", xattrs={"user.a": "1"}),
            entry("gone", "1"),
            entry("dev", kind=tarfile.CHRTYPE, device=(1, 3)), entry("kind", "1"), entry("first", "1"),
            entry("second", kind=tarfile.LNKTYPE, link="first", mode=0o644),
        ]  # fmt: skip
        names = {info.name for info, _ in changed}
        return _layer(*[one for one in base if one[0].name not in names], *changed)

    other = tree(
        entry("mode", "1", mode=0o600), entry("owner", "1", uid=5), entry("content", "abd"), entry("size", "12"),
        entry("time", "1", mtime=5), entry("link", link="y"), entry("xattr", "1", xattrs={"user.a": "2"}),
        entry("dev", kind=tarfile.CHRTYPE, device=(1, 5)), entry("kind"), entry("extra", "1"), entry("second", "1"),
    )  # fmt: skip
    assert other.children is not None
    del other.children[b"gone"]
    found = compare(TreeView(tree()), TreeView(other))
    told = {line.split(":")[0] for line in found.differences}
    assert sorted(told) == [
        "/content",
        "/dev", "/extra", "/gone", "/kind", "/link", "/mode", "/owner", "/second", "/size", "/time", "/xattr",
    ]  # fmt: skip
    assert found.count == len(found.differences)
    assert compare(TreeView(tree()), TreeView(tree())).count == 0


# -- the command line


@pytest.mark.interop
def test_convert_has_upstreams_flags() -> None:
    """Names, aliases, environment variables, as upstream's help lists them."""
    program = ref_bin("nydusify")
    if program is None:
        pytest.skip("interop: no reference programs here")
    text = subprocess.run([str(program), "convert", "--help"], capture_output=True, text=True, timeout=20).stdout
    theirs = {}
    for line in text.splitlines():
        names = re.match(r"\s+(--[\w-]+(?:, --[\w-]+)*)", line)
        if names and "--help" not in line:
            variable = re.search(r"\[\$(\w+)\]", line)
            for name in names[1].split(", "):
                theirs[name] = variable and variable[1]
    ours: dict[str, list[str]] = {}
    for option in command.params:
        variables = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or [])
        ours.update(dict.fromkeys(option.opts, variables))
    assert len(theirs) > 40
    assert {name: variable for name, variable in theirs.items() if variable not in (ours.get(name) or [None])} == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert"], "--source is required"),
        (["convert", "--source", "a"], "give --target, --target-suffix"),
        (["convert", "--source", "a", "--target", "b", "--chunk-size", "3"], "power of two"),
        (["convert", "--source", "a", "--target", "b", "--platform", "x", "--all-platforms"], "exclude"),
        (["convert", "--source", "a", "--target", "b", "--push-retry-delay", "5"], "duration"),
        (["check"], "--target is required"),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert said in done.output and "Traceback" not in done.output


def test_help_names_upstream_flags_and_their_variables() -> None:
    text = CliRunner().invoke(cli, ["convert", "--help"], terminal_width=200).output
    for flag in ("--source-insecure", "--fs-version", "--build-cache-max-records", "--oci-ref", "--push-retry-delay"):
        assert flag in text
    assert "SOURCE_INSECURE" in text and "BACKEND_CONFIG_FILE" in text


def _name(number: int) -> str:
    return f"sha256:{str(number) * 64}"


def _sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
