"""The snapshot store against a model: containerd's rules, and rows and directories always in step."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nydusfs.trees import disk_usage
from snapshotter.database import MIGRATIONS, NAME, Database
from snapshotter.directories import read_record
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotterError,
    StartError,
)
from snapshotter.filters import parse
from snapshotter.labels import GID_MAPPING, SNAPSHOT_REF, UID_MAPPING
from snapshotter.store import Kind, Store, record_of


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
        gone = self.store.gone()
        for identity in gone:
            shutil.rmtree(self.store.path(identity))
        self.store.forget(gone)
        assert {int(name) for name in directories(self.store)} == self.store.ids()

    @rule()
    def reopen(self) -> None:
        self.store = open_store(self.root)

    @invariant()
    def agree(self) -> None:
        found = {s.key: (s.kind, s.parent) for s in self.store.all()}
        assert found == self.model
        assert self.store.missing == []
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


def test_a_filter_for_bytes_that_are_no_text_finds_nothing(store: Store) -> None:
    store.create(Kind.ACTIVE, "k", "", {SNAPSHOT_REF: "x"})
    for text in ('name=="\\xff"', 'parent=="\\xff"', f'labels."{SNAPSHOT_REF}"=="\\377"'):
        assert store.candidates(parse([text]).alternatives) == []


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
    assert "new-half" not in os.listdir(tmp_path / "snapshots")
    assert again.create(Kind.ACTIVE, "k", "", {}).id == 4
    again.remove("k")
    assert again.gone() == [4]


def test_a_death_right_after_a_new_database_was_made_costs_nobody_his_directories(tmp_path: Path) -> None:
    """Of a database that was lost, or of another implementation's root."""
    (tmp_path / "snapshots" / "7" / "fs").mkdir(parents=True)
    Database(tmp_path / NAME).close()  # killed here
    store = open_store(tmp_path)
    assert store.gone() == []
    assert open_store(tmp_path).gone() == []
    assert store.create(Kind.ACTIVE, "k", "", {}).id == 8
    store.remove("k")
    assert store.gone() == [8]


def test_a_directory_of_a_rolled_back_transaction_is_a_leftover(store: Store, tmp_path: Path) -> None:
    store.create(Kind.ACTIVE, "k", "", {})
    os.makedirs(tmp_path / "snapshots" / "2" / "fs")  # killed between the rename and the commit
    again = open_store(tmp_path)
    assert again.gone() == [2]
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


def test_a_database_of_an_older_version_is_carried_over(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / NAME)
    old.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    insert = "INSERT INTO snapshots (id, key, parent, kind, created, updated, labels) VALUES (?, ?, ?, ?, 7, 8, ?)"
    old.execute(insert, (3, "sha256:a", None, 3, json.dumps({SNAPSHOT_REF: "sha256:a"})))
    old.execute(insert, (5, "container", 3, 2, "{}"))
    old.execute("INSERT INTO daemons VALUES ('d', 1, 9, 9, '/s', '/m')")
    old.commit()
    old.close()
    for name in ("3", "4", "5"):
        (tmp_path / "snapshots" / name / "fs").mkdir(parents=True)
    store = open_store(tmp_path)
    found = [(s.id, s.key, s.parent, s.created) for s in store.all()]
    assert found == [(5, "container", "sha256:a", 7), (3, "sha256:a", "", 7)]
    assert [s.id for s in store.candidates([{("labels", SNAPSHOT_REF): "sha256:a"}])] == [3]
    assert store.commit_skipped("again", "", "sha256:a", {SNAPSHOT_REF: "sha256:a"}) is None
    assert store.gone() == [4]  # removed by the old version, not cleaned up yet
    assert store.write_records() == 2
    assert store.write_records() == 0
    assert (read_record(tmp_path / "snapshots" / "5") or {})["parent"] == "sha256:a"
    (version,) = sqlite3.connect(tmp_path / NAME).execute("PRAGMA user_version").fetchone()
    assert version == len(MIGRATIONS)


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path)
    newer = sqlite3.connect(tmp_path / NAME)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(StartError, match="newer release"):
        open_store(tmp_path)


def test_callers_of_one_commit_fail_alone(tmp_path: Path) -> None:
    """Each of many at once gets its own answer; the statements of one that raises are undone, those of others kept."""
    database = Database(tmp_path / NAME)
    commits: list[int] = []
    answers: dict[int, object] = {}

    def call(number: int) -> None:
        def work(writer: sqlite3.Connection) -> int:
            writer.execute("INSERT INTO facts VALUES (?, ?)", (f"n{number}", number))
            if number % 3 == 0:
                raise NotFound(str(number))
            if number % 3 == 1:
                writer.execute("INSERT INTO facts VALUES (?, 1)", (f"n{number}",))  # not unique
            return number

        try:
            answers[number] = database.apply(work, before=counted)
        except SnapshotterError as error:
            answers[number] = error

    def counted() -> None:
        commits.append(1)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    kept = {row[0] for row in database.query("SELECT value FROM facts")}
    assert kept == {number for number in range(300) if number % 3 == 2}
    for number, answer in answers.items():
        if number % 3 == 0:
            assert isinstance(answer, NotFound) and str(answer) == str(number)
        elif number % 3 == 1:
            assert isinstance(answer, SnapshotterError) and "UNIQUE" in str(answer)
        else:
            assert answer == number
    assert 1 <= len(commits) <= 300
    assert len(answers) == 300


