"""Every reference image whose kind we can build is built again by the commands that made it: the same bytes.

Needs root: the trees have devices, owners and trusted attributes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from click.testing import CliRunner

from bootstrap import crypt
from bootstrap.cli import main
from bootstrap.codec import decompress
from bootstrap.kinds import ALIASES, KINDS
from bootstrap.layout import batch, v6
from bootstrap.layout.common import Compressor
from bootstrap.modes.packed import PackedMode
from bootstrap.reader import open_bootstrap
from tests.unit.test_build_fixtures import REFERENCE, _manifest, rewrite, tree_tar

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(REFERENCE is None, reason="interop: the reference fixtures are not here"),
]


def _kind(arguments: list[str]) -> str:
    name = arguments[arguments.index("--type") + 1] if "--type" in arguments else "dir-rafs"
    return ALIASES.get(name, name)


def _cases() -> list[str]:
    found = []
    for case in sorted(REFERENCE.iterdir()) if REFERENCE else ():
        if case.name == "oci" or not case.is_dir():
            continue
        commands = [command["args"] for command in _manifest(case)["commands"]]
        if all(args[0] == "merge" or _kind(args) in KINDS for args in commands):
            found.append(case.name)
    return found


@pytest.fixture(scope="module")
def tmpfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place that can hold long extended attributes; ext4 cannot."""
    place = tmp_path_factory.mktemp("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True, timeout=10)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=10)


def _source(text: str, work: Path, originals: list[Path]) -> Path:
    """WORK/... of a command: a tree, or an archive of one; `originals` are those that lie beside the image."""
    assert REFERENCE is not None
    path = work / text.removeprefix("WORK/")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "empty":  # nothing with data
        (path / "d").mkdir(parents=True, mode=0o700)
        (path / "e").touch(0o644)
        (path / "s").symlink_to("e")
        for name in "des":
            os.utime(path / name, (1600000000, 1600000000), follow_symlinks=False)
    elif path.name.startswith("make_tree-"):
        _, tree, chunk = path.name.split("-")
        make = [sys.executable, str(REFERENCE / "make_tree.py"), "dir", tree, str(path), "-c", "0x" + chunk]
        subprocess.run(make, check=True, timeout=120)
    elif path.name.endswith(".tar"):
        tree, chunk = path.stem.rsplit("-", 1)
        path.write_bytes(tree_tar(tree, int(chunk, 16)))
    elif path.name.endswith((".esgz", ".tar.gz")):
        number = int(path.name[5]) - 1 if path.name.startswith("layer") else 0
        return originals[number]
    return path


def _run(arguments: list[str], stdin: str | None) -> None:
    done = CliRunner().invoke(main, ["-l", "error", *arguments], input=stdin or "")
    assert done.exit_code == 0, done.output


def _secrets(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of this case use the keys the reference was made with."""
    image = (case / "image.boot").read_bytes()
    extended = v6.ExtSuperblock._make(v6.EXT_SUPERBLOCK.unpack_from(image, v6.EXT_SUPER_OFFSET)[:9])
    keys = []
    at = extended.blob_table_offset
    for place in range(at, at + extended.blob_table_size, v6.BLOB_ENTRY.size):
        entry = v6.BlobEntry._make(v6.BLOB_ENTRY.unpack_from(image, place))
        keys.append(crypt.from_table(entry.cipher, entry.blob_meta_digest, entry.blob_meta_size, entry.cipher_iv))
    monkeypatch.setattr(crypt, "generate", lambda: keys.pop(0))


@pytest.mark.parametrize("name", _cases())
def test_the_same_commands_give_the_same_bytes(
    name: str, tmpfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REFERENCE is not None
    case = REFERENCE / name
    manifest: dict[str, Any] = _manifest(case)
    if int(manifest["flags"], 0) & 0x0200_0000:
        _secrets(case, monkeypatch)
        # Ours stores batches apart that encryption would make unreadable for upstream's daemon; these have some.
        monkeypatch.setattr(PackedMode, "refused_by_readers", staticmethod(lambda stored, size: False))
    original_case = REFERENCE / "v6-estargz-ref" if name == "v6-estargz-rafs" else case
    is_ref = any(
        _kind(command["args"]).endswith(("-ref", "-tarfs")) for command in _manifest(original_case)["commands"]
    )
    originals = [original_case / blob["id"] for blob in _manifest(original_case)["blobs"]] if is_ref else []
    out = tmp_path / "out"
    out.mkdir()
    for command in manifest["commands"]:
        arguments = []
        for text in command["args"]:
            if text.startswith("WORK/") and "/mrg-" in "/" + text:
                text = str(tmp_path / text.rsplit("/", 1)[1])
            elif text.startswith("WORK/"):
                text = str(_source(text, tmpfs, originals))
            arguments.append(text.replace("OUT", str(out)) if text.startswith(("OUT", "bootstrap=OUT")) else text)
        _run(arguments, command.get("stdin"))
        layer = tmp_path / "layer"
        if layer.exists():
            digest = hashlib.sha256(layer.read_bytes()).hexdigest()
            shutil.copy(layer, out / digest)
            layer.rename(tmp_path / (Path(arguments[-1]).name if is_ref else digest))
    for file in manifest["files"]:
        if case / file in originals:
            continue
        ours, theirs = (out / file).read_bytes(), (case / file).read_bytes()
        if file.endswith(".boot") and ours != theirs:  # attributes of an inode are in no order upstream
            stdin = manifest["commands"][-1].get("stdin") or ""
            table = stdin.encode().splitlines() if manifest["prefetch_table"] else []
            theirs = rewrite(case / file, table, sort_xattrs=True)
        assert ours == theirs, file


def test_encrypted_batches_can_be_read_by_everyone(tmpfs: Path, tmp_path: Path) -> None:
    """The tree of v6-encrypt-batch-toc has flushes below 16 bytes: stored apart, so upstream's daemon reads them."""
    source = _source("WORK/src/make_tree-nasty-10000", tmpfs, [])
    flags = ["--chunk-size", "0x10000", "--encrypt", "--batch-size", "0x8000", "--features", "blob-toc"]
    _run(["create", *flags, "--bootstrap", str(tmp_path / "boot"), "--blob-dir", str(tmp_path), str(source)], None)
    with open_bootstrap(tmp_path / "boot") as image:
        (blob,) = image.blobs
        secret = crypt.from_table(blob.cipher, blob.meta_digest, blob.meta_size, blob.cipher_iv)
        data = (tmp_path / blob.id).read_bytes()
        apart = [record for record in image.chunk_records() if record[3] == 18]
        assert apart and all(record[4] < 16 for record in apart)
        for digest, _, _, stored, size, at, *_ in apart:
            plain = crypt.decrypt(secret, data[at : at + stored], size)
            assert blake3(plain).digest() == digest
        region = crypt.decrypt(secret, data[blob.ci_offset : blob.ci_offset + blob.ci_compressed_size])
        region = decompress(Compressor(blob.ci_compressor), region, blob.ci_uncompressed_size)
        for place in range(24 * blob.chunk_count, len(region), 40):
            context = batch.unpack_context(region, place)
            assert context.compressed_size <= context.uncompressed_batch_size
