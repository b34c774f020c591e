"""Images pulled as plain ones that run lazily: with a Nydus image beside them, or as eStargz; and shared layers."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nydusfs.registry.client import RegistryClient
from nydusfs.registry.referrers import add_to_tag, subject_of
from snapshotter.doctor.finding import Level
from snapshotter.doctor.run import findings
from snapshotter.node import Choices, Node
from tests.e2e.conftest import NODES, either, nodes, require_programs
from tests.lab.cri import Cri
from tests.lab.images import MANIFEST, Image, ImageLayout, Layer, Member, entry, fetch_manifest, push_image
from tests.lab.operated import CTL
from tests.lab.paths import ref_bin
from tests.lab.process import LabError, mounts_below, remove_tree, run, wait_until, work_dir
from tests.lab.registry import Registry
from tests.lab.sample import pause_image, small_image, small_layers
from tests.lab.snapshots import PREFIX, Client
from tests.lab.stack import Stack, StackOptions, program

pytestmark = pytest.mark.timeout(300)

PAYLOAD = 9 << 20
READ = "cat /marker; echo; cat /payload.sha256; echo; sha256sum < /payload; ls -d /payload* /doomed 2>&1; ls /shadowed"
PRODUCERS = ["ours", "upstream"]


no_nydusd = nodes(NODES[0])  # serves what these are about


def converter(producer: str) -> list[str | Path]:
    nydusify, image = program("nydusify"), program("nydus-image")
    if producer == "upstream":
        other, other_image = ref_bin("nydusify"), ref_bin("nydus-image")
        if other is None or other_image is None:
            pytest.skip("interop: upstream's nydusify is not here")
        nydusify, image = other, other_image
    return [nydusify, "convert", "--nydus-image", image, "--source-insecure", "--target-insecure"]


@dataclass
class Pods:
    """A stack and a pod on it to run containers in."""

    stack: Stack
    work: Path
    cri: Cri
    pod: str
    config: Any

    def push(self, name: str, *, estargz: int = 0, complete: bool = True, zstd: bool = False) -> Image:
        """As NAME:oci; `marker` and payload are the name's. `estargz`: chunk size of the layer with the payload, which
        names all its directories if `complete`, and with `zstd` is zstd:chunked beside layers of gzip."""

        def add(layout: ImageLayout, members: list[Member]) -> Layer:
            payload = any(info.name == "payload" for info, _ in members)
            more = [entry("tmp", mode=0o1777)] if payload and complete else []
            if not estargz:
                return layout.add_layer([*more, *members])
            return layout.add_estargz([*more, *members], estargz if payload else 4 << 20, zstd=zstd and payload)

        image = small_image(self.work / name, name, payload=PAYLOAD, add=add)
        image.push(self.stack.registry.host, f"lab/{name}", "oci")
        return image

    def convert(self, producer: str, name: str, tag: str, *arguments: str) -> None:
        source, target = (f"{self.stack.host}/lab/{name}:{one}" for one in ("oci", tag))
        command = [*converter(producer), "--work-dir", self.work / "convert", "--source", source, "--target", target]
        run([*command, *arguments], timeout=120)

    def pull(self, name: str, tag: str) -> str:
        return self.cri.pull(f"{self.stack.host}/lab/{name}:{tag}", self.config)

    def explained(self, name: str, tag: str = "oci") -> tuple[bool, list[str], str]:
        """What `nydusctl explain` says: lazy, the layers' states, reasons."""
        ref, where = f"{self.stack.host}/lab/{name}:{tag}", ["-a", self.stack.containerd.socket, "-n", "k8s.io"]
        told = run([*CTL, "explain", ref, "--json", "--root", self.stack.snapshotter.root, *where], timeout=60).stdout
        found = json.loads(told)
        assert found["lazy"] == (found["mountpoint"] != "")
        return found["lazy"], [layer["state"] for layer in found["layers"]], "; ".join(found["why"])

    def read(self, pulled: str) -> list[str]:
        code, text = self.cri.run(self.pod, self.config, pulled, "sh", "-c", READ)
        assert code == 0, text
        return text.split()

    def lazy(self, name: str, tag: str = "oci") -> None:
        """Pulls and runs an image; its big layer comes in ranges, and only when it is read."""
        stack, mark = self.stack, self.stack.registry.mark()
        pulled = self.pull(name, tag)
        assert big(stack, mark) == []
        good(self.read(pulled), name)
        requests = stack.registry.since(mark).blobs().requests
        assert big(stack, mark) == []
        assert sum(one.size for one in requests if one.status == 206) >= PAYLOAD


