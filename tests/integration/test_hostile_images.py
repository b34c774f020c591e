"""Images made to do harm, over a real mount: by FUSE, and as kernel mounts of EROFS where this machine can.

What an image may hold is served as it is, and powerless: devices do not open, set-id bits do not count. What no image
may hold is refused, or an error where it is; the daemon lives, and a good image beside it is read as before. Mutations
of every structure are the fuzzers' business (tests/fuzz); these are the ones with a purpose.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import shutil
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootstrap.build import build_layer
from bootstrap.decompress import open_layer
from bootstrap.errors import RafsError
from bootstrap.layout import v5, v6
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.reader_v5 import BootstrapV5
from bootstrap.reader_v6 import BootstrapV6
from nydusfs.convert.bootstrap_layer import unpack_bootstrap_layer
from nydusfs.errors import ConvertError
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, reader, wait_until
from tests.lab.erofs import is_erofs
from tests.lab.faulty import faulty_server
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]
DEPTH = 2000  # paths of 8,000 bytes: twice what one call takes
LONG = "n" * 255


@pytest.fixture(scope="module")
def node(fs_driver: str) -> Iterator[Nydusd]:
    """A daemon with a good image at /good, whose pid and answers are those of before after each test."""
    with Nydusd() as running:
        image = running.dir / "good"
        image.mkdir()
        good = tiny_image(image, {"f": noise(100_000)})
        mount(running, "/good", good, image)
        yield running


@pytest.fixture(autouse=True)
def _good_image_is_read_as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    if "node" not in request.fixturenames:
        yield
        return
    node: Nydusd = request.getfixturevalue("node")
    before = node.worker_pid
    yield
    assert node.worker_pid == before, "the worker died"
    assert inside(node.mnt / "good", "print(len(open('f', 'rb').read()))") == "100000"
    assert "Traceback" not in node.log_text()


def mount(node: Nydusd, where: str, image: TinyImage, folder: Path) -> None:
    (folder / image.blob_id).write_bytes(image.blob)
    answer = node.mount(where, image.bootstrap, config(folder))
    assert answer.status == 204, answer


def config(folder: Path) -> str:
    text = json.loads(localfs_config(folder, work_dir=folder.parent / f"{folder.name}.cache"))
    return json.dumps({**text, "enable_xattr": True, "fs_prefetch": {"learn": False}})


def inside(folder: Path, code: str, timeout: float = 60.0) -> str:
    """What a program in this directory prints."""
    # imports first: they would look into the directory
    head = "import errno, json, os, stat, subprocess, sys\nos.chdir(sys.argv[1])\n"
    done = reader(head + code, folder, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(folder: Path, fill: Callable[[tarfile.TarFile], None], version: int = 6) -> TinyImage:
    tar, out = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        fill(archive)
    tar.seek(0)
    result = build_layer(tar, out, BuildOptions(fs_version=version, chunk_size=0x1000))
    boot = folder / "image.boot"
    boot.write_bytes(result.bootstrap)
    return TinyImage(boot, result.blob_id, out.getvalue(), {})


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in fields.items():
        setattr(entry, field, value)
    archive.addfile(entry, io.BytesIO(data))


# ---- what an image may hold


def odd(archive: tarfile.TarFile) -> None:
    symlink, device = tarfile.SYMTYPE, tarfile.CHRTYPE
    for name, target in (
        ("loop", "loop"), ("ping", "pong"), ("pong", "ping"), ("absolute", "/etc/passwd"),
        ("up", "../" * 60 + "etc/passwd"), ("long", "x/" * 2000 + "y"), ("newline", "a\nb"),
        ("proc", "/proc/self/root/etc/passwd"),
    ):  # fmt: skip
        add(archive, name, type=symlink, linkname=target)
    add(archive, "etc", type=tarfile.DIRTYPE, mode=0o755)
    add(archive, "etc/passwd", b"the image's own")
    add(archive, "dev", type=tarfile.DIRTYPE, mode=0o755)
    add(archive, "dev/zero", type=device, devmajor=1, devminor=5, mode=0o666)
    add(archive, "dev/disk", type=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o666)
    add(archive, "dev/watchdog", type=device, devmajor=10, devminor=130, mode=0o666)
    add(archive, "dev/strange", type=device, devmajor=4095, devminor=(1 << 20) - 1, mode=0o666)
    add(archive, "pipe", type=tarfile.FIFOTYPE, mode=0o666)
    with open(shutil.which("id") or "/usr/bin/id", "rb") as program:
        add(archive, "id", program.read(), mode=0o6755)
    own = {"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.overlay.redirect": "/../../etc",
           "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.trusted.overlay.metacopy": "",
           f"SCHILY.xattr.user.{'k' * 250}": "v" * 60_000}  # fmt: skip
    add(archive, "marked", b"data", pax_headers=own)
    many = {f"SCHILY.xattr.user.{number:03}{'k' * 230}": "v" * 100 for number in range(250)}
    add(archive, "many", b"data", pax_headers=many)
    add(archive, "newline\nname", b"data")
    add(archive, LONG, b"data")


def test_what_an_image_may_hold_is_powerless(node: Nydusd, tmp_path: Path) -> None:
    image = build(tmp_path, odd)
    mount(node, "/odd", image, tmp_path)
    top = node.mnt / "odd"
    try:
        found = json.loads(inside(top, f"""
