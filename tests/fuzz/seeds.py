"""Sound inputs to start from: images of every form made here, and the reference fixtures where they are."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bootstrap.build import build_layer
from bootstrap.inlined import sections
from bootstrap.layout.common import Compressor, Digester
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from tests.lab import handmade
from tests.lab.estargz import file as stargz_file
from tests.lab.estargz import write_estargz
from tests.lab.paths import shared_dir

MAX_SEED = 300_000  # bytes: larger ones take too long to be read whole a thousand times


@dataclass
class Seed:
    """`files`: what lies in the image's directory; `boot`: the name of the bootstrap among them."""

    name: str
    files: dict[str, bytes]
    boot: str = "image.boot"
    weak: dict[str, list[int]] = field(default_factory=dict)


def layer_tar() -> bytes:
    """A tar with one entry of each kind, PAX and GNU headers among them."""
    out = io.BytesIO()
    rng = random.Random(1)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, (kind, name) in enumerate(
            [
                (tarfile.DIRTYPE, "d"), (tarfile.REGTYPE, "d/f"), (tarfile.REGTYPE, "d/" + "long" * 60),
                (tarfile.LNKTYPE, "d/hard"), (tarfile.SYMTYPE, "d/soft"), (tarfile.FIFOTYPE, "d/fifo"),
                (tarfile.CHRTYPE, "d/null"), (tarfile.REGTYPE, "d/.wh.gone"), (tarfile.REGTYPE, "e/.wh..wh..opq"),
                (tarfile.REGTYPE, "implied/parent/ü"),
            ]
        ):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.type, entry.uid, entry.mtime = kind, 70_000 * number, 1.5 * number
            if kind == tarfile.LNKTYPE:
                entry.linkname = "d/f"
            if kind == tarfile.SYMTYPE:
                entry.linkname = "t" * 150
            if kind == tarfile.CHRTYPE:
                entry.devmajor, entry.devminor = 1, 3
            data = rng.randbytes(700) + bytes(900) if kind == tarfile.REGTYPE and ".wh." not in name else b""
            entry.size = len(data)
            if number == 1:
                entry.pax_headers = {"SCHILY.xattr.user.a": "value", "comment": "x"}
            archive.addfile(entry, io.BytesIO(data))
    out.seek(0)
    with tarfile.open(fileobj=out, mode="a", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo("gnu/" + "n" * 200)
        entry.type, entry.linkname = tarfile.SYMTYPE, "l" * 200
        archive.addfile(entry)
    return out.getvalue()


def stargz_layer(zstd: bool = False) -> bytes:
    rng = random.Random(2)
    files = [stargz_file(f"d/f{n}", rng.randbytes(n * 400)) for n in range(8)]
    return write_estargz(files, chunk_size=4096, zstd=zstd)[0]


@cache
def images() -> list[Seed]:
    found: list[Seed] = []
    with tempfile.TemporaryDirectory() as folder:
        files = dict(list(handmade.contents(12).items()))
        for form in handmade.FORMS:
            made = handmade.make(form, Path(folder) / form, files, beside=form in ("zran", "batch"))
            found.append(
                Seed(form, {path.name: path.read_bytes() for path in made.folder.iterdir()}, boot=made.boot.name)
            )
    tar = layer_tar()
    for version in (5, 6):
        for inline in (False, True):
            for compressor in (Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD):
                out = io.BytesIO()
                options = BuildOptions(
                    fs_version=version, compressor=compressor, digester=Digester.SHA256, chunk_size=0x1000,
                    inline_meta=inline, blob_toc=inline and version == 6,
                )  # fmt: skip
                result = build_layer(io.BytesIO(tar), out, options)
                name = f"v{version}-{compressor.label}-{'inline' if inline else 'apart'}"
                if inline:
                    found.append(Seed(name, {result.blob_sha256: out.getvalue()}, boot=result.blob_sha256))
                else:
                    found.append(Seed(name, {result.blob_id: out.getvalue(), "image.boot": result.bootstrap}))
    shared = shared_dir()
    for folder_ in sorted((shared / "fixtures" / "reference").iterdir()) if shared else []:
        parts = {p.name: p for p in folder_.iterdir() if p.is_file()} if folder_.is_dir() else {}
        if "image.boot" in parts and sum(p.stat().st_size for p in parts.values()) < MAX_SEED:
            found.append(Seed(folder_.name, {n: p.read_bytes() for n, p in parts.items() if "manifest" not in n}))
    for seed in found:
        _find_weak_spots(seed)
    return found


def _find_weak_spots(seed: Seed) -> None:
    """Where structures begin: superblocks, tables, inodes, the ends of blobs."""
    with tempfile.NamedTemporaryFile() as file:
        data = seed.files[seed.boot]
        file.write(data)
        file.flush()
        spots = list(range(0, 128, 8)) + list(range(1024, 1408, 8))
        try:
            with open_bootstrap(file.name) as image:
                for _, entry in image.walk():
                    ino = entry.ino
                    spots.append(image.inode_offset(ino) if hasattr(image, "inode_offset") else ino)
        except Exception:
            pass  # an inline one named by its blob: the fixed places must do
        step = max(32, len(data) // 400)
        seed.weak[seed.boot] = spots + list(range(0x1000, min(len(data), 0x20000), step))
    for name, content in seed.files.items():
        tail = [len(content) - back for back in (512, 640, 1024, 4096, 4608, 5120) if back <= len(content)]
        try:
            tail += [offset for _, offset in sections(io.BytesIO(content), len(content))]
        except Exception:
            pass  # not framed
        seed.weak.setdefault(name, []).extend(tail)


def gzip_layer() -> bytes:
    tar = layer_tar()
    return gzip.compress(tar[:3000], mtime=0) + gzip.compress(tar[3000:], mtime=0)


MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "sha256:" + "1" * 64, "size": 2},
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1", "digest": "sha256:" + "2" * 64, "size": 9,
                "annotations": {"containerd.io/snapshot/nydus-blob": "true"},
            },
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "sha256:" + "3" * 64, "size": 9,
                "annotations": {"containerd.io/snapshot/nydus-bootstrap": "true"},
            },
        ],
        "annotations": {"containerd.io/snapshot/nydus-fs-version": "6"},
    }
).encode()  # fmt: skip
INDEX = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:" + "4" * 64, "size": 9,
                "platform": {"os": "linux", "architecture": "amd64", "os.features": ["nydus.remoteimage.v1"]},
                "artifactType": "application/vnd.nydus.image.manifest.v1+json",
            },
        ],
    }
).encode()  # fmt: skip
CONFIG = json.dumps(
    {
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "2" * 64, "sha256:" + "3" * 64]},
        "history": [{"created_by": "x"}, {"created_by": "y", "empty_layer": True}],
    }
).encode()  # fmt: skip
DAEMON = json.dumps(
    {
        "device": {
            "id": "/4",
            "backend": {
                "type": "registry",
                "config": {
                    "scheme": "http", "host": "h:5000", "repo": "a/b", "auth": "dTpw", "timeout": 5, "retry_limit": 2,
                    "mirrors": [{"host": "http://m", "headers": {"x": "y"}, "ping_url": "http://m/p"}],
                    "proxy": {"url": "http://p", "ping_url": "http://p/q", "fallback": True, "check_interval": 5},
                },
            },
            "cache": {"type": "blobcache", "config": {"work_dir": "/c", "compressed": False}},
        },
        "mode": "direct", "digest_validate": False, "iostats_files": False, "enable_xattr": True,
        "amplify_io": 1048576,
        "fs_prefetch": {"enable": True, "threads_count": 4, "merging_size": 1048576, "bandwidth_rate": 0},
    }
).encode()  # fmt: skip
DAEMON_V2 = json.dumps(
    {
        "version": 2, "id": "x",
        "backend": {"type": "s3", "s3": {"endpoint": "e", "bucket_name": "b", "region": "r", "access_key_id": "k"}},
        "cache": {"type": "filecache", "filecache": {"work_dir": "/c"}, "prefetch": {"enable": True, "threads": 2}},
        "rafs": {"mode": "direct", "batch_size": 1048576, "validate": False, "prefetch": {"enable": True}},
    }
).encode()  # fmt: skip
HOSTS_TOML = b"""server = "https://s"
[host."https://m:5000"]
capabilities = ["pull", "resolve"]
ca = ["/a.pem"]
client = [["/c.pem", "/k.pem"]]
skip_verify = true
override_path = true
[host."https://m:5000".header]
x-a = ["b"]
"""
