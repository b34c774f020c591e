"""Labels that an image's author wrote, by whichever way they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapshotter.auth.vault import Vault
from snapshotter.database import NAME, Database
from snapshotter.flow import Snapshotter
from snapshotter.labels import DATA_LAYER, IMAGE_REF, META_LAYER, OWN, PULL_SECRET, PULL_USER, SNAPSHOT_REF, TWIN
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.mounts import Layout
from snapshotter.origins import Origin
from snapshotter.store import Store

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
