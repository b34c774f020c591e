"""Troubles that machine, registry and image can make, on the real programs: one line, an exit code, no residue."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bootstrap.options import BuildOptions
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, reader
from tests.lab.drivers import both
from tests.lab.faulty import dead_port
from tests.lab.images import ImageLayout, entry, fetch_manifest
from tests.lab.process import (
    Child,
    can_connect,
    mounts_below,
    processes_mentioning,
    remove_tree,
    unmount_below,
    work_dir,
)
from tests.lab.registry import Registry, find_program
from tests.lab.snapshots import Client
from tests.lab.stack import Snapshotter, daemon_config, program
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=f"root: {can_mount_fuse()}"),
]

NOBODY = ("unshare", "--user")  # another real user could not read an environment below /root
BARE_DEV = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && "
NO_FUSE = ("unshare", "-m", "sh", "-c", BARE_DEV + 'exec "$@"', "sh")
FILES = {"a": noise(300_000, 1), "b": b"small", "c": noise(70_000, 2)}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that every program takes for its place of temporary files, too; empty of mounts at the end."""
    path = work_dir()
    temporary = path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("DOCKER_CONFIG", str(path / "docker"))
    try:
        yield path
        assert mounts_below(path) == []
        assert processes_mentioning(str(path)) == []
        assert list(temporary.iterdir()) == []
    finally:
        unmount_below(path)
        remove_tree(path)


