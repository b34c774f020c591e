"""One function per parser: makes an input from a generator, runs the parser over it as its users do.

`make(rng)` gives the input as bytes (directories as JSON of hex); `run(data)` may raise only the target's `allowed`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bootstrap import optimize, tar
from bootstrap.blobsource import open_blobs
from bootstrap.build import build_layer
from bootstrap.check import check_bootstrap
from bootstrap.chunkmap import ChunkMap
from bootstrap.decompress import open_layer
from bootstrap.errors import RafsError
from bootstrap.estargz import layer_bootstrap, parse_toc
from bootstrap.inlined import extract_bootstrap, read_toc, sections
from bootstrap.layout.zran import ZranContext
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.zran import Contexts, decode_slice
from nydusfs.config import load_config
from nydusfs.convert.endpoints.docker import DockerArchive
from nydusfs.convert.endpoints.tarindex import TarIndex
from nydusfs.convert.images import load_images
from nydusfs.daemon import handover
from nydusfs.errors import NydusError
from nydusfs.http import url, wire
from nydusfs.http.errors import HttpError
from nydusfs.profile import decode as decode_profile
from nydusfs.registry import hosts
from nydusfs.registry.challenge import parse_challenges, parse_token_reply
from nydusfs.registry.client import Manifest
from nydusfs.registry.reference import Reference
from snapshotter import filters, settings
from snapshotter.errors import SnapshotterError
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate, mutate_json
from tests.lab.nowhere import Nowhere

MAX_PATHS = 2000  # of a tree looked at: a hostile one may show an endless number
DOMAIN = (RafsError, NydusError, SnapshotterError, HttpError)


@dataclass(frozen=True)
class Target:
    name: str
    make: Callable[[random.Random], bytes]
    run: Callable[[bytes], object]
    allowed: tuple[type[BaseException], ...] = DOMAIN
    weight: int = 1


def _pack(files: dict[str, bytes], boot: str) -> bytes:
    return json.dumps({"boot": boot, "files": {name: data.hex() for name, data in files.items()}}).encode()


def _unpack(data: bytes, folder: str) -> str:
    value = json.loads(data)
    for name, content in value["files"].items():
        Path(folder, name).write_bytes(bytes.fromhex(content))
    return os.path.join(folder, value["boot"])


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None, prefix="nydus-fuzz-")


# ---- images


def _make_image(rng: random.Random) -> bytes:
    seed = rng.choice(seeds.images())
    files = dict(seed.files)
    victim = seed.boot if rng.random() < 0.6 else rng.choice(sorted(files))
    others = [content for name, content in files.items() if name != victim] or [b"\0" * 64]
    files[victim] = mutate(rng, files[victim], others, seed.weak.get(victim, []))
    return _pack(files, seed.boot)


def _tolerant(call: Callable[[], object]) -> None:
    try:
        call()
    except RafsError:
        pass


def _run_image(data: bytes) -> None:
    with _scratch() as folder, open_bootstrap(_unpack(data, folder)) as image:
        names = []
        for path, entry in itertools.islice(image.walk(), MAX_PATHS):
            names.append(entry)
            _tolerant(lambda ino=entry.ino: image.xattrs(ino))  # type: ignore[misc]
            _tolerant(lambda ino=entry.ino: image.lacks_xattrs(ino))  # type: ignore[misc]
            _tolerant(lambda path=path: image.resolve(b"/" + path))  # type: ignore[misc]
        for entry in names[:300]:
            attr = image.attr(entry.ino)
            if entry.dtype == 10:
                _tolerant(lambda ino=entry.ino: image.readlink(ino))  # type: ignore[misc]
            if entry.dtype == 8:
                _tolerant(lambda ino=entry.ino, n=attr.size: image.extents(ino, 0, min(n, 1 << 20)))  # type: ignore[misc]
                _tolerant(lambda ino=entry.ino: image.chunk_refs(ino))  # type: ignore[misc]
        image.prefetch_inodes()
        _tolerant(lambda: check_bootstrap(image))


def _run_blobs(data: bytes) -> None:
    with _scratch() as folder, open_bootstrap(_unpack(data, folder)) as image, open_blobs(image, folder) as blobs:
        for _, entry in itertools.islice(image.walk(), 300):
            if entry.dtype == 8 and image.attr(entry.ino).size < 4 << 20:
                try:
                    for part in itertools.islice(blobs.read_file(entry.ino), 64):
                        len(part)
                except RafsError:
                    continue


def _run_chunks(data: bytes) -> None:
    with _scratch() as folder, open_bootstrap(_unpack(data, folder)) as image:
        chunks = ChunkMap.open(image, None)
        try:
            for blob in image.blobs:
                for row in itertools.islice(chunks.blob_rows(blob.index), 200):
                    _tolerant(lambda row=row: chunks.chunk(row))  # type: ignore[misc]
        finally:
            chunks.close()


def _run_merge(data: bytes) -> None:
    with _scratch() as folder:
        boot = Path(_unpack(data, folder))
        merge_layers([MergeSource(boot), MergeSource(boot)], Path(folder) / "merged.boot")


# ---- layers


def _make_tail(rng: random.Random) -> bytes:
    seed = rng.choice([seed for seed in seeds.images() if seed.boot != "image.boot" or len(seed.files) > 1])
    name = seed.boot if seed.boot != "image.boot" else rng.choice(sorted(seed.files))
    return mutate(rng, seed.files[name], [], seed.weak.get(name, []))


def _run_tail(data: bytes) -> None:
    blob = io.BytesIO(data)
    _tolerant(lambda: list(itertools.islice(sections(blob, len(data)), 100)))
    _tolerant(lambda: read_toc(blob, len(data)))
    extract_bootstrap(blob, len(data))


def _make_tar(rng: random.Random) -> bytes:
    data = mutate(rng, seeds.layer_tar(), [], range(0, 8192, 512))
    if rng.random() < 0.7:  # headers whose checksum is right again
        out = bytearray(data)
        for at in range(0, len(out) - 511, 512):
            if out[at + 257 : at + 262] == b"ustar":
                out[at + 148 : at + 156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
        data = bytes(out)
    return data


def _run_tar(data: bytes) -> None:
    options = BuildOptions(chunk_size=0x1000, threads=1)
    build_layer(io.BytesIO(data), io.BytesIO(), options)
    stream = tar.TarStream(io.BytesIO(data))
    while stream.next() is not None:
        pass


def _make_gzip(rng: random.Random) -> bytes:
    return mutate(rng, seeds.gzip_layer(), [], [0, 3, 10])


def _run_gzip(data: bytes) -> None:
    with open_layer(io.BytesIO(data)) as source:
        while source.read(1 << 16):
            pass


def _make_stargz(rng: random.Random) -> bytes:
    layer = seeds.stargz_layer(zstd=rng.random() < 0.5)
    return mutate(rng, layer, [], [len(layer) - 51, len(layer) - 47, len(layer) - 20])


def _run_stargz(data: bytes) -> None:
    layer_bootstrap(lambda offset, size: data[offset : offset + size], len(data), "a" * 64)


def _make_toc(rng: random.Random) -> bytes:
    entries = [
        {"name": "d/", "type": "dir", "mode": 0o755, "uid": 0, "gid": 0, "xattrs": {"user.a": "dg=="}},
        {"name": "d/f", "type": "reg", "size": 5000, "offset": 100, "chunkSize": 4096, "digest": "sha256:" + "0" * 64,
         "chunkDigest": "sha256:" + "0" * 64},
        {"name": "d/f", "type": "chunk", "offset": 900, "chunkOffset": 4096, "chunkDigest": "sha256:" + "1" * 64},
        {"name": "l", "type": "symlink", "linkName": "d/f"}, {"name": "h", "type": "hardlink", "linkName": "d/f"},
        {"name": "c", "type": "char", "devMajor": 1, "devMinor": 3},
    ]  # fmt: skip
    return mutate_json(rng, json.dumps({"version": 1, "entries": entries}).encode())


def _run_toc(data: bytes) -> None:
    toc = parse_toc(data, 10_000)
    for _, chunks in itertools.islice(toc.files(toc.fitting_chunk_size()), 1000):
        len(chunks)


def _make_slice(rng: random.Random) -> bytes:
    fields = [rng.choice((0, 1, 7, 8, 9, 4096, 70_000, 1 << 24, rng.randrange(5000))) for _ in range(5)]
    context = (fields[0], 0, 0, fields[1], fields[2], fields[3] % 32769, rng.randrange(256), rng.randrange(10))
    head = json.dumps(context).encode()
    return head + b"\n" + mutate(rng, seeds.gzip_layer()[rng.choice((0, 10, 200)) :], [])


def _run_slice(data: bytes) -> None:
    head, _, stored = data.partition(b"\n")
    context = ZranContext(*json.loads(head))
    decode_slice(context, bytes(context.dict_size), stored[: context.in_len])


def _make_contexts(rng: random.Random) -> bytes:
    return mutate(rng, rng.randbytes(400), [], range(0, 400, 8))


def _run_contexts(data: bytes) -> None:
    contexts = Contexts(memoryview(data), 0, len(data), 4, 1 << 20)
    for number in range(4):
        context = contexts[number]
        contexts.dictionary(context)


# ---- texts


class _Canned(Nowhere):
    name = image = "canned"

    def __init__(self, top: tuple[str, bytes], manifest: bytes, config: bytes) -> None:
        self._top, self._manifest, self._config = top, manifest, config

    def manifest(self, digest: str = "") -> Manifest:
        kind = "application/vnd.oci.image.manifest.v1+json"
        return Manifest(digest, kind, self._manifest) if digest else Manifest("x", *self._top)

    def blob(self, digest: str, limit: int) -> bytes:
        return self._config


def _make_manifests(rng: random.Random) -> bytes:
    parts = [seeds.INDEX, seeds.MANIFEST, seeds.CONFIG]
    at = rng.randrange(3)
    parts[at] = mutate_json(rng, parts[at])
    return json.dumps([part.hex() for part in parts]).encode()


def _run_manifests(data: bytes) -> None:
    index, manifest, config = (bytes.fromhex(part) for part in json.loads(data))
    kinds = ("application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json")
    for top in ((kinds[0], index), (kinds[1], manifest)):
        try:
            for image in load_images(_Canned(top, manifest, config), None).images:
                image.is_nydus, image.is_docker  # noqa: B018
        except NydusError:
            continue


def _make_docker(rng: random.Random) -> bytes:
    out = io.BytesIO()
    import tarfile

    with tarfile.open(fileobj=out, mode="w") as archive:
        listing = mutate_json(
            rng, json.dumps([{"Config": "c.json", "RepoTags": ["a:b"], "Layers": ["l.tar"]}]).encode()
        )
        config = mutate_json(rng, seeds.CONFIG) if rng.random() < 0.5 else seeds.CONFIG
        for name, data in (("manifest.json", listing), ("c.json", config), ("l.tar", seeds.layer_tar())):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return mutate(rng, out.getvalue(), [], range(0, 3072, 512)) if rng.random() < 0.3 else out.getvalue()


class _Named:
    image = tag = reference = ""

    def __str__(self) -> str:
        return "archive"


def _run_docker(data: bytes) -> None:
    with _scratch() as folder:
        path = Path(folder, "a.tar")
        path.write_bytes(data)
        endpoint = DockerArchive(TarIndex(path), _Named(), ())  # type: ignore[arg-type]
        load_images(endpoint, None)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _either(*texts: bytes) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        return mutate_json(rng, rng.choice(texts))

    return make


_HEAD = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Type: a/b\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/100\r\n"
    b'WWW-Authenticate: Bearer realm="https://r/t",service="s",scope="repository:a:pull", Basic realm="x"\r\n\r\n'
)


def _run_wire(data: bytes) -> None:
    end = wire.find_head_end(data)
    head = wire.parse_head(data[:end] if end > 0 else data)
    for name, value in head.headers if isinstance(head.headers, list) else head.headers.items():
        for call in (wire.parse_content_range, parse_challenges):
            call(value)
        len(name)
    wire.parse_chunk_size(data[:20])


def _run_urls(data: bytes) -> None:
    text = _text(data)
    for call in (url.parse_url, Reference.parse, lambda text: filters.parse([text])):
        try:
            call(text)
        except DOMAIN:
            continue


def _run_hosts(data: bytes) -> None:
    with _scratch() as folder:
        Path(folder, "r").mkdir()
        Path(folder, "r", "hosts.toml").write_bytes(data)
        hosts.route("r", hosts.ClientOptions(hosts_dir=folder))


def _small(
    call: Callable[[bytes], object], *texts: bytes, name: str, allowed: tuple[type[BaseException], ...] = DOMAIN
) -> Target:
    return Target(name, _either(*texts), call, allowed)


_SETTINGS = b'version = 1\nroot = "/r"\n[daemon]\nnydusd_path = "/x"\n'
_URLS = (b"https://u:p@h:1/a?b#c", b"h:5000/a/b:t@sha256:" + b"0" * 64, b'name==foo,labels."a.b"~=x.*')
_STATE = handover.encode(
    handover.KeptState("/m", [handover.KeptMount("/a", "/b", "{}", ("/c",), 1, 0, 5)], (1, 0), [("/a", 2)], 3, {"": {}})
)
TARGETS = {
    target.name: target
    for target in (
        Target("image", _make_image, _run_image, weight=6),
        Target("blobs", _make_image, _run_blobs, weight=6),
        Target("chunks", _make_image, _run_chunks, weight=3),
        Target("merge", _make_image, _run_merge, weight=3),
        Target("tail", _make_tail, _run_tail, weight=2),
        Target("tar", _make_tar, _run_tar, weight=3),
        Target("gzip", _make_gzip, _run_gzip),
        Target("stargz", _make_stargz, _run_stargz),
        Target("toc", _make_toc, _run_toc, weight=2),
        Target("slice", _make_slice, _run_slice, weight=2),
        Target("contexts", _make_contexts, _run_contexts),
        Target("manifests", _make_manifests, _run_manifests, weight=2),
        Target("docker", _make_docker, _run_docker),
        _small(lambda d: load_config(_text(d), "fuzz"), seeds.DAEMON, seeds.DAEMON_V2, name="config"),
        _small(decode_profile, b'{"version":1,"runs":1,"segments":[["a",1,1.0]],"inodes":[1]}', name="profile",
               allowed=(ValueError,)),
        _small(handover.decode, _STATE, name="state"),
        _small(optimize.parse_list, b'{"version":"v1","files":[{"path":"/a","ranges":[[0,10]]}]}', name="optimize"),
        _small(lambda d: parse_token_reply(d), b'{"token":"x","expires_in":60,"issued_at":"2026-01-01T00:00:00Z"}',
               name="token"),
        _small(lambda d: settings.parse_toml(_text(d), "fuzz"), _SETTINGS, name="settings"),
        Target("wire", lambda rng: mutate(rng, _HEAD, []), _run_wire),
        Target("urls", lambda rng: mutate(rng, rng.choice(_URLS), []), _run_urls),
        Target("hosts", lambda rng: mutate(rng, seeds.HOSTS_TOML, []), _run_hosts),
    )
}  # fmt: skip
