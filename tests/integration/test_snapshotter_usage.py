"""What snapshots say they use is what the disk holds: the sum is what CRI gives to kubelet, which evicts by it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bootstrap.reader import open_bootstrap
from nydusfs.containerd.chain import chain_ids
from tests.lab.cases import case as image_case
from tests.lab.daemon import all_durable, can_mount_fuse
from tests.lab.drivers import both
from tests.lab.process import remove_tree, unmount_below, wait_until, work_dir
from tests.lab.snapshots import PREFIX, REF, Client, clean, mounted, option, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    both,
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

IMAGE = "127.0.0.1:1/lab/merged:v6"


@contextlib.contextmanager
def running(case: str) -> Iterator[tuple[Snapshotter, Client]]:
    backend = {"type": "localfs", "config": {"dir": str(image_case(case))}}
    config = {"device": {"backend": backend, "cache": {"type": "blobcache"}}, "mode": "direct"}
    work = work_dir()
    try:
        with Snapshotter(work / "s", config) as ours, Client(ours.socket) as client:
            yield ours, client
    finally:
        unmount_below(work)
        remove_tree(work)


def blocks(path: Path) -> int:
    # it fails, and counts the rest, where the cache gives a file its final name meanwhile
    done = subprocess.run(["du", "-s", "-B512", path], capture_output=True, check=False, timeout=60)
    return int((done.stdout.split() or [b"0"])[0])  # or is gone itself


def held(ours: Snapshotter) -> tuple[int, int]:
    """Bytes of the cached blobs, and of the layers' directories."""
    cache = [path for path in (ours.root / "cache").iterdir() if len(path.name) == 64]
    layers = (ours.root / "snapshots").glob("*/fs")
    return 512 * sum(map(blocks, cache)), 512 * sum(map(blocks, layers))


def written(ours: Snapshotter) -> None:
    """Readers go on before what they have is in the cache, and it gets other names when the disk has it."""
    wait_until(lambda: held(ours)[0] > 100_000 and all_durable(ours.root / "cache"), 60, "the cache to be on the disk")


def told(client: Client) -> dict[str, int]:
    return {info.name: client.usage(info.name)[0] for info in client.list()}


def agree(ours: Snapshotter, client: Client) -> bool:
    """But for skipped layers' own empty directories, which are not worth a look at each."""
    cache, layers = held(ours)
    skipped = sum(REF in info.labels and PREFIX + "nydus-blob" in info.labels for info in client.list())
    return sum(told(client).values()) == cache + layers - 4096 * skipped


def read_all(lower: Path) -> None:
    subprocess.run(["tar", "-cf", "/dev/null", "--ignore-failed-read", "."], cwd=lower, check=False, timeout=120)
    subprocess.run(f"find {lower} -type f -exec cat {{}} + >/dev/null", shell=True, check=True, timeout=120)


def original_layers(client: Client, case: Path, work: Path) -> str:
    """A zran image: small data layers that name the original ones. The committed name of its meta layer."""
    with open_bootstrap(case / "image.boot") as image:
        pairs = [(blob.meta_digest.hex(), blob.id) for blob in image.blobs]
    parent, digests = "", [f"sha256:{digest}" for digest, _ in pairs]
    for ref, (digest, original) in zip(chain_ids(digests), pairs, strict=True):
        labels: dict[str, str] = {
            REF: ref,
            PREFIX + "cri.image-ref": IMAGE,
            PREFIX + "cri.layer-digest": f"sha256:{digest}",
            PREFIX + "nydus-blob": "true",
            PREFIX + "nydus-ref": f"sha256:{original}",
        }
        with pytest.raises(grpc.RpcError, match="target snapshot"):
            client.prepare(f"default/1/extract {digest}", parent, labels)
        parent = ref
    meta = {REF: "sha256:meta", PREFIX + "cri.image-ref": IMAGE, PREFIX + "nydus-bootstrap": "true"}
    with mounted(client.prepare("default/2/meta", parent, meta), work / "unpack") as target:
        (target / "image").mkdir()
        shutil.copyfile(case / "image.boot", target / "image" / "image.boot")
    client.commit("default/3/meta", "default/2/meta", meta)
    return "default/3/meta"


@pytest.mark.parametrize("case", ["v6-merged3", "v6-zran-merged3"])
def test_every_cached_byte_counts_once(case: str) -> None:
    with running(case) as (ours, client):
        bring: Any = original_layers if "zran" in case else pull
        meta = bring(client, image_case(case), ours.work, *(() if "zran" in case else (IMAGE,)))
        (mount,) = client.prepare("default/4/c", meta)
        read_all(Path(option(mount, "lowerdir")))
        with mounted([mount], ours.work / "c") as rootfs:
            (rootfs / "written").write_bytes(os.urandom(100_000))
        written(ours)
        wait_until(lambda: agree(ours, client), 60, "figures that agree")
        # layers with data account for it, not the one with the metadata
        sizes = told(client)
        assert sizes[meta] < 100_000 < max(sizes.values())


def test_blobs_of_two_images_count_once() -> None:
    with running("v6-merged3") as (ours, client):
        metas = [pull(client, image_case("v6-merged3"), ours.work, IMAGE, tag=tag) for tag in ("a", "b")]
        read_all(Path(option(client.prepare("default/4/c", metas[1])[0], "lowerdir")))
        written(ours)
        wait_until(lambda: agree(ours, client), 60, "figures that agree")
        cached, _ = held(ours)
        parents = {info.name: info.parent for info in client.list()}

        def chain(name: str) -> int:
            total = 0
            while name:
                total += client.usage(name)[0]
                name = parents[name]
            return total

        assert chain(metas[0]) > cached > 100_000 > chain(metas[1])
        # when the first goes, the other has them
        name = metas[0]
        while name:
            client.remove(name)
            name = parents[name]
        clean(client, ours.root)
        wait_until(lambda: agree(ours, client), 60, "figures that agree")
        assert chain(metas[1]) > cached
