"""OCI images without docker: layers from Python's tarfile, an OCI layout on disk, a push over plain HTTP."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from tests.lab.estargz import write_estargz

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"

EPOCH = 1_700_000_000  # the one time stamp of everything we make up: images are the same on every run


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob: `digest` is `sha256:…` of the file's bytes, `size` their number."""

    digest: str
    size: int
    path: Path
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    def descriptor(self) -> dict[str, Any]:
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return found | ({"annotations": dict(self.annotations)} if self.annotations else {})


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; `diff_id` is `sha256:…` of the uncompressed tar, `tar_size` its bytes, `files` its regular files."""

    blob: Blob
    diff_id: str
    tar_size: int
    entries: int
    files: int
    content: int


def entry(
    name: str,
    data: bytes | str | None = None,
    *,
    kind: bytes | None = None,
    mode: int | None = None,
    uid: int = 0,
    gid: int = 0,
    mtime: int = EPOCH,
    link: str = "",
    xattrs: Mapping[str, str] | None = None,
    device: tuple[int, int] = (0, 0),
) -> tuple[tarfile.TarInfo, bytes | None]:
    """A tar member: a file when `data` is given, a symbolic link when only `link` is, else a directory."""
    info = tarfile.TarInfo(name)
    body = data.encode() if isinstance(data, str) else data
    info.type = kind or (tarfile.REGTYPE if body is not None else tarfile.SYMTYPE if link else tarfile.DIRTYPE)
    info.mode = mode if mode is not None else 0o644 if body is not None else 0o777 if link else 0o755
    info.uid, info.gid, info.mtime, info.linkname = uid, gid, mtime, link
    info.size = len(body or b"")
    info.devmajor, info.devminor = device
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info, body


Member = tuple[tarfile.TarInfo, bytes | Path | None]


class _HashingWriter(io.RawIOBase):
    """Hashes and counts what passes: the digests of both forms of a layer come from one pass."""

    def __init__(self, out: Callable[[bytes], object]) -> None:
        self.out, self.hash, self.size = out, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        block = bytes(data)
        self.hash.update(block)
        self.size += len(block)
        self.out(block)
        return len(block)

    @property
    def digest(self) -> str:
        return "sha256:" + self.hash.hexdigest()


class ImageLayout:
    """An OCI layout directory holding one image that grows layer by layer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = directory / "blobs" / "sha256"
        self.blobs.mkdir(parents=True, exist_ok=True)

    def add_blob(self, data: bytes, media_type: str) -> Blob:
        digest = hashlib.sha256(data).hexdigest()
        path = self.blobs / digest
        path.write_bytes(data)
        return Blob(f"sha256:{digest}", len(data), path, media_type)

    def add_layer(self, members: Iterable[Member], compression: str = "gzip", level: int = 6) -> Layer:
        """Writes a layer; `compression` is gzip, zstd or none. A Path as a body is read when its turn comes."""
        part = self.blobs / f".part-{id(members)}"
        counts = {"entries": 0, "files": 0, "content": 0}
        with part.open("wb") as file:
            stored = _HashingWriter(file.write)
            push, finish = _compressor(compression, level, stored)
            plain = _HashingWriter(push)
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
                for info, body in members:
                    counts["entries"] += 1
                    if info.isreg():
                        counts["files"] += 1
                        counts["content"] += info.size
                    if isinstance(body, Path):
                        with body.open("rb") as source:
                            tar.addfile(info, source)
                    else:
                        tar.addfile(info, io.BytesIO(body) if body is not None else None)
            finish()
        path = self.blobs / stored.hash.hexdigest()
        part.rename(path)
        media = {"gzip": LAYER_GZIP, "zstd": LAYER_ZSTD, "none": LAYER_TAR}[compression]
        return Layer(Blob(stored.digest, stored.size, path, media), plain.digest, plain.size, **counts)

    def add_estargz(self, members: Iterable[Member], chunk_size: int = 4 << 20, *, zstd: bool = False) -> Layer:
        """A layer as stargz tools make them, of gzip or zstd:chunked; the manifest vouches for its table."""
        listed = []
        for info, body in members:
            data = body.read_bytes() if isinstance(body, Path) else body or b""
            info.size = len(data)
            listed.append((info, data))
        archive, table = write_estargz(listed, chunk_size, zstd=zstd)
        media = LAYER_ZSTD if zstd else LAYER_GZIP
        stored = self.add_blob(archive, media)
        marks = {TOC_DIGEST: "sha256:" + hashlib.sha256(table).hexdigest()}
        blob = Blob(stored.digest, stored.size, stored.path, media, marks)
        frames = zstandard.ZstdDecompressor().stream_reader(archive, read_across_frames=True)
        plain = frames.read() if zstd else gzip.decompress(archive)
        files = sum(info.isreg() for info, _ in listed)
        diff_id = "sha256:" + hashlib.sha256(plain).hexdigest()
        return Layer(blob, diff_id, len(plain), len(listed), files, sum(info.size for info, _ in listed))

    def finish(
        self,
        layers: Sequence[Layer],
        *,
        entrypoint: Sequence[str] | None = None,
        cmd: Sequence[str] | None = None,
        env: Sequence[str] = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",),
        workdir: str = "/",
        architecture: str = "amd64",
    ) -> Image:
        """Config, manifest and index.json around `layers`, lowest first."""
        config: dict[str, Any] = {"Env": list(env), "WorkingDir": workdir}
        if entrypoint is not None:
            config["Entrypoint"] = list(entrypoint)
        if cmd is not None:
            config["Cmd"] = list(cmd)
        created = "2023-11-14T22:13:20Z"
        text = json.dumps(
            {
                "created": created,
                "architecture": architecture,
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
                "history": [{"created": created, "created_by": f"lab layer {index}"} for index in range(len(layers))],
            }
        )
        config_blob = self.add_blob(text.encode(), CONFIG)
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": config_blob.descriptor(),
                "layers": [layer.blob.descriptor() for layer in layers],
            }
        )
        manifest_blob = self.add_blob(manifest.encode(), MANIFEST)
        (self.directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.directory / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest_blob.descriptor()]})
        )
        return Image(self.directory, manifest_blob, config_blob, list(layers))