def attempt(call):
    try: return call()
    except OSError as error: return errno.errorcode[error.errno]
def as_nobody():
    os.setgid(65534); os.setuid(65534)
found = {{name: attempt(lambda: open(name, "rb").read(5) and "read") for name in ("loop", "ping", "pong", "long")}}
found["targets"] = [os.readlink(name) for name in ("absolute", "up", "newline")]
for name in ("zero", "disk", "watchdog", "strange"):
    found[name] = attempt(lambda: os.open("dev/" + name, os.O_RDONLY | os.O_NONBLOCK))
found["rdev"] = [os.major(os.lstat("dev/zero").st_rdev), os.minor(os.lstat("dev/zero").st_rdev)]
found["pipe"] = stat.S_ISFIFO(os.lstat("pipe").st_mode)
found["id"] = [oct(os.lstat("id").st_mode), subprocess.run(["./id", "-u"], preexec_fn=as_nobody, capture_output=True,
               text=True, timeout=20).stdout.strip()]
found["xattrs"] = sorted(os.listxattr("marked", follow_symlinks=False))
found["large"] = len(os.getxattr("marked", "user." + "k" * 250))
found["many"] = attempt(lambda: len(os.listxattr("many")))
found["one"] = attempt(lambda: os.getxattr("many", "user.007" + "k" * 230).decode())
found["names"] = [os.path.exists("newline\\nname"), os.path.exists({LONG!r})]
writes = (lambda: os.mknod("x"), lambda: os.unlink("pipe"), lambda: os.chmod("id", 0))
found["write"] = [attempt(call) for call in writes]
os.chroot("."); os.chdir("/")
found["root"] = [attempt(lambda: open(name).read()) for name in ("absolute", "up")]
print(json.dumps(found))
"""))  # fmt: skip
    finally:
        assert node.umount("/odd").status == 204
    assert [found[name] for name in ("loop", "ping", "pong")] == ["ELOOP"] * 3
    assert found["long"] in ("ENOENT", "ENAMETOOLONG")
    assert found["targets"] == ["/etc/passwd", "../" * 60 + "etc/passwd", "a\nb"]
    assert found["root"] == ["the image's own"] * 2
    assert [found[name] for name in ("zero", "disk", "watchdog", "strange")] == ["EACCES"] * 4  # nodev
    assert found["rdev"] == [1, 5] and found["pipe"] is True
    assert found["id"] == ["0o106755", "65534"]  # nosuid
    overlay = {f"trusted.overlay.{name}" for name in ("redirect", "opaque", "metacopy")}
    assert {"user.a", *overlay} <= set(found["xattrs"]) and found["large"] == 60_000
    assert found["many"] in (250, "E2BIG", "ERANGE") and found["one"] == "v" * 100
    assert found["names"] == [True, True]
    assert found["write"] == ["EROFS"] * 3


def test_overlay_marks_of_an_image_lead_nowhere(node: Nydusd, tmp_path: Path) -> None:
    """A container's root is an overlay of the image: a redirect must not take it out of it."""

    def fill(archive: tarfile.TarFile) -> None:
        for number, target in enumerate(("/../../../etc", "../../etc", "/", "..")):
            add(archive, f"d{number}", type=tarfile.DIRTYPE, mode=0o755,
                pax_headers={"SCHILY.xattr.trusted.overlay.redirect": target})  # fmt: skip
        add(archive, "f", b"x", pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/etc/passwd",
                                             "SCHILY.xattr.trusted.overlay.metacopy": ""})  # fmt: skip

    mount(node, "/redirects", build(tmp_path, fill), tmp_path)
    places = [tmp_path / name for name in ("upper", "work", "merged")]
    for place in places:
        place.mkdir()
    options = f"lowerdir={node.mnt}/redirects,upperdir={places[0]},workdir={places[1]}"
    try:
        found = inside(tmp_path, f"""
subprocess.run(["mount", "-t", "overlay", "overlay", "merged", "-o", {options!r}], check=True, timeout=30)
try:
    for folder, names, files in os.walk("merged"):
        print(folder, names, files)
    try: print(open("merged/f").read())
    except OSError as error: print(error.errno)
finally:
    subprocess.run(["umount", "-l", "merged"], check=True, timeout=30)
""")  # fmt: skip
    finally:
        assert node.umount("/redirects").status == 204
    assert "passwd" not in found and "hostname" not in found and "root:" not in found, found