def big(stack: Stack, mark: int) -> list[str]:
    """Layers that were downloaded whole."""
    requests = stack.registry.since(mark).blobs().requests
    return [one.path for one in requests if one.status == 200 and one.size > 2 << 20]


def good(words: list[str], marker: str) -> None:
    assert words[0] == marker
    assert words[1] == words[2]
    assert words[-1] == "above"
    assert "below" not in words


@pytest.fixture(scope="module")
def pause() -> Iterator[str]:
    require_programs()
    work = work_dir()
    try:
        with Registry(work / "reg") as registry:
            yield pause_image(work / "pause").push(registry.host, "lab/pause", "1")
    finally:
        remove_tree(work)


@pytest.fixture(scope="module")
def pods(node: Path | None, pause: str) -> Iterator[Pods]:
    arguments = ("--enable-index-detect", "--enable-referrer-detect", "--enable-stargz")
    options = StackOptions(
        prefetch=False,
        containerd=node,
        pause_ref=pause,
        snapshotter_arguments=(*arguments, "--log-level=debug"),
    )
    with Stack(options) as stack:
        host = pause.partition("/")[0]
        stack.containerd.add_host(host, f"http://{host}")
        cri = Cri(stack.containerd.socket, stack.work)
        try:
            pod, config = cri.sandbox()
            try:
                yield Pods(stack, stack.work / "images", cri, pod, config)
            finally:
                cri.remove(pod)
        finally:
            cri.close()
    assert stack.leftovers == []


def test_both_in_one_index(pods: Pods) -> None:
    both_in_one_index(pods, "ours")


@either
def test_both_in_one_index_by_upstream(pods: Pods) -> None:
    both_in_one_index(pods, "upstream")


def both_in_one_index(pods: Pods, producer: str) -> None:
    name = f"index-{producer}"
    pods.push(name)
    pods.convert(producer, name, "both", "--merge-platform")
    pods.lazy(name, "both")
    assert f"lab/{name}:both: there is a Nydus image of it in its index" in log_of(pods)


def test_a_referrer_of_the_plain_image(pods: Pods) -> None:
    referrer_of_the_plain_image(pods, "ours")


@either
def test_a_referrer_of_the_plain_image_by_upstream(pods: Pods) -> None:
    referrer_of_the_plain_image(pods, "upstream")


def referrer_of_the_plain_image(pods: Pods, producer: str) -> None:
    name = f"referrer-{producer}"
    pods.push(name)
    pods.convert(producer, name, "nydus", "--with-referrer")
    if producer == "upstream":
        # it leaves the list of referrers to the registry, and this one knows of none
        with RegistryClient(pods.stack.registry.host) as client:
            found = client.manifest(f"lab/{name}", "nydus")
            add_to_tag(client, f"lab/{name}", subject_of(found.body), found.media_type, found.body)
    pods.lazy(name)
    assert f"lab/{name}:oci: there is a Nydus image of it among its referrers" in log_of(pods)
    assert pods.explained(name) == (True, ["lazy"] * 3, "")


