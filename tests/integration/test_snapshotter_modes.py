"""What containerd is told to mount in each mode of the configuration, beside upstream's snapshotter; that it mounts.

The helper `nydus-overlayfs` too: ours and upstream's mount the same from the same options.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.paths import ref_bin
from tests.lab.process import mounts_below, remove_tree, unmount_below, wait_until, work_dir
from tests.lab.served import CASE, IMAGE, template
from tests.lab.snapshots import PREFIX, REF, Client, mounted, option, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

EXTRA, KATA = "extraoption", "io.katacontainers.volume"
PROXY = PREFIX + "nydus-proxy-mode"
DIGEST = PREFIX + "cri.layer-digest"


class Configured(Snapshotter):
    """Either program with the same TOML file; `text`: its last tables."""

    driver, text = "fusedev", ""

    def argv(self) -> list[str]:
        argv = super().argv()
        toml = self.work / "snapshotter.toml"
        if self.upstream:
            text = toml.read_text().replace('fs_driver = "fusedev"', f'fs_driver = "{self.driver}"')
            toml.write_text(text + self.text)
            return argv
        toml.write_text(
            f'version = 1\ndaemon_mode = "{self.mode}"\n[daemon]\nfs_driver = "{self.driver}"\n'
            f'nydusd_config = "{self.work}/nydusd.json"\n{self.text}'
        )
        return [argv[0], "--config", str(toml), "--root", str(self.root), "--address", str(self.socket)]


@contextlib.contextmanager
def running(
    mode: str = "dedicated", driver: str = "fusedev", text: str = "", *, upstream: bool = False
) -> Iterator[tuple[Configured, Client]]:
    work = work_dir()
    made = Configured(work / "s", template(), upstream=upstream, mode=mode)
    made.driver, made.text = driver, text
    try:
        with made, Client(made.socket) as client:
            yield made, client
    finally:
        unmount_below(work)
        remove_tree(work)


def both(mode: str, driver: str, text: str) -> Iterator[tuple[Configured, Client]]:
    if ref_bin("containerd-nydus-grpc") is None:
        pytest.skip("interop: upstream's snapshotter is not here")
    for upstream in (True, False):
        with running(mode, driver, text, upstream=upstream) as found:
            yield found


def shown(mounts: list[Any], one: Snapshotter) -> list[tuple[str, str, list[Any]]]:
    """With what is encoded decoded, and the root's own name left out."""

    def plain(text: str) -> Any:
        name, _, value = text.partition("=")
        if name not in (EXTRA, KATA):
            return text.replace(str(one.root), "ROOT")
        decoded = json.loads(base64.b64decode(value, validate=True))
        return name, json.loads(json.dumps(decoded).replace(str(one.root), "ROOT"))

    return [
        (mount.type, mount.source.replace(str(one.root), "ROOT"), [plain(text) for text in mount.options])
        for mount in mounts
    ]


def without_config(mounts: list[tuple[str, str, list[Any]]]) -> tuple[Any, Any]:
    """nydusd's configuration inside `extraoption` apart: upstream writes out keys of its own."""
    configs = []
    for entry in [entry for _, _, options in mounts for entry in options]:
        if isinstance(entry, tuple) and entry[0] == EXTRA:
            device = json.loads(entry[1].pop("config"))["device"]
            configs += [device["id"], device["backend"]["config"]["dir"], device["cache"]["config"]["work_dir"]]
    return mounts, configs


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("dedicated", "[snapshot]\nenable_nydus_overlayfs = true\n"),
        ("dedicated", '[snapshot]\nenable_nydus_overlayfs = true\nnydus_overlayfs_path = "/opt/nydus-overlayfs"\n'),
        ("dedicated", "[snapshot]\nenable_kata_volume = true\n"),
        ("dedicated", "[snapshot]\nenable_overlayfs_volatile = true\n"),
        ("none", ""),
    ],
)
def test_mounts_are_those_of_upstream(mode: str, text: str) -> None:
    found = []
    for one, client in both(mode, "fusedev", text):
        meta = pull(client, image_case(CASE), one.work, IMAGE)
        made = client.prepare("default/4/c", meta)
        assert client.mounts("default/4/c") == made
        answers = [made, client.prepare("default/4/p", "")]
        if "volatile" not in text:  # a view has nothing to write, the kernel says so in its log
            answers.append(client.view("default/4/v", meta))
        found.append([without_config(shown(mounts, one)) for mounts in answers])
    assert found[0] == found[1]


