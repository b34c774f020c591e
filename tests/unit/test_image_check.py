"""nydus-image check: one broken promise of the format at a time, each is found and named."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bootstrap.build import build_layer
from bootstrap.cli import main
from bootstrap.inlined import read_toc, sections
from bootstrap.layout import toc, v6
from bootstrap.layout.common import Compressor
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.reader_v6 import BootstrapV6
from tests.lab.tiny import noise


def ours(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def layer_tar() -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("dir/a", noise(10_000)), ("dir/b", b"x" * 5_000), ("z", noise(3_000, 2))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if name == "z":
                entry.pax_headers = {"SCHILY.xattr.user.k": "v"}
            archive.addfile(entry, io.BytesIO(data))
        for name, kind in (("dir/hard", tarfile.LNKTYPE), ("soft", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "dir/a"
            archive.addfile(entry)
    out.seek(0)
    return out


def built(
    folder: Path, version: int = 6, *, inline: bool = False, compressor: Compressor = Compressor.LZ4_BLOCK
) -> Path:
    """A bootstrap beside its blob, or a layer blob named by its digest."""
    options = BuildOptions(
        fs_version=version, compressor=compressor, chunk_size=0x1000, inline_meta=inline,
        blob_toc=version == 6, prefetch=[b"/dir"], prefetch_policy="fs",
    )  # fmt: skip
    out = io.BytesIO()
    result = build_layer(layer_tar(), out, options)
    if inline:
        path = folder / hashlib.sha256(out.getvalue()).hexdigest()
        path.write_bytes(out.getvalue())
        return path
    (folder / result.blob_id).write_bytes(out.getvalue())
    (folder / "image.boot").write_bytes(result.bootstrap)
    return folder / "image.boot"


Change = Callable[[BootstrapV6, bytearray], None]


def put(offset: int, form: str, value: int) -> Change:
    return lambda image, data: struct.pack_into(form, data, offset, value)


def inode(path: bytes, field: int, form: str, value: int) -> Change:
    def change(image: BootstrapV6, data: bytearray) -> None:
        struct.pack_into(form, data, image.inode_offset(image.resolve(path)) + field, value)

    return change


def record(field: int, form: str, change: Callable[[int], int]) -> Change:
    """Changes a field of the last compressed chunk's record."""

    def run(image: BootstrapV6, data: bytearray) -> None:
        rows = list(image.chunk_records())
        number = max((row for row in range(len(rows)) if rows[row][2] & 1), key=lambda row: rows[row][8])
        at = image.ext.chunk_table_offset + 80 * number + field
        struct.pack_into(form, data, at, change(struct.unpack_from(form, data, at)[0]))

    return run


def dirent(parent: bytes, number: int, field: int, form: str, value: int) -> Change:
    def change(image: BootstrapV6, data: bytearray) -> None:
        ino = image.resolve(parent)
        at = bytes(data).index(struct.pack("<QHB", ino, len(list(image.raw_entries(ino))) * 12, 2))
        struct.pack_into(form, data, at + 12 * number + field, value)

    return change


