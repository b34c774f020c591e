"""`--repair`: the same snapshots from the directories, from rows that can still be read, and never fewer layers."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from snapshotter.database import MIGRATIONS, NAME, Database
from snapshotter.directories import RECORD
from snapshotter.errors import StartError
from snapshotter.labels import SNAPSHOT_REF
from snapshotter.records import Records
from snapshotter.repair import repair
from snapshotter.store import Kind, Snapshot, Store


def open_store(root: Path) -> Store:
    return Store(root, Database(root / NAME))


def filled(root: Path) -> list[Snapshot]:
    """Three layers, one skipped, containers and a view on them; one key used twice."""
    store = open_store(root)
    store.create(Kind.ACTIVE, "k", "", {"l": "ü"})
    store.commit("one", "k", {"l": "1"})
    store.create(Kind.ACTIVE, "k", "one", {})
    store.remove("k")
    store.create(Kind.ACTIVE, "k", "one", {"again": "yes"})
    store.commit_skipped("x", "one", "sha256:s", {SNAPSHOT_REF: "sha256:s"})
    store.commit_skipped("x", "", "sha256:s", {SNAPSHOT_REF: "sha256:s"})
    store.create(Kind.ACTIVE, "free", "", {})
    store.commit("two", "free", {}, parent="one")
    store.create(Kind.ACTIVE, "container/ü", "two", {"a": "b"})
    store.create(Kind.VIEW, "view", "sha256:s", {})
    store.update("container/ü", {"c": "d"}, ["labels.c"])
    return store.all()


def damage(root: Path, seed: int) -> None:
    """Pages of the file overwritten, the log gone."""
    database = sqlite3.connect(root / NAME)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    path = root / NAME
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(6):
        at = rng.randrange(len(data))
        data[at : at + 900] = rng.randbytes(900)
    path.write_bytes(data[: rng.randrange(len(data) // 2, len(data))])


@pytest.mark.parametrize("seed", [1, 2, 3, None])
def test_all_is_as_before(tmp_path: Path, seed: int | None) -> None:
    before = filled(tmp_path)
    removed = open_store(tmp_path).gone()
    if seed is None:
        (tmp_path / NAME).unlink()
    else:
        damage(tmp_path, seed)
        with pytest.raises(StartError, match="--repair"):
            open_store(tmp_path)
    report = repair(tmp_path)
    assert (report.unknown, report.orphans, report.snapshots) == ([], [], len(before))
    assert bool(report.kept) == (seed is not None)
    store = open_store(tmp_path)
    assert store.all() == before
    assert store.gone() == removed == [2]
    assert store.missing == []
    assert store.create(Kind.ACTIVE, "new", "two", {}).id > max(snapshot.id for snapshot in before)
    assert not list(tmp_path.glob("repair-*")) and not list(tmp_path.glob("*.new*"))
    assert store.all() == open_store(tmp_path).all()


def test_a_whole_database_is_repaired_to_itself(tmp_path: Path) -> None:
    before = filled(tmp_path)
    for _ in range(2):
        repair(tmp_path)
        assert open_store(tmp_path).all() == before


def test_directories_without_a_record_give_their_rows(tmp_path: Path) -> None:
    before = filled(tmp_path)
    for path in (tmp_path / "snapshots").glob(f"*/{RECORD}"):
        path.unlink()
    report = repair(tmp_path)
    store = open_store(tmp_path)
    assert store.all() == before
    assert report.unknown == [2]  # removed, with no row and no record: nobody's, but that is not known any more
    assert store.write_records() == 0  # repair wrote them


def test_what_lies_on_an_unknown_layer_is_left_alone(tmp_path: Path) -> None:
    before = {snapshot.key: snapshot for snapshot in filled(tmp_path)}
    lost = before["two"]
    (tmp_path / "snapshots" / str(lost.id) / RECORD).write_text('{"key": ')  # a power cut
    (tmp_path / NAME).unlink()
    report = repair(tmp_path)
    assert report.unknown == [lost.id]
    assert report.orphans == [before["container/ü"].id]
    assert any("pull them again" in line for line in report.lines())
    store = open_store(tmp_path)
    assert {s.key for s in store.all()} == set(before) - {"two", "container/ü"}
    assert (tmp_path / "snapshots" / str(lost.id)).is_dir()
    assert lost.id not in store.gone()


def test_hostile_records_do_no_harm(tmp_path: Path) -> None:
    """Parents in a circle, on an active snapshot, of another type; the good ones come through."""
    filled(tmp_path)
    plain = {"parent": "", "kind": 3, "created": 1, "updated": 1, "size": 0, "inodes": 0, "labels": {}}
    records: list[object] = [
        plain | {"key": "circle1", "parent": "circle2"},
        plain | {"key": "circle2", "parent": "circle1"},
        plain | {"key": "self", "parent": "self"},
        plain | {"key": "on-active", "parent": "container/ü"},
        plain | {"key": "kind", "kind": 7},
        plain | {"key": 5},
        plain | {"key": "labels", "labels": {"a": 1}},
        plain | {"key": "time", "created": "x"},
        [],
        {},
        plain | {"key": "good"},
    ]
    for number, record in enumerate(records, 100):
        (tmp_path / "snapshots" / str(number) / "fs").mkdir(parents=True)
        (tmp_path / "snapshots" / str(number) / RECORD).write_text(json.dumps(record))
    (tmp_path / NAME).unlink()
    report = repair(tmp_path)
    assert sorted(report.orphans) == [100, 101, 102, 103]
    assert report.unknown == [104, 105, 106, 107, 108, 109]
    keys = {snapshot.key for snapshot in open_store(tmp_path).all()}
    assert "good" in keys and "container/ü" in keys and "on-active" not in keys


def test_daemons_and_images_come_from_their_configurations(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    meta = {"containerd.io/snapshot/nydus-bootstrap": "1", "containerd.io/snapshot/cri.image-ref": "a.io/b/c:1"}
    for name in ("image1", "image2"):
        made = store.create(Kind.ACTIVE, "k", "", meta)
        (store.upper(made.id) / "image.boot").write_bytes(b"SFAR\x00\x05\x00\x00" + bytes(8192))
        store.commit(name, "k", meta)
    shared, own = "c0000000000000000001", "c0000000000000000002"
    for path in (f"config/{shared}/1", f"config/{own}", f"socket/{shared}"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / f"config/{own}/config.json").write_text('{"device": {"id": "/2"}}')
    (tmp_path / NAME).unlink()
    report = repair(tmp_path)
    assert (report.daemons, report.images) == (2, 2)
    records = Records(Database(tmp_path / NAME))
    assert {(one.id, one.shared, str(one.mountpoint)) for one in records.daemons()} == {
        (shared, True, f"{tmp_path}/mnt"),
        (own, False, f"{tmp_path}/snapshots/2/mnt"),
    }
    assert {(one.snapshot, one.daemon, one.image) for one in records.instances()} == {
        (1, shared, "a.io/b/c:1"),
        (2, own, "a.io/b/c:1"),
    }


def test_nothing_to_repair_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="nothing to repair"):
        repair(tmp_path)


def test_a_death_during_repair_needs_only_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its changes to the root."""
    base = tmp_path / "base"
    base.mkdir()
    before = filled(base)
    damage(base, 1)
    for name in ("replace", "link"):
        for nth in range(3):
            root = tmp_path / f"{name}{nth}"
            shutil.copytree(base, root)
            calls = iter(range(10))
            real = getattr(os, name)

            class Death(BaseException):
                pass

            def dying(*arguments: object, _calls: object = calls, _nth: int = nth, _real: object = real) -> object:
                if next(_calls) == _nth:  # type: ignore[call-overload]
                    raise Death
                return _real(*arguments)  # type: ignore[operator]

            with monkeypatch.context() as patched:
                patched.setattr(os, name, dying)
                try:
                    repair(root)
                except Death:
                    pass
            repair(root)
            assert open_store(root).all() == before


def test_the_first_version_has_rows_enough(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / NAME)
    old.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    insert = "INSERT INTO snapshots (id, key, parent, kind, created, updated, labels) VALUES (?, ?, ?, ?, 7, 8, '{}')"
    old.execute(insert, (3, "base", None, 3))
    old.execute(insert, (5, "container", 3, 2))
    old.commit()
    old.close()
    for name in ("3", "5"):
        (tmp_path / "snapshots" / name / "fs").mkdir(parents=True)
    repair(tmp_path)
    assert [(s.id, s.key, s.parent) for s in open_store(tmp_path).all()] == [(3, "base", ""), (5, "container", "base")]
