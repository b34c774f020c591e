"""Merging layer bootstraps: what comes out, where upstream's mistakes are not copied, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bootstrap.build import build_directory, build_layer
from bootstrap.check import check_bootstrap
from bootstrap.cli.merge import merge
from bootstrap.errors import BuildError, RafsError
from bootstrap.inlined import extract_bootstrap
from bootstrap.layout import v6
from bootstrap.layout.common import CHUNK_RECORD, BlobFeatures, Compressor, Digester
from bootstrap.load import blob_info, load_tree
from bootstrap.merge import InconsistentError, MergeSource, merge_layers
from bootstrap.options import BuildOptions
from bootstrap.overlay import overlay
from bootstrap.reader import BootstrapV6, open_bootstrap
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6
from tests.lab.paths import REPO, ref_bin
from tests.unit.test_build_tar import member, pack

CHUNK = 0x1000
BOTH = pytest.mark.parametrize("version", [5, 6])


def layer(folder: Path, data: bytes, version: int = 6, **options: object) -> Path:
    """The bootstrap of a layer tar, in a file named by the layer's digest."""
    out = io.BytesIO()
    settings = BuildOptions(fs_version=version, inline_meta=True, **{"chunk_size": CHUNK, **options})  # type: ignore[arg-type]
    result = build_layer(io.BytesIO(data), out, settings)
    path = folder / result.blob_sha256
    path.write_bytes(result.bootstrap)
    return path


def names(path: Path) -> list[bytes]:
    with open_bootstrap(path) as image:
        check_bootstrap(image)
        return [name for name, _ in image.walk()]


def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str]:
    done = CliRunner().invoke(merge, list(map(str, arguments)), input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@BOTH
def test_whiteouts_of_the_lowest_layer_are_no_files(tmp_path: Path, version: int) -> None:
    """Upstream keeps them: a container sees `.wh.` files."""
    one = layer(tmp_path, pack(member("d/.wh.a"), member("d/b", b"1"), member(".wh..wh..opq"), member(".wh.")), version)
    two = layer(tmp_path, pack(member("d/.wh.\udcff"), member("d/.wh.b"), member("d/c")), version)
    out = tmp_path / "out"
    merge_layers([MergeSource(one)], out)
    assert names(out) == [b".wh.", b"d", b"d/b"]
    merge_layers([MergeSource(one), MergeSource(two)], out)
    assert names(out) == [b".wh.", b"d", b"d/c"]


@BOTH
def test_the_chunk_size_of_layers_without_data_stays(tmp_path: Path, version: int) -> None:
    """Upstream says 1 MiB then, and the image no longer fits the next layer."""
    empty = layer(tmp_path, pack(member("empty")), version)
    out = tmp_path / "out"
    result = merge_layers([MergeSource(empty)], out)
    assert result.blobs == []
    with open_bootstrap(out) as image:
        assert image.chunk_size == CHUNK
    merge_layers([MergeSource(layer(tmp_path, pack(member("f", b"1")), version))], tmp_path / "next", parent=out)
    assert names(tmp_path / "next") == [b"empty", b"f"]


@BOTH
def test_special_files_stay_linked(tmp_path: Path, version: int) -> None:
    """Upstream's v6 merge takes each name for a file of its own."""
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "a")
    (source / "s").symlink_to("target")
    for path, name in (("a", "z"), ("s", "t")):
        os.link(source / path, source / name, follow_symlinks=False)
    result = build_directory(str(source), io.BytesIO(), BuildOptions(fs_version=version, chunk_size=CHUNK))
    lower = tmp_path / "lower"
    lower.write_bytes(result.bootstrap)
    upper = layer(tmp_path, pack(member("b", b"1"), member("n", type=tarfile.SYMTYPE, linkname="x")), version)
    merge_layers([MergeSource(upper)], tmp_path / "out", parent=lower)
    with open_bootstrap(tmp_path / "out") as image:
        check_bootstrap(image)
        for one, other in ((b"a", b"z"), (b"s", b"t")):
            inodes = [image.resolve(name) for name in (one, other)]
            assert [image.attr(inode).nlink for inode in inodes] == [2, 2]
            if isinstance(image, BootstrapV6):
                assert image.inode_number(inodes[0]) == image.inode_number(inodes[1])
        assert image.attr(image.resolve(b"b")).nlink == 1


