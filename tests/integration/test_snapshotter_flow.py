"""The lazy flow over gRPC with a real nydusd: labels like containerd's, deaths of either program, clean ends.

Runs with our nydusd, and with upstream's where it is here.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import all_durable, can_mount_fuse
from tests.lab.mounted import check_mount
from tests.lab.paths import ref_bin
from tests.lab.process import kill_together, mounts_below, signal_all, wait_until
from tests.lab.served import CASE, IMAGE, snapshotter, some_file
from tests.lab.snapshots import PREFIX, REF, Client, clean, mounted, option, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]


def case() -> Path:
    return image_case(CASE)


OURS, UPSTREAM = [("fuse", "ours"), ("erofs", "ours")], ("fuse", "upstream")
EVERY = [*OURS, ("fuse", "ours-dedicated"), UPSTREAM]


def nydusds(*kinds: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("fs_driver", "kind"), kinds, indirect=["fs_driver"])


@pytest.fixture
def ours(fs_driver: str, kind: str) -> Iterator[Snapshotter]:
    real = ref_bin("nydusd") if kind == "upstream" else None
    if kind == "upstream" and real is None:
        pytest.skip("interop: upstream's nydusd is not here")
    words = ("--daemon-mode=dedicated",) if kind == "ours-dedicated" else ()
    with snapshotter("--log-level", "debug", *words, upstream=real) as running:
        yield running


def check(path: Path) -> None:
    """The whole tree, entry by entry, but for what upstream's nydusd changes at its mount point."""
    lines = check_mount(case(), path)
    upstream_changes = (": mtime is ", "'/': ")
    assert not [line for line in lines if not any(text in line for text in upstream_changes)]


def read(path: Path, timeout: float = 30.0) -> bytes:
    """In a process of its own: a test must not hang with a mount."""
    program = f"print(open({str(path)!r},'rb').read().hex())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=timeout)
    if done.returncode:
        raise OSError(done.stderr.decode())
    return bytes.fromhex(done.stdout.decode())


def log_of(ours: Snapshotter) -> str:
    return (ours.root / "logs" / "nydus-snapshotter.log").read_text()


@nydusds(*EVERY)
def test_the_whole_life_of_an_image(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, case(), ours.work, IMAGE)
        mounts = client.prepare("default/4/c1", meta)
        (mount,) = mounts
        assert (mount.type, mount.source) == ("overlay", "overlay")
        assert [text.partition("=")[0] for text in mount.options] == ["workdir", "upperdir", "lowerdir"]
        lower = Path(option(mount, "lowerdir"))
        check(lower)
        assert client.mounts("default/4/c1") == mounts

        name = some_file()
        with mounted(mounts, ours.work / "c1") as rootfs:
            assert read(rootfs / name) == read(lower / name)
            (rootfs / name).write_bytes(b"written")
            (rootfs / "etc-new").mkdir()
            assert client.usage("default/4/c1")[0] > 0

        # views: of the image as nerdctl makes them, of a data layer, of the layer being built on top
        (view,) = client.view("default/5/v", meta)
        assert not option(view, "upperdir")
        assert option(view, "lowerdir").split(":")[0] == str(lower)
        with mounted([view], ours.work / "v") as rootfs:
            assert read(rootfs / name) == read(lower / name)
            with pytest.raises(OSError):
                (rootfs / "x").mkdir()
        assert client.mounts("default/5/v") == [view]
        data = client.stat(meta).parent
        assert client.view("default/5/data", data)

        # an ordinary layer over the Nydus image, and a container on top of that: nothing of either is lost
        client.commit("default/6/top", "default/4/c1")
        stacked = client.prepare("default/7/c2", "default/6/top")
        with mounted(stacked, ours.work / "c2") as rootfs:
            assert read(rootfs / name) == b"written"
            assert (rootfs / "etc-new").is_dir()
        assert client.mounts("default/7/c2") == stacked

        for key in ("default/7/c2", "default/6/top", "default/5/v", "default/5/data", meta):
            client.remove(key)
        while left := client.list():
            parents = {info.parent for info in left}
            for info in left:
                if info.name not in parents:
                    client.remove(info.name)
        assert str(lower.parent) in mounts_below(ours.root) or str(lower) in mounts_below(ours.root)
        cache = ours.root / "cache"
        wait_until(lambda: all_durable(cache) or any(cache.glob("*.blob.data")), 60, "the cache to be on the disk")
        cached = [path for path in (ours.root / "cache").iterdir() if len(path.name) >= 64]
        assert cached
        for path in cached:  # what is young is kept
            os.utime(path, (1_000_000_000, 1_000_000_000))
        clean(client, ours.root)
        wait_until(lambda: not any(path.exists() for path in cached), 60, "the image's blobs to leave the cache")
        assert os.listdir(ours.root / "snapshots") == []
        served = [path for path in mounts_below(ours.root) if path != str(ours.root / "mnt")]
        assert served == []
        assert not os.path.exists(lower) or not os.listdir(lower)