def test_trees_thousands_deep_and_directories_of_thousands(node: Nydusd, tmp_path: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        path = ""
        for _ in range(DEPTH):
            path += "ddd/"
            add(archive, path, type=tarfile.DIRTYPE, mode=0o755)
        add(archive, path + "bottom", b"deep")
        for number in range(3000):
            add(archive, f"wide/{number:05}{'w' * 250}")

    image = build(tmp_path, fill)
    mount(node, "/deep", image, tmp_path)
    try:
        found = inside(node.mnt / "deep", f"""
print(len(os.listdir("wide")), os.path.exists("wide/02999" + "w" * 250))
for _ in range({DEPTH}): os.chdir("ddd")
print(open("bottom").read())
""")  # fmt: skip
        assert found == "3000 True\ndeep"
    finally:
        assert node.umount("/deep").status == 204


# ---- what no image may hold


PROBE = """
found, budget, seen = {}, 3000, []
def note(what, call):
    try:
        call()
    except OSError as error:
        found[what] = found.get(what, 0) + 1
        seen.append(errno.errorcode[error.errno])
def look(depth):
    global budget
    names = []
    note("list", lambda: names.extend(os.listdir(b".")))
    for name in names:
        assert b"/" not in name and b"\\0" not in name and name not in (b".", b".."), name
    for name in [*names, b"a/../../../../../etc/passwd", b"..x", b"dir/..", b"x" * 255]:
        budget -= 1
        if budget < 0: return
        facts = []
        note("stat", lambda: facts.append(os.lstat(name)))
        if not facts: continue
        mode = facts[0].st_mode
        if stat.S_ISLNK(mode): note("link", lambda: os.readlink(name))
        note("xattr", lambda: os.listxattr(name, follow_symlinks=False))
        if stat.S_ISREG(mode) and b"/" not in name:
            def read():
                fd = os.open(name, os.O_RDONLY)
                try:
                    os.pread(fd, 4096, 0)
                    os.pread(fd, 4096, min(facts[0].st_size, 1 << 62) // 2)
                finally: os.close(fd)
            note("read", read)
        if stat.S_ISDIR(mode) and b"/" not in name and depth < 40:
            here = os.open(".", os.O_RDONLY)
            try:
                os.chdir(name)
                look(depth + 1)
            except OSError as error:
                seen.append(errno.errorcode[error.errno])
            finally:
                os.fchdir(here)
                os.close(here)
look(0)
print(json.dumps({"errors": sorted(set(seen)), "secret": os.path.exists(b"a/../../../../../etc/passwd/../shadow-x")}))
"""


def plain(archive: tarfile.TarFile) -> None:
    add(archive, "dir", type=tarfile.DIRTYPE, mode=0o755)
    add(archive, "dir/sub", type=tarfile.DIRTYPE, mode=0o755)
    for name in ("SLASHNAME", "NULLNAME", "FF", "GG", "HH", "I", "dir/file", "dir/sub/file"):
        add(archive, name, noise(9000))
    add(archive, "soft", type=tarfile.SYMTYPE, linkname="target-of-it")


Forge = Callable[[bytearray, Path], None]


def renamed(old: bytes, new: bytes) -> Forge:
    def forge(data: bytearray, path: Path) -> None:
        assert len(old) == len(new) and data.count(old), old
        at = data.index(old)
        data[at : at + len(old)] = new

    return forge


def _dirent(path: Path, folder: bytes, name: bytes) -> int:
    """Where a v6 directory entry lies."""
    with open_bootstrap(path) as image:
        assert isinstance(image, BootstrapV6)
        directory = image._directory(image.resolve(folder))
        assert directory is not None
        for block in range(directory.blocks):
            at, size, count = image._block(directory, block)
            for number in range(count):
                if image._name(at, size, count, number) == name:
                    return at + v6.DIRENT.size * number
    raise AssertionError(name)


def points_to(folder: bytes, name: bytes, target: bytes | int, kind: int | None = None) -> Forge:
    """A v6 entry that leads to another inode: a directory above it, something else's, one that cannot be."""

    def forge(data: bytearray, path: Path) -> None:
        at = _dirent(path, folder, name)
        nid, offset, old, rest = v6.DIRENT.unpack_from(data, at)
        if isinstance(target, bytes):
            with open_bootstrap(path) as image:
                nid = image.resolve(target)
        else:
            nid = target
        v6.DIRENT.pack_into(data, at, nid & ((1 << 64) - 1), offset, old if kind is None else kind, rest)

    return forge


def inode_v6(name: bytes, field: str, value: int) -> Forge:
    """Fields of an extended inode, by their place (EROFS): mode at 4, size at 8, the union at 16."""
    fields = {"icount": (2, "<H"), "mode": (4, "<H"), "size": (8, "<Q"), "union": (16, "<I"), "nlink": (44, "<I")}
    place, form = fields[field]

    def forge(data: bytearray, path: Path) -> None:
        with open_bootstrap(path) as image:
            assert isinstance(image, BootstrapV6)
            at = image.inode_offset(image.resolve(name))
        struct.pack_into(form, data, at + place, value)

    return forge


def inode_v5(name: bytes, **changed: int) -> Forge:
    def forge(data: bytearray, path: Path) -> None:
        with open_bootstrap(path) as image:
            assert isinstance(image, BootstrapV5)
            at = image._at(image.resolve(name))
        fields = v5.Inode(*v5.INODE.unpack_from(data, at))._replace(**changed)
        v5.INODE.pack_into(data, at, *fields)

    return forge


def blob_named(new: bytes) -> Forge:
    """The blob's id becomes another text: it is part of file names and URLs."""

    def forge(data: bytearray, path: Path) -> None:
        with open_bootstrap(path) as image:
            old = image.blobs[0].id.encode()
        while (at := data.find(old)) >= 0:
            data[at : at + len(old)] = new.ljust(len(old), b"\0")

    return forge


ALIKE: dict[str, Forge] = {  # for both versions
    "slash": renamed(b"SLASHNAME", b"../../../"),
    "slash-inside": renamed(b"SLASHNAME", b"a/../../b"),
    "nul": renamed(b"NULLNAME", b"nul\0name"),
    "dot-dot": renamed(b"FF", b".."),
    "dot": renamed(b"I", b"."),
    "twice": renamed(b"FF", b"GG"),
    "disorder": renamed(b"FF", b"zz"),
    "target-nul": renamed(b"target-of-it", b"target\0of-it"),
    "target-root": renamed(b"target-of-it", b"/proc/1/root"),
    "blob-above": blob_named(b"../../../../../../etc/passwd"),
    "blob-absolute": blob_named(b"/etc/passwd"),
    "blob-hidden": blob_named(b".maps"),
    "blob-lock": blob_named(b".lock"),
    "blob-encoded": blob_named(b"%2e%2e%2f%2e%2e%2fetc"),
    "blob-query": blob_named(b"x?y=z#w d"),
    "blob-header": blob_named(b"x HTTP/1.1\r\nHost: y"),
    "blob-dots": blob_named(b".."),
}
ONLY: dict[int, dict[str, Forge]] = {
    6: {
        "cycle-root": points_to(b"/dir", b"sub", b"/"),
        "cycle-parent": points_to(b"/dir/sub", b"file", b"/dir", 2),
        "cycle-self": points_to(b"/dir", b"sub", b"/dir"),
        "two-parents": points_to(b"/", b"FF", b"/dir/sub", 2),
        "lies-about-kind": points_to(b"/", b"FF", b"/dir/sub"),
        "file-as-directory": points_to(b"/dir", b"sub", b"/GG"),
        "outside": points_to(b"/", b"FF", 1 << 40),
        "another-image": points_to(b"/", b"FF", 1 << 48 | 36),  # node numbers have the image above these bits
        "another-image-2": points_to(b"/", b"FF", 2 << 48 | 36),
        "negative": points_to(b"/", b"FF", -1),
        "nowhere": points_to(b"/", b"FF", 0),
        "middle": points_to(b"/", b"FF", 3),
        "kind": points_to(b"/", b"FF", b"/GG", 99),
        "endless": inode_v6(b"/FF", "size", (1 << 63) - 1),
        "endless-directory": inode_v6(b"/dir", "size", (1 << 63) - 1),
        "large-directory": inode_v6(b"/dir", "size", 1 << 20),
        "directory-elsewhere": inode_v6(b"/dir", "union", 0xFFFFFFFF),
        "mode": inode_v6(b"/FF", "mode", 0o170777),
        "becomes-a-directory": inode_v6(b"/FF", "mode", 0o040755),
        "becomes-a-file": inode_v6(b"/dir", "mode", 0o100644),
        "becomes-a-link": inode_v6(b"/FF", "mode", 0o120777),
        "xattrs-of-others": inode_v6(b"/FF", "icount", 0xFFFF),
        "target-of-megabytes": inode_v6(b"/soft", "size", 1 << 20),
        "no-links": inode_v6(b"/FF", "nlink", 0),
    },
    5: {
        "cycle-root": inode_v5(b"/dir", child_index=1, child_count=9),
        "cycle-self": inode_v5(b"/dir/sub", child_index=2, child_count=1),
        "endless": inode_v5(b"/FF", size=(1 << 63) - 1),
        "many-children": inode_v5(b"/dir", child_count=0xFFFFFFFF),
        "another-image": inode_v5(b"/FF", ino=1 << 48 | 1),
        "mode": inode_v5(b"/FF", mode=0o170777),
        "becomes-a-directory": inode_v5(b"/FF", mode=0o040755),
        "becomes-a-file": inode_v5(b"/dir", mode=0o100644),
        "becomes-a-link": inode_v5(b"/FF", mode=0o120777),
        "name": inode_v5(b"/FF", name_size=0xFFFF),
        "target-of-megabytes": inode_v5(b"/soft", symlink_size=0xFFFF),
        "parent": inode_v5(b"/dir/sub", parent=1 << 60),
    },
}
# Wrong in no way that shows: a link may lead anywhere, dots are hidden, what is said twice is there once, and the rest
# is about fields that one or the other driver has no use for.
HARMLESS = {
    "target-root", "dot-dot", "dot", "twice", "disorder", "two-parents", "lies-about-kind", "file-as-directory", "kind",
    "directory-elsewhere", "parent", "another-image",
}  # fmt: skip
CASES = [(version, name, forge) for version in (6, 5) for name, forge in {**ALIKE, **ONLY[version]}.items()]


def test_forged_bootstraps(node: Nydusd, tmp_path: Path) -> None:
    """One after the other at one daemon; each is refused with a sentence, or shows errors where it is wrong."""
    outcomes = {}
    whole = {version: tmp_path / str(version) for version in (5, 6)}
    images = {}
    for version, folder in whole.items():
        folder.mkdir()
        images[version] = build(folder, plain, version)
        (folder / images[version].blob_id).write_bytes(images[version].blob)
    for version, name, forge in CASES:
        folder = whole[version]
        data = bytearray(images[version].bootstrap.read_bytes())
        forge(data, images[version].bootstrap)
        boot = folder / f"{name}.boot"
        boot.write_bytes(data)
        answer = node.mount(f"/{version}{name}", boot, config(folder))
        if answer.status != 204:
            assert answer.message and len(answer.message) < 2000 and "\n" not in answer.message, (version, name, answer)
            outcomes[version, name] = "refused"
            continue
        try:
            found = json.loads(inside(node.mnt / f"{version}{name}", PROBE, timeout=30))
        finally:
            assert node.umount(f"/{version}{name}").status == 204
        outcomes[version, name] = ",".join(found["errors"]) + (" erofs" if is_erofs(node.mnt / name) else "")
        assert found["secret"] is False
    # nothing was made where a blob's id leads
    assert not (tmp_path / "etc").exists()
    for version in (5, 6):
        cache = tmp_path / f"{version}.cache"
        assert not [path for path in cache.rglob("*") if path.is_symlink()]
        assert {path.name for path in cache.iterdir() if path.name.startswith(".")} <= {".lock", ".maps", ".erofs"}
        assert (cache / ".lock").is_file()
    quiet = {name for (_, name), outcome in outcomes.items() if outcome in ("", "ENOENT")}
    assert quiet <= HARMLESS, outcomes


@pytest.mark.parametrize("learn", [False, True])
def test_a_prefetch_table_of_what_is_not_there(node: Nydusd, tmp_path: Path, learn: bool) -> None:
    """Nothing is fetched ahead then, and nothing else comes of it."""
    image = build(tmp_path, plain)
    data = bytearray(image.bootstrap.read_bytes())
    fields = v6.ExtSuperblock(*v6.EXT_SUPERBLOCK.unpack_from(data, v6.EXT_SUPER_OFFSET))
    fields = fields._replace(prefetch_table_offset=len(data), prefetch_table_size=4)
    v6.EXT_SUPERBLOCK.pack_into(data, v6.EXT_SUPER_OFFSET, *fields)
    image.bootstrap.write_bytes(data + struct.pack("<I", 0x7FFFFFFF) + bytes(4092))
    (tmp_path / image.blob_id).write_bytes(image.blob)
    settings = json.loads(config(tmp_path))
    settings["fs_prefetch"] = {"enable": True, "learn": learn}
    assert node.mount("/ahead", image.bootstrap, json.dumps(settings)).status == 204
    try:
        assert inside(node.mnt / "ahead", "print(len(open('dir/file', 'rb').read()))") == "9000"
        wait_until(lambda: "nothing is prefetched, its metadata is bad" in node.log_text(), 20, "line")
    finally:
        assert node.umount("/ahead").status == 204


def test_blob_ids_stay_one_part_of_a_url(node: Nydusd, tmp_path: Path) -> None:
    image = build(tmp_path, plain)
    whole = image.bootstrap.read_bytes()
    with faulty_server({}) as server:
        for number, name in enumerate((b"%2e%2e%2f%2e%2e%2fetc", b"x?y=z#w d", b"\xc3\xbc HTTP 1.1 x", b"a:b@c;d&e")):
            data = bytearray(whole)
            blob_named(name)(data, image.bootstrap)
            boot = tmp_path / f"{number}.boot"
            boot.write_bytes(data)
            backend = {"scheme": "http", "host": server.netloc, "repo": "a/b", "timeout": 2, "retry_limit": 0}
            cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
            device = {"backend": {"type": "registry", "config": backend}, "cache": cache}
            assert node.mount(f"/url{number}", boot, json.dumps({"device": device, "mode": "direct"})).status == 204
            try:
                code = "try: open('GG', 'rb').read()\nexcept OSError as error: print(error.errno)"
                assert int(inside(node.mnt / f"url{number}", code)) == errno.EIO
            finally:
                assert node.umount(f"/url{number}").status == 204
        targets = {request.target for request in server.requests if request.target != "/v2/"}
    assert targets and {target.rpartition("/")[0] for target in targets} == {"/v2/a/b/blobs"}
    assert all(re.fullmatch(r"sha256:[A-Za-z0-9%._~-]+", target.rpartition("/")[2]) for target in targets), targets


# ---- layers of a hostile bootstrap


Entry = tuple[str, bytes, dict[str, object]]


def layer(*entries: Entry) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data, fields in entries:
            add(archive, name, data, **fields)
    return out.getvalue()


LINK: dict[str, object] = {"type": tarfile.SYMTYPE, "linkname": "{outside}"}
HARD: dict[str, object] = {"type": tarfile.LNKTYPE, "linkname": "{outside}/file"}
PIPE: dict[str, object] = {"type": tarfile.FIFOTYPE}
DISK: dict[str, object] = {"type": tarfile.BLKTYPE, "devmajor": 8}


@pytest.mark.parametrize(
    "entries",
    [
        [("image", b"", LINK), ("image/image.boot", b"x", {})],
        [("image/image.boot", b"", {**LINK, "linkname": "{outside}/file"}), ("image/image.boot", b"x", {})],
        [("image/image.boot", b"", HARD)],
        [("image/image.boot", b"", PIPE)],
        [("image/image.boot", b"", DISK)],
        [("image/../../outside/file", b"x", {}), ("image/..", b"x", {}), ("image/image.boot", b"x", {})],
        [("{outside}/file", b"x", {}), ("image/image.boot", b"x", {})],
        [("image/a\\..\\b", b"x", {}), ("image/", b"x", {}), ("image/image.boot", b"x", {})],
        [("./image/./image.boot", b"x", {}), ("image//image.boot", b"x", {}), ("/image/image.boot", b"x", {})],
    ],
    ids=["folder-link", "file-link", "hard-link", "pipe", "device", "dots", "absolute", "odd", "spellings"],
)
def test_bootstrap_layers_stay_in_their_folder(tmp_path: Path, entries: list[Entry]) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "in"
    outside.mkdir()
    folder.mkdir()
    (outside / "file").write_text("mine")
    named = [
        (name.format(outside=outside), data, {key: value.format(outside=outside) if isinstance(value, str) else value
                                              for key, value in fields.items()})
        for name, data, fields in entries
    ]  # fmt: skip
    try:
        boot = unpack_bootstrap_layer(io.BytesIO(layer(*named)), folder, "image")
        assert boot.read_bytes() == b"x" and stat.S_ISREG(boot.lstat().st_mode)
        assert boot.parent == folder / "image"
    except ConvertError as error:
        assert "has no image/image.boot" in str(error)
    assert (outside / "file").read_text() == "mine" and os.listdir(outside) == ["file"]
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "in"}
    kinds = {stat.S_IFMT(path.lstat().st_mode) for path in folder.rglob("*")}
    assert kinds <= {stat.S_IFREG, stat.S_IFDIR}


