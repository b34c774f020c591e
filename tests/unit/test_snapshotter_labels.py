"""Labels that an image's author wrote, by whichever way they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snapshotter.auth.vault import Vault
from snapshotter.database import NAME, Database
from snapshotter.flow import Snapshotter
from snapshotter.labels import (
    DATA_LAYER,
    GID_MAPPING,
    IMAGE_REF,
    META_LAYER,
    OWN,
    PULL_SECRET,
    PULL_USER,
    SNAPSHOT_REF,
    TWIN,
    UID_MAPPING,
)
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.mounts import Layout
from snapshotter.origins import Origin
from snapshotter.store import Kind, Store

CHAIN = "sha256:" + "1" * 64


class Containerd:
    """Says of each layer what a manifest's annotations say."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels = labels

    def find(self, chain: str, namespace: str) -> tuple[Origin, str]:
        return Origin("r.example/a:b", namespace, self.labels), ""


def test_what_containerd_knows_of_an_image_is_no_more_trusted_than_the_image(tmp_path: Path) -> None:
    """A client without labels: they are taken from the manifest, but for those that only this program may set."""
    store = Store(tmp_path, Database(tmp_path / NAME))
    said = {META_LAYER: "true", IMAGE_REF: "r.example/a:b", "containerd.io/snapshot/x": "y"}
    origins: Any = Containerd({**said, **dict.fromkeys(OWN, "true"), PULL_USER: "u", PULL_SECRET: "p"})
    lazy = LazyFinder(LazySettings(index=True), None, store)  # type: ignore[arg-type]
    none: Any = None
    flow = Snapshotter(store, Layout(store.directory), none, none, Vault(tmp_path / "auth"), lazy, none, none, origins)
    flow.prepare("extract-1 " + CHAIN, "", {SNAPSHOT_REF: CHAIN})
    (made,) = store.all()
    assert dict(made.labels) == {**said, SNAPSHOT_REF: CHAIN}
    assert TWIN in OWN and DATA_LAYER not in OWN


def test_one_snapshot_whose_labels_map_nothing_does_not_end_the_clean_up_of_others(tmp_path: Path) -> None:
    store = Store(tmp_path, Database(tmp_path / NAME))
    store.commit_skipped("x", "", CHAIN, {SNAPSHOT_REF: CHAIN})
    for key in ("good", "bad"):
        store.create(Kind.ACTIVE, key, CHAIN, dict.fromkeys((UID_MAPPING, GID_MAPPING), "0:65536:65536"), 0)
    store.update("bad", {UID_MAPPING: "what", GID_MAPPING: "ever"}, [])
    asked: list[set[str]] = []
    images: Any = SimpleNamespace(release_mapped=lambda used: asked.append(used()))
    idmapped: Any = SimpleNamespace(release=lambda used: asked.append(used()))
    none: Any = None
    lazy = LazyFinder(LazySettings(), None, store)  # type: ignore[arg-type]
    flow = Snapshotter(store, Layout(store.directory), images, idmapped, Vault(tmp_path / "auth"), lazy, none, none)
    flow.cleanup()
    assert asked and all(names == {"1-userns-65536"} for names in asked)
