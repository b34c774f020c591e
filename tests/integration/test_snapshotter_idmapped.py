"""Containers in user namespaces on images that have unpacked layers on top of a lazy one: a mount for each of those."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from snapshotter import idmapped
from snapshotter.database import NAME, Database
from snapshotter.doctor import storage
from snapshotter.errors import InvalidArgument
from snapshotter.idmapped import IdMappedLayers
from snapshotter.labels import IdMapping
from snapshotter.node import Choices, Node
from snapshotter.store import Kind, Store
from tests.integration.test_snapshotter_userns import ENVIRONMENT, IN_NAMESPACE, labels
from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.process import kill_together, mounts_below, remove_tree, run, unmount_below, wait_until, work_dir
from tests.lab.served import CASE, IMAGE, snapshotter, some_file, template
from tests.lab.snapshots import Client, mounted, option, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

HOSTS = (100_000, 300_000)
NET_RAW = 1 << 13
OF_THE_IMAGE = some_file()


def acl(user: int) -> bytes:
    entries = [(1, 7, 0xFFFFFFFF), (2, 5, user), (4, 5, 0xFFFFFFFF), (16, 5, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def with_layers(client: Client, ours: Snapshotter) -> tuple[str, list[int]]:
    """An image with two layers on top of the lazy one; its name and the numbers of those, nearest first."""
    meta = pull(client, image_case(CASE), ours.work, IMAGE)
    with mounted(client.prepare("default/4/lower", meta), ours.work / "build") as rootfs:
        (rootfs / "of-root").write_text("lower")
        (rootfs / "covered").write_text("lower")
        (rootfs / OF_THE_IMAGE).unlink()
    client.commit("default/5/lower", "default/4/lower")
    with mounted(client.prepare("default/4/upper", "default/5/lower"), ours.work / "build") as rootfs:
        (rootfs / "covered").write_text("upper")
        (rootfs / "of-1000").write_text("x")
        os.chown(rootfs / "of-1000", 1000, 1001)
        os.setxattr(rootfs / "of-1000", "system.posix_acl_access", acl(33))
        tool = rootfs / "cat"
        tool.write_bytes(Path("/bin/cat").read_bytes())
        tool.chmod(0o755)
        os.setxattr(tool, "security.capability", struct.pack("<IIIII", 0x02000001, NET_RAW, 0, 0, 0))
    client.commit("default/5/upper", "default/4/upper")
    number = {int(path.parent.name): path for path in (ours.root / "snapshots").glob("*/fs")}
    return "default/5/upper", sorted(number)[-1:-3:-1]


def binds(ours: Snapshotter) -> list[str]:
    """Names of the layers that are mounted, twice if it is twice; directories where nothing is."""
    mounts = [os.path.basename(path) for path in mounts_below(ours.root / "idmapped")]
    return sorted([*mounts, *(f"no {name}" for name in os.listdir(ours.root / "idmapped") if name not in mounts)])


def names(layers: list[int], *hosts: int) -> list[str]:
    return sorted(f"{layer}-userns-{host}" for layer in layers for host in hosts)


def seen_from_outside(rootfs: Path, host: int) -> None:
    assert [(rootfs / name).read_text() for name in ("covered", "of-root")] == ["upper", "lower"]
    owners = {name: os.stat(rootfs / name)[4:6] for name in (".", "of-root", "of-1000")}
    assert owners == {".": (host, host), "of-root": (host, host), "of-1000": (host + 1000, host + 1001)}
    assert not (rootfs / OF_THE_IMAGE).exists()
    assert os.getxattr(rootfs / "of-1000", "system.posix_acl_access") == acl(host + 33)
    capability = struct.pack("<IIIIII", 0x03000001, NET_RAW, 0, 0, 0, host)
    assert os.getxattr(rootfs / "cat", "security.capability") == capability


def inside(rootfs: Path, host: int, *command: str) -> str:
    return run([*IN_NAMESPACE, str(host), *command], timeout=30, cwd=rootfs, env=ENVIRONMENT).stdout


@pytest.mark.parametrize("mode", ["shared", "dedicated"])
def test_the_life_of_layers_in_user_namespaces(mode: str) -> None:
    with snapshotter("--daemon-mode", mode) as ours:
        with Client(ours.socket) as client:
            top, layers = with_layers(client, ours)
            mounts = {host: client.prepare(f"default/6/u{host}", top, labels(host)) for host in HOSTS}
            for host, (mount,) in mounts.items():
                lower = option(mount, "lowerdir").split(":")
                assert lower[:-1] == [f"{ours.root}/idmapped/{layer}-userns-{host}" for layer in layers]
                assert Path(lower[-1]).name.endswith(f"-{host}")
                assert not option(mount, "uidmap") and not option(mount, "gidmap")
                assert [os.stat(option(mount, name)).st_uid for name in ("upperdir", "workdir")] == [host, host]
                with mounted([mount], ours.work / "u") as rootfs:
                    seen_from_outside(rootfs, host)
            assert binds(ours) == names(layers, *HOSTS)
            plain = client.prepare("default/6/plain", top)
            with mounted(plain, ours.work / "u") as rootfs:
                assert os.stat(rootfs / "of-1000").st_uid == 1000
            (view,) = client.view("default/6/view", top, labels(HOSTS[0]))
            assert option(view, "lowerdir").startswith(option(mounts[HOSTS[0]][0], "lowerdir"))
            client.remove("default/6/view")

            # in the namespace: what the image says; root may change everything, and the layers stay as they are
            with mounted(mounts[HOSTS[0]], ours.work / "u") as rootfs:
                script = "stat -c %u:%g . of-root of-1000 && echo more >> of-1000 && chown 5:6 of-1000 && rm of-root"
                assert inside(rootfs, HOSTS[0], "sh", "-c", script).split() == ["0:0", "0:0", "1000:1001"]
                command = ["setpriv", "--reuid", "5", "--clear-groups", "--", "./cat", "/proc/self/status"]
                said = dict(line.split(":\t") for line in inside(rootfs, HOSTS[0], *command).splitlines())
                assert (int(said["CapEff"], 16), said["Uid"].split()[1]) == (NET_RAW, "5")
                assert os.stat(rootfs / "of-1000")[4:6] == (HOSTS[0] + 5, HOSTS[0] + 6)
            below = [ours.root / "snapshots" / str(layer) / "fs" for layer in layers]
            assert (below[0] / "of-1000").read_text() == "x" and (below[1] / "of-root").exists()
            assert os.stat(below[0] / "of-1000").st_uid == 1000

            # death of the snapshotter, twice: what is mounted is used again
            ours.kill()
            ours.start()
        with Client(ours.socket) as client:
            assert [client.mounts(f"default/6/u{host}") for host in HOSTS] == list(mounts.values())
            assert binds(ours) == names(layers, *HOSTS)
            client.remove(f"default/6/u{HOSTS[0]}")
            client.prepare(f"default/6/v{HOSTS[0]}", top, labels(HOSTS[0]))
            ours.kill()
            # a reboot; a directory of something else in one's place
            kill_together(ours.daemons())
            unmount_below(ours.root)  # the kernel's mount of the image lies on FUSE's, or is not there yet
            odd = ours.root / "idmapped" / names(layers, HOSTS[1])[0]
            run(["mount", "--bind", ours.work, odd])
            ours.start()
        with Client(ours.socket) as client:
            assert client.mounts(f"default/6/u{HOSTS[1]}") == mounts[HOSTS[1]]
            with mounted(mounts[HOSTS[1]], ours.work / "u") as rootfs:
                seen_from_outside(rootfs, HOSTS[1])
            (again,) = client.mounts(f"default/6/v{HOSTS[0]}")
            assert option(again, "lowerdir") == option(mounts[HOSTS[0]][0], "lowerdir")
            assert binds(ours) == names(layers, *HOSTS)
            # and of the database
            ours.stop()
            for name in ours.root.glob("metadata.sqlite*"):
                name.unlink()
            run([*ours.argv(), "--repair"], timeout=60)
            ours.start()
        with Client(ours.socket) as client:
            client.cleanup()
            assert client.mounts(f"default/6/u{HOSTS[1]}") == mounts[HOSTS[1]]
            assert binds(ours) == names(layers, *HOSTS)

            # the last container with a mapping takes its mounts with it; one whose overlay is mounted reads on
            with mounted(mounts[HOSTS[1]], ours.work / "u") as rootfs:
                client.remove(f"default/6/u{HOSTS[1]}")
                client.cleanup()
                wait_until(lambda: binds(ours) == names(layers, HOSTS[0]), 60, "the unmount")
                assert (rootfs / "of-1000").read_text() == "x"
                assert os.stat(rootfs / "of-1000").st_uid == HOSTS[1] + 1000
            client.remove(f"default/6/v{HOSTS[0]}")
            ours.kill()  # before a clean-up
            ours.start()
        with Client(ours.socket) as client:
            wait_until(lambda: binds(ours) == [], 60, "the unmount")
            assert all((path / "covered").exists() for path in below)
            for key in ("default/6/plain", top, "default/5/lower"):
                client.remove(key)
            client.cleanup()
            wait_until(lambda: not any(path.exists() for path in below), 60, "the removal")


def test_a_clean_up_that_doctor_waits_for_and_the_one_at_the_end() -> None:
    with snapshotter("--cleanup-on-close", "--sync-remove") as ours, Client(ours.socket) as client:
        top, layers = with_layers(client, ours)

        def told() -> list[str]:
            findings = storage.mounts(Node(Choices(root=str(ours.root))))
            return [one.check for one in findings if one.check.startswith("leftover")]

        client.prepare("default/6/a", top, labels(HOSTS[0]))
        client.prepare("default/6/b", top, labels(HOSTS[1]))
        assert told() == ["leftover.mount"]
        stale = ours.root / "idmapped" / "999-userns-5"
        stale.mkdir()
        run(["mount", "--bind", ours.work, stale])
        assert told() == ["leftover.idmapped", "leftover.mount"]
        client.remove("default/6/b")
        wait_until(lambda: binds(ours) == names(layers, HOSTS[0]), 60, "the unmount")
        assert told() == ["leftover.mount"]
        ours.stop()
        assert binds(ours) == []


def test_a_file_system_without_idmapped_mounts() -> None:
    """ramfs has none; overlayfs takes it for all else."""
    work = work_dir()
    ours = Snapshotter(work / "s", template())
    try:
        ours.root.mkdir(parents=True)
        run(["mount", "-t", "ramfs", "ramfs", ours.root])
        with ours, Client(ours.socket) as client:
            meta = pull(client, image_case(CASE), ours.work, IMAGE)
            client.prepare("default/4/layer", meta)
            client.commit("default/5/top", "default/4/layer")
            with pytest.raises(grpc.RpcError, match=r"mapped.*Linux 5\.12 and a file system") as refused:
                client.prepare("default/4/b", "default/5/top", labels(1000))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert [info.name for info in client.list("kind==active")] == []
            assert binds(ours) == []
            client.prepare("default/4/c", meta, labels(1000))  # the image alone can
    finally:
        unmount_below(work)
        remove_tree(work)


@contextmanager
def one_layer() -> Iterator[tuple[Path, Store, int]]:
    work = work_dir()
    database = Database(work / NAME)
    try:
        store = Store(work, database)
        yield work, store, store.create(Kind.ACTIVE, "a", "", {}).id
    finally:
        database.close()
        unmount_below(work)
        remove_tree(work)


def test_a_machine_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lacks is said, and nothing is left of the trial."""
    mapping = IdMapping(0, 1000, 10)
    with one_layer() as (work, store, layer):
        layers = IdMappedLayers(work, store)
        with monkeypatch.context() as patch:
            patch.setattr(idmapped, "overlay_works", lambda *_: False)
            with pytest.raises(InvalidArgument, match=r"overlayfs refuses idmapped layers: it needs Linux 5\.19"):
                layers.ensure([layer], mapping)
        with monkeypatch.context() as patch:
            patch.setattr(idmapped, "_CHILD", f"import os; os.write(1, bytes([{errno.ENOSPC}]))")
            with pytest.raises(InvalidArgument, match=r"0:1000:10: No space.*user\.max_user_namespaces"):
                layers.ensure([layer], mapping)
            patch.setattr(idmapped, "_CHILD", "raise SystemExit(1)")
            with pytest.raises(InvalidArgument, match="CONFIG_USER_NS"):
                layers.ensure([layer], mapping)
        assert mounts_below(work) == [] and os.listdir(work / "idmapped") == []
        (path,) = layers.ensure([layer], mapping)
        assert os.stat(path).st_uid == 1000
        # outside of the range nobody owns it
        (odd,) = layers.ensure([layer], IdMapping(5, 1000, 10))
        assert os.stat(odd).st_uid == int(Path("/proc/sys/kernel/overflowuid").read_text())
        with pytest.raises(OSError, match="Read-only"):
            Path(path, "new").touch()
        layers.close()
        assert mounts_below(work) == []


