"""nydus-image export on the kernel: what it mounts is what the manifest says. Compact and optimize on nydusd."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bootstrap.cli import main
from bootstrap.layout import v6
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.verity import append_tree
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.mounted import check_mount
from tests.lab.paths import ref_bin, shared_dir
from tests.lab.tiny import noise, tiny_image

pytestmark = pytest.mark.root
REFERENCE = (shared_dir() or Path("/nonexistent")) / "fixtures" / "reference"
interop = [
    pytest.mark.interop,
    pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here"),
]


def ours(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@contextmanager
def mounted(disk: Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    run("mount", "-t", "erofs", "-o", "ro,loop", disk, at)
    try:
        yield at
    finally:
        run("umount", at)


def has_erofs() -> bool:
    if modprobe := shutil.which("modprobe"):
        subprocess.run([modprobe, "-q", "erofs"], check=False, capture_output=True)
    return any(line.split()[-1:] == ["erofs"] for line in Path("/proc/filesystems").read_text().splitlines())


@pytest.mark.skipif(not has_erofs(), reason="this kernel has no EROFS")
class TestExport:
    pytestmark = interop

    @pytest.mark.parametrize(
        "case",
        ["v6-zstd-blake3-1m", "v6-merged3", "v6-tar-tarfs", "v6-encrypt-batch-toc", "v6-zran-slices", "v6-no-data"],
    )
    def test_the_kernel_sees_the_manifest(self, case: str, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        source = REFERENCE / case
        done = ours("export", "--block", "--verity", "-B", source / "image.boot", "-D", source, "-O", disk)
        assert done.exit_code == 0, done.output
        with mounted(disk, tmp_path / "mnt") as mnt:
            assert check_mount(source, mnt) == []
        if shutil.which("veritysetup") is None:
            pytest.skip("needs veritysetup (cryptsetup-bin) to check the hash tree")
        assert done.output.startswith("dm-verity options: --no-superblock")
        *options, root = done.output.removeprefix("dm-verity options: ").replace('""', "-").split()
        run("veritysetup", "verify", *options, disk, disk, root)

    def test_fsck_accepts_it(self, tmp_path: Path) -> None:
        if shutil.which("fsck.erofs") is None:
            pytest.skip("needs fsck.erofs (erofs-utils)")
        disk, source = tmp_path / "disk", REFERENCE / "v6-merged3"
        assert ours("export", "--block", "-B", source / "image.boot", "-D", source, "-O", disk).exit_code == 0
        # Version 1.5 wants each blob as a device of its own: the same bytes, at the addresses the disk gives.
        data, devices = disk.read_bytes(), []
        with open_bootstrap(source / "image.boot") as image:
            for blob in image.blobs:
                slot = v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * blob.index
                _, blocks, start = v6.DEVICE_SLOT.unpack_from(data, slot)
                devices.append(tmp_path / f"device{blob.index}")
                devices[-1].write_bytes(data[start * 4096 : (start + blocks) * 4096])
        words = [f"--device={device}" for device in devices]
        run("fsck.erofs", *words, f"--extract={tmp_path / 'tree'}", disk)
        assert (tmp_path / "tree" / "etc" / "replaced").read_bytes()

    def test_the_bytes_are_upstreams(self, tmp_path: Path) -> None:
        program = ref_bin("nydus-image")
        if program is None:
            pytest.skip("interop: the reference nydus-image is not here")
        for case in ("v6-zstd-blake3-1m", "v6-tar-tarfs"):
            folder, theirs = tmp_path / case, tmp_path / f"theirs-{case}"
            shutil.copytree(REFERENCE / case, folder)
            run(program, "export", "--block", "-B", folder / "image.boot", "-D", folder, "-O", theirs)
            done = ours("export", "--block", "-B", folder / "image.boot", "-D", folder)
            assert done.exit_code == 0, done.output
            assert (folder / "image.boot.disk").read_bytes() == theirs.read_bytes()


def test_verity_trees_of_two_levels(tmp_path: Path) -> None:
    if shutil.which("veritysetup") is None:
        pytest.skip("needs veritysetup (cryptsetup-bin)")
    for size, unit in ((512 * 8, 512), (4096 * 129, 4096), (4096 * 16_385, 4096)):
        path = tmp_path / "data"
        with open(path, "w+b") as file:
            file.truncate(size)
            file.write(noise(10_000))
            found = append_tree(file, size, unit)
        options = found.as_options().replace('""', "-").split()
        run("veritysetup", "verify", *options[:-1], path, path, options[-1])
        damaged = bytearray(path.read_bytes())
        damaged[size - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(AssertionError):
            run("veritysetup", "verify", *options[:-1], path, path, options[-1])


def test_export_says_what_is_wrong(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, {"f": noise(9_000)})
    blob = tmp_path / image.blob_id
    base = ["export", "--block", "-B", image.bootstrap, "-D", tmp_path, "-O", tmp_path / "disk"]
    assert image.blob_id in ours(*base).output
    blob.write_bytes(image.blob[:500] + bytes([image.blob[500] ^ 1]) + image.blob[501:])
    done = ours(*base)
    assert done.exit_code == 1 and "digest is wrong" in done.output and len(done.output.splitlines()) == 1
    assert not (tmp_path / "disk").exists() and not list(tmp_path.glob(".*"))
    blob.write_bytes(image.blob)
    entry = {"type": "bootstrap", "id": "x", "config_v2": {"version": 2, "id": "x", "backend": {
        "type": "localfs", "localfs": {"dir": str(tmp_path)}}, "cache": {"type": "blobcache", "filecache": {
            "work_dir": str(tmp_path)}}, "metadata_path": str(image.bootstrap)}}  # fmt: skip
    (tmp_path / "entry").write_text(json.dumps(entry))
    done = ours("export", "--block", "-C", tmp_path / "entry", "-O", tmp_path / "disk")
    assert done.exit_code == 0, done.output
    assert noise(9_000) in (tmp_path / "disk").read_bytes()
    # Images of before 2.2 name no place for their blobs: they get the one a builder of today gives.
    old_disk, boot = (tmp_path / "disk").read_bytes(), bytearray(image.bootstrap.read_bytes())
    boot[v6.DEVICE_TABLE_OFFSET + 68 : v6.DEVICE_TABLE_OFFSET + 72] = bytes(4)
    assert boot != image.bootstrap.read_bytes()
    (tmp_path / "old.boot").write_bytes(boot)
    assert ours("export", "--block", "-B", tmp_path / "old.boot", "-D", tmp_path).exit_code == 0
    assert (tmp_path / "old.boot.disk").read_bytes() == old_disk
    assert "are missing" in ours("export", "--block", "-B", image.bootstrap).output
    assert ours("export", "-B", image.bootstrap, "-D", tmp_path).exit_code == 2
    old = tiny_image(tmp_path, {"f": b"x"}, BuildOptions(fs_version=5))
    done = ours("export", "--block", "-B", old.bootstrap, "-D", tmp_path)
    assert done.exit_code == 1 and "only version 6 is an EROFS image" in done.output


COMPARE = """
import sys
from pathlib import Path
from tests.lab.manifest import check_tree, load_manifest
for line in check_tree(Path(sys.argv[2]), load_manifest(Path(sys.argv[1]))):
    print(line.encode("utf-8", "backslashreplace").decode())
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Nydusd]:
    with Nydusd(binary=ref_bin("nydusd")) as daemon:
        yield daemon


