"""The snapshot store against a model: containerd's rules, and rows and directories always in step."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snapshotter.database import NAME, Database
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotterError,
    StartError,
)
from snapshotter.labels import SNAPSHOT_REF
from snapshotter.store import Kind, Store


def open_store(root: Path) -> Store:
    return Store(root, Database(root / NAME))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def directories(store: Store) -> set[str]:
    return set(os.listdir(store.directory))


KEYS = st.sampled_from(["a", "b", "c", "d", "e/ü", "x y"])
PARENTS = st.one_of(st.just(""), KEYS)


class StoreModel(RuleBasedStateMachine):
    """key -> (kind, parent); ids only grow; a failed call changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = open_store(self.root)
        self.model: dict[str, tuple[Kind, str]] = {}
        self.seen: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def expected(self, key: str, parent: str) -> type[SnapshotterError] | None:
        if parent and parent not in self.model:
            return NotFound
        if parent and self.model[parent][0] is not Kind.COMMITTED:
            return InvalidArgument
        return AlreadyExists if key in self.model else None

    @rule(key=KEYS, parent=PARENTS, kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]))
    def create(self, key: str, parent: str, kind: Kind) -> None:
        if error := self.expected(key, parent):
            with pytest.raises(error):
                self.store.create(kind, key, parent, {})
            return
        made = self.store.create(kind, key, parent, {"l": "1"})
        assert made.id not in self.seen
        assert made == self.store.stat(key)
        self.seen.add(made.id)
        self.model[key] = (kind, parent)

    @rule(key=KEYS, parent=PARENTS, ref=KEYS)
    def skip(self, key: str, parent: str, ref: str) -> None:
        if error := self.expected(key, parent):
            with pytest.raises(error):
                self.store.commit_skipped(key, parent, ref, {SNAPSHOT_REF: ref})
            return
        made = self.store.commit_skipped(key, parent, ref, {SNAPSHOT_REF: ref})
        refs = [s for s in self.store.all() if s.labels.get(SNAPSHOT_REF) == ref and s.parent == parent]
        assert len(refs) == 1
        if made is not None:
            assert made.key == (ref if ref not in self.model else f"{ref}.{made.id}")
            self.seen.add(made.id)
            self.model[made.key] = (Kind.COMMITTED, parent)

    @rule(key=KEYS, name=KEYS)
    def commit(self, key: str, name: str) -> None:
        error: type[SnapshotterError] | None = None
        if key not in self.model:
            error = NotFound
        elif name in self.model:
            error = AlreadyExists
        elif self.model[key][0] is not Kind.ACTIVE:
            error = FailedPrecondition
        if error:
            with pytest.raises(error):
                self.store.commit(name, key, {})
            return
        before = self.store.stat(key).id
        self.store.commit(name, key, {"kept": "yes"})
        after = self.store.stat(name)
        assert (after.id, after.labels, after.inodes >= 1) == (before, {"kept": "yes"}, True)
        self.model[name] = (Kind.COMMITTED, self.model.pop(key)[1])

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        if key not in self.model:
            with pytest.raises(NotFound):
                self.store.remove(key)
        elif any(parent == key for _, parent in self.model.values()):
            with pytest.raises(FailedPrecondition, match="cannot remove snapshot with child"):
                self.store.remove(key)
        else:
            self.store.remove(key)
            del self.model[key]

    @rule()
    def cleanup(self) -> None:
        for _, path in self.store.leftovers():
            shutil.rmtree(path)
        assert {int(name) for name in directories(self.store)} == self.store.ids()

    @rule()
    def reopen(self) -> None:
        self.store = open_store(self.root)

    @invariant()
    def agree(self) -> None:
        found = {s.key: (s.kind, s.parent) for s in self.store.all()}
        assert found == self.model
        assert self.store.missing() == []
        assert not [name for name in directories(self.store) if not name.isdecimal()]
        for key in self.model:
            chain = self.store.chain(key)
            assert [s.parent for s in chain] == [s.key for s in chain[1:]] + [""]


StoreModel.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreModel = StoreModel.TestCase


def test_update_masks(store: Store) -> None:
    made = store.create(Kind.ACTIVE, "k", "", {"a": "1", "b": "2", "c.d/e": "3"})
    assert made.created == made.updated
    changed = store.update("k", {"a": "9", "z": "ignored"}, ["labels.a", "labels.c.d/e"])
    assert dict(changed.labels) == {"a": "9", "b": "2"}
    assert changed.created == made.created < changed.updated
    assert dict(store.update("k", {"only": "this", "empty": ""}, ["labels"]).labels) == {"only": "this"}
    assert dict(store.update("k", {"x": "y"}, []).labels) == {"x": "y"}
    with pytest.raises(InvalidArgument):
        store.update("k", {"p": "q"}, ["labels.p", "parent"])
    assert dict(store.stat("k").labels) == {"x": "y"}


def test_rebase_only_where_there_was_no_parent(store: Store) -> None:
    for name in ("p", "q"):
        store.create(Kind.ACTIVE, "tmp", "", {})
        store.commit(name, "tmp", {})
    store.create(Kind.ACTIVE, "free", "", {})
    store.create(Kind.ACTIVE, "bound", "p", {})
    with pytest.raises(InvalidArgument):
        store.commit("c1", "bound", {}, parent="q")
    with pytest.raises(NotFound):
        store.commit("c1", "free", {}, parent="nobody")
    with pytest.raises(FailedPrecondition):
        store.commit("c1", "free", {}, parent="bound")
    store.commit("c1", "free", {}, parent="q")
    store.commit("c2", "bound", {}, parent="p")
    assert (store.stat("c1").parent, store.stat("c2").parent) == ("q", "p")


def test_a_lost_database_never_reuses_or_deletes_what_lies_there(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        store.create(Kind.ACTIVE, str(number), "", {})
    os.makedirs(tmp_path / "snapshots" / "new-half")
    for name in os.listdir(tmp_path):
        if name.startswith(NAME):
            (tmp_path / name).unlink()
    again = open_store(tmp_path)
    assert again.sweep_temporary() == 1
    assert again.create(Kind.ACTIVE, "k", "", {}).id == 4
    again.remove("k")
    assert [identity for identity, _ in again.leftovers()] == [4]


def test_a_directory_of_a_rolled_back_transaction_is_a_leftover(store: Store, tmp_path: Path) -> None:
    store.create(Kind.ACTIVE, "k", "", {})
    os.makedirs(tmp_path / "snapshots" / "2" / "fs")  # killed between the rename and the commit
    again = open_store(tmp_path)
    assert [identity for identity, _ in again.leftovers()] == [2]
    assert again.create(Kind.ACTIVE, "l", "", {}).id == 3


def test_a_damaged_database_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StartError, match=NAME):
        open_store(tmp_path)


def test_concurrent_prepares_of_one_layer_make_one_snapshot(store: Store) -> None:
    made: list[object] = []

    def prepare(number: int) -> None:
        made.append(store.commit_skipped(f"extract-{number}", "", "sha256:x", {SNAPSHOT_REF: "sha256:x"}))

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len([one for one in made if one is not None]) == 1
    assert len(store.all()) == 1
    assert len(directories(store)) == 1