def test_a_container_that_comes_while_the_last_one_goes() -> None:
    with one_layer() as (work, store, layer):
        layers, mapping = IdMappedLayers(work, store), IdMapping(0, 1000, 10)
        (path,) = layers.ensure([layer], mapping)
        asked: list[str] = []

        def used() -> set[str]:
            """When it is asked first there is no container, then one that was answered."""
            needed = set(asked)
            if not asked:
                asked.extend(os.path.basename(one) for one in layers.ensure([layer], mapping))
            return needed

        layers.release(used)
        assert mounts_below(work) == [path]
        layers.release(lambda: set())
        assert mounts_below(work) == []


def test_nobody_is_left_of_a_user_namespace() -> None:
    script = (
        "from snapshotter.idmapped import user_namespace; from snapshotter.labels import IdMapping\n"
        "import os\n"
        "with user_namespace(IdMapping(0, 1000, 10)) as namespace:\n"
        "    try: print(os.waitpid(-1, os.WNOHANG))\n"
        "    except ChildProcessError: print('none', os.readlink(f'/proc/self/fd/{namespace}')[:6])\n"
        "print(len(os.listdir('/proc/self/fd')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, env=ENVIRONMENT)
    assert done.stdout.split() == ["none", "user:[", "4"], done.stderr
