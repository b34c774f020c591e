"""An image whose pull did not name it, while containerd knows its registry's host and not yet the port."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snapshotter import images
from snapshotter.auth.chain import Chain
from snapshotter.auth.vault import Vault
from snapshotter.daemons import DaemonSettings
from snapshotter.database import NAME, Database
from snapshotter.flow import Snapshotter
from snapshotter.images import Images
from snapshotter.labels import IMAGE_REF, META_LAYER, SNAPSHOT_REF, image_label
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.mounts import Layout
from snapshotter.nydusd_config import load_template
from snapshotter.origins import Origin
from snapshotter.records import Records
from snapshotter.serving import ImageSettings
from snapshotter.store import Kind, Snapshot, Store

CHAIN = "sha256:" + "1" * 64
GUESS, NAMED = "127.0.0.1/a/b@sha256:" + "2" * 64, "127.0.0.1:5000/a/b:c"


class Containerd:
    """Has the name of an image from the `after`th question on."""

    def __init__(self, after: int) -> None:
        self.after, self.asked = after, 0

    def find(self, chain: str, namespace: str) -> tuple[Origin, str]:
        assert (chain, namespace) == (CHAIN, "default")
        self.asked += 1
        sure = self.asked >= self.after
        name = NAMED if sure else GUESS
        return Origin(name, namespace, {IMAGE_REF: name, META_LAYER: "true"}, sure), ""


def meta_layer(store: Store, labels: Mapping[str, str]) -> Snapshot:
    key, active = f"default/2/{CHAIN}", f"default/1/extract-1-x {CHAIN}"
    made = store.create(Kind.ACTIVE, active, "", labels)
    boot = store.upper(made.id) / "image" / "image.boot"
    boot.parent.mkdir()
    boot.write_bytes(bytes(1024) + (0xE0F5E1E2).to_bytes(4, "little"))
    return store.commit(key, active, labels)


def all_images(tmp_path: Path, store: Store, database: Database, containerd: Any) -> Images:
    template = tmp_path / "template.json"
    template.write_text('{"device":{"backend":{"type":"registry","config":{"scheme":"http"}},"cache":{}}}')
    daemon = DaemonSettings("/bin/false", tmp_path, tmp_path / "log")
    settings = ImageSettings(daemon, True, load_template(template), tmp_path / "cache")
    made = Images(settings, store, Records(database), Chain([]), containerd)
    made._gates.recovered.set()
    return made


def host_of(config: str) -> str:
    return str(json.loads(config)["device"]["backend"]["config"]["host"])


@pytest.mark.parametrize("labels", [{META_LAYER: "true", SNAPSHOT_REF: CHAIN}, {META_LAYER: "true"}])
def test_a_guess_is_not_kept(tmp_path: Path, labels: Mapping[str, str]) -> None:
    """A pull was ended behind its last layer, and asked about at that moment; the next one gives the name."""
    database = Database(tmp_path / NAME)
    store = Store(tmp_path, database)
    meta = meta_layer(store, labels)
    made = all_images(tmp_path, store, database, Containerd(after=2))
    assert host_of(made.describe(meta)[1]) == "127.0.0.1"
    assert image_label(store.stat(meta.key).labels) == ""
    assert host_of(made.describe(store.stat(meta.key))[1]) == "127.0.0.1:5000"
    assert image_label(store.stat(meta.key).labels) == NAMED


def test_an_image_is_opened_ahead_by_its_name_and_not_by_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "NAMED_SOON", (0.0, 0.0))
    database = Database(tmp_path / NAME)
    store = Store(tmp_path, database)
    meta = meta_layer(store, {META_LAYER: "true", SNAPSHOT_REF: CHAIN})
    for after, wanted in ((99, []), (3, ["127.0.0.1:5000"])):
        expected: list[str] = []
        said = threading.Event()

        def expect(where: str, source: Path, config: str, expected: list[str] = expected) -> None:
            expected.append(host_of(config))

        containerd = Containerd(after)
        made = all_images(tmp_path, store, database, containerd)
        daemon = SimpleNamespace(id="d", alive=True, shared=True, api=SimpleNamespace(expect=expect))
        monkeypatch.setattr(made, "_shared_daemon", lambda daemon=daemon: daemon)
        real = made._expect
        monkeypatch.setattr(made, "_expect", lambda meta, real=real, said=said: (real(meta), said.set()))
        made.expect(meta)
        assert said.wait(20)
        assert (expected, containerd.asked) == (wanted, 3)
    assert image_label(store.stat(meta.key).labels) == NAMED


def test_a_guess_does_not_become_the_label_of_what_is_unpacked(tmp_path: Path) -> None:
    store = Store(tmp_path, Database(tmp_path / NAME))
    lazy = LazyFinder(LazySettings(index=True), None, store)  # type: ignore[arg-type]
    none: Any = None
    for number, after in enumerate((2, 1)):
        containerd: Any = Containerd(after)
        vault = Vault(tmp_path / "auth")
        flow = Snapshotter(store, Layout(store.directory), none, none, vault, lazy, none, none, containerd)
        key = f"default/{number}/extract-1-x {CHAIN}"
        flow.prepare(key, "", {})
        labels = store.stat(key).labels
        assert (META_LAYER in labels, image_label(labels)) == (True, NAMED if after == 1 else "")