def test_without_a_nydusd_images_are_for_others_to_mount() -> None:
    with running("none") as (one, client):
        meta = pull(client, image_case(CASE), one.work, IMAGE)
        (mount,) = client.prepare("default/4/c", meta)
        assert one.daemons() == [] and mounts_below(one.root) == []
        assert (mount.type, os.listdir(option(mount, "lowerdir"))) == ("fuse.nydus-overlayfs", [])
        described = json.loads(base64.b64decode(option(mount, EXTRA)))
        assert Path(described["source"]).read_bytes() == (image_case(CASE) / "image.boot").read_bytes()
        # plain images are plain overlays
        client.prepare("k", "")
        client.commit("layer", "k")
        (plain,) = client.prepare("default/4/p", "layer")
        assert plain.type == "overlay"
        with mounted([plain], one.work / "p") as rootfs:
            (rootfs / "x").write_text("written")


def test_volatile_where_it_is_asked_for() -> None:
    """By its label, on an image and on a plain layer: the kernel has it, and it can be written to."""
    with running("shared") as (one, client):
        meta = pull(client, image_case(CASE), one.work, IMAGE)
        client.prepare("k", "")
        client.commit("layer", "k")
        for parent in (meta, "layer"):
            asked = client.prepare(f"v {parent}", parent, {PREFIX + "overlay.volatile": "true"})
            with mounted(asked, one.work / "volatile") as rootfs:
                assert {"volatile", "fsync=volatile"} & set(overlay_at(rootfs))  # as kernels before 6.18, and since
                (rootfs / "x").write_text("written")
            with mounted(client.prepare(f"n {parent}", parent), one.work / "usual") as rootfs:
                assert not {"volatile", "fsync=volatile"} & set(overlay_at(rootfs))


def proxied(client: Client, *digests: str) -> str:
    parent = ""
    for digest in digests:
        ref = f"sha256:{digest[:2]}"
        labels = {REF: ref, PREFIX + "cri.image-ref": IMAGE, DIGEST: f"sha256:{digest}"}
        with pytest.raises(grpc.RpcError, match="target snapshot"):
            client.prepare(f"default/1/extract {ref}", parent, labels)
        (info,) = client.list(f'labels."{REF}"=={ref},parent=="{parent}"')
        assert info.labels[PROXY] == "true"
        parent = info.name
    return parent


def test_proxy_mounts_are_those_of_upstream() -> None:
    """But for the container's volume in Mounts: upstream forgets which image it is of."""
    found = []
    for one, client in both("dedicated", "proxy", "[snapshot]\nenable_kata_volume = true\n"):
        top = proxied(client, "a" * 64, "b" * 64)
        with pytest.raises(grpc.RpcError, match="missing CRI reference annotation"):
            client.prepare("default/1/x", top, {REF: "sha256:cc"})
        prepared = client.prepare("default/4/c", top)
        asked = client.mounts("default/4/c")
        (_, _, options), *_ = shown(prepared, one)
        _, volume = options.pop()
        assert volume["volume_type"] == "image_guest_pull"
        assert volume["image_pull"]["metadata"] == {DIGEST: "sha256:" + "b" * 64, PROXY: "true"}
        if not one.upstream:
            assert (asked, volume["source"]) == (prepared, IMAGE)
            (view,) = client.view("default/4/v", top)
            assert client.mounts("default/4/v") == [view]
            made = run(OURS, view.source, str(one.work), "-o", ",".join(view.options))
            assert made.returncode == 0, made.stderr
            unmount_below(one.work)
            assert one.daemons() == []
        (kind, source, options), *_ = shown(asked, one)
        # of another snapshotter: the pause image
        pause = shown(client.prepare("default/4/pause", "sha256:elsewhere"), one)
        stand_in = client.stat("sha256:elsewhere")
        assert (stand_in.kind, stand_in.labels["nydus.recovered"]) == (3, "true")
        bare = shown(client.prepare("default/4/bare", ""), one)
        answers = [kind, source, options[:-1], pause, bare]
        found.append(re.sub(r"snapshots/\d+", "snapshots/N", json.dumps(answers)))
    assert found[0] == found[1]


def test_a_proxied_layer_on_one_that_is_not_here() -> None:
    """containerd has the layer below on record for this snapshotter, whose root was lost."""
    with running("dedicated", "proxy") as (_, client):
        ref, below = "sha256:" + "c" * 64, "sha256:elsewhere"
        client.prepare(f"recovered {below}", "")  # a snapshotter was killed here
        with pytest.raises(grpc.RpcError, match="target snapshot"):
            client.prepare(f"default/1/extract {ref}", below, {REF: ref, DIGEST: "sha256:" + "d" * 64})
        assert client.stat(below).labels["nydus.recovered"] == "true"
        (info,) = client.list(f'labels."{REF}"=={ref},parent=="{below}"')
        assert info.labels[PROXY] == "true"