def differences(daemon: Nydusd, case: str, boot: Path, blobs: Path) -> list[str]:
    """What upstream's daemon shows of an image, against a manifest. In a process of its own: a daemon may hang."""
    at = "/" + blobs.name
    work = daemon.dir / "cache" / blobs.name
    work.mkdir(parents=True)
    config = localfs_config(blobs, config_id=at, work_dir=work, digest_validate=case.startswith("v5"))  # it can no v6
    answer = daemon.mount(at, boot, config)
    assert answer.status == 204, answer
    found = run(sys.executable, "-c", COMPARE, REFERENCE / case, daemon.mnt / blobs.name).splitlines()
    assert daemon.umount(at).status == 204
    return found


@pytest.mark.interop
@pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())
@pytest.mark.skipif(
    shared_dir() is None or ref_bin("nydusd") is None, reason="interop: fixtures and reference nydusd are not here"
)
@pytest.mark.parametrize("case", ["v5-merged3", "v6-merged3", "v6-merged3-encrypt-batch", "v6-zstd-blake3-1m"])
def test_upstream_serves_what_was_rewritten(upstream: Nydusd, case: str, tmp_path: Path) -> None:
    blobs = tmp_path / f"rewritten-{case}"
    blobs.mkdir()
    for path in (REFERENCE / case).iterdir():
        if len(path.name) == 64:
            (blobs / path.name).write_bytes(path.read_bytes())
    boot = REFERENCE / case / "image.boot"
    (tmp_path / "list").write_text("/usr\n/links\n/big1\n/files\n/names\n")
    done = ours("-l", "warn", "optimize", "-B", boot, "-D", blobs, "--output-blob-dir", blobs, "-p", tmp_path / "list",
                "-O", tmp_path / "optimized")  # fmt: skip
    assert done.exit_code == 0
    with open_bootstrap(boot) as old, open_bootstrap(tmp_path / "optimized") as new:
        assert len(new.blobs) == len(old.blobs) + 1
    assert differences(upstream, case, tmp_path / "optimized", blobs) == []
    compacted = tmp_path / f"compacted-{case}"
    shutil.copytree(blobs, compacted)
    done = ours("-l", "error", "compact", "-B", tmp_path / "optimized", "-D", compacted, "--min-used-ratio", "99",
                "-O", tmp_path / "compacted.boot")  # fmt: skip
    assert done.exit_code == 0
    with open_bootstrap(tmp_path / "compacted.boot") as new:
        assert len(new.blobs) == 1
    assert differences(upstream, case, tmp_path / "compacted.boot", compacted) == []
