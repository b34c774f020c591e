"""nydus-image check and inspect as scripts use them: output, exit codes, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bootstrap.reader import open_bootstrap
from tests.lab.paths import ref_bin, shared_dir

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here"),
]
REFERENCE = (shared_dir() or Path("/nonexistent")) / "fixtures" / "reference"


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from bootstrap.cli import main; main(prog_name='nydus-image')"]
    return subprocess.run([*command, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=60)


def test_help_and_version_are_what_callers_probe_for() -> None:
    shown = run("create", "-h").stdout
    for word in ("--type", "tar-rafs", "--batch-size", "--encrypt"):
        assert word in shown
    assert run("--version").stdout.startswith("Version: \tv")
    assert len(run("--version").stdout.splitlines()) == 5
    assert run().returncode == 0 and "check" in run().stdout


@pytest.mark.parametrize("case", ["v6-merged3", "v5-merged3", "v6-batch-128k", "v6-zran-merged3", "v6-no-data"])
def test_check_says_what_upstream_says(case: str, tmp_path: Path) -> None:
    boot = REFERENCE / case / "image.boot"
    ours = run("-l", "warn", "check", "-J", tmp_path / "ours.json", boot)
    assert ours.returncode == 0, ours.stderr
    document = json.loads((tmp_path / "ours.json").read_text())
    theirs = ref_bin("nydus-image")
    if theirs is None:
        pytest.skip("interop: the reference nydus-image is not here")
    done = subprocess.run(
        [str(theirs), "check", "-J", str(tmp_path / "theirs.json"), str(boot)],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert ours.stdout == done.stdout
    expected = json.loads((tmp_path / "theirs.json").read_text())
    assert document.keys() == expected.keys()
    for key in ("bootstrap", "blobs", "external_bootstrap", "external_blobs", "fs_version", "compressor"):
        assert document[key] == expected[key]
    for request in ("stats", "blobs", "prefetch"):
        done = subprocess.run(
            [str(theirs), "inspect", "-R", request, str(boot)], capture_output=True, text=True, timeout=30, check=True
        )
        assert json.loads(run("inspect", "-R", request, boot).stdout) == json.loads(done.stdout)


def test_check_of_data_finds_one_flipped_bit(tmp_path: Path) -> None:
    case = REFERENCE / "v6-lz4-blake3-64k-toc"
    for file in case.iterdir():
        if len(file.name) == 64 or file.suffix == ".boot":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert run("check", "-D", tmp_path, tmp_path / "image.boot").returncode == 0
    blob = next(path for path in tmp_path.iterdir() if len(path.name) == 64)
    good = blob.read_bytes()
    for at in (0, 50_000, len(good) - 700, len(good) - 300):
        bad = bytearray(good)
        bad[at] ^= 0x10
        blob.write_bytes(bad)
        done = run("check", "-D", tmp_path, tmp_path / "image.boot")
        assert done.returncode == 1, at
        assert blob.name in done.stderr and len(done.stderr.splitlines()) == 1
    blob.write_bytes(good[:9000])
    assert "shorter" in run("check", "-D", tmp_path, tmp_path / "image.boot").stderr
    blob.unlink()
    assert blob.name in run("check", "-D", tmp_path, tmp_path / "image.boot").stderr


def test_what_is_no_image_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    good = (REFERENCE / "v5-tar-rafs" / "image.boot").read_bytes()
    flipped = bytearray(good)
    with open_bootstrap(REFERENCE / "v5-tar-rafs" / "image.boot") as image:
        flipped[good.index(next(image.chunk_records())[0])] ^= 1  # only the digests of inodes can tell
    files = {"empty": b"", "text": b"no image\n" * 900, "cut": good[:12000], "flipped": bytes(flipped)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for path in [tmp_path / name for name in (*files, "missing")] + [tmp_path]:
        for command in (["check"], ["inspect", "-R", "blobs"]):
            if path.name == "flipped" and command[0] == "inspect":
                continue
            done = run(*command, path)
            assert done.returncode == 1, (command, path)
            assert len(done.stderr.splitlines()) == 1 and str(path) in done.stderr and "Traceback" not in done.stderr
    assert run("check").returncode == 1


def test_inspect_as_a_shell_ends_with_its_input() -> None:
    lines = (
        'stats\nls\ncd etc\nls\nstat keep\nicheck 128\nchunk 0\nblobs\nprefetch\nchunk x\nnonsense\nls "\ncd /nowhere\n'
    )
    done = run("inspect", REFERENCE / "v6-merged3" / "image.boot", stdin=lines)
    assert done.returncode == 0 and not done.stderr
    for text in (
        '"dir-to-symlink"',
        '"readded"',
        "Permissions:        100644",
        "File: keep ",
        "Unsupported command",
    ):
        assert text in done.stdout
    assert "ls" not in run("inspect", REFERENCE / "v6-merged3" / "image.boot", stdin="exit\nls\n").stdout