def test_v5_gives_up_links_that_readers_refuse(tmp_path: Path) -> None:
    """A fifo in `b` cannot have the number of one before `b`; upstream writes it and refuses to load it."""
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for name in ("a", "c"):
        os.mkfifo(source / name)
        os.link(source / name, source / "b" / name)
        os.link(source / name, source / f"{name}2")
    (source / "f").write_bytes(b"1")
    os.link(source / "f", source / "b" / "f")
    result = build_directory(str(source), io.BytesIO(), BuildOptions(fs_version=5, chunk_size=CHUNK))
    path = tmp_path / "boot"
    path.write_bytes(result.bootstrap)
    with open_bootstrap(path) as image:
        check_bootstrap(image)
        nlink = {name: image.attr(image.resolve(name)).nlink for name, _ in image.walk()}
    assert nlink == {b"a": 2, b"a2": 2, b"b": 2, b"b/a": 1, b"b/c": 3, b"b/f": 2, b"c": 3, b"c2": 3, b"f": 2}
    if (upstream := ref_bin("nydus-image")) is not None:
        subprocess.run([str(upstream), "check", "-l", "warn", str(path)], check=True, timeout=60, capture_output=True)


@BOTH
def test_links_are_those_of_one_layer(tmp_path: Path, version: int) -> None:
    """Layers number their inodes from the same start; replaced names leave the group."""
    link = {"type": tarfile.LNKTYPE, "linkname": "a"}
    one = layer(tmp_path, pack(member("a", b"1"), member("b", **link), member("c", **link)), version)
    two = layer(tmp_path, pack(member("a", b"2"), member("x", **link), member(".wh.b")), version)
    merge_layers([MergeSource(one), MergeSource(two)], tmp_path / "out")
    with open_bootstrap(tmp_path / "out") as image:
        check_bootstrap(image)
        found = {name: image.resolve(name) for name in (b"a", b"c", b"x")}
        assert found[b"a"] == found[b"x"] != found[b"c"]
        assert [image.attr(inode).nlink for inode in found.values()] == [2, 1, 2]


