"""Layers that are unpacked after all, hostile ones too; and what tarfs does where the kernel lacks something."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nydusfs.containerd.chain import chain_ids
from nydusfs.drivers.erofs import mount as erofs_mount
from nydusfs.drivers.erofs.selftest import tiny_image
from nydusfs.registry.reference import Reference
from snapshotter.database import NAME, Database
from snapshotter.errors import FailedPrecondition
from snapshotter.labels import DIFF_ID, IMAGE_REF, LAYER_DIGEST, SNAPSHOT_REF
from snapshotter.lazy import plain, tarfs
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.settings import LazySettings
from snapshotter.store import Store
from tests.lab.daemon import can_mount_fuse
from tests.lab.images import Member, entry
from tests.lab.process import remove_tree, run, unmount_below, work_dir

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(60),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]


def layer(*members: Member) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, body in members:
            assert not isinstance(body, Path)
            tar.addfile(info, io.BytesIO(body) if body is not None else None)
    return out.getvalue()


def apply(scratch: Path, data: bytes, *below: Path) -> subprocess.CompletedProcess[bytes]:
    for name in ("fs", "work", "merged"):
        (scratch / name).mkdir(parents=True)
    command = [sys.executable, "-m", "snapshotter.lazy.apply", str(scratch), *map(str, below)]
    return subprocess.run(command, input=data, capture_output=True, timeout=30)


def test_a_layer_over_others_in_overlays_form(tmp_path: Path) -> None:
    """On a real disk: overlay has no upper directories on overlay."""
    work = work_dir()
    try:
        bottom = layer(
            entry("var", mode=0o700, uid=7),
            entry("var/old", "x"),
            entry("var/kept", "x"),
            entry("full"),
            entry("full/hidden", "x"),
            entry("dir"),
            entry("dir/f", "x"),
        )
        top = layer(
            entry("var/new", "y", uid=5, mode=0o4755, xattrs={"user.note": "hi"}),  # without its directory
            entry("var/.wh.old", ""),
            entry("full"),
            entry("full/.wh..wh..opq", ""),
            entry("full/shown", "z"),
            entry("dir", "now a file"),
            entry("node", kind=tarfile.CHRTYPE, device=(1, 3)),
            entry("pipe", kind=tarfile.FIFOTYPE),
            entry("link", kind=tarfile.LNKTYPE, link="full/shown", mode=0o644),
        )
        for name, data, below in (("b", bottom, ()), ("t", top, (work / "b" / "fs",))):
            done = apply(work / name, data, *below)
            assert done.returncode == 0, done.stderr
        assert (work / "b" / "fs" / "var" / "old").exists()  # the layer below is as it was
        fs = work / "t" / "fs"
        assert stat.S_ISCHR(os.lstat(fs / "var" / "old").st_mode)  # overlay's whiteout
        seen = work / "seen"
        seen.mkdir()
        run(["mount", "-t", "overlay", "-o", f"lowerdir={fs}:{work / 'b' / 'fs'}", "overlay", seen])
        assert sorted(os.listdir(seen / "var")) == ["kept", "new"]
        assert os.listdir(seen / "full") == ["shown"]
        assert (seen / "dir").read_text() == "now a file"
        var, new = os.lstat(seen / "var"), os.lstat(seen / "var" / "new")
        assert (stat.S_IMODE(var.st_mode), var.st_uid) == (0o700, 7)
        assert (stat.S_IMODE(new.st_mode), new.st_uid) == (0o4755, 5)
        assert os.getxattr(seen / "var" / "new", "user.note") == b"hi"
        assert os.lstat(seen / "link").st_ino == os.lstat(seen / "full" / "shown").st_ino
        assert os.lstat(seen / "node").st_rdev == os.makedev(1, 3)
        assert stat.S_ISFIFO(os.lstat(seen / "pipe").st_mode)
    finally:
        unmount_below(work)
        remove_tree(work)


@pytest.mark.parametrize(
    "members",
    [
        [entry("out", link="{outside}"), entry("out/file", "changed")],
        [entry("../../outside/file", "changed")],
        [entry("{outside}/file", "changed")],
        [entry("out", link="{outside}"), entry("out/.wh.file", "")],
        [entry("out", link="{outside}"), entry("out/.wh..wh..opq", "")],
        [entry(".wh...", "")],
        [entry("hard", kind=tarfile.LNKTYPE, link="{outside}/file"), entry("hard", "changed")],
        [entry("out", link="{outside}"), entry("out", mode=0o777)],
    ],
    ids=["link", "dots", "absolute", "whiteout", "opaque", "whiteout-of-dots", "hard-link", "replaced-link"],
)
def test_no_layer_reaches_out_of_its_directory(tmp_path: Path, members: list[Member]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").write_text("mine")
    before = os.lstat(outside)
    facts = (before.st_mode, before.st_uid, before.st_mtime_ns)
    for info, _ in members:
        info.name, info.linkname = (text.format(outside=outside) for text in (info.name, info.linkname))
    done = apply(tmp_path / "scratch", layer(*members))
    assert b"Traceback" not in done.stderr
    assert (outside / "file").read_text() == "mine"
    assert os.listdir(outside) == ["file"]
    after = os.lstat(outside)
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == facts


def test_a_layer_is_what_its_images_config_says(tmp_path: Path) -> None:
    """All images with its chain id share it, and containerd compares nothing: it did not unpack it."""
    image, data = Reference.parse("r.example/a:b"), layer(entry("file", "x"))
    diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
    under = "sha256:" + "1" * 64
    (tmp_path / "layer.tar").write_bytes(data)
    labels = {LAYER_DIGEST: "sha256:" + "2" * 64}

    def unpack(name: str, chain: str | None, **more: str) -> list[str]:
        (tmp_path / name / "fs").mkdir(parents=True)
        said = {**labels, **{{"ref": SNAPSHOT_REF, "diff": DIFF_ID}[key]: value for key, value in more.items()}}
        tar = tmp_path / "layer.tar"
        plain.unpack(None, image, said, tmp_path / name, [], tar, chain=chain)  # type: ignore[arg-type]
        return os.listdir(tmp_path / name / "fs")

    assert unpack("lowest", "", ref=diff_id) == ["file"]
    assert unpack("above", under, ref=chain_ids([under, diff_id])[-1], diff=diff_id) == ["file"]
    assert unpack("unknown", None, ref=under) == ["file"]
    for name, chain, more in (
        ("another", "", {"ref": under}),
        ("moved", under, {"ref": diff_id}),
        ("differs", None, {"diff": under}),
    ):
        with pytest.raises(FailedPrecondition, match="not what the image's config says"):
            unpack(name, chain, **more)
        assert os.listdir(tmp_path / name) == ["fs"] and not os.listdir(tmp_path / name / "fs")


def test_a_layer_of_no_bytes_is_an_empty_one(tmp_path: Path) -> None:
    """containerd unpacks it so: a tar that ends before its first header."""
    done = apply(tmp_path / "none", b"")
    assert (done.returncode, done.stderr, list((tmp_path / "none" / "fs").iterdir())) == (0, b"", [])


def test_damage_is_said_in_one_line(tmp_path: Path) -> None:
    done = apply(tmp_path / "cut", layer(entry("file", "x" * 5000))[:3000])
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_loop_devices_where_files_cannot_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, device, target = (tmp_path / name for name in ("image", "device", "mnt"))
    image.write_bytes(tiny_image())
    device.write_bytes(bytes(range(256)) * 32)
    target.mkdir()
    real, tried = erofs_mount.open_erofs, []

    def before_6_12(source: str, devices: object) -> int:
        tried.append(source)
        if not source.startswith("/dev/"):
            raise OSError(errno.ENOTBLK, "Block device required")
        return real(source, devices)  # type: ignore[arg-type]

    monkeypatch.setattr(erofs_mount, "open_erofs", before_6_12)
    try:
        tarfs.mount_erofs(image, [device], target)
        assert [name.startswith("/dev/loop") for name in tried] == [False, True]
        assert (target / "f").read_bytes() == device.read_bytes()
    finally:
        unmount_below(tmp_path)
    assert str(tmp_path) not in run(["losetup", "-a"]).stdout  # they went with the mount


def test_without_erofs_layers_are_unpacked_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(tarfs, "mount_erofs", refuse)
    with caplog.at_level(logging.WARNING):
        store = Store(tmp_path, Database(tmp_path / NAME))
        finder = LazyFinder(LazySettings(tarfs=True), None, store)  # type: ignore[arg-type]
    assert "enable_tarfs: No such device: it needs CONFIG_EROFS_FS" in caplog.text
    assert finder.claim("", {IMAGE_REF: "r.example/a", LAYER_DIGEST: "sha256:" + "0" * 64}) is None
    finder.close(umount=False)
