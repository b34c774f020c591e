"""nydus-image chunkdict generate: what it picks, that it remembers, and that builders take it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bootstrap.chunkdb import ChunkDatabase, form_of, generate
from bootstrap.cli import main
from bootstrap.errors import BuildError
from bootstrap.layout import v6
from bootstrap.layout.common import BlobFeatures
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from tests.lab.paths import ref_bin
from tests.lab.tiny import TinyImage, noise, tiny_image

SHARED, OTHER = noise(20_000, 1), noise(9_000, 2)


def ours(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def image(folder: Path, name: str, files: dict[str, bytes], version: int = 6, chunk_size: int = 0x2000) -> TinyImage:
    (folder / name).mkdir()
    return tiny_image(folder / name, files, BuildOptions(fs_version=version, chunk_size=chunk_size))


@pytest.mark.parametrize("version", [5, 6])
def test_the_fewest_blobs_that_hold_all_shared_chunks(version: int, tmp_path: Path) -> None:
    one = image(tmp_path, "a:1", {"s": SHARED, "own": noise(5_000, 3)}, version)
    both = image(tmp_path, "a:2", {"s": SHARED, "o": OTHER, "more": noise(6_000, 4)}, version)
    two = image(tmp_path, "b:1", {"o": OTHER, "q": noise(100, 5)}, version)
    alone = image(tmp_path, "c:1", {"z": noise(50_000, 6)}, version)
    out = tmp_path / "dict.boot"
    done = ours("-l", "error", "chunkdict", "generate", "-v", "-B", out, "-J", tmp_path / "json",
                *[i.bootstrap for i in (one, both, two, alone)])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output == "shares nothing: c:1\n"
    document = json.loads((tmp_path / "json").read_text())
    assert document["blobs"] == [both.blob_id] and document["fs_version"] == str(version)
    with open_bootstrap(out) as made, open_bootstrap(both.bootstrap) as source:
        assert made.chunk_size == 0x2000 and made.blobs[0].features & BlobFeatures.IS_CHUNKDICT_GENERATED
        assert made.blobs[0].compressed_size == source.blobs[0].compressed_size
        have = {(r[0], r[2], *r[3:7], r[8]) for r in made.chunk_records()}
        assert have == {(r[0], r[2], *r[3:7], r[8]) for r in source.chunk_records()}  # all of the blob comes along
    assert ours("check", out).exit_code == 0


def test_the_database_remembers_and_a_new_run_replaces(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/chunks.db"
    first = image(tmp_path, "a:1", {"s": SHARED})
    second = image(tmp_path, "a:2", {"s": SHARED, "t": OTHER})
    run = ["-l", "warn", "chunkdict", "generate", "--database", url, "-B", tmp_path / "dict.boot"]
    done = ours(*run, first.bootstrap)
    assert done.exit_code == 0 and "the dictionary is empty" in done.output
    assert ours("check", tmp_path / "dict.boot").exit_code == 0
    for _ in range(2):
        assert ours(*run, second.bootstrap).output == ""
        with open_bootstrap(tmp_path / "dict.boot") as made:
            assert len(made.blobs) == 1 and sum(r[4] for r in made.chunk_records()) >= len(SHARED)
    with sqlite3.connect(tmp_path / "chunks.db") as db:
        assert db.execute("SELECT COUNT(*) FROM chunk").fetchone() == (3 + 5,)  # not twice
        # Rows of upstream's tool lack the chunk's number: they count, but cannot be picked.
        db.execute("UPDATE chunk SET chunk_index = NULL WHERE version = '2'")
    with ChunkDatabase(str(tmp_path / "chunks.db")) as database, open_bootstrap(first.bootstrap) as opened:
        assert generate(database, form_of(opened)).blobs == [first.blob_id]


def test_the_chunks_of_a_blob_are_found_without_a_look_at_all_others(tmp_path: Path) -> None:
    """That is asked for each blob of a dictionary, of up to 253."""
    one = image(tmp_path, "a:1", {"s": SHARED})
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    with ChunkDatabase(":memory:") as database, open_bootstrap(one.bootstrap) as opened:
        count = database.add(opened, "a", "1")
        database._db.executemany(
            "INSERT INTO chunk (chunk_blob_id, chunk_digest, chunk_index) VALUES (?, ?, ?)",
            ((f"{number % 10:064x}", f"{number:064x}", number) for number in range(20_000)),
        )
        database._db.set_progress_handler(step, 100)
        assert len(database.of_blob(one.blob_id)) == count
    assert steps < 20  # times 100 instructions of SQLite's machine; one look at each row takes 1,000


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    small, big = image(tmp_path, "a:1", {"s": SHARED}), image(tmp_path, "a:2", {"s": SHARED}, chunk_size=0x4000)
    old = image(tmp_path, "a:3", {"s": SHARED}, version=5)
    (tmp_path / "text").write_text("no database, but long enough to be looked at" * 30)
    out = ["-B", tmp_path / "dict.boot"]
    for arguments, text in (
        ([*out, small.bootstrap, big.bootstrap], "chunk size 0x4000 instead of 0x2000"),
        ([*out, small.bootstrap, old.bootstrap], "Bootstrap versions are inconsistent, cannot use chunkdict"),
        ([*out, small.bootstrap, small.bootstrap], "are both a:1"),
        ([small.bootstrap], "both --bootstrap and --blob-dir are missing"),
        (["-D", tmp_path / "nowhere", small.bootstrap], "Directory to store blobs does not exist"),
        ([*out, "--database", "mysql:///x", small.bootstrap], "Unsupported database type: mysql"),
        ([*out, "--database", "/x", small.bootstrap], "Invalid database URL"),
        ([*out, "--database", f"sqlite://{tmp_path}/text", small.bootstrap], "cannot use the chunk database"),
        ([*out, tmp_path / "text"], "text"),
    ):
        done = ours("chunkdict", "generate", *arguments)
        assert done.exit_code == 1 and text in done.output and len(done.output.splitlines()) == 1, done.output
    assert not (tmp_path / "dict.boot").exists()


def test_what_a_database_cannot_hold_or_give_is_one_line(tmp_path: Path) -> None:
    """Sizes of 64 bits, where SQLite has 63; a file that somebody wrote over meanwhile."""
    one = image(tmp_path, "a:1", {"s": SHARED})
    damaged = tmp_path / "huge.boot"
    data = bytearray(one.bootstrap.read_bytes())
    at = v6.BLOCK_SIZE + 112  # offset of the blob meta in the first entry of the blob table
    data[at : at + 8] = (1 << 63).to_bytes(8, "little")
    damaged.write_bytes(data)
    done = ours("chunkdict", "generate", "-B", tmp_path / "dict.boot", damaged)
    assert done.exit_code == 1 and "huge.boot: a chunk or blob lies" in done.output, (done.output, done.exception)
    assert len(done.output.splitlines()) == 1 and not (tmp_path / "dict.boot").exists()

    path = tmp_path / "chunks.db"
    with ChunkDatabase(str(path)) as database, open_bootstrap(one.bootstrap) as opened:
        database.add(opened, "a", "1")
        path.write_bytes(b"something else" * 5000)
        with pytest.raises(BuildError, match="cannot read the chunk database"):
            generate(database, form_of(opened))


@pytest.mark.parametrize("version", [5, 6])
def test_our_builder_takes_it(version: int, tmp_path: Path) -> None:
    made = [image(tmp_path, f"a:{n}", {"s": SHARED, "o": noise(4_000, n)}, version) for n in (1, 2)]
    blobs, source = tmp_path / "blobs", tmp_path / "source"
    blobs.mkdir(), source.mkdir()
    for one in made:
        (blobs / one.blob_id).write_bytes(one.blob)
    given = tmp_path / "dict.boot"
    assert ours("-l", "warn", "chunkdict", "generate", "-B", given, *[one.bootstrap for one in made]).exit_code == 0
    (source / "again").write_bytes(SHARED)
    (source / "new").write_bytes(noise(12_345, 9))
    done = ours("-l", "warn", "create", "-t", "dir-rafs", "-v", str(version), "-D", blobs, "-B", tmp_path / "new.boot",
                "--chunk-size", "0x2000", "--chunk-dict", f"bootstrap={given}", source)  # fmt: skip
    assert done.exit_code == 0, done.output
    with open_bootstrap(tmp_path / "new.boot") as opened:
        known = {one.blob_id for one in made}
        assert len(opened.blobs) == 2 and len({blob.id for blob in opened.blobs} & known) == 1
        own = next(blob for blob in opened.blobs if blob.id not in known)
        assert own.data_size <= 12_345
    assert ours("check", "-D", blobs, tmp_path / "new.boot").exit_code == 0


@pytest.mark.interop
@pytest.mark.skipif(ref_bin("nydus-image") is None, reason="interop: the reference nydus-image is not here")
@pytest.mark.parametrize("version", [5, 6])
def test_upstream_builds_with_our_dictionary(version: int, tmp_path: Path) -> None:
    def upstream(*arguments: str | Path) -> None:
        done = subprocess.run(
            [str(ref_bin("nydus-image")), *map(str, arguments)],
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    blobs, source = tmp_path / "blobs", tmp_path / "source"
    blobs.mkdir(), source.mkdir()
    images = []
    for number in (1, 2):
        # The upper layer hides the first file of the lower one: the numbers of the chunks left do not start at 0.
        lower = image(tmp_path, f"l:{number}", {"first": noise(4_000, number), "s": SHARED}, version)
        upper = image(tmp_path, f"u:{number}", {".wh.first": b"", "o": noise(3_000, 2 + number)}, version)
        for layer in (lower, upper):
            (blobs / layer.blob_id).write_bytes(layer.blob)
        (tmp_path / f"a:{number}").mkdir()
        images.append(tmp_path / f"a:{number}" / "image.boot")
        merge_layers([MergeSource(layer.bootstrap, layer.blob_id) for layer in (lower, upper)], images[-1])
    assert ours("-l", "warn", "chunkdict", "generate", "-B", tmp_path / "dict.boot", *images).exit_code == 0
    upstream("check", tmp_path / "dict.boot")
    (source / "again").write_bytes(SHARED)
    (source / "new").write_bytes(noise(12_345, 9))
    upstream("create", "-t", "dir-rafs", "-v", str(version), "-D", blobs, "-B", tmp_path / "new.boot",
             "--chunk-size", "0x2000", "--chunk-dict", f"bootstrap={tmp_path / 'dict.boot'}", source)  # fmt: skip
    with open_bootstrap(tmp_path / "new.boot") as opened:
        assert len(opened.blobs) == 2
    assert ours("check", "-D", blobs, tmp_path / "new.boot").exit_code == 0
    upstream("unpack", "-D", blobs, "--output", tmp_path / "tar", tmp_path / "new.boot")
    assert SHARED in (tmp_path / "tar").read_bytes()


def test_log_options_may_stand_before_generate(tmp_path: Path) -> None:
    alone = image(tmp_path, "a:1", {"s": SHARED}).bootstrap
    rest = ["-B", tmp_path / "dict.boot", alone]
    assert "the dictionary is empty" in ours("chunkdict", "-l", "warn", "generate", *rest).output
    for words in (["chunkdict", "-l", "error", "generate"], ["-l", "warn", "chunkdict", "generate", "-l", "error"]):
        done = ours(*words, *rest)
        assert (done.exit_code, done.output) == (0, "")
    assert ours("chunkdict", "-L", tmp_path / "log", "generate", *rest).output == ""
    assert "the dictionary is empty" in (tmp_path / "log").read_text()