def _compressor(kind: str, level: int, out: _HashingWriter) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    if kind == "none":
        return out.write, lambda: None
    if kind == "gzip":
        # A raw gzip member with a zero time stamp, so that equal content has an equal digest.
        squeeze: Any = zlib.compressobj(level, zlib.DEFLATED, 31)
    elif kind == "zstd":
        import zstandard

        squeeze = zstandard.ZstdCompressor(level=3).compressobj()
    else:
        raise ValueError(f"compression {kind!r}: gzip, zstd or none")

    def push(data: bytes) -> None:
        if packed := squeeze.compress(data):
            out.write(packed)

    return push, lambda: out.write(squeeze.flush())


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image in an OCI layout."""

    directory: Path
    manifest: Blob
    config: Blob
    layers: list[Layer] = field(default_factory=list)

    @property
    def blob_bytes(self) -> int:
        """Bytes a full pull fetches in layers."""
        return sum(layer.blob.size for layer in self.layers)

    @property
    def files(self) -> int:
        return sum(layer.files for layer in self.layers)

    @property
    def content(self) -> int:
        """Bytes of all regular files, as unpacked (hidden ones included)."""
        return sum(layer.content for layer in self.layers)

    def push(self, registry: str, repository: str, tag: str) -> str:
        """Uploads to the plain-HTTP `registry` (host:port); the reference to pull it by."""
        push_image(registry, repository, tag, self.manifest, [*(layer.blob for layer in self.layers), self.config])
        return f"{registry}/{repository}:{tag}"


def push_blob(registry: str, repository: str, blob: Blob) -> None:
    """Upload a blob unless the registry has it."""
    if _request(registry, "HEAD", f"/v2/{repository}/blobs/{blob.digest}")[0] == 200:
        return
    status, headers = _request(registry, "POST", f"/v2/{repository}/blobs/uploads/")
    if status != 202:
        raise OSError(f"{registry}/{repository}: POST of an upload was answered {status}")
    place = headers["location"]
    place = place.partition(registry)[2] if place.startswith("http") else place
    with blob.path.open("rb") as body:
        status, _ = _request(
            registry,
            "PUT",
            f"{place}{'&' if '?' in place else '?'}digest={blob.digest}",
            body,
            {"Content-Length": str(blob.size), "Content-Type": "application/octet-stream"},
        )
    if status != 201:
        raise OSError(f"{registry}/{repository}: PUT of blob {blob.digest} was answered {status}")


def push_image(registry: str, repository: str, tag: str, manifest: Blob, blobs: Sequence[Blob]) -> None:
    for blob in blobs:
        push_blob(registry, repository, blob)
    with manifest.path.open("rb") as body:
        headers = {"Content-Type": manifest.media_type, "Content-Length": str(manifest.size)}
        status, _ = _request(registry, "PUT", f"/v2/{repository}/manifests/{tag}", body, headers)
    if status != 201:
        raise OSError(f"{registry}/{repository}:{tag}: PUT of the manifest was answered {status}")


def _request(
    registry: str, method: str, path: str, body: BinaryIO | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection(registry, timeout=120, blocksize=1 << 18)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        answer.read()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}
    finally:
        connection.close()


def fetch_manifest(registry: str, repository: str, tag: str) -> tuple[str, dict[str, Any]]:
    """(digest, parsed manifest or index) as a plain-HTTP registry serves it."""
    connection = http.client.HTTPConnection(registry, timeout=30)
    try:
        accept = ", ".join([MANIFEST, INDEX, "application/vnd.docker.distribution.manifest.v2+json"])
        connection.request("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": accept})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise OSError(f"{registry}/{repository}:{tag}: {answer.status} {text[:200]!r}")
        return "sha256:" + hashlib.sha256(text).hexdigest(), json.loads(text)
    finally:
        connection.close()


def image_bytes(registry: str, repository: str, tag: str) -> int:
    """Sum of the layer sizes in a manifest."""
    return sum(int(layer["size"]) for layer in fetch_manifest(registry, repository, tag)[1]["layers"])


def gunzip_layer(blob: Blob) -> bytes:
    with gzip.open(blob.path) as stream:
        return stream.read()
