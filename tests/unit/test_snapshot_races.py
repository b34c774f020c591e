"""Two calls at once, where one of them ends in the middle of the other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from snapshotter.auth.vault import Vault
from snapshotter.database import NAME, Database
from snapshotter.errors import Unavailable
from snapshotter.flow import Snapshotter
from snapshotter.labels import META_LAYER
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.mounts import Layout
from snapshotter.store import Kind, Store


def test_a_prepare_that_fails_late_leaves_alone_who_has_its_key_by_then(tmp_path: Path) -> None:
    """Its client gave up, removed the snapshot and prepared it again."""
    store = Store(tmp_path, Database(tmp_path / NAME))
    store.create(Kind.ACTIVE, "unpacked", "", {})
    store.commit("image", "unpacked", {META_LAYER: "true"})

    def ensure(*_: object, **__: object) -> NoReturn:
        store.remove("container")
        store.create(Kind.ACTIVE, "container", "image", {})
        raise Unavailable("nydusd hangs")

    none: Any = None
    images: Any = SimpleNamespace(ensure=ensure, release=lambda _: False, release_mapped=lambda _: None)
    idmapped: Any = SimpleNamespace(release=lambda _: None)
    lazy = LazyFinder(LazySettings(), None, store)  # type: ignore[arg-type]
    flow = Snapshotter(store, Layout(store.directory), images, idmapped, Vault(tmp_path / "auth"), lazy, none, none)
    with pytest.raises(Unavailable):
        flow.prepare("container", "image", {})
    flow.cleanup()
    again = store.stat("container")
    assert store.upper(again.id).is_dir()
    assert store.ids() == {1, again.id}
    assert not store.path(2).exists()
