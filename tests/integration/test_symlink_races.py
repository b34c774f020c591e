"""A container swaps a directory of its upper directory for a link to the host's files, as fast as it can, while this
stack measures, commits and deletes that directory: nothing outside of it is counted, read or deleted."""

from __future__ import annotations

import ctypes
import io
import os
import stat
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nydusfs.convert.upperdir import ChangedError, Choice, folder_layer, upper_layer
from nydusfs.errors import ConvertError
from nydusfs.trees import disk_usage, remove_tree
from snapshotter.trash import Trash

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="root: reads overlayfs' attributes, makes devices"),
]
RENAME_EXCHANGE, AT_FDCWD = 2, -100
SECRET = b"what only the host may read "
OWN, SECRETS, BIG = 30, 400, 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class Swapping:
    """`one` and `other` change places in a loop, until the end of the block."""

    def __init__(self, one: Path, other: Path) -> None:
        self._paths = os.fsencode(one), os.fsencode(other)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.times = 0

    def follow(self, one: Path) -> None:
        self._paths = os.fsencode(one), self._paths[1]

    def _run(self) -> None:
        while not self._end.is_set():
            one, other = self._paths
            # ctypes lets the walker run meanwhile, and the two take turns at any system call
            self.times += _libc.renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE) == 0

    def __enter__(self) -> Swapping:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def secrets(tmp_path: Path) -> Iterator[Path]:
    """Not smaller than it was at the end of the test."""
    folder = tmp_path / "host"
    (folder / "below").mkdir(parents=True)
    for number in range(SECRETS):
        (folder / "below" / f"key-{number}").write_bytes(SECRET)
    (folder / "big").write_bytes(SECRET * (BIG // len(SECRET)))
    yield folder
    assert len(os.listdir(folder / "below")) == SECRETS
    assert sorted(os.listdir(folder)) == ["below", "big"]


def upper(place: Path, secrets: Path) -> tuple[Path, Path, Path]:
    """A tree, and what in it changes places: a directory with names of the host's, and a link to that."""
    top = place / "upper"
    (top / "a" / "swap" / "below").mkdir(parents=True)
    for number in range(OWN):
        (top / "a" / "swap" / "below" / f"key-{number}").write_bytes(b"own")
    for number in range(20):  # walked between the look at the two and their use, or before
        (top / "a" / f"beside-{number}").mkdir()
    (top / "a" / "link").symlink_to(secrets)
    return top, top / "a" / "swap", top / "a" / "link"


def until(enough: Callable[[], bool], work: Callable[[], None], least: int = 300, seconds: float = 100) -> None:
    """Does the work `least` times, and on until it was `enough`."""
    done, end = 0, time.monotonic() + seconds
    while done < least or not enough():
        assert time.monotonic() < end, f"the swaps were not met in {done} times"
        work()
        done += 1


def test_usage_counts_nothing_behind_a_link(tmp_path: Path, secrets: Path) -> None:
    top, one, other = upper(tmp_path, secrets)
    size, inodes = disk_usage(top)
    assert inodes < SECRETS
    seen: set[int] = set()
    with Swapping(one, other) as swaps:

        def look() -> None:
            found = disk_usage(top)
            assert found[0] <= size
            assert found[1] <= inodes
            seen.add(found[1])

        until(lambda: len(seen) > 1, look)
    assert swaps.times > 300
    assert len(seen) > 1, "no swap was met"


def layer(pieces: Callable[[], Iterator[bytes]]) -> bytes | None:
    """None when it was said that the tree changed under it."""
    try:
        return b"".join(pieces())
    except ChangedError:
        return None
    except ConvertError as error:
        assert "links are not followed" in str(error)
        return None


@pytest.mark.parametrize("way", ["upper", "folder"])
def test_a_commit_reads_nothing_behind_a_link(tmp_path: Path, secrets: Path, way: str) -> None:
    top, one, other = upper(tmp_path, secrets)
    results: set[bool] = set()
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)

    def pieces() -> Iterator[bytes]:
        if way == "upper":
            return upper_layer(descriptor, Choice(), lambda: descriptor)
        return folder_layer(descriptor, b"a", Choice())

    def look() -> None:
        made = layer(pieces)
        results.add(made is None)
        if made is not None:
            assert SECRET not in made
            with tarfile.open(fileobj=io.BytesIO(made)) as archive:
                keys = [name for name in archive.getnames() if "key-" in name]
                # seen under both names in turn, maybe; the host's folder has more
                assert all(int(name.rpartition("-")[2]) < OWN for name in keys)

    try:
        with Swapping(one, other) as swaps:
            until(lambda: len(results) > 1, look)
    finally:
        os.close(descriptor)
    assert swaps.times > 300
    assert results == {True, False}


@pytest.mark.parametrize("kind", ["device", "pipe", "link"])
def test_a_commit_opens_only_the_file_that_it_saw(tmp_path: Path, secrets: Path, kind: str) -> None:
    """A container may make the device, though not open it. This one has no driver: opening it fails with a word of its
    own, which is no change that is noticed."""
    top = tmp_path / "upper"
    top.mkdir()
    (top / "file").write_bytes(bytes(BIG))
    if kind == "device":
        os.mknod(top / "other", stat.S_IFCHR | 0o666, os.makedev(4000, 77))
    elif kind == "pipe":
        os.mkfifo(top / "other")
    else:
        (top / "other").symlink_to(secrets / "big")
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    results: set[bool] = set()

    def look() -> None:
        made = layer(lambda: upper_layer(descriptor, Choice(), lambda: descriptor))
        results.add(made is None)
        assert made is None or SECRET not in made

    try:
        with Swapping(top / "file", top / "other"):
            until(lambda: len(results) > 1, look)
    finally:
        os.close(descriptor)
    assert results == {True, False}


def test_deletion_leaves_what_is_behind_a_link(tmp_path: Path, secrets: Path) -> None:
    """The link comes from without, as if the container made it anew however often it is deleted."""
    hit = 0
    trash = tmp_path / "trash"
    for number in range(300):
        top, one, link = upper(tmp_path, secrets)
        other = link.rename(tmp_path / "other")
        with Swapping(one, other) as swaps:
            if number % 2:
                with suppress(OSError):  # such as: not empty
                    remove_tree(top)
            else:
                trash.mkdir(exist_ok=True)
                one.parent.rename(trash / "a")  # and the swaps find their way there
                swaps.follow(trash / "a" / one.name)
                Trash(trash).empty(20)
            hit += swaps.times > 0
        for left in (top, trash, other):
            if left.is_symlink():
                left.unlink()
            elif left.exists():
                remove_tree(left)
    assert hit > 10


@contextmanager
def deep(top: Path, levels: int) -> Iterator[None]:
    """Deeper than a path is long, with something beside each level."""
    top.mkdir()
    at = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("down", dir_fd=at)
        os.mkdir("side", dir_fd=at)
        below = os.open("down", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    yield
    assert not top.exists()


def test_trees_deeper_than_paths_and_recursion_are_counted_and_deleted(tmp_path: Path) -> None:
    with deep(tmp_path / "7", 3000):
        assert disk_usage(tmp_path / "7")[1] == 6001
        trash = Trash(tmp_path / "trash")
        trash.put(tmp_path / "7")
        trash.empty(60)
        assert os.listdir(tmp_path / "trash") == []
    assert [name for name in open_files() if name.startswith(str(tmp_path))] == []


def open_files() -> list[str]:
    """What this process has open. Only names tell one's own: other tests' garbage is closed at any time."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return names