def test_a_whole_job_that_was_not_whole_keeps_nothing(tmp_path: Path) -> None:
    """Told to write without a savepoint, it raises after a row: nobody's statements of that commit may stay."""
    database = Database(tmp_path / NAME)
    first = threading.Event()
    answers: list[str] = []

    def slow(writer: sqlite3.Connection) -> None:
        assert first.wait(10)  # meanwhile the others gather for the next commit

    def call(number: int) -> None:
        def work(writer: sqlite3.Connection) -> None:
            writer.execute("INSERT INTO facts VALUES (?, ?)", (f"n{number}", number))
            if number == 3:
                raise NotFound("3")

        try:
            database.apply(work, whole=True)
            answers.append("kept")
        except NotFound:
            answers.append("raised")

    threads = [threading.Thread(target=database.apply, args=(slow,))]
    threads += [threading.Thread(target=call, args=(number,)) for number in range(5)]
    threads[0].start()
    while not database._led:
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    while len(database._queue) < 5:
        time.sleep(0.001)
    first.set()
    for thread in threads:
        thread.join(30)
    assert answers == ["raised"] * 5
    assert database.query("SELECT * FROM facts") == []
    call(7)
    assert (answers[5:], database.query("SELECT value FROM facts")) == (["kept"], [(7,)])


@pytest.mark.parametrize("files", [0, 63, 64, 200])
def test_what_a_commit_measures(store: Store, files: int) -> None:
    """In the transaction where it is little, before it where it is not."""
    upper = store.upper(store.create(Kind.ACTIVE, "k", "", {}).id)
    for number in range(files):
        (upper / f"d{number % 3}").mkdir(exist_ok=True)
        (upper / f"d{number % 3}" / str(number)).write_bytes(b"x" * 5000)
    expected = disk_usage(upper)
    assert expected[1] == files + min(files, 3) + 1
    store.commit("layer", "k", {"l": "1"})
    done = store.stat("layer")
    assert ((done.size, done.inodes), done.labels, done.kind) == (expected, {"l": "1"}, Kind.COMMITTED)
    assert read_record(store.path(done.id)) == record_of(done)


def test_a_record_is_written_over_the_one_before_or_takes_its_place(store: Store) -> None:
    made = store.create(Kind.ACTIVE, "k", "", {"l": "1"})
    path = store.path(made.id) / "snapshot.json"
    numbers = []
    for text in ("2", "x" * 3000, "3", "y" * 9000, "4"):
        store.update("k", {"l": text}, [])
        numbers.append(path.stat().st_ino)
        assert read_record(store.path(made.id)) == record_of(store.stat("k"))
    # one that does not fit gets a file of its own; a file of several pages is never written over
    assert [one == other for one, other in pairwise(numbers)] == [False, True, False, False]
    assert os.listdir(store.path(made.id)).count("snapshot.json") == len(os.listdir(store.path(made.id))) - 2
    path.unlink()
    store.update("k", {"l": "5"}, [])
    assert read_record(store.path(made.id)) == record_of(store.stat("k"))
    shutil.rmtree(store.path(made.id))
    store.update("k", {"l": "6"}, [])
    assert store.stat("k").labels == {"l": "6"}


def test_a_commit_that_fails_takes_back_every_directory(store: Store, tmp_path: Path) -> None:
    fails = True
    apply = store._database.apply

    def sync() -> None:
        if fails:
            raise OSError(28, "No space left on device")

    store._database.apply = partial(apply, before=sync)  # type: ignore[method-assign]
    errors: list[OSError] = []

    def create(number: int) -> None:
        try:
            store.create(Kind.ACTIVE, str(number), "", {})
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 20
    assert directories(store) == set()
    fails = False
    made = store.create(Kind.ACTIVE, "after", "", {})
    assert directories(store) == {str(made.id)}


def test_directories_that_a_power_cut_took_are_made_again_where_they_were_empty(store: Store, tmp_path: Path) -> None:
    store.create(Kind.ACTIVE, "k", "", {})
    os.chown(store.upper(1), 7, 8)
    store.commit("layer", "k", {})
    store.create(Kind.ACTIVE, "container", "layer", {"l": "1"})
    store.create(Kind.VIEW, "view", "layer", {})
    store.commit_skipped("x", "layer", "sha256:s", {SNAPSHOT_REF: "sha256:s"})
    before = store.all()
    for identity in (2, 3, 4):
        shutil.rmtree(store.path(identity))
    again = open_store(tmp_path)
    assert (again.all(), again.missing, again.gone()) == (before, [], [])
    for identity, inside in ((2, {"fs", "work"}), (3, {"fs"}), (4, {"fs"})):
        assert set(os.listdir(again.path(identity))) == inside | {"snapshot.json"}
        stat = os.stat(again.upper(identity))
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (7, 8, 0o755)
    shutil.rmtree(again.path(1))  # what it held is gone: no container may start on an empty one
    assert open_store(tmp_path).missing == [1]
    assert not again.path(1).exists()


def test_labels_that_map_no_user_namespace_do_not_stop_the_start_after_a_power_cut(
    store: Store, tmp_path: Path
) -> None:
    """An image's author writes what he likes on layers that are skipped, and anybody with an update."""
    store.commit_skipped("x", "", "sha256:s", {SNAPSHOT_REF: "sha256:s", UID_MAPPING: "bad"})
    store.create(Kind.ACTIVE, "container", "sha256:s", {})
    store.update("container", {UID_MAPPING: "0:9:x", GID_MAPPING: "0:9:x"}, [])
    for identity in (1, 2):
        shutil.rmtree(store.path(identity))
    again = open_store(tmp_path)
    assert again.missing == []
    assert (again.upper(1).stat().st_uid, again.upper(2).stat().st_uid) == (os.geteuid(),) * 2