def test_layers_of_a_dictionary_need_it(tmp_path: Path) -> None:
    shared = b"shared" * 1000
    base = layer(tmp_path, pack(member("base", shared)))
    dictionary = tmp_path / "dict"
    merge_layers([MergeSource(base)], dictionary)
    upper = tmp_path / ("e" * 64)
    options = BuildOptions(chunk_size=CHUNK, inline_meta=True, chunk_dict=dictionary)
    out = io.BytesIO()
    result = build_layer(io.BytesIO(pack(member("own", b"own"), member("copy", shared))), out, options)
    upper.write_bytes(result.bootstrap)
    with pytest.raises(BuildError, match="having multiple associated data blobs"):
        merge_layers([MergeSource(upper)], tmp_path / "out")
    merged = merge_layers([MergeSource(upper, blob_digest="f" * 64)], tmp_path / "out", chunk_dict=dictionary)
    assert merged.blobs == [base.name, "f" * 64]
    with open_bootstrap(tmp_path / "out") as image:
        check_bootstrap(image)
        assert {image.blobs[ref.blob_index].id for ref in image.chunk_refs(image.resolve(b"copy"))} == {base.name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 5}, "RAFS version 5 instead of 6"),
        ({"chunk_size": 0x2000}, "chunk size 0x2000 instead of 0x1000"),
        ({"repeatable": True}, "explicit owners False instead of True"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("role", ["layer", "parent", "dictionary"])
def test_what_does_not_fit_exits_with_2(tmp_path: Path, change: dict[str, object], said: str, role: str) -> None:
    one, other = pack(member("f", b"1")), pack(member("g", b"2"))
    good, odd = layer(tmp_path, one), layer(tmp_path, other, **change)  # type: ignore[arg-type]
    if role == "layer":
        arguments = [good, odd]
    else:
        flag = ["--parent-bootstrap", good] if role == "parent" else ["--chunk-dict", f"bootstrap={good}"]
        arguments = [*flag, odd]  # type: ignore[list-item]
    code, text = run("-B", tmp_path / "out", *arguments)
    assert code == 2 and "Inconsistent RAFS Filesystem" in text and said in text and odd.name in text
    assert not (tmp_path / "out").exists()


def test_v5_layers_need_one_digester_and_v6_layers_do_not(tmp_path: Path) -> None:
    for version in (5, 6):
        one = layer(tmp_path, pack(member("f", b"1")), version)
        two = layer(tmp_path, pack(member("g", b"2")), version, digester=Digester.SHA256, compressor=Compressor.NONE)
        sources = [MergeSource(one), MergeSource(two)]
        if version == 5:
            with pytest.raises(InconsistentError, match="digest algorithm sha256 instead of blake3"):
                merge_layers(sources, tmp_path / "out")
        else:
            result = merge_layers(sources, tmp_path / "out")
            assert (result.digester, result.compressor) == (Digester.SHA256, Compressor.ZSTD)
            with open_bootstrap(tmp_path / "out") as image:
                assert (image.digester, image.compressor) == (Digester.SHA256, Compressor.NONE)
                assert [blob.digester for blob in image.blobs] == [Digester.BLAKE3, Digester.SHA256]


def test_two_blobs_cannot_have_one_id(tmp_path: Path) -> None:
    """Upstream writes an image whose chunks lie in the wrong blob."""
    one, two = (MergeSource(layer(tmp_path, pack(member(name, name.encode() * 9000)))) for name in ("f", "gg"))
    with pytest.raises(BuildError, match="two blobs cannot have one id"):
        merge_layers([replace(one, blob_digest="a" * 64), replace(two, blob_digest="a" * 64)], tmp_path / "out")
    merge_layers([one, one], tmp_path / "out")
    assert names(tmp_path / "out") == [b"f"]


def test_a_chunk_record_that_no_file_means_may_name_any_blob(tmp_path: Path) -> None:
    """Upstream's check takes such an image too, and only looks at records that files refer to."""
    paths = [layer(tmp_path, pack(member(name, name.encode() * 9000))) for name in ("f", "gg")]
    data = bytearray(paths[0].read_bytes())
    with open_bootstrap(paths[0]) as image:
        assert isinstance(image, BootstrapV6)
        table, size = image.ext.chunk_table_offset, image.ext.chunk_table_size
    stray = bytearray(data[table : table + CHUNK_RECORD.size])
    stray[32:36] = (9).to_bytes(4, "little")
    data[table + size : table + size + len(stray)] = stray
    at = v6.EXT_SUPER_OFFSET + 32
    data[at : at + 8] = (size + len(stray)).to_bytes(8, "little")
    paths[0].write_bytes(data)
    for sources in (paths[:1], paths):
        merge_layers([MergeSource(path) for path in sources], tmp_path / "out")
        assert names(tmp_path / "out") == [b"f", b"gg"][: len(sources)]


def test_a_generated_dictionary_does_not_hide_a_layer_s_own_entry(tmp_path: Path) -> None:
    """Its entries say less: no compressed size, no flags (5.11)."""
    base = layer(tmp_path, pack(member("f", b"1" * 5000)))
    dictionary = tmp_path / "dict"
    merge_layers([MergeSource(base)], dictionary)
    data = bytearray(dictionary.read_bytes())
    features = BlobFeatures.CAP_TAR_TOC | BlobFeatures.ALIGNED | BlobFeatures.IS_CHUNKDICT_GENERATED
    data[v6.BLOCK_SIZE + 84 : v6.BLOCK_SIZE + 96] = int(features).to_bytes(4, "little") + bytes(8)
    dictionary.write_bytes(data)
    merge_layers([MergeSource(base)], tmp_path / "out", parent=dictionary, chunk_dict=dictionary)
    with open_bootstrap(tmp_path / "out") as image, open_bootstrap(base) as own:
        assert image.blobs[0].compressed_size == own.blobs[0].compressed_size > 0
        assert not image.blobs[0].features & BlobFeatures.IS_CHUNKDICT_GENERATED


def test_lists_of_the_command_line(tmp_path: Path) -> None:
    one, two = (layer(tmp_path, pack(member(name, name.encode()))) for name in ("f", "g"))
    out, report = tmp_path / "out", tmp_path / "report.json"
    digests = "a" * 64 + "," + "b" * 64
    arguments = ["--blob-digests", digests, "--blob-sizes", "100000,0x30000", "--blob-toc-digests", digests]
    arguments += ["--blob-toc-sizes", "700,800", "--original-blob-ids", "x,y"]
    assert run("-l", "warn", "-B", out, "-J", report, one, two, *arguments) == (0, "")
    with open_bootstrap(out) as image:
        assert [(b.id, b.compressed_size, b.toc_size, b.toc_digest.hex()) for b in image.blobs] == [
            ("a" * 64, 100000, 700, "a" * 64),
            ("b" * 64, 0x30000, 800, "b" * 64),
        ]
    said = json.loads(report.read_text())
    assert (said["blobs"], said["fs_version"], said["compressor"]) == (digests.split(","), "6", "zstd")
    assert said["bootstrap"] == str(out) and {"load_tree_from_bootstrap", "dump_bootstrap"} <= set(
        said["trace"]["consumed_time"]
    )


def test_the_blob_directory_takes_the_bootstrap_by_its_digest(tmp_path: Path) -> None:
    one = layer(tmp_path, pack(member("f", b"1")))
    folder = tmp_path / "blobs"
    folder.mkdir()
    assert run("-l", "warn", "-D", folder, one) == (0, "")
    (made,) = folder.iterdir()
    assert hashlib.sha256(made.read_bytes()).hexdigest() == made.name
    assert names(made) == [b"f"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-B", "OUT"], 2, "SOURCE"),
        (["LAYER"], 1, "both --bootstrap and --blob-dir are missing"),
        (["-D", "none", "LAYER"], 1, "directory to store blobs does not exist"),
        (["-B", "none/out", "LAYER"], 1, "cannot write none/out"),
        (["-B", "OUT", "nothing"], 1, "nothing"),
        (["-B", "OUT", "--blob-digests", "a,b", "LAYER"], 1, "blob digest entries 2 doesn't match number of sources 1"),
        (["-B", "OUT", "--blob-digests", "zz", "LAYER"], 1, "'zz' is not a SHA-256"),
        (["-B", "OUT", "--blob-toc-digests", "12", "LAYER"], 1, "'12' is not a SHA-256"),
        (["-B", "OUT", "--blob-sizes", "-1", "LAYER"], 1, "invalid number in --blob-sizes option: '-1'"),
        (["-B", "OUT", "--blob-sizes", str(1 << 64), "LAYER"], 1, "invalid number in --blob-sizes"),
        (["-B", "OUT", "--blob-toc-sizes", str(1 << 32), "LAYER"], 1, "invalid number in --blob-toc-sizes"),
        (["-B", "OUT", "--original-blob-ids", "i" * 65, "LAYER"], 1, "cannot be a blob id"),
        (["-B", "OUT", "--chunk-dict", "local=x", "LAYER"], 1, "invalid chunk dict type local"),
        (["-B", "OUT", "--chunk-dict", "bootstrap=nothing", "LAYER"], 1, "nothing"),
        (["-B", "OUT", "--parent-bootstrap", "nothing", "LAYER"], 1, "nothing"),
        (["-B", "OUT", "-C", "nothing", "LAYER"], 1, "nothing"),
        (["-B", "OUT", "--prefetch-policy", "all", "LAYER"], 2, "all"),
    ],
    ids=lambda v: " ".join(v[-3:])[:40] if isinstance(v, list) else "",
)
def test_wrong_use_is_one_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    one, out = layer(tmp_path, pack(member("f", b"1"))), tmp_path / "out"
    got, text = run(*[{"LAYER": one, "OUT": out}.get(argument, argument) for argument in arguments])
    assert got == code and said in text and "Traceback" not in text
    assert text.splitlines()[-1].startswith("Error: ") and (code == 2 or text.count("\n") == 1)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_prefetch_lines_that_name_nothing_are_told(tmp_path: Path) -> None:
    one, out = layer(tmp_path, pack(member("d/f", b"1"), member("e"))), tmp_path / "out"
    lines = b"d\n\n/d/../d\n/nowhere\n//d/./f/\n/e\n/d/f/g\n/d\n"
    code, text = run("-l", "warn", "-B", out, "--prefetch-policy", "fs", one, stdin=lines)
    assert code == 0 and [text.count(word) for word in ("left out", "covered by", "\n")] == [2, 1, 3]
    with open_bootstrap(out) as image:
        assert image.prefetch_inodes() == [image.resolve(b"d/f"), image.resolve(b"d")]
    assert run("-l", "warn", "-B", out, "--prefetch-policy", "none", one, stdin=lines) == (0, "")
    with open_bootstrap(out) as image:
        assert image.prefetch_inodes() == []