@nydusds(*EVERY)
def test_sigkill_of_the_snapshotter_changes_nothing(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, case(), ours.work, IMAGE)
        mounts = client.prepare("default/4/c1", meta)
        lower = Path(option(mounts[0], "lowerdir"))
        name = some_file()
        with mounted(mounts, ours.work / "c1") as rootfs:
            before = ours.serving()
            assert len(ours.services()) == 1
            found = "found 1 nydusd running, 0 were not"  # behind the socket: before the next stop, or never
            for times, stop in enumerate((ours.kill, ours.stop), 1):
                stop()
                assert read(rootfs / name)
                ours.start()
                wait_until(lambda times=times: log_of(ours).count(found) == times, 60, "the log")  # type: ignore[misc]
            with Client(ours.socket) as again:
                assert again.mounts("default/4/c1") == mounts
                new = again.prepare("default/5/c2", meta)
                with mounted(new, ours.work / "c2") as other:
                    assert read(other / name) == read(rootfs / name)
                assert ours.serving() == before
                assert ", 1 were not" not in log_of(ours)
                again.remove("default/5/c2")
                again.cleanup()
                assert read(rootfs / name)
                check(lower)


@nydusds(*EVERY)
def test_a_dead_nydusd_comes_back_by_itself(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        first = pull(client, case(), ours.work, IMAGE)
        second = pull(client, case(), ours.work, IMAGE, tag="b")
        roots = [Path(option(client.prepare(f"default/9/{n}", n)[0], "lowerdir")) for n in (first, second)]
        for root in roots:
            check(root)
        for _ in range(2):
            old = ours.daemons()
            kill_together(old)
            wait_until(lambda: served(roots), 60, "both images after the death of nydusd")
            assert not set(ours.daemons()) & set(old)
        for root in roots:
            check(root)
        # both dead: the next start brings the mounts back before anybody asks
        old = ours.daemons()
        ours.kill()
        kill_together(old)
        ours.start()
        wait_until(lambda: served(roots), 60, "both images after a start")
        with Client(ours.socket) as again:
            assert Path(option(again.mounts(f"default/9/{first}")[0], "lowerdir")) == roots[0]
        for root in roots:
            check(root)


@nydusds(*OURS, UPSTREAM)
def test_a_container_that_is_prepared_while_nydusd_dies_gets_its_mount(ours: Snapshotter) -> None:
    with Client(ours.socket) as client, ThreadPoolExecutor(1) as pool:
        first = pull(client, case(), ours.work, IMAGE)
        second = pull(client, case(), ours.work, IMAGE, tag="b")
        client.prepare("first", first)
        old = ours.daemons()
        signal_all(old, signal.SIGSTOP)  # it has the request and does not answer
        asked = pool.submit(client.prepare, "second", second)
        time.sleep(1)
        kill_together(old)
        root = Path(option(asked.result(60)[0], "lowerdir"))
        assert read(root / some_file())
        assert not set(ours.daemons()) & set(old)


@nydusds(*OURS)
def test_containers_that_are_prepared_while_a_worker_dies_get_their_mounts(ours: Snapshotter) -> None:
    """The keeper has another one at once, which knows nothing of a request that the last one had begun."""
    with Client(ours.socket) as client, ThreadPoolExecutor(1) as pool:
        images = [pull(client, case(), ours.work, IMAGE, tag=f"t{number}") for number in range(12)]
        client.prepare("first", images.pop())
        for number, image in enumerate(images):
            before = ours.serving()
            asked = pool.submit(client.prepare, f"c{number}", image)
            time.sleep(0.003 * number)
            os.kill(before[0][1], signal.SIGKILL)
            root = Path(option(asked.result(60)[0], "lowerdir"))
            assert read(root / some_file())
            wait_until(lambda before=before: ours.serving()[0][1] != before[0][1], 60, "the next worker")  # type: ignore[misc]
            assert ours.serving()[0][0] == before[0][0]


def served(roots: list[Path]) -> bool:
    """Files read before are in the page cache, also of a dead mount: statfs always asks the daemon. An EROFS mount has
    none to ask; what it lies on has."""
    for root in (*roots, *{root.parent for root in roots}):
        if subprocess.run(["stat", "-f", root], capture_output=True, timeout=20).returncode:
            return False
    try:
        return all(read(root / some_file()) for root in roots)
    except (OSError, subprocess.TimeoutExpired):
        return False


@nydusds(*OURS)
def test_errors_are_clear_and_roll_back(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        # a client that sends no annotations
        meta = pull(client, case(), ours.work, "")
        with pytest.raises(grpc.RpcError, match="disable_snapshot_annotations"):
            client.prepare("c", meta)
        with pytest.raises(grpc.RpcError, match="not found"):
            client.stat("c")
        # a damaged bootstrap
        meta = pull(client, case(), ours.work, IMAGE, tag="c")
        for boot in (ours.root / "snapshots").glob("*/fs/image/image.boot"):
            boot.write_bytes(b"\0" * 4096)
        with pytest.raises(grpc.RpcError, match="no RAFS bootstrap"):
            client.prepare("c", meta)
        for boot in (ours.root / "snapshots").glob("*/fs/image/image.boot"):
            boot.unlink()
        with pytest.raises(grpc.RpcError, match="holds no image"):
            client.prepare("c", meta)
        # a link instead of a bootstrap would have nydusd read files of the host
        for root in (ours.root / "snapshots").glob("*/fs/image"):
            (root / "image.boot").symlink_to(case() / "image.boot")
        with pytest.raises(grpc.RpcError, match="not a regular file"):
            client.prepare("c", meta)
        # plain images do not care, and another parent under a taken chain id gets a name of its own
        client.prepare("p", "")
        client.commit("plain", "p")
        taken = next(info for info in client.list() if info.parent == "" and REF in info.labels)
        labels = {REF: taken.labels[REF], PREFIX + "nydus-blob": "1"}
        for key in ("q1", "q2"):
            with pytest.raises(grpc.RpcError, match="target snapshot"):
                client.prepare(key, "plain", labels)
        (found,) = client.list(f'labels."{REF}"=={labels[REF]},parent=="plain"')
        assert found.name != taken.name
        with pytest.raises(grpc.RpcError, match="missing parent"):
            client.prepare("r", "nobody")
        with pytest.raises(grpc.RpcError) as caught:
            client.list("==")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@nydusds(*EVERY)
def test_many_containers_at_once_share_one_mount(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, case(), ours.work, IMAGE)
        with ThreadPoolExecutor(12) as pool:
            mounts = list(pool.map(lambda number: client.prepare(f"default/4/c{number}", meta), range(12)))
        lower = {option(mount, "lowerdir") for (mount,) in mounts}
        assert len(lower) == 1
        assert len(ours.services()) == 1
        assert len(client.list("kind==active")) == 12
        assert log_of(ours).count(" mounted at ") == 1
        check(Path(next(iter(lower))))
        kill_together(ours.daemons())
        with ThreadPoolExecutor(12) as pool:
            mounts = list(pool.map(lambda number: client.prepare(f"default/4/d{number}", meta), range(12)))
        assert {option(mount, "lowerdir") for (mount,) in mounts} == lower
        # whichever of the calls started it: what keeps a crowd of them on one core is not for nydusd
        assert all(os.sched_getaffinity(pid) == os.sched_getaffinity(0) for pid in ours.daemons())
        check(Path(lower.pop()))


@nydusds(*OURS, UPSTREAM)
def test_no_nydusd_is_lost_when_the_start_is_interrupted(ours: Snapshotter) -> None:
    for _ in range(5):
        ours.kill()
        ours.end_daemons()
        ours.start()
        time.sleep(random.uniform(0, 0.4))
    ours.kill()
    ours.start()
    with Client(ours.socket) as client:
        meta = pull(client, case(), ours.work, IMAGE)
        (mount,) = client.prepare("default/4/c", meta)
        check(Path(option(mount, "lowerdir")))
    assert len(ours.services()) == 1
