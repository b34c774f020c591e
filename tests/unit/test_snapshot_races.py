"""Two calls at once, where one of them ends in the middle of the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from nydusfs.registry.reference import Reference
from snapshotter import leftovers
from snapshotter.auth.chain import Chain
from snapshotter.auth.vault import Vault
from snapshotter.daemons import Daemon, DaemonSettings
from snapshotter.database import NAME, Database
from snapshotter.errors import Unavailable
from snapshotter.flow import Snapshotter
from snapshotter.images import Images
from snapshotter.labels import META_LAYER
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.lazy.tarfs import Tarfs
from snapshotter.mounts import Layout
from snapshotter.nydusd_config import NO_TEMPLATE
from snapshotter.records import Records
from snapshotter.serving import ImageSettings
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


def images_of(root: Path, *, shared: bool) -> Images:
    database = Database(root / NAME)
    settings = ImageSettings(DaemonSettings("/bin/false", root, root / "logs"), shared, NO_TEMPLATE, root / "cache")
    return Images(settings, Store(root, database), Records(database), Chain([]))


def test_a_nydusd_that_begins_during_the_sweep_of_the_start_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its socket is gone, and who waits for it waits half a minute for nothing."""
    places = [tmp_path / name for name in ("config", "socket", "logs")]
    for place in places:
        (place / ("0" * 20)).mkdir(parents=True)
    images = images_of(tmp_path, shared=False)
    begun: list[Daemon] = []
    look = leftovers._names

    def names(place: Path) -> list[str]:
        if not begun:
            begun.append(images._new_daemon(7, None))
            for folder in places:
                (folder / begun[0].id).mkdir()
        return look(place)

    monkeypatch.setattr(leftovers, "_names", names)
    images._recover()
    assert [[path.name for path in place.iterdir()] for place in places] == [[begun[0].id]] * 3


def test_two_images_wait_for_one_tarfs_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waited first tidies up while the other has only asked."""
    none: Any = None
    layers, ready, image = Tarfs(none, 1), threading.Event(), Reference.parse("r.example/a:b")

    def convert(image: Reference, labels: Mapping[str, str], folder: Path, below: str | None) -> None:
        assert ready.wait(10)
        (folder / "layer-00.tar").touch()

    monkeypatch.setattr(layers, "_convert", convert)
    first = threading.Thread(target=lambda: layers.finish(image, {}, tmp_path, below=""))
    first.start()
    begin = layers.begin

    def slowly(image: Reference, labels: Mapping[str, str], folder: Path, *, below: str | None) -> Future[None]:
        begun = begin(image, labels, folder, below=below)
        ready.set()
        first.join(10)
        return begun

    while not layers._running:
        time.sleep(0.001)
    monkeypatch.setattr(layers, "begin", slowly)
    assert layers.finish(image, {}, tmp_path, below="")[1] == tmp_path / "layer-00.tar"
    layers.close()


def test_a_tarfs_layer_that_could_not_be_fetched_at_the_pull_is_fetched_for_the_first_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none: Any = None
    layers, image = Tarfs(none, 1), Reference.parse("r.example/a:b")
    registry = [False, True]  # whether it answers

    def convert(image: Reference, labels: Mapping[str, str], folder: Path, below: str | None) -> None:
        if not registry.pop(0):
            raise Unavailable("the registry does not answer")
        (folder / "layer-00.tar").touch()

    monkeypatch.setattr(layers, "_convert", convert)
    with pytest.raises(Unavailable):
        layers.begin(image, {}, tmp_path, below="").result(10)
    assert layers.finish(image, {}, tmp_path, below="")[1] == tmp_path / "layer-00.tar"
    assert not layers._running  # also of images that no container ever ran
    layers.close()


def test_an_image_that_was_released_is_mounted_again_by_one_caller(tmp_path: Path) -> None:
    """One waited for the release to end, another comes behind it: two would start a nydusd each at one mount point."""
    images = images_of(tmp_path, shared=False)
    inside, most = 0, 0
    go = threading.Event()

    def mount() -> None:
        nonlocal inside, most
        with images._one("7"):
            inside += 1
            most = max(most, inside)
            go.wait(0.5)
            inside -= 1

    with images._one("7"):
        first = threading.Thread(target=mount)
        first.start()
        time.sleep(0.1)
        released = threading.Thread(target=images._release, args=("7", lambda: False))
        released.start()
        time.sleep(0.1)
    callers = [first, *(threading.Thread(target=mount) for _ in range(3))]
    for caller in callers[1:]:
        caller.start()
        time.sleep(0.3)
    for caller in (*callers, released):
        caller.join(20)
    assert most == 1


def test_the_sweep_of_the_start_leaves_the_logs_of_another_snapshotter(tmp_path: Path) -> None:
    """Both have the same log directory."""
    root, logs = tmp_path / "root", tmp_path / "logs"
    for place in (root / "config", root / "logs", logs):
        (place / ("0" * 20)).mkdir(parents=True)
    for folder in (logs, root / "logs"):
        leftovers.sweep(root, folder, dict)
    assert [len(list(place.iterdir())) for place in (root / "config", root / "logs", logs)] == [0, 0, 1]