@either
def test_a_layer_that_was_skipped_and_overlayfs_needs(pods: Pods) -> None:
    """containerd has the image but not its layers: it says so, and pulling for the other snapshotter brings them."""
    pods.push("both")
    pods.convert("ours", "both", "nydus", "--with-referrer")
    pods.lazy("both")
    ref, containerd = f"{pods.stack.host}/lab/both:oci", pods.stack.containerd
    plain = ("--rm", "--net-host", "--snapshotter", "overlayfs", ref, "plain", "sh", "-c", READ)
    with pytest.raises(LabError, match="not found"):
        containerd.ctr_run(*plain, namespace="k8s.io")
    containerd.ctr("-n", "k8s.io", "images", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
    good(containerd.ctr_run(*plain, namespace="k8s.io").split(), "both")
    mark = pods.stack.registry.mark()
    good(pods.read(pods.pull("both", "oci")), "both")
    assert pods.stack.registry.since(mark).blobs().bytes == 0


@pytest.mark.parametrize("zstd", [False, True], ids=["gzip", "zstd"])
def test_estargz_as_it_is(pods: Pods, zstd: bool) -> None:
    name = f"estargz-{zstd}".lower()
    pods.push(name, estargz=4 << 20, zstd=zstd)
    pods.lazy(name)
    assert pods.explained(name) == (True, ["lazy"] * 3, "")


@pytest.mark.interop
@pytest.mark.parametrize("form", ["estargz", "zstdchunked"])
def test_what_nerdctl_converts_runs_as_it_is(pods: Pods, nerdctl: Path, form: str) -> None:
    pods.push(f"before-{form}")
    source, target = f"{pods.stack.host}/lab/before-{form}:oci", f"{pods.stack.host}/lab/nerdctl-{form}:oci"
    for words in (
        ("pull", "-q", "--snapshotter", "overlayfs", "--unpack=false", source),
        ("image", "convert", f"--{form}", "--oci", source, target),
        ("push", "-q", target),
        ("rmi", source, target),
    ):
        pods.stack.containerd.nerdctl(nerdctl, *words)
    stack, mark = pods.stack, pods.stack.registry.mark()
    pulled = pods.pull(f"nerdctl-{form}", "oci")
    assert big(stack, mark) == []
    good(pods.read(pulled), f"before-{form}")
    assert big(stack, mark) == []


@no_nydusd
def test_estargz_layers_that_do_not_fit_together_are_unpacked(pods: Pods) -> None:
    pods.push("mixed", estargz=1 << 20)
    good(pods.read(pods.pull("mixed", "oci")), "mixed")
    lazy, states, why = pods.explained("mixed")
    # the lowest one is an image by itself
    assert (lazy, states, why) == (True, ["lazy", "unpacked", "unpacked"], "2 ordinary layers above it were unpacked")
    assert "its layers are unpacked instead" in log_of(pods)


@no_nydusd
def test_estargz_layers_that_name_no_directories_are_unpacked(pods: Pods) -> None:
    pods.push("unnamed", estargz=4 << 20, complete=False)
    pulled = pods.pull("unnamed", "oci")
    code, text = pods.cri.run(pods.pod, pods.config, pulled, "ls", "-ldn", "/tmp", "/tmp/middle")
    assert (code, text.split()[0]) == (0, "drwxrwxrwt")
    assert "does not name its directory tmp" in log_of(pods)


def log_of(pods: Pods) -> str:
    return (pods.stack.snapshotter.root / "logs" / "nydus-snapshotter.log").read_text()


@either
@pytest.mark.parametrize("way", ["referrer", "estargz"])
def test_layers_of_a_lazy_image_under_another_image(pods: Pods, way: str) -> None:
    """containerd has their chain ids and downloads nothing; the other image must have their files, no more and no less,
    with all that layers do to each other."""
    name, other = f"base-{way}", f"other-{way}"
    image = pods.push(name, estargz=4 << 20 if way == "estargz" else 0)
    if way == "referrer":
        pods.convert("ours", name, "nydus", "--with-referrer")
    pods.pull(name, "oci")
    layout = ImageLayout(image.directory)
    # as builders do that write no parent directories: those of the layers below keep their modes
    top = [entry(".wh.doomed", ""), entry("etc/hard", "changed"), entry("tmp/new", "x"), entry("marker", other)]
    made = layout.finish([*image.layers[:2], layout.add_layer(top)], cmd=["cat", "/marker"])
    made.push(pods.stack.registry.host, f"lab/{other}", "oci")
    mark = pods.stack.registry.mark()
    ref = f"{pods.stack.host}/lab/{other}:oci"
    stack = pods.stack
    stack.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
    show = (
        "cat /marker; sha256sum < /payload; ls -lnR /etc /shadowed /payload /tmp /usr; "
        "ls -ldn /tmp /etc / /usr; ls /doomed 2>&1; true"
    )
    expected = stack.ctr_run(ref, "sh", "-c", show, snapshotter="overlayfs").splitlines()
    pulled = pods.pull(other, "oci")
    code, text = pods.cri.run(pods.pod, pods.config, pulled, "sh", "-c", show)
    assert code == 0
    assert "below" in text
    # what runtimes put into every container
    ignored = ("hosts", "hostname", "resolv.conf", "mtab", "total")
    assert rows(text.splitlines(), ignored) == rows(expected, ignored)
    if way == "referrer":
        assert "is unpacked for an image built on it" in log_of(pods)
        assert f"/lab/{name}/blobs/" in " ".join(big(stack, mark))
    pods.read(pods.pull(name, "oci"))  # and the lazy one goes on as it was


def rows(lines: list[str], ignored: tuple[str, ...]) -> list[list[str]]:
    """Without sizes and times of directories: mounts and runtimes change them."""
    words = [line.split() for line in lines if not any(word in line for word in ignored)]
    return [[*row[:4], row[-1]] if row and row[0].startswith("d") else row for row in words]


@no_nydusd
def test_plain_images_stay_plain(pods: Pods) -> None:
    pods.push("plain")
    mark = pods.stack.registry.mark()
    good(pods.read(pods.pull("plain", "oci")), "plain")
    assert len(big(pods.stack, mark)) == 1


@either
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("form", ["v5", "zran"])
def test_nydus_images_of_every_kind(pods: Pods, form: str, producer: str) -> None:
    name = f"{form}-{producer}"
    pods.push(name)
    arguments = {"v5": ["--fs-version", "5"], "zran": ["--oci-ref"]}[form]
    pods.convert(producer, name, "nydus", *arguments)
    pods.lazy(name, "nydus")


@no_nydusd
def test_tarfs(pods: Pods) -> None:
    """Layers as they are, mounted by the kernel; what shares them with a plain image; away with the image."""
    stack = pods.stack
    restart(
        pods, "--enable-index-detect=false", "--enable-referrer-detect=false", "--enable-stargz=false", "--enable-tarfs"
    )
    layout = ImageLayout(pods.work / "tarfs")
    members = small_layers("tarfs", PAYLOAD)
    # of no other test's image: on layers that are unpacked already nothing is merged
    bottom = layout.add_layer([entry("for-tarfs"), *members[0]])
    named = layout.add_layer([entry("tmp", mode=0o1777), *members[1]])
    unnamed, top = layout.add_layer(members[1]), layout.add_layer(members[2])
    for tag, middle in (("named", named), ("oci", unnamed)):
        layout.finish([bottom, middle, top], cmd=["sh"]).push(stack.registry.host, "lab/tarfs", tag)
    good(pods.read(pods.pull("tarfs", "named")), "tarfs")

    def mounts() -> list[str]:
        return [path for path in mounts_below(stack.snapshotter.root / "snapshots") if path.endswith("/mnt")]

    (mounted,) = mounts()
    found = {one.check: one for one in findings(Node(Choices(root=str(stack.snapshotter.root))))}
    assert found["leftover.mount"].level is Level.OK
    assert "leftover.unknown" not in found
    lazy, states, why = pods.explained("tarfs", "named")
    assert (lazy, states, why.startswith("tarfs: ")) == (False, ["tar"] * 3, True)
    # the same with the snapshotter gone meanwhile, and after a reboot, which takes mounts away
    stack.snapshotter.kill()
    run(["umount", mounted], timeout=20)
    stack.snapshotter.start()
    connected(pods)
    good(pods.read(pods.pull("tarfs", "named")), "tarfs")
    assert mounts() == [mounted]
    # a layer in between that names no directories cannot be merged: unpacked, from what is here already
    mark = stack.registry.mark()
    pulled = pods.pull("tarfs", "oci")
    code, text = pods.cri.run(pods.pod, pods.config, pulled, "ls", "-ldn", "/tmp", "/tmp/middle")
    assert (code, text.split()[0]) == (0, "drwxrwxrwt")
    good(pods.read(pulled), "tarfs")
    assert len(big(stack, mark)) == 1
    assert "does not name its directory tmp" in log_of(pods)
    for tag in ("named", "oci"):
        pods.cri.remove_image(f"{stack.host}/lab/tarfs:{tag}")
    wait_until(lambda: mounts() == [], 60, "the unmount")


@no_nydusd
@pytest.mark.parametrize("mode", ["image_block_with_verity", "layer_block"])
def test_tarfs_as_block_devices_for_virtual_machines(pods: Pods, mode: str) -> None:
    """What Kata is handed is a disk that the kernel mounts by itself, with a hash tree that veritysetup accepts."""
    stack, root = pods.stack, pods.stack.snapshotter.root
    pods.work.mkdir(exist_ok=True)
    toml = pods.work / f"{mode}.toml"
    toml.write_text(
        "version = 1\n[snapshot]\nenable_kata_volume = true\n"
        f'[experimental.tarfs]\nenable_tarfs = true\nexport_mode = "{mode}"\n'
    )
    detect = ("index-detect", "referrer-detect", "stargz")
    restart(pods, "--config", str(toml), *(f"--enable-{name}=false" for name in detect))
    layout, members = ImageLayout(pods.work / mode), small_layers(mode, PAYLOAD)
    layers = [
        layout.add_layer([entry(f"for-{mode}"), *members[0]]),
        layout.add_layer([entry("tmp", mode=0o1777), *members[1]]),
        layout.add_layer(members[2]),
    ]
    layout.finish(layers, cmd=["sh"]).push(stack.registry.host, "lab/disks", mode)
    pods.pull("disks", mode)
    with Client(stack.snapshotter.socket) as client:
        ref = f"{stack.host}/lab/disks:{mode}"
        ours = [info for info in client.list() if info.labels.get(PREFIX + "cri.image-ref") == ref]
        (top,) = {info.name for info in ours} - {info.parent for info in ours}
        (mount,) = client.prepare(f"k8s.io/1/{mode}", top)
        assert mount.type == "fuse.nydus-overlayfs"
        told = [text.partition("=") for text in mount.options]
        volumes = [json.loads(base64.b64decode(text)) for name, _, text in told if name == "io.katacontainers.volume"]
        kind = mode.partition("_")[0]
        assert [volume["volume_type"] for volume in volumes] == [f"{kind}_raw_block"] * (1 if kind == "image" else 3)
        payloads = []
        for number, volume in enumerate(volumes):
            assert (volume["fs_type"], volume["options"]) == ("erofs", ["ro"])
            target = pods.work / f"{mode}-{number}"
            target.mkdir()
            run(["mount", "-t", "erofs", "-o", "ro,loop", volume["source"], target])
            try:
                payloads += [path.read_bytes() for path in (target / "payload",) if path.exists()]
                names = {path.name for path in target.iterdir()}
                assert kind == "layer" or {"marker", f"for-{mode}", "payload"} <= names
            finally:
                run(["umount", target])
        served = root / "snapshots" / Path(volumes[0]["source"]).parent.name / "mnt"
        assert payloads == [(served / "payload").read_bytes()]
        verity = volumes[0].get("dm_verity")
        assert (verity is not None) == mode.endswith("verity")
        if verity is not None:
            command = ["veritysetup", "verify", "--no-superblock", "--format=1", "-s", "-", "--hash=sha256"]
            command += [f"--data-block-size={verity['blocksize']}", f"--hash-block-size={verity['hashsize']}"]
            command += [f"--data-blocks={verity['blocknum']}", f"--hash-offset={verity['offset']}"]
            run([*command, volumes[0]["source"], volumes[0]["source"], verity["hash"]])
            label = f"{verity['blocknum']},{verity['offset']},sha256:{verity['hash']}"
            assert client.stat(top).labels[PREFIX + "nydus-image-block"] == label
        client.remove(f"k8s.io/1/{mode}")
    pods.cri.remove_image(f"{stack.host}/lab/disks:{mode}")
    wait_until(lambda: not served.exists(), 60, "the unmount")


def restart(pods: Pods, *arguments: str) -> None:
    pods.stack.snapshotter.stop()
    pods.stack.snapshotter.arguments += arguments
    pods.stack.snapshotter.start()
    connected(pods)


def connected(pods: Pods) -> None:
    """containerd goes on to think for up to 3 s that a snapshotter that was restarted is away."""
    ctr, probe = pods.stack.containerd.ctr, ("snapshots", "--snapshotter", "nydus")
    keys: list[str] = []

    def prepared() -> bool:
        keys.append(f"probe-{time.monotonic_ns()}")  # one that failed may be there all the same
        return ctr(*probe, "prepare", keys[-1], check=False).returncode == 0

    wait_until(prepared, 60, "containerd's connection")
    for key in keys:
        ctr(*probe, "rm", key, check=key == keys[-1])


@nodes(NODES[0])  # about what is mounted, not how
def test_signed_bootstraps(pods: Pods) -> None:
    """This module's last test: the snapshotter is told to want signatures."""
    stack, folder = pods.stack, pods.work / "signing"
    folder.mkdir(parents=True)
    pods.push("signed")
    pods.convert("ours", "signed", "nydus")
    _, manifest = fetch_manifest(stack.registry.host, "lab/signed", "nydus")
    key, other = folder / "key.pem", folder / "other.pem"
    for path in (key, other):
        run(["openssl", "genrsa", "-out", path, "2048"])
    public = folder / "public.pem"
    run(["openssl", "rsa", "-in", key, "-pubout", "-out", public])
    boot = pods.work / "boot"
    boot.mkdir()
    layer = manifest["layers"][-1]["digest"].removeprefix("sha256:")
    stored = stack.registry.work / "data" / "docker/registry/v2/blobs/sha256" / layer[:2] / layer / "data"
    run(["tar", "-xzf", stored, "-C", boot])

    def sign(tag: str, by: Path) -> None:
        signature = folder / "signature"
        run(["openssl", "dgst", "-sha256", "-sign", by, "-out", signature, boot / "image" / "image.boot"])
        text = base64.b64encode(signature.read_bytes()).decode()
        manifest["layers"][-1]["annotations"]["containerd.io/snapshot/nydus-signature"] = text
        made = ImageLayout(folder).add_blob(json.dumps(manifest).encode(), MANIFEST)
        push_image(stack.registry.host, "lab/signed", tag, replace(made, media_type=manifest["mediaType"]), [])

    sign("good", key)
    sign("bad", other)
    restart(pods, "--validate-signature", f"--publickey-file={public}")
    for tag, words in (("nydus", "is not signed"), ("bad", "was not made with the key of")):
        pulled = pods.pull("signed", tag)
        with pytest.raises(Exception, match=words):
            pods.read(pulled)
        pods.cri.remove_image(f"{stack.host}/lab/signed:{tag}")
    good(pods.read(pods.pull("signed", "good")), "signed")
