"""What ctr-remote decides before it asks anybody: platform, chain ids, labels, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.containerd.chain import chain_ids
from snapshotter.client.plan import (
    LABEL_IMAGE_LAYERS,
    LABEL_LIMIT,
    Descriptor,
    ImageError,
    Platform,
    choose_manifest,
    parse_diff_ids,
    parse_manifest,
    snapshot_labels,
)


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def entry(name: str, os: str = "linux", arch: str = "amd64", **more: Any) -> dict[str, Any]:
    platform = {"os": os, "architecture": arch, **more.pop("platform", {})}
    return {"mediaType": "m", "digest": digest(name), "size": 1, "platform": platform, **more}


def test_chain_ids_are_those_of_the_specification() -> None:
    first, second = digest("a"), digest("b")
    assert chain_ids([first]) == [first]
    assert chain_ids([first, second])[1] == digest(f"{first} {second}")
    assert chain_ids([]) == []


def test_labels_stop_at_containerds_limit() -> None:
    """About 57 digests fit into 4096 bytes with the key; containerd refuses a Prepare with a longer label."""
    layers = [
        Descriptor("m", digest(str(number)), 1, {"containerd.io/snapshot/nydus-blob": "true", "other": "x"})
        for number in range(100)
    ]
    labels = snapshot_labels("h/r:t", digest("manifest"), layers, 10, digest("chain"))
    assert all(len(key) + len(value) <= LABEL_LIMIT for key, value in labels.items())
    listed = labels[LABEL_IMAGE_LAYERS].split(",")
    assert listed[0] == layers[10].digest
    assert 50 < len(listed) < 90
    assert labels["containerd.io/snapshot/nydus-blob"] == "true"
    assert "other" not in labels
    assert labels["containerd.io/snapshot.ref"] == digest("chain")


def test_nydus_variant_is_preferred_and_then_the_target() -> None:
    plain, nydus = entry("plain"), entry("nydus", platform={"os.features": ["nydus.remoteimage.v1"]})
    amd64 = Platform("linux", "amd64")
    assert choose_manifest({"manifests": [plain, nydus]}, amd64, "i")[0].digest == nydus["digest"]
    # containerd would take the first: then the index must not become the image's target
    assert choose_manifest({"manifests": [plain, nydus]}, amd64, "i")[1] is False
    assert choose_manifest({"manifests": [nydus, plain]}, amd64, "i")[1] is True


def test_platforms() -> None:
    index = {"manifests": [entry("arm", arch="arm64", platform={"variant": "v8"}), entry("amd")]}
    assert choose_manifest(index, Platform.parse("linux/aarch64"), "i")[0].digest == digest("arm")
    with pytest.raises(ImageError, match=r"no image for platform linux/riscv64; it has linux/amd64, linux/arm64"):
        choose_manifest(index, Platform.parse("linux/riscv64"), "i")
    with pytest.raises(ImageError, match="want os/architecture"):
        Platform.parse("linux")
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}).encode()
    with pytest.raises(ImageError, match="it is for linux/amd64, not for linux/arm64"):
        parse_diff_ids(config, [], Platform("linux", "arm64"), "image x")


def test_variants_as_containerd_takes_them() -> None:
    """What the machine may not be able to run is none for it; of the others the newest, wherever it stands."""
    variants = {"amd64": ["v3", "v2", "", "v4"], "arm": ["v5", "v7", "v6", "v8"], "arm64": ["v9", "v8"]}
    index = {
        "manifests": [
            entry(f"{arch}{variant}", arch=arch, platform={"variant": variant} if variant else {})
            for arch, found in variants.items()
            for variant in found
        ]
    }
    for asked, wanted in {
        "linux/amd64": "amd64",
        "linux/amd64/v1": "amd64",
        "linux/amd64/v2": "amd64v2",
        "linux/amd64/v3": "amd64v3",
        "linux/arm": "armv7",
        "linux/arm/v6": "armv6",
        "linux/arm64": "arm64v8",
        "linux/arm64/v8": "arm64v8",
    }.items():
        assert choose_manifest(index, Platform.parse(asked), "i") == (
            Descriptor.parse(next(one for one in index["manifests"] if one["digest"] == digest(wanted)), "i"), True
        )  # fmt: skip
    with pytest.raises(ImageError, match=r"no image for platform linux/amd64; it has linux/amd64/v3$"):
        choose_manifest({"manifests": index["manifests"][:1]}, Platform.parse("linux/amd64"), "i")
    strange = Platform.parse("linux/amd64/fast")
    assert not strange.matches({"os": "linux", "architecture": "amd64"})
    assert strange.matches({"os": "linux", "architecture": "amd64", "variant": "fast"})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "manifests",
                    "layers",
                    "config",
                    "digest",
                    "size",
                    "mediaType",
                    "platform",
                    "annotations",
                    "rootfs",
                    "diff_ids",
                    "os",
                    "architecture",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(_JSON)
def test_hostile_documents_raise_only_image_errors(document: Any) -> None:
    body = json.dumps(document).encode()
    for call in (
        lambda: parse_manifest(body, "i"),
        lambda: parse_diff_ids(body, [], Platform("linux", "amd64"), "i"),
        lambda: choose_manifest(document if isinstance(document, dict) else {}, Platform("linux", "amd64"), "i"),
    ):
        try:
            call()
        except ImageError:
            pass
