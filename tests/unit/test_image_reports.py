"""What nydus-image says about images: check -v, inspect, stat. Upstream's program is the judge where it is here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bootstrap.cli import main
from bootstrap.layout.common import Digester
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.stat import ImageStat
from tests.lab.paths import ref_bin, shared_dir
from tests.lab.tiny import noise, tiny_image

REFERENCE = (shared_dir() or Path("/nonexistent")) / "fixtures" / "reference"
interop = [
    pytest.mark.interop,
    pytest.mark.skipif(
        shared_dir() is None or ref_bin("nydus-image") is None,
        reason="interop: reference fixtures or the reference nydus-image are not here",
    ),
]


def ours(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def upstream(*arguments: str | Path) -> str:
    done = subprocess.run(
        [str(ref_bin("nydus-image")), *map(str, arguments)], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8", "replace")


# -- stat


def test_stat_tells_what_images_share(tmp_path: Path) -> None:
    shared, options = noise(30_000, 1), BuildOptions(chunk_size=0x4000)
    first = tiny_image(tmp_path, {"a": shared, "b": noise(5_000, 2), "empty": b""}, options)
    second = tiny_image(tmp_path, {"x/c": shared, "d": noise(100, 3)}, options)
    third = tiny_image(tmp_path, {"a": shared, "new": noise(7_000, 4)}, options)
    numbers = ImageStat(dedup=True)
    for image in (first, second):
        with open_bootstrap(image.bootstrap) as opened:
            numbers.add(opened)
    with open_bootstrap(third.bootstrap) as opened:
        numbers.add(opened, target=True)
    numbers.finish()
    base, target = numbers.base_image, numbers.target_image
    assert (base.dirs, base.files, base.symlinks, base.chunks, base.file_size) == (3, 5, 0, 6, 65_100)
    assert base.uncomp_size - base.padding_size == 65_100
    assert (base.own_chunks, base.own_uncomp_size) == (6, 65_100)
    assert (base.dedup_chunks, base.dedup_uncomp_size) == (4, 35_100)
    assert base.file_sizes[15] == 2 and base.file_sizes[0] == 1 and base.chunk_sizes[0] == 19
    assert (target.ref_chunks, target.ref_uncomp_size) == (2, 30_000)
    assert (target.own_chunks, target.own_uncomp_size) == (1, 7_000)
    in_both = numbers.thresholds[1]  # a dictionary of what two images have
    assert (in_both.raw_chunks, in_both.uncomp_base_size, in_both.uncomp_image_size) == (6, 30_000, 5_100)


def test_stat_of_a_directory_and_its_errors(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, digester in ((1, Digester.BLAKE3), (2, Digester.SHA256)):
        image = tiny_image(tmp_path, {"f": noise(9_000), "own": noise(50, seed)}, BuildOptions(digester=digester))
        image.bootstrap.rename(folder / f"image{seed}.boot")
    (folder / "README").write_text("no image")
    done = ours("stat", "-D", folder, "-J", tmp_path / "stat.json")
    assert done.exit_code == 0, done.output
    base = json.loads((tmp_path / "stat.json").read_text())["base_image"]
    assert base["files"] == 4 and base["dedup_chunks"] == 4  # digests of two kinds never match
    ours("stat", "-D", folder, "--digester", "sha256", "-J", tmp_path / "stat.json")
    assert json.loads((tmp_path / "stat.json").read_text())["base_image"]["dedup_chunks"] == 2
    for arguments, text in (
        ([], "one of `--bootstrap` and `--blob-dir` must be specified"),
        (["-D", tmp_path / "nowhere"], "must be a directory"),
        (["-B", tmp_path / "nowhere"], "nowhere"),
        (["-B", folder / "README"], "README"),
    ):
        failed = ours("stat", *arguments)
        assert failed.exit_code == 1 and text in failed.output and len(failed.output.splitlines()) == 1
    (folder / "image1.boot").unlink()
    (folder / "image2.boot").unlink()
    assert "no RAFS image" in ours("stat", "-D", folder).output


@pytest.mark.parametrize(
    "case", ["v5-merged3", "v5-none-sha256-4k", "v6-merged3", "v6-zran-merged3", "v6-tar-tarfs", "v6-chunk-dict"]
)
class TestAgainstUpstream:
    pytestmark = interop

    def test_stat(self, case: str, tmp_path: Path) -> None:
        folder = tmp_path / "copy"  # upstream leaves files of its own in a directory it is given
        shutil.copytree(REFERENCE / case, folder)
        boot = folder / "image.boot"
        for arguments in (
            ["-B", boot],
            ["-D", boot.parent, "--digester", "blake3"],
            ["-D", boot.parent, "--digester", "sha256", "-T", boot],
        ):
            found: list[dict[str, Any]] = []
            upstream("stat", *arguments, "-J", tmp_path / "json")
            found.append(json.loads((tmp_path / "json").read_text()))
            if arguments[0] == "-D" and not found[0]["base_image"]["dirs"]:
                continue  # no layer blobs there: upstream shows zeros, ours takes the bootstrap
            assert ours("stat", *arguments, "-J", tmp_path / "json").exit_code == 0
            found.append(json.loads((tmp_path / "json").read_text()))
            assert found[1] == found[0], arguments
        assert ours("stat", "-B", boot).output == upstream("stat", "-B", boot)

    def test_check_verbose(self, case: str) -> None:
        def lines(text: str) -> list[str]:
            # Upstream shows no type for special files, and for the offset of a chunk that of its last user.
            kinds = ("inode: char", "inode: block", "inode: fifo", "inode: socket")
            found = []
            for line in text.splitlines():
                for kind in kinds:
                    line = line.replace(kind, "inode: ")
                head, separator, rest = line.partition(", file_offset ")
                found.append(head + separator + rest.partition(",")[2])
            return found

        boot = REFERENCE / case / "image.boot"
        assert lines(ours("check", "-v", boot).output) == lines(upstream("check", "-v", boot))

    def test_inspect(self, case: str) -> None:
        boot = REFERENCE / case / "image.boot"
        shared = ["stats", "blobs", "prefetch", "ls", "stat etc", "icheck 2"]
        if case != "v6-tar-tarfs":
            shared.append("chunk 0")  # others are found too here: upstream knows only where chunks begin
        for request in shared:
            there = upstream("inspect", "-R", request, boot)
            here = ours("inspect", "-R", request, boot)
            assert here.exit_code == 0
            text = here.stdout.replace("c    160 ", "     160 ").replace("Device:             1:3\n", "")
            assert text == there, request


def test_inspect_requests_that_are_wrong(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, {"dir/file": b"content"})
    for request in ("nonsense", "chunk many", "icheck -1", "stat"):
        done = ours("inspect", "-R", request, image.bootstrap)
        assert done.exit_code == 1 and f"unsupported inspect request `{request}`" in done.output, request
    for request in ("stat nothing", "icheck 99999", "cd dir/file", "ls nothing"):
        done = ours("inspect", "-R", request, image.bootstrap)
        assert done.exit_code == 0 and done.stdout.endswith("null") and done.stderr, request
    assert '"file"' in ours("inspect", "-R", "ls /dir/../dir", image.bootstrap).stdout
    assert "missing parameter `bootstrap` or `BOOTSTRAP`" in ours("inspect").output