SB, EXT, SLOT = v6.SUPER_OFFSET, v6.EXT_SUPER_OFFSET, v6.DEVICE_TABLE_OFFSET
V6 = {
    "root nid": (put(SB + 14, "<H", 130), ""),
    "blocks": (put(SB + 36, "<I", 1), "blocks instead of"),
    "shared xattrs": (put(SB + 44, "<I", 1), "shared xattrs"),
    "xattr flag": (lambda image, data: put(EXT, "<Q", image.flags & ~0x20)(image, data), "none has any"),
    "prefetch table": (lambda image, data: put(EXT + 40, "<Q", image.ext.prefetch_table_offset + 8)(image, data),
                       "prefetch table at"),
    "slot blocks": (put(SLOT + 64, "<I", 3), "3 blocks for"),
    "slot id": (put(SLOT, "<B", ord("0")), ""),
    "file link count": (inode(b"dir/a", 44, "<I", 3), "link count 3"),
    "directory link count": (inode(b"dir", 44, "<I", 3), "link count 3"),
    "inode number": (lambda image, data: inode(b"z", 20, "<I", image.inode_number(image.resolve(b"dir/a")))(
        image, data), "link count 2, but 3 names"),
    "file size": (inode(b"z", 8, "<Q", 3_001), "its chunk 3000"),
    "prefetch nid": (lambda image, data: put(image.ext.prefetch_table_offset, "<I", 129)(image, data), ""),
    "own name": (dirent(b"dir", 0, 0, "<Q", 128), '"."'),
    "file type": (dirent(b"dir", 2, 10, "<B", 7), "file type"),
    "stored place": (record(48, "<Q", lambda at: at - 1), "overlap"),
    "behind the data": (record(48, "<Q", lambda at: at + 5_000), "behind the data"),
    "inside a block": (record(56, "<Q", lambda at: at + 8), ""),
    "number": (record(72, "<I", lambda number: number + 1), ""),
    "plain with two sizes": (record(36, "<I", lambda flags: flags & ~1), "two sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", V6)
def test_every_promise_of_a_v6_bootstrap(name: str, tmp_path: Path) -> None:
    path = built(tmp_path)
    assert ours("check", "-D", tmp_path, path).exit_code == 0
    change, text = V6[name]
    data = bytearray(path.read_bytes())
    with open_bootstrap(path) as image:
        assert isinstance(image, BootstrapV6)
        change(image, data)
    assert data != path.read_bytes()
    path.write_bytes(data)
    done = ours("check", path)
    assert done.exit_code == 1 and text in done.output and len(done.output.splitlines()) == 1, done.output


@pytest.mark.parametrize("version", [5, 6])
def test_a_flipped_bit_anywhere_in_a_layer_blob(version: int, tmp_path: Path) -> None:
    """Each section is vouched for by something: no byte of a layer may change unseen."""
    for compressor in (Compressor.LZ4_BLOCK, Compressor.ZSTD):
        path = built(tmp_path, version, inline=True, compressor=compressor)
        done = ours("-l", "warn", "check", "-D", tmp_path, path)
        assert done.exit_code == 0 and "WARN" not in done.output, done.output
        good = path.read_bytes()
        ends = [len(good)]
        with open(path, "rb") as file:
            ends += [at + part for header, at in sections(file, len(good)) for part in (0, header.size)]
        spots = {at + shift for at in ends for shift in (-9, -200, 3) if 0 <= at + shift < len(good)}
        unseen = []
        for at in sorted(spots):
            bad = bytearray(good)
            bad[at] ^= 0x04
            path.write_bytes(bad)
            done = ours("-l", "warn", "check", "-D", tmp_path, path)
            assert "Traceback" not in done.output and isinstance(done.exception, SystemExit | None)
            if done.exit_code == 0 and "not named by its SHA-256" not in done.output:
                unseen.append(at)
        assert not unseen
        path.unlink()


def test_tables_of_contents_that_lie(tmp_path: Path) -> None:
    path = built(tmp_path)
    blob = next(file for file in tmp_path.iterdir() if len(file.name) == 64)
    good, boot = blob.read_bytes(), path.read_bytes()
    with open(blob, "rb") as file:
        entries = read_toc(file, len(good))
    size = len(entries) * 128 + 512
    for number, entry in enumerate(entries):
        for field, form in ((24, "<B"), (56, "<Q")):
            if entry.name == toc.IMAGE_BLOB and field == 56:
                continue  # older builders gave the end of the data there
            bad = bytearray(good)
            at = len(good) - size + 128 * number + field
            struct.pack_into(form, bad, at, struct.unpack_from(form, bad, at)[0] ^ 1)
            blob.write_bytes(bad)
            # As if the bootstrap had been made for it: what remains are the contents.
            fixed = boot.replace(hashlib.sha256(good[-size:]).digest(), hashlib.sha256(bad[-size:]).digest())
            assert fixed != boot
            path.write_bytes(fixed)
            done = ours("-l", "warn", "check", "-D", tmp_path, path)
            assert done.exit_code == 1 and blob.name in done.output, (entry.name, field, done.output)
        path.write_bytes(boot)