def test_a_proxied_image_cannot_run_without_the_proxy() -> None:
    with running("shared", "proxy") as (one, client):
        top = proxied(client, "a" * 64)
        client.prepare("default/4/c", top)
        one.stop()
        one.driver = "fusedev"
        one.start()
        with Client(one.socket) as again:
            with pytest.raises(grpc.RpcError, match="remove it and pull it again"):
                again.prepare("default/4/d", top)
            assert again.prepare("default/4/e", "")[0].type == "bind"


@pytest.mark.parametrize(("mode", "driver"), [("shared", "proxy"), ("none", "fusedev"), ("dedicated", "fusedev")])
def test_a_nydusd_of_another_mode_that_serves_no_image_ends(mode: str, driver: str) -> None:
    with running("shared") as (one, _):
        wait_until(lambda: bool(mounts_below(one.root)), 60, "the nydusd of all")
        one.stop()
        assert one.daemons()
        one.mode, one.driver = mode, driver
        one.start()
        wait_until(lambda: not one.daemons() and not mounts_below(one.root), 60, "its end")


# ---- the helper


OURS = [sys.executable, "-m", "snapshotter.overlayfs"]


def helpers() -> list[list[str]]:
    upstream = ref_bin("nydus-overlayfs")
    if upstream is None:
        pytest.skip("interop: upstream's nydus-overlayfs is not here")
    return [OURS, [str(upstream)]]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=30, check=False)


def overlay_at(target: Path) -> list[str]:
    """Options as the kernel shows them."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[1] == str(target):
            return sorted(line.split()[3].split(","))
    return []


@pytest.mark.parametrize("count", [2, 120])
def test_the_helper_mounts_what_upstreams_does(tmp_path: Path, count: int) -> None:
    """A hundred directories take more than a page unless they are shortened. (Upstream's takes `dev` for `nodev`.)"""
    target, seen = tmp_path / "merged", []
    target.mkdir()
    for number, command in enumerate(helpers()):
        snapshots = tmp_path / f"{number}{'x' * 40}" / "snapshots"
        lower = [snapshots / str(one) / "fs" for one in range(count)]
        for path in (*lower, snapshots / "900" / "fs", snapshots / "900" / "work"):
            path.mkdir(parents=True)
            (path / f"from-{path.parent.name}").write_text("x")
        (snapshots / "900" / "work" / "from-900").unlink()
        options = [
            "nosuid", f"workdir={snapshots}/900/work", f"upperdir={snapshots}/900/fs",
            f"lowerdir={':'.join(map(str, lower))}", "extraoption=" + base64.b64encode(b"geheim").decode(),
            f"{KATA}=e30=", "noatime",
        ]  # fmt: skip
        done = run(command, "overlay", str(target), "-o", ",".join(options))
        assert done.returncode == 0, done.stderr
        try:
            assert set(os.listdir(target)) == {f"from-{one}" for one in (*range(count), 900)}
            seen.append([text.replace(str(snapshots), "ROOT") for text in overlay_at(target)])
        finally:
            unmount_below(tmp_path)
    assert seen[0] == seen[1]


def test_the_helper_refuses_what_upstreams_does(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    target = str(tmp_path / "merged")
    secret = "extraoption=" + base64.b64encode(b"geheim").decode()
    wrong = [
        [],
        ["overlay", target, "-o"],
        ["overlay", target, "-x", "ro"],
        ["overlay", target, "-o", "ro", "more"],
        ["overlay", target, "-o", f"lowerdir=/nowhere:/nowhere2,{secret}"],
    ]
    for arguments in wrong:
        for command in helpers():
            done = run(command, *arguments)
            assert done.returncode != 0 and overlay_at(tmp_path / "merged") == []
            if command is OURS:
                assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
                assert secret not in done.stderr
    assert run(OURS, "tmpfs", target, "-o", "ro").returncode == 1


def test_a_mount_handed_out_can_be_made_by_the_helper() -> None:
    text = "[snapshot]\nenable_nydus_overlayfs = true\n"
    with running("shared", text=text) as (one, client):
        meta = pull(client, image_case(CASE), one.work, IMAGE)
        (mount,) = client.prepare("default/4/c", meta)
        target = one.work / "rootfs"
        target.mkdir()
        done = run(OURS, mount.source, str(target), "-o", ",".join(mount.options))
        assert done.returncode == 0, done.stderr
        lower = Path(option(mount, "lowerdir"))
        assert sorted(os.listdir(target)) == sorted(os.listdir(lower))
        (target / "written").write_text("x")