def run(name: str, *arguments: str | Path, pre: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    words = [*pre, str(program(name)), *map(str, arguments)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def fails(done: subprocess.CompletedProcess[str], *said: str, code: int = 1) -> None:
    """Exit code, and one line on stderr (progress aside) that says all this."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert (done.returncode, len(lines)) == (code, 1), done
    for text in said:
        assert text in lines[0], lines[0]


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(path)], check=True, timeout=20)
    try:
        with contextlib.suppress(OSError), (path / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield path
    finally:
        unmount_below(path)


def image_in(folder: Path, version: int = 6) -> TinyImage:
    folder.mkdir(exist_ok=True)
    image = tiny_image(folder, FILES, BuildOptions(fs_version=version))
    (folder / image.blob_id).write_bytes(image.blob)
    return image


# -- nydusd


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"device": ', "is not valid JSON"),
        (b"a = = b", "is neither JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b'{"device": {"backend": {"type": "localfs", "config": {"dir": 5}}}}', "device.backend.config.dir: expected"),
    ],
)
def test_nydusd_refuses_a_configuration_by_name(work: Path, content: bytes, said: str) -> None:
    image = image_in(work / "image")
    (work / "m").mkdir()
    config = work / "c.json"
    config.write_bytes(content)
    fails(run("nydusd", "-M", work / "m", "-B", image.bootstrap, "-C", config), str(config), said)


def test_nydusd_refuses_a_missing_blob_directory_and_makes_none(work: Path) -> None:
    image = image_in(work / "image")
    (work / "m").mkdir()
    fails(run("nydusd", "-M", work / "m", "-B", image.bootstrap, "-D", work / "none"), "none is not a directory")
    assert not (work / "none").exists()


@pytest.mark.parametrize("version", [5, 6])
@both
def test_nydusd_and_damaged_bootstraps(work: Path, version: int) -> None:
    """Cut ones are refused by name; a flipped bit is refused or serves an error, never a hang nor a dead daemon."""
    image = image_in(work / "image", version)
    data = image.bootstrap.read_bytes()
    config = localfs_config(image.bootstrap.parent)
    bad = work / "bad.boot"
    walk = (
        "import os, sys\n"
        "for root, _, names in os.walk(sys.argv[1]):\n"
        "    for name in names:\n"
        "        try: open(os.path.join(root, name), 'rb').read(1 << 22)\n"
        "        except (OSError, MemoryError): pass\n"
    )
    with Nydusd() as daemon:
        for size in (0, 100, 1024, 4000, len(data) // 2, len(data) - 1):
            bad.write_bytes(data[:size])
            answer = daemon.mount("/bad", bad, config)
            assert answer.status == 500 and str(bad) in answer.message, (size, answer)
            fails(run("nydus-image", "check", bad), str(bad))
        used = [at for at in range(0, len(data), 61) if data[at]][:60]
        for at in used:
            bad.write_bytes(data[:at] + struct.pack("B", data[at] ^ 0x10) + data[at + 1 :])
            answer = daemon.mount("/bad", bad, config)
            if answer.status != 204:
                assert answer.status == 500 and str(bad) in answer.message, (at, answer)
                continue
            done = reader(walk, daemon.mnt / "bad", timeout=30)
            assert done.returncode == 0, (at, done.stderr)
            assert daemon.umount("/bad").status == 204
        assert daemon.mount("/good", image.bootstrap, config).status == 204
        assert {name: (daemon.mnt / "good" / name).read_bytes() for name in FILES} == FILES
        assert "internal error" not in daemon.log_text()
        assert "Traceback" not in daemon.log_text()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_nydusd_and_damaged_blobs(work: Path, damage: str, fs_driver: str) -> None:
    image = image_in(work / "image")
    stored = image.bootstrap.parent / image.blob_id
    if damage == "cut":
        stored.write_bytes(image.blob[:1000])
    elif damage == "flipped":
        stored.write_bytes(image.blob[:1000] + struct.pack("B", image.blob[1000] ^ 1) + image.blob[1001:])
    else:
        stored.unlink()
    check = run("nydus-image", "check", "-D", stored.parent, image.bootstrap)
    fails(check, str(image.bootstrap), image.blob_id)
    with Nydusd() as daemon:
        assert daemon.mount("/x", image.bootstrap, localfs_config(stored.parent)).status == 204
        with pytest.raises(OSError, match="Input/output error"):
            (daemon.mnt / "x" / "a").read_bytes()
        if damage == "flipped":
            assert (daemon.mnt / "x" / "c").read_bytes() == FILES["c"]
        (line, *_) = [line for line in daemon.log_text().splitlines() if " ERROR " in line]
        # a segment that nothing at all came of is told of as one
        chunk = "chunk " if damage == "flipped" or (damage == "cut" and fs_driver == "fuse") else ""
        for text in ("image /x", "file /a", image.blob_id, chunk, str(stored)):
            assert text in line
        stored.write_bytes(image.blob)
        assert (daemon.mnt / "x" / "a").read_bytes() == FILES["a"]


def test_nydusd_mounts_and_reads_when_the_cache_disk_is_full(work: Path) -> None:
    image = image_in(work / "image")
    with full_disk(work / "full") as disk, Nydusd() as daemon:
        config = localfs_config(image.bootstrap.parent, work_dir=disk, fs_prefetcher={})
        assert daemon.mount("/x", image.bootstrap, config).status == 204
        assert {name: (daemon.mnt / "x" / name).read_bytes() for name in FILES} == FILES
        log = daemon.log_text()
        assert "No space left on device: going on with a temporary one" in log
        assert "unknown key fs_prefetcher is ignored; did you mean 'fs_prefetch'?" in log
        assert os.listdir(disk) == ["filler"] or not list(disk.rglob("*/.maps/*"))


# -- containerd-nydus-grpc


@pytest.mark.parametrize(
    ("flag", "content", "said"),
    [
        ("--config-path", '{"device": ', "is not valid JSON"),
        ("--config", "a = = b", "neither a JSON object nor valid TOML"),
        ("--config", "[daemon]\nthreads_number = '4'", "daemon.threads_number: expected a number"),
        ("--config-path", '{"device": {"backend": {"type": "registry", "config": {"timeout": "5"}}}}', "timeout"),
    ],
)
def test_snapshotter_refuses_a_configuration_by_name(work: Path, flag: str, content: str, said: str) -> None:
    config = work / "c"
    config.write_text(content)
    place = ("--root", work / "r", "--address", work / "g.sock")
    fails(run("containerd-nydus-grpc", flag, config, *place), str(config), said, code=2)
    assert not (work / "g.sock").exists()


def test_snapshotter_goes_on_with_unknown_keys_and_a_full_log_disk(work: Path) -> None:
    config = work / "c.json"
    config.write_text(json.dumps({**daemon_config(), "fs_prefech": {}}))
    with full_disk(work / "full") as disk:
        argv: list[str | Path] = [program("containerd-nydus-grpc"), "--config-path", config, "--root", work / "r"]
        argv += ["--address", work / "g.sock", "--log-dir", disk / "logs", "--daemon-mode", "dedicated"]
        child = Child("snapshotter", argv, work / "out")
        try:
            child.wait_ready(lambda: can_connect(work / "g.sock"))
            with Client(work / "g.sock") as client:
                client.prepare("a")
        finally:
            assert child.stop(60) == 0
    said = (work / "out").read_text()
    assert "unknown key fs_prefech is ignored; did you mean 'fs_prefetch'?" in said
    assert said.count("No space left on device; lines are lost") == 1
    assert "Traceback" not in said


def test_snapshotter_says_that_a_bootstrap_is_damaged(work: Path) -> None:
    good = image_in(work / "image").bootstrap.read_bytes()
    labels = {"containerd.io/snapshot/nydus-bootstrap": "1", "containerd.io/snapshot/cri.image-ref": "a.io/b/c"}
    with Snapshotter(work / "s", daemon_config(prefetch=False)) as ours, Client(ours.socket) as client:
        client.prepare("meta", "", labels)
        (layer,) = (ours.root / "snapshots").iterdir()
        (layer / "fs" / "image").mkdir()
        boot = layer / "fs" / "image" / "image.boot"
        boot.write_bytes(good[:5000])
        client.commit("image", "meta", labels)
        for content, hint in (
            (good[:5000], "remove the image in containerd and pull it again"),
            (b"", "pull it again"),
        ):
            boot.write_bytes(content)
            with pytest.raises(grpc.RpcError) as caught:
                client.prepare("container", "image")
            assert all(text in str(caught.value.details()) for text in (str(boot), "a.io/b/c", hint))
            assert [info.name for info in client.list()] == ["image"]
        boot.write_bytes(good)
        assert client.prepare("container", "image")


# -- nydusify and ctr-remote


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    if find_program() is None:
        pytest.skip("docker-registry is not installed")
    folder = work_dir()
    try:
        with Registry(folder / "reg") as running:
            layout = ImageLayout(folder / "image")
            image = layout.finish([layout.add_layer([entry("a", FILES["a"]), entry("c", "x")])], cmd=["x"])
            image.push(running.host, "lab/app", "oci")
            names = [f"{running.host}/lab/app:{tag}" for tag in ("oci", "nydus")]
            done = run("nydusify", "convert", "--source", names[0], "--target", names[1], "--work-dir", folder / "w")
            assert done.returncode == 0, done.stderr
            yield running
    finally:
        remove_tree(folder)


def test_nydusify_check_and_mount_say_what_is_wrong(work: Path, registry: Registry) -> None:
    there = f"{registry.host}/lab/app"
    place = ("--work-dir", work / "w", "--mount-path", work / "m")
    options: tuple[str | Path, ...]
    for command, options in (("check", place[:2]), ("mount", place)):
        with dead_port() as dead:
            fails(run("nydusify", command, "--target", f"{dead}/a/b:c", *options), dead, "cannot be reached")
        fails(run("nydusify", command, "--target", f"{there}:none", *options), "app:none", "does not exist")
        fails(run("nydusify", command, "--target", "Not A Name", *options), "Not A Name")
    fails(run("nydusify", "mount", "--target", f"{there}:oci", *place), "is not a Nydus image")
    images = ("--source", f"{there}:oci", "--target", f"{there}:nydus")
    assert run("nydusify", "check", *images, *place[:2], pre=NOBODY).returncode == 0, "no mount where there may be none"
    fails(run("nydusify", "check", *images, *place[:2], "--mount", pre=NOBODY), "must run as root", "--no-mount")
    fails(run("nydusify", "mount", *images[2:], *place, pre=NOBODY), "must run as root")
    for command, options in (("check", (*images, *place[:2], "--mount")), ("mount", (*images[2:], *place))):
        fails(run("nydusify", command, *options, pre=NO_FUSE), "/dev/fuse does not exist")
    assert not (work / "m").exists()


def _damaged(registry: Registry, layer: dict[str, Any], damage: str) -> contextlib.AbstractContextManager[None]:
    digest = layer["digest"].removeprefix("sha256:")
    path = registry.work / "data/docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        good = path.read_bytes()
        at = len(good) // 3
        path.write_bytes(good[:at] if damage == "cut" else good[:at] + struct.pack("B", good[at] ^ 1) + good[at + 1 :])
        try:
            yield
        finally:
            path.write_bytes(good)

    return changed()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_nydusify_check_finds_damage_in_the_registry(work: Path, registry: Registry, damage: str) -> None:
    there = f"{registry.host}/lab/app"
    blob, *_, boot = fetch_manifest(registry.host, "lab/app", "nydus")[1]["layers"]
    check: tuple[str | Path, ...] = (
        "check",
        "--source",
        f"{there}:oci",
        "--target",
        f"{there}:nydus",
        "--work-dir",
        work / "w",
    )
    with _damaged(registry, blob, damage):
        done = run("nydusify", *check, "--mount")
        (summary,) = (line for line in done.stderr.splitlines() if line.startswith("nydusify: "))
        assert (done.returncode, " difference" in summary) == (1, True), done
        assert str(work / "w" / "target" / "nydusd.log") in summary
        assert "/a: cannot be read in the target: Input/output error" in done.stdout + done.stderr, done
        assert blob["digest"].removeprefix("sha256:") in (work / "w" / "target" / "nydusd.log").read_text()
        done = run("nydusify", *check, "--no-mount")
        assert done.returncode == 1
        assert blob["digest"].removeprefix("sha256:") in done.stderr
    with _damaged(registry, boot, damage):
        fails(run("nydusify", *check), boot["digest"])
        fails(run("nydusify", "mount", *check[3:5], *check[5:], "--mount-path", work / "m"), boot["digest"])
    assert run("nydusify", *check).returncode == 0


def test_ctr_remote_says_what_is_wrong(work: Path) -> None:
    pull = ("images", "rpull", "127.0.0.1:1/a/b:c")
    missing = run("ctr-remote", "-a", work / "none.sock", *pull)
    fails(missing, "does not answer", "none.sock (No such file or directory)", "is that its socket?")
    (work / "hosts" / "127.0.0.1:1").mkdir(parents=True)
    (work / "hosts" / "127.0.0.1:1" / "hosts.toml").write_text("server = 5")
    wrong = run("ctr-remote", "-a", work / "none.sock", *pull, "--hosts-dir", work / "hosts")
    fails(wrong, "hosts.toml: server: must be a string")
    closed = work / "closed"
    closed.mkdir(mode=0o000)
    denied = run("ctr-remote", "-a", closed / "c.sock", *pull, pre=NOBODY)
    fails(denied, "Permission denied", "run as root")