def test_a_list_of_all_files_is_no_work(tmp_path: Path) -> None:
    """Each line was compared with all lines before it: 20,000 took 20 s, as often as somebody asked for them."""
    one, out = layer(tmp_path, pack(member("d/f", b"1"), member("e", b"2"))), tmp_path / "out"
    lines = b"".join(b"/usr/lib/package%d/module%d.py\n" % (n % 500, n) for n in range(100_000))
    command = [sys.executable, "-c", "from bootstrap.cli import main; main()", "merge", "-B", out]
    subprocess.run(
        [*command, "--prefetch-policy", "fs", one], input=lines + b"/e\n/d\n/d/f\n", check=True, timeout=120, cwd=REPO
    )
    with open_bootstrap(out) as image:
        assert image.prefetch_inodes() == [image.resolve(b"e"), image.resolve(b"d")]


@BOTH
def test_damaged_layers_are_refused_or_make_a_sound_tree(tmp_path: Path, version: int) -> None:
    """Loading trusts no byte: whatever it lets through can be written and read again."""
    rng = random.Random(version)
    data = pack(
        *(member(f"d{n % 7}/file{n}", b"%d" % n * n) for n in range(60)),
        *(member(f"d{n}/link", type=tarfile.SYMTYPE, linkname="x" * n) for n in range(1, 7)),
        member("hard", type=tarfile.LNKTYPE, linkname="d1/file1"),
        member("attributes", b"1", pax_headers={"SCHILY.xattr.user.a": "b" * 50}),
        member("fifo", type=tarfile.FIFOTYPE),
    )
    good = layer(tmp_path, data, version).read_bytes()
    start = 8192 if version == 5 else 1024
    write = write_v5 if version == 5 else write_v6
    path, refused = tmp_path / "damaged", 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 2, 5))):
            width = rng.choice((1, 2, 4, 8))
            at, other = (rng.randrange(start, len(good) - 128) & -rng.choice((1, 4)) for _ in range(2))
            value = int.from_bytes(damaged[at : at + width], "little")
            value = rng.choice((value + 1, value - 1, value + 32, 0, (1 << 8 * width) - 1, rng.randrange(1 << 63)))
            damaged[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
            if not rng.randrange(3):
                damaged[at : at + 128] = damaged[other : other + 128]
        path.write_bytes(damaged)
        try:
            with open_bootstrap(path) as image:
                tree = overlay([(load_tree(image, [blob_info(blob) for blob in image.blobs]), "oci")])
                again = write(tree, chunk_size=image.chunk_size, flags=image.flags, prefetch=[b"/d1"])
        except RafsError:
            refused += 1
            continue
        path.write_bytes(again)
        with open_bootstrap(path) as image:
            found = overlay([(load_tree(image, [blob_info(blob) for blob in image.blobs]), "none")])
        assert found.names == tree.names
        assert (found.inodes["mode"] == tree.inodes["mode"]).all()
    assert 100 < refused < 300


def test_a_chain_of_directories_ends(tmp_path: Path) -> None:
    """Depth costs array operations per level: 1,500 levels work, absurd ones are refused and not walked for minutes."""
    deep = pack(member("/".join("d" * 1500), type=tarfile.DIRTYPE))
    merge_layers([MergeSource(layer(tmp_path, deep))], tmp_path / "out")
    assert len(names(tmp_path / "out")) == 1500


def test_layer_blobs_and_old_names(tmp_path: Path) -> None:
    """A SOURCE may be the blob with its bootstrap inside; the id is the name up to the first dot."""
    out = io.BytesIO()
    options = BuildOptions(chunk_size=CHUNK, inline_meta=True, blob_toc=True)
    build_layer(io.BytesIO(pack(member("f", b"1"))), out, options)
    blob = tmp_path / "abc.image.boot"
    blob.write_bytes(out.getvalue())
    assert merge_layers([MergeSource(blob)], tmp_path / "one").blobs == ["abc"]
    apart = tmp_path / "abc.boot"
    with blob.open("rb") as file:
        apart.write_bytes(extract_bootstrap(file, blob.stat().st_size))
    assert merge_layers([MergeSource(apart)], tmp_path / "two").blobs == ["abc"]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
