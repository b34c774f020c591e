"""What a container changed, as a layer: lower layer + our tar of the upper directory = what overlayfs itself shows."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusfs.convert.compare import compare
from nydusfs.convert.sourcetree import apply_layer, new_root, read_layer
from nydusfs.convert.streams import PieceStream
from nydusfs.convert.upperdir import ChangedError, Choice, folder_layer, upper_layer
from nydusfs.convert.views import MountView, TreeView
from nydusfs.errors import ConvertError

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="root: mounts overlayfs"),
]


class Overlay:
    def __init__(self, work: Path, options: str) -> None:
        self.lower, self.upper, self.merged = work / "lower", work / "upper", work / "merged"
        for folder in (self.lower, self.upper, self.merged, work / "work"):
            folder.mkdir()
        self.options = f"lowerdir={self.lower},upperdir={self.upper},workdir={work / 'work'},{options}"

    def __enter__(self) -> Overlay:
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", self.options, self.merged], check=True, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.merged], check=True, timeout=60)


def fill(lower: Path) -> None:
    for name in ("keep", "gone", "replaced", "opaque", "moved", "data"):
        (lower / name).mkdir()
        for number in range(3):
            (lower / name / f"{number}").write_bytes(os.urandom(5000))
    (lower / "opaque" / "deep").mkdir()
    (lower / "opaque" / "deep" / "x").write_text("x")
    (lower / "link").symlink_to("keep/1")
    os.setxattr(lower / "keep" / "2", "user.note", b"\x00\xffvalue")
    (lower / "was-file").write_text("file")
    (lower / "was-dir").mkdir()
    (lower / "chowned").write_bytes(bytes(100_000))


def change(merged: Path) -> None:
    (merged / "keep" / "0").unlink()
    (merged / "keep" / "1").write_text("changed")
    (merged / "keep" / ("n" * 200)).mkdir()
    (merged / "keep" / ("n" * 200) / "long").symlink_to("t" * 3000)
    (merged / "keep" / "made").write_bytes(os.urandom(3 << 20))
    os.setxattr(merged / "keep" / "made", "user.bin", bytes(range(256)))
    os.setxattr(merged / "keep" / "made", "security.capability", b"\x01\x00\x00\x02\x00\x04" + bytes(14))
    os.link(merged / "keep" / "made", merged / "hard")
    os.chmod(merged / "hard", 0o4711)
    os.chown(merged / "hard", 0x123456, 0x654321)
    subprocess.run(["rm", "-r", merged / "gone", merged / "opaque", merged / "was-dir"], check=True, timeout=60)
    (merged / "opaque").mkdir(mode=0o1777)
    (merged / "opaque" / "fresh").write_text("fresh")
    (merged / "was-file").unlink()
    (merged / "was-file").mkdir()
    (merged / "was-dir").write_text("now a file")
    (merged / os.fsdecode(b"n\xf6t-utf8\n")).write_text("name")
    os.mkfifo(merged / "fifo", 0o640)
    os.mknod(merged / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (merged / "old").write_text("before 1970")
    os.utime(merged / "old", (-5000, -5000))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(merged / "sock"))
    os.chown(merged / "chowned", 7, 8)


def layer(overlay: Overlay, choice: Choice | None = None) -> bytes:
    upper = os.open(overlay.upper, os.O_RDONLY)
    opened: list[int] = []

    def merged() -> int:
        opened.append(os.open(overlay.merged, os.O_RDONLY))
        return opened[-1]

    try:
        return b"".join(upper_layer(upper, choice or Choice(), merged))
    finally:
        for descriptor in (upper, *opened):
            os.close(descriptor)


def plain_tar(folder: Path) -> io.BytesIO:
    command = ["tar", "--xattrs", "--xattrs-include=*", "--format=pax", "-C", folder, "-cf", "-", "."]
    return io.BytesIO(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout)


@pytest.fixture(params=["", "redirect_dir=on,metacopy=on"], ids=["usual", "redirect-metacopy"])
def overlay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Overlay]:
    made = Overlay(tmp_path, request.param or "redirect_dir=off")
    fill(made.lower)
    with made:
        yield made


def test_lower_and_layer_give_what_overlayfs_shows(overlay: Overlay) -> None:
    change(overlay.merged)
    if "redirect_dir=on" in overlay.options:
        os.rename(overlay.merged / "moved", overlay.merged / "to")
        (overlay.merged / "to" / "1").write_text("changed after the move")
        (overlay.merged / "to" / "2").unlink()
        assert os.getxattr(overlay.upper / "to", "trusted.overlay.redirect")
        assert os.getxattr(overlay.upper / "chowned", "trusted.overlay.metacopy") is not None
    (overlay.merged / "sock").unlink()
    tree = new_root()
    apply_layer(tree, read_layer(plain_tar(overlay.lower), "lower"))
    data = layer(overlay)
    apply_layer(tree, read_layer(io.BytesIO(data), "upper"))
    found = compare(TreeView(tree), MountView(overlay.merged))
    # the model keeps no time before 1970
    assert found.differences == []
    assert found.entries > 20
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name: member for member in archive}
        assert members["old"].mtime == -5000
        assert not any(key.startswith("SCHILY.xattr.trusted.overlay") for one in members.values()
                       for key in one.pax_headers)  # fmt: skip


def test_sockets_excluded_and_replaced_paths(overlay: Overlay) -> None:
    change(overlay.merged)
    choice = Choice(left_out=[b"keep/made", b"opaque"], replaced=[b"data"])
    with tarfile.open(fileobj=io.BytesIO(layer(overlay, choice))) as archive:
        names = archive.getnames()
    assert "sock" not in names
    assert ".wh.data" in names
    assert "keep/made" not in names
    assert not [name for name in names if name.startswith("opaque")]
    assert "hard" in names, "another name of what is left out is a file of its own"


def test_a_folder_with_mounts_below(overlay: Overlay, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "v").write_text("from the volume")
    subprocess.run(["mount", "--bind", volume, overlay.merged / "data"], check=True, timeout=60)
    top = os.open(overlay.merged, os.O_RDONLY)
    try:
        with tarfile.open(fileobj=PieceStream(folder_layer(top, b"data", Choice())), mode="r|") as archive:
            assert archive.getnames() == ["data", "data/v"]
        with tarfile.open(fileobj=PieceStream(folder_layer(top, b"was-file", Choice())), mode="r|") as archive:
            assert archive.getnames() == ["was-file"]
        for path, said in ((b"link/x", "links are not followed"), (b"nothing", "has no /nothing")):
            with pytest.raises(ConvertError, match=said):
                list(folder_layer(top, path, Choice()))
    finally:
        os.close(top)
        subprocess.run(["umount", overlay.merged / "data"], check=True, timeout=60)


def test_a_file_that_grows_is_noticed_and_reserved_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "grows").write_bytes(bytes(3 << 20))
    top = os.open(tmp_path, os.O_RDONLY)
    try:
        pieces = folder_layer(top, b"grows", Choice())
        next(pieces)
        with (tmp_path / "grows").open("ab") as file:
            file.write(b"more")
        with pytest.raises(ChangedError, match="/grows of the container changed"):
            list(pieces)
        (tmp_path / "dir").mkdir()
        (tmp_path / "dir" / ".wh.x").write_text("")
        with pytest.raises(ConvertError, match=r"--with-path '!/dir/\.wh\.x'"):
            list(folder_layer(top, b"dir", Choice()))
    finally:
        os.close(top)