def test_bombs_end_at_the_limit(tmp_path: Path) -> None:
    """A gzip of zeros, a sparse file of a terabyte, an entry that claims more than there is."""
    zeros = gzip.compress(layer(("image/image.boot", bytes(64 << 20), {})), 9)
    assert len(zeros) < 100_000
    with pytest.raises(ConvertError, match="unpacks to more than"), open_layer(io.BytesIO(zeros)) as plain_layer:
        unpack_bootstrap_layer(plain_layer, tmp_path / "zeros", "image", limit=1 << 20)  # type: ignore[arg-type]
    assert sum(path.stat().st_blocks for path in (tmp_path / "zeros").rglob("*")) * 512 < 2 << 20

    sparse = bytearray(layer(("image/image.boot", b"x" * 512, {})))
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[257:265] = b"ustar  \0"
    sparse[386:410] = b"00000000000\0" + b"00000001000\0"  # one piece of 512 bytes at 0
    sparse[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")  # of a file of a terabyte
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse[:512])
    with pytest.raises(ConvertError, match="unpacks to more than"):
        unpack_bootstrap_layer(io.BytesIO(bytes(sparse)), tmp_path / "sparse", "image")

    claims = bytearray(layer(("image/image.boot", b"x" * 512, {})))
    claims[124:136] = b"\x80" + (1 << 30).to_bytes(11, "big")
    claims[148:156] = b" " * 8
    claims[148:156] = b"%06o\0 " % sum(claims[:512])
    with pytest.raises((ConvertError, RafsError)):
        unpack_bootstrap_layer(io.BytesIO(bytes(claims)), tmp_path / "claims", "image")
