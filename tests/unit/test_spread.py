"""Folders of a cache lie apart on ext4, and no other file system is in the way."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from nydusfs.cache import CacheStore
from nydusfs.cache.spread import FS_IOC_GETFLAGS, FS_TOPDIR_FL, make_folder, spread

SHM = Path("/dev/shm")


def is_topdir(folder: Path) -> bool:
    fd = os.open(folder, os.O_RDONLY)
    try:
        return bool(int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4], "little") & FS_TOPDIR_FL)
    finally:
        os.close(fd)


def test_ext4_is_told(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True, timeout=10)
    if "ext" not in kind.stdout:
        pytest.skip(f"ext4: temporary files are on {kind.stdout.strip()} here")
    assert not is_topdir(tmp_path)
    CacheStore(tmp_path / "cache").close()
    assert is_topdir(tmp_path / "cache")
    spread(tmp_path / "cache")
    assert is_topdir(tmp_path / "cache")


def test_a_folder_is_made_once_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    make_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "file").touch()
    make_folder(folder)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["file"]
    with pytest.raises(FileNotFoundError):
        make_folder(tmp_path / "nowhere" / "folder")
    with pytest.raises(NotADirectoryError):
        make_folder(folder / "file")
    assert os.listdir(folder) == ["file"]


def test_one_that_came_first_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setattr(Path, "is_dir", lambda path: False)  # as it was a moment before
    make_folder(folder)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["file"]


def test_what_a_death_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".new-0123456789abcdef").mkdir()
    (tmp_path / ".other").mkdir()
    spread(tmp_path)
    assert os.listdir(tmp_path) == [".other"]


@pytest.mark.skipif(not SHM.is_dir(), reason="tmpfs: no /dev/shm here")
def test_another_file_system_and_nothing_there(tmp_path: Path) -> None:
    spread(tmp_path / "nothing")
    spread(SHM)
