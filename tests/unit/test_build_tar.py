"""Layer archives: what is understood, what is refused and how it is said."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap import tar
from bootstrap.build import BuildOptions, build_directory, build_layer
from bootstrap.cli.create import create
from bootstrap.cli.merge import merge
from bootstrap.errors import BuildError
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.reader import open_bootstrap
from bootstrap.tartree import LayerTree
from bootstrap.tree import Node, find


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def pack(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tree(data: bytes) -> Node:
    layer = LayerTree(65535)
    stream = tar.TarStream(io.BytesIO(data))
    while (entry := stream.next()) is not None:
        layer.add(entry)
    return layer.root


def build(data: bytes, **options: object) -> bytes:
    out = io.BytesIO()
    build_layer(io.BytesIO(data), out, BuildOptions(inline_meta=True, **options))  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_numbers_of_every_dialect(form: int) -> None:
    long = form != tarfile.USTAR_FORMAT
    name = "d/" * 60 + "f" * (250 if long else 90)
    target = "../" * 100 + "t" if long else "t"
    root = tree(
        pack(
            member(name, b"x", mtime=1_600_000_000, uid=2**21 + 5 if long else 1000, mode=0o4755),
            member("link", type=tarfile.SYMTYPE, linkname=target),
            form=form,
        )
    )
    file = find(root, name.encode())
    assert file is not None and file.size == 1 and file.mode == stat.S_IFREG | 0o4755
    assert (file.uid, file.mtime) == (2**21 + 5 if long else 1000, 1_600_000_000)
    link = find(root, b"link")
    assert link is not None and link.target == target.encode()


def test_base256_and_times_outside_octal() -> None:
    header = bytearray(pack(member("f", mtime=0), form=tarfile.GNU_FORMAT)[:512])
    header[136:148] = b"\xff" * 8 + (-86400 & 0xFFFFFFFF).to_bytes(4, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file = find(tree(bytes(header) + bytes(1024)), b"f")
    assert file is not None and file.mtime == -86400


def test_pax_records_are_split_by_length_and_foreign_ones_ignored() -> None:
    value = b"one\ntwo=3\n20 path=evil\n\0\xff"
    info, data = member("f", b"data", mtime=5.25)
    info.pax_headers = {
        "SCHILY.xattr.user.odd": value.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.com.apple.x": "left out",
        "LIBARCHIVE.xattr.user.b": "ignored",
    }
    file = find(tree(pack((info, data))), b"f")
    assert file is not None and file.xattrs == {b"user.odd": value} and file.mtime == 5


def test_empty_pax_records_leave_the_header_s_fields() -> None:
    empty = dict.fromkeys(("path", "linkpath", "uid", "gid", "size", "mtime", "SCHILY.xattr.user.none"), "")
    root = tree(
        pack(
            member("d", type=tarfile.DIRTYPE, mode=0o700, uid=5, gid=6, mtime=77, pax_headers=empty),
            member("d/f", b"123", pax_headers=empty),
            member("l", type=tarfile.SYMTYPE, linkname="d/f", pax_headers=empty),
        )
    )
    assert root.mode & 0o7777 == 0o755
    d, f, link = (find(root, name) for name in (b"d", b"d/f", b"l"))
    assert d is not None and f is not None and link is not None
    assert (d.mode & 0o7777, d.uid, d.gid, d.mtime, d.xattrs) == (0o700, 5, 6, 77, {b"user.none": b""})
    assert (f.size, link.target) == (3, b"d/f")


def test_a_global_header_is_no_file() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c" * 40}) as archive:
        archive.addfile(tarfile.TarInfo("f"))
    assert list(tree(out.getvalue()).children or {}) == [b"f"]


def test_implied_parents_and_replaced_entries() -> None:
    root = tree(
        pack(
            member("z/f", b"1"),
            member("a/g", b"2"),
            member("z", type=tarfile.DIRTYPE, mode=0o700, mtime=9),
            member("a/g", b"333"),
            member("x/y/below", b"4"),
            member("x/y", b"now a file"),
            member("./x//./y2", b"5"),
        )
    )
    assert sorted(root.children or {}) == [b"a", b"x", b"z"]
    z, g, y = find(root, b"/z"), find(root, b"/a/g"), find(root, b"/x/y")
    assert z is not None and list(z.children or {}) == [b"f"] and z.mode & 0o7777 == 0o700 and not z.implied
    assert g is not None and g.size == 3
    assert y is not None and y.is_file and find(root, b"/x/y2") is not None


def test_paths_through_symbolic_links_land_where_containerd_puts_them() -> None:
    root = tree(
        pack(
            member("usr/lib", type=tarfile.DIRTYPE),
            member("lib", type=tarfile.SYMTYPE, linkname="usr/lib"),
            member("up", type=tarfile.SYMTYPE, linkname="/usr/../../lib"),
            member("lib/a", b"a"),
            member("up/b", b"b"),
            member("lib/c", type=tarfile.LNKTYPE, linkname="./up/a"),  # what merging a package into /usr leaves
            member("lib/b", type=tarfile.LNKTYPE, linkname="usr/lib/b"),  # itself
        )
    )
    lib = find(root, b"/usr/lib")
    assert lib is not None and sorted(lib.children or {}) == [b"a", b"b", b"c"]
    a, b, c = (lib.children or {}).values()
    assert a.group is c.group is not None and c.size == 1 and b.group is None
    link = find(root, b"/lib")
    assert link is not None and link.is_symlink


def test_hard_links_keep_one_content_even_when_their_target_is_replaced() -> None:
    data = pack(
        member("a", b"content"),
        member("b", type=tarfile.LNKTYPE, linkname="./a"),
        member("a", b"other"),
        member("c", type=tarfile.LNKTYPE, linkname="/b"),
        member("s", type=tarfile.SYMTYPE, linkname="b"),
        member("s2", type=tarfile.LNKTYPE, linkname="s"),
    )
    root = tree(data)
    a, b, c = (find(root, name) for name in (b"a", b"b", b"c"))
    assert a is not None and b is not None and c is not None
    assert b.group is c.group is not None and a.group is not b.group
    assert (a.size, b.size, c.size) == (5, 7, 7)
    second = find(root, b"s2")
    assert second is not None and second.target == b"b"


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "dotdot": (lambda: pack(member("a/../../etc/passwd", b"x")), "'..'"),
    "link to nothing": (lambda: pack(member("l", type=tarfile.LNKTYPE, linkname="gone")), "'gone'"),
    "link to directory": (
        lambda: pack(member("d", type=tarfile.DIRTYPE), member("l", type=tarfile.LNKTYPE, linkname="d")),
        "directory",
    ),
    "below a file": (lambda: pack(member("f", b"1"), member("f/g", b"2")), "not a directory"),
    "symlink loop": (
        lambda: pack(member("s", type=tarfile.SYMTYPE, linkname="s"), member("s/f", b"2")),
        "too many symbolic links",
    ),
    "empty symlink": (lambda: pack(member("s", type=tarfile.SYMTYPE, linkname="")), "'s'"),
    "long name": (lambda: pack(member("n" * 256)), "255"),
    "odd type": (lambda: pack(member("v", type=b"V")), "type b'V'"),
    "sparse": (lambda: pack(member("s", type=b"S")), "'s'"),
    "truncated": (lambda: pack(member("big", b"x" * 5000))[:3000], "'big'"),
    "not a tar": (lambda: b"hello world" * 1000, "not a tar"),
    "empty": (lambda: b"", "not a tar"),
    "damaged header": (lambda: pack(member("f", b"x" * 600))[:1536] + b"garbage!" * 64 + bytes(1024), "'f'"),
    "huge PAX header": (
        lambda: pack(member("x" * 200, b""))[:124] + b"77777777777\0" + pack(member("x" * 200, b""))[136:],
        "not a tar",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_clear_error(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(BuildError) as caught:
        build(make())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_long_attribute_value_is_refused_by_name() -> None:
    info, data = member("dir/file", b"1")
    info.pax_headers = {"SCHILY.xattr.user.big": "v" * 65536}
    layer = pack((info, data))
    with pytest.raises(BuildError, match=r"dir/file.*user\.big.*65536"):
        build(layer)
    assert build(layer, fs_version=5)  # v5 has room for one more byte


def test_garbage_behind_the_end_mark_is_ignored_and_archives_may_follow_each_other() -> None:
    one, two = pack(member("one", b"1")), pack(member("two", b"2"))
    assert sorted(tree(one + two).children or {}) == [b"one", b"two"]
    assert sorted(tree(one + b"\xaa" * 1234).children or {}) == [b"one"]


@pytest.mark.parametrize("wrap", ["gzip", "zstd", "multi"])
def test_damaged_compression_is_reported(wrap: str) -> None:
    data = pack(member("f", os.urandom(300_000)))
    packed = {
        "gzip": lambda: gzip.compress(data),
        "zstd": lambda: zstandard.compress(data),
        "multi": lambda: gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(512),
    }[wrap]()
    with tar.open_layer(io.BytesIO(packed)) as stream:
        assert stream.read(1 << 20) == data
    end = len(packed) - (600 if wrap == "multi" else 1000)
    with (
        pytest.raises(BuildError, match="truncated"),
        tar.open_layer(io.BytesIO(packed[:end])) as stream,
    ):
        build_layer(stream, io.BytesIO(), BuildOptions())
    flipped = bytearray(packed)
    flipped[-8 if wrap != "multi" else -520] ^= 0xFF
    if wrap != "zstd":  # our zstd sample has no checksum
        with pytest.raises(BuildError, match="damaged"), tar.open_layer(io.BytesIO(bytes(flipped))) as stream:
            build_layer(stream, io.BytesIO(), BuildOptions())


def test_zeros_under_zstd_do_not_fill_the_memory() -> None:
    """16 KB stand for 512 MiB; frames may follow each other, and others than data lie between them."""
    packer = zstandard.ZstdCompressor().compressobj()
    zeros = b"".join([packer.compress(bytes(1 << 20)) for _ in range(512)]) + packer.flush()
    skipped = b"\x51\x2a\x4d\x18" + (5000).to_bytes(4, "little") + bytes(5000)
    size = 0
    tracemalloc.start()
    try:
        with tar.open_layer(io.BytesIO(skipped + zeros + skipped + zstandard.compress(b"end"))) as stream:
            while data := stream.read(1 << 20):
                size += len(data)
                last = data
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (size, last) == ((512 << 20) + 3, b"end")
    assert peak < 256 << 20


def test_foreign_compression_is_named() -> None:
    with pytest.raises(BuildError, match="xz"):
        tar.open_layer(io.BytesIO(b"\xfd7zXZ\0" + bytes(100)))


def test_a_directory_that_is_only_implied_keeps_what_lower_layers_say(tmp_path: Path) -> None:
    lower = pack(
        member("./", type=tarfile.DIRTYPE, mode=0o555, uid=7),
        member("opt", type=tarfile.DIRTYPE, mode=0o700, uid=5, mtime=77),
        member("opt/old", b"1"),
    )
    upper = pack(member("opt/new", b"2"), member("opt/.wh.old"), member("srv/x", b"3"))
    sources = []
    for number, data in enumerate((lower, upper)):
        path = tmp_path / f"{number}"
        path.write_bytes(build(data))
        sources.append(MergeSource(path))
    merge_layers(sources, tmp_path / "boot")
    with open_bootstrap(tmp_path / "boot") as image:
        opt = image.attr(image.resolve(b"/opt"))
        assert (opt.mode & 0o7777, opt.uid, opt.mtime) == (0o700, 5, 77)
        root = image.attr(image.root)
        assert (root.mode & 0o7777, root.uid) == (0o555, 7)
        srv = image.attr(image.resolve(b"/srv"))
        assert (srv.mode & 0o7777, srv.mtime, srv.mtime_nsec) == (0o755, 0, 0)
        assert sorted(path for path, _ in image.walk()) == [b"opt", b"opt/new", b"srv", b"srv/x"]


# ---- the commands


def run(command: object, *arguments: str, stdin: bytes = b"") -> tuple[int, str]:
    result = CliRunner().invoke(command, list(arguments), input=stdin)  # type: ignore[arg-type]
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("width", ["20", "80", "300"])
def test_help_has_what_callers_probe_for(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    code, text = run(create, "-h")
    assert code == 0
    for word in ("--type", "tar-rafs", "--batch-size", "--encrypt"):
        assert word in text


def test_create_streams_through_pipes_and_merge_reads_the_result(tmp_path: Path) -> None:
    """The way nydusify and the snapshotter drive it: FIFO in, FIFO out, patterns on stdin."""
    layer = gzip.compress(pack(member("d/f", b"content" * 1000), member("d/.wh.gone")))
    source, target = str(tmp_path / "in"), str(tmp_path / "out")
    os.mkfifo(source)
    os.mkfifo(target)
    received: list[bytes] = []
    feed = threading.Thread(target=lambda: Path(source).write_bytes(layer), daemon=True)
    drain = threading.Thread(target=lambda: received.append(Path(target).read_bytes()), daemon=True)
    feed.start()
    drain.start()
    arguments = ["--log-level", "warn", "--prefetch-policy", "fs", "--whiteout-spec", "none", "--fs-version", "6"]
    arguments += ["--type", "tar-rafs", "--blob-inline-meta", "--features", "blob-toc", "--chunk-size", "0x1000"]
    code, text = run(create, *arguments, "--blob", target, source, stdin=b"/\n")
    assert (code, text) == (0, "")
    feed.join(10)
    drain.join(10)
    (tmp_path / "abc").write_bytes(received[0])
    out, report = str(tmp_path / "boot"), str(tmp_path / "out.json")
    code, _ = run(merge, "--prefetch-policy", "fs", "-J", report, "-B", out, str(tmp_path / "abc"), stdin=b"/d\n")
    assert code == 0 and '"abc"' in Path(report).read_text()
    with open_bootstrap(out) as image:
        assert [path for path, _ in image.walk()] == [b"d", b"d/f"]
        assert image.prefetch_inodes() == [image.resolve(b"/d")]


def test_wrong_use_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    layer = tmp_path / "layer.tar"
    layer.write_bytes(pack(member("f", b"1")))
    blob = str(tmp_path / "blob")
    cases = {
        ("-t", "tar-rafs", "-b", blob, str(layer)): 2,
        ("-t", "tar-rafs", "-b", blob, "--blob-inline-meta", "--chunk-size", "5000", str(layer)): 1,
        ("-t", "targz-ref", "-v", "5", "-b", blob, "--blob-inline-meta", str(layer)): 1,
        ("-t", "tar-rafs", "-b", blob, "--blob-inline-meta", "--encrypt", "-v", "5", str(layer)): 1,
        ("-t", "tar-rafs", "-b", blob, "--blob-inline-meta", str(tmp_path / "nothing")): 1,
        ("-t", "tar-rafs", "-b", blob, "--blob-inline-meta", __file__): 1,
        ("-b", blob, "-B", blob + ".boot", str(layer)): 1,
        ("-D", str(tmp_path / "none"), str(layer)): 1,
        ("-t", "tar-rafs", "-b", "/dev/full", "--blob-inline-meta", str(layer)): 1,
    }
    for arguments, expected in cases.items():
        code, text = run(create, *arguments)
        assert code == expected, (arguments, text)
        assert text.startswith("Error: ") and text.count("\n") == 1
        assert not os.path.exists(blob)


def test_layers_that_do_not_fit_exit_with_2(tmp_path: Path) -> None:
    data = pack(member("f", b"1"))
    (tmp_path / "a").write_bytes(build(data))
    (tmp_path / "b").write_bytes(build(data, chunk_size=0x1000))
    code, text = run(merge, "-B", str(tmp_path / "out"), str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 2 and "chunk size" in text and not (tmp_path / "out").exists()
    (tmp_path / "c").write_bytes(b"no image at all" * 1000)
    code, text = run(merge, "-B", str(tmp_path / "out"), str(tmp_path / "c"))
    assert code == 1 and text.count("\n") == 1


def test_directory_builds_leave_whiteouts_out_and_are_repeatable(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "d").mkdir(parents=True)
    (source / "d" / "f").write_bytes(b"1" * 5000)
    os.link(source / "d" / "f", source / "g")
    (source / "d" / ".wh.x").touch()
    (source / "d" / ".wh..wh..opq").touch()
    builds = []
    for spec in ("oci", "oci", "none"):
        out = io.BytesIO()
        result = build_directory(str(source), out, BuildOptions(whiteout_spec=spec, chunk_size=0x1000))
        builds.append((out.getvalue(), result))
    assert builds[0][0] == builds[1][0] and builds[0][1].bootstrap == builds[1][1].bootstrap
    assert (builds[0][1].inode_count, builds[2][1].inode_count) == (4, 6)
    code, _ = run(create, "-D", str(tmp_path), "-B", str(tmp_path / "boot"), "--chunk-size", "0x1000", str(source))
    assert code == 0
    assert (tmp_path / builds[0][1].blob_id).read_bytes() == builds[0][0]
    assert (tmp_path / "boot").read_bytes() == builds[0][1].bootstrap


patch = st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=12))


@settings(max_examples=300, deadline=None)
@given(st.lists(patch, min_size=1, max_size=6), st.data())
def test_damaged_tars_give_an_image_or_a_build_error(patches: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """Nothing else may come out of bytes from outside, whatever header field they hit (checksums made right again)."""
    info, content = member("d/x" * 40, b"x" * 700, mtime=5)
    info.pax_headers = {"SCHILY.xattr.user.a": "b", "size": "700", "uid": "7"}
    whole = bytearray(
        pack(
            (info, content),
            member("l" * 120, type=tarfile.LNKTYPE, linkname="d/x" * 40),
            member("s", type=tarfile.SYMTYPE, linkname="t" * 120),
            member("c", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        )
    )
    for at, bytes_ in patches:
        at %= len(whole) - len(bytes_)
        whole[at : at + len(bytes_)] = bytes_
    if data.draw(st.booleans()):
        for at in range(0, len(whole), 512):
            if whole[at + 257 : at + 262] == b"ustar":
                whole[at + 148 : at + 156] = b" " * 8
                whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    try:
        build(bytes(whole), threads=1)
    except BuildError as error:
        assert "\n" not in str(error)
