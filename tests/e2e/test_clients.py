"""The clients people have, with the fewest labels they send: no snapshot annotations, no export, all defaults.

On 1.6 CRI pulls for nydus by default; on 2.x it pulls through the transfer service, and only pods of the runtime `lazy`
use nydus. Everything else of containerd's configuration is examples/containerd.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bootstrap.reader import open_bootstrap
from tests.e2e.conftest import NODES, containerd_of, either, load_image, nodes, require_programs
from tests.lab.containerd import CRI_2, IMAGES_3, RUNTIME_3
from tests.lab.cri import Cri
from tests.lab.interpose import Interposer
from tests.lab.paths import REPO, ref_bin
from tests.lab.process import mounts_below, run, wait_until
from tests.lab.sample import pause_image, small_image
from tests.lab.stack import Stack, StackOptions, program

pytestmark = pytest.mark.timeout(180)

RUNTIME = "lazy"
PAYLOAD = 8 << 20
BARE_2: dict[str, Any] = {"plugins": {CRI_2: {"containerd": {"disable_snapshot_annotations": None}}}}


def bare_3() -> dict[str, Any]:
    """Nothing of the snippet that says which image a layer is of, and its lines for a single runtime."""
    text = (REPO / "examples" / "containerd" / "config-2.x.toml").read_text().partition("# Only one runtime")[2]
    lines = [line[2:] for line in text.splitlines() if line.startswith("#   ")]
    changes = tomllib.loads("\n".join(lines).replace("RUNTIME", RUNTIME))
    changes["plugins"][IMAGES_3] |= {"disable_snapshot_annotations": None, "snapshotter": None}
    changes["plugins"][RUNTIME_3]["containerd"]["runtimes"][RUNTIME]["options"] = {"SystemdCgroup": False}
    changes["proxy_plugins"] = {"nydus": {"exports": {"enable_remote_snapshot_annotations": None}}}
    return changes


@dataclass
class Clients:
    stack: Stack
    cri: Cri
    runtime: str
    ref: str
    plain: str

    def remove_images(self) -> None:
        """Of every namespace but for CRI's pause image, with the leases of pulls that were ended."""
        containerd = self.stack.containerd
        for space in containerd.ctr("namespaces", "ls", "-q").stdout.split():
            for lease in containerd.ctr("-n", space, "leases", "ls", "-q").stdout.split():
                containerd.ctr("-n", space, "leases", "rm", lease, check=False)
            images = containerd.ctr("-n", space, "images", "ls", "-q").stdout.split()
            if mine := [image for image in images if "/pause" not in image]:
                containerd.ctr("-n", space, "images", "rm", "--sync", *mine, check=False)

    def pull(self, client: str, nerdctl: Path) -> list[str]:
        containerd = self.stack.containerd
        if client == "nerdctl":
            return containerd.nerdctl_argv(nerdctl, "pull", "-q", self.ref)
        if client == "ctr":
            return containerd.ctr_argv("images", "pull", "--plain-http", "--snapshotter", "nydus", self.ref)
        space = ["-a", str(containerd.socket), "-n", containerd.namespace]
        return [str(program("ctr-remote")), *space, "images", "rpull", "--plain-http", self.ref]

    def environment(self) -> dict[str, str]:
        """Of clients: without a developer's logins."""
        containerd = self.stack.containerd
        path = f"{containerd.binary.parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        return {"PATH": path, "HOME": str(containerd.work), "DOCKER_CONFIG": str(containerd.work), **kept}


@pytest.fixture(scope="module")
def clients(node: Path | None) -> Iterator[Clients]:
    changes = bare_3() if node else BARE_2
    options = StackOptions(
        prefetch=False,
        containerd=node,
        changes=changes,
        interpose=bool(node),
        snapshotter_arguments=("--enable-referrer-detect",),
    )
    with Stack(options) as stack:
        load_image(stack, payload=PAYLOAD)
        pause_image(stack.work / "pause").push(stack.registry.host, "lab/pause", "1")
        cri = Cri(stack.containerd.socket, stack.work)
        try:
            name = f"{stack.host}/lab/small"
            yield Clients(stack, cri, RUNTIME if node else "", f"{name}:nydus", f"{name}:oci")
        finally:
            cri.close()
    assert stack.leftovers == []


def two_pods(stack: Stack, cri: Cri, ref: str, runtime: str) -> None:
    """Both pull, create, start, exec, stats and remove at the same time, from nothing; then the image goes."""
    mark = stack.registry.mark()

    def life(number: int) -> tuple[int, str]:
        pod, config = cri.sandbox(runtime)
        try:
            pulled = cri.pull(ref, config, runtime=runtime)
            container, _ = cri.start(pod, config, pulled, "sh", "-c", f"echo {number} > /mine; sleep 600")
            wait_until(lambda: cri.exec(container, "cat", "/mine")[0] == 0, 60, "the container's first write")
            check = "cat /marker /mine; sha256sum < /payload; cat /payload.sha256; exit 7"
            said = cri.exec(container, "sh", "-c", check)
            assert cri.stats(container).memory.working_set_bytes.value > 0
            if not runtime:  # containerd collects it once a second here, and of the default snapshotter alone
                # (what it counted before the container's first write stays until its next round)
                wait_until(lambda: cri.stats(container).writable_layer.inodes_used.value >= 2, 60, "statistics")
                assert cri.stats(container).writable_layer.used_bytes.value > 0
            cri.stop(container)
            return said
        finally:
            cri.remove(pod)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(life, (1, 2)))
    for number, (code, said) in enumerate(results, 1):
        first, sums, _, wanted = said.split()
        assert (code, first, sums) == (7, f"hello{number}", wanted)
    # once for both: what one of them fetched the other did not
    assert stack.registry.since(mark).blobs().bytes < PAYLOAD + (4 << 20)
    assert cri.image(ref).size > PAYLOAD
    if not runtime:
        assert cri.image_filesystem().inodes_used.value > 0
    cri.remove_image(ref)
    assert cri.image(ref) is None
    root = stack.snapshotter.root
    wait_until(lambda: not [one for one in mounts_below(root) if Path(one).name.isdecimal()], 60, "umount")


def test_two_pods_of_one_image_at_once(clients: Clients) -> None:
    two_pods(clients.stack, clients.cri, clients.ref, clients.runtime)
    # by whichever of its names containerd has first: with the tag or with the digest
    named = re.compile(rf"is of image {re.escape(clients.ref.rpartition(':')[0])}[:@]")
    wait_until(lambda: any(map(named.search, clients.stack.snapshotter.log_lines())), 60, "the image's name")


def test_snippet_of_1_7_in_2_x() -> None:
    """A configuration of version 2, which containerd 2.x migrates; the images' file system is the one it exports."""
    require_programs()
    with Stack(StackOptions(prefetch=False, containerd=containerd_of("2.x"), snippet="1.7")) as stack:
        load_image(stack, payload=PAYLOAD)
        pause_image(stack.work / "pause").push(stack.registry.host, "lab/pause", "1")
        cri = Cri(stack.containerd.socket, stack.work)
        try:
            two_pods(stack, cri, f"{stack.host}/lab/small:nydus", "")
            assert cri.image_filesystem().fs_id.mountpoint == str(stack.snapshotter.root)
        finally:
            cri.close()
    assert stack.leftovers == []


def test_terminal(clients: Clients, nerdctl: Path) -> None:
    """nerdctl run --rm -it, as the scenario has it: what is typed comes back, and the exit code too."""
    containerd = clients.stack.containerd
    ours, theirs = pty.openpty()
    argv = containerd.nerdctl_argv(nerdctl, "run", "--rm", "-it", "-q", "--net", "host", clients.ref, "sh")
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, env=clients.environment(), start_new_session=True
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 60
    os.write(ours, b"test -t 0 && echo ter''minal $(cat /marker); exit 5\n")
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                try:
                    said += os.read(ours, 4096)
                except OSError:  # the other end is closed
                    break
        assert process.wait(30) == 5, said
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
    assert b"terminal hello" in said
    assert containerd.nerdctl(nerdctl, "ps", "-aq").stdout.split() == []


@nodes(*NODES[1:])
def test_compose(clients: Clients, nerdctl: Path) -> None:
    """Five services of one image, pulled and started by nerdctl compose."""
    containerd = clients.stack.containerd
    clients.remove_images()
    file = clients.stack.work / "compose.yaml"
    service = "  s{n}:\n    image: {ref}\n    network_mode: host\n    command: sh -c '{command}'\n"
    command = "cat /marker; echo; sha256sum < /payload; cat /payload.sha256; echo; sleep 1"
    file.write_text("services:\n" + "".join(service.format(n=n, ref=clients.ref, command=command) for n in range(5)))
    compose = ("compose", "-f", file, "-p", "lab")
    containerd.nerdctl(nerdctl, *compose, "up", "-d", "--quiet-pull")

    def said() -> list[str]:
        return containerd.nerdctl(nerdctl, *compose, "logs", "--no-color", "--no-log-prefix").stdout.split()

    wait_until(lambda: len(said()) == 20, 60, "five services' output")
    words = said()
    assert words.count("hello") == 5
    assert len({word for word in words if len(word) == 64}) == 1
    containerd.nerdctl(nerdctl, *compose, "down")
    assert containerd.nerdctl(nerdctl, "ps", "-aq").stdout.split() == []
    containerd.nerdctl(nerdctl, "rmi", clients.ref)
    left = containerd.ctr("snapshots", "--snapshotter", "nydus", "ls").stdout.splitlines()[1:]
    assert left == [], "containers and image are gone, their snapshots are not"


def test_pull_without_labels_says_how_to_pull(clients: Clients, nerdctl: Path) -> None:
    """What `ctr images pull` of 1.x does always, and 2.x with --local: nothing tells that it should be lazy.

    nerdctl meets the same with an image that is here but not unpacked, and pulls it again by itself.
    """
    stack = clients.stack
    clients.remove_images()
    local = ["--local"] if clients.runtime else []
    pull = ("images", "pull", *local, "--plain-http", "--snapshotter", "nydus")
    failed = stack.containerd.ctr(*pull, clients.ref, check=False)
    said = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1
    assert f"{clients.ref} is a Nydus image" in said
    remedy = f"ctr-remote -n {stack.containerd.namespace} images rpull"
    assert f"images rm {clients.ref}" in said
    assert remedy in said
    run_it = ("run", "--rm", "-q", "--net", "host", clients.ref, "cat", "/marker")
    assert stack.containerd.nerdctl(nerdctl, *run_it).stdout == "hello"
    stack.containerd.ctr("images", "rm", "--sync", clients.ref)
    stack.rpull(clients.ref)
    assert stack.ctr_run(clients.ref, "cat", "/marker") == "hello"
    # a plain image needs no labels
    stack.containerd.ctr(*pull, clients.plain)
    assert stack.ctr_run(clients.plain, "cat", "/marker") == "hello"


def test_pulls_at_the_same_time(clients: Clients, nerdctl: Path) -> None:
    """One image by every client at once, in two namespaces, then four containers at once: nothing fails."""
    stack, cri = clients.stack, clients.cri
    clients.remove_images()
    pod, config = cri.sandbox(clients.runtime)
    try:
        with ThreadPoolExecutor(6) as pool:
            names = ["ctr-remote", "nerdctl", "ctr-remote", "nerdctl", *(["ctr"] if clients.runtime else [])]
            commands = [clients.pull(name, nerdctl) for name in names]
            tasks = [pool.submit(run, argv, timeout=60, check=False, env=clients.environment()) for argv in commands]
            pulled = pool.submit(cri.pull, clients.ref, config, runtime=clients.runtime)
            for task in tasks:
                assert task.result().returncode == 0, task.result().stderr
            assert cri.run(pod, config, pulled.result(), "cat", "/marker") == (0, "hello")
            check = ("sh", "-c", "sha256sum < /payload; cat /payload.sha256")
            runs = [pool.submit(stack.ctr_run, clients.ref, *check) for _ in range(4)]
            for one in runs:
                assert len(set(one.result().replace("-", "").split())) == 1
    finally:
        cri.remove(pod)
    # the same chain of layers for all of them in each namespace, and none of a pull that came second
    for space in {stack.containerd.namespace, "k8s.io"}:
        listed = stack.containerd.ctr("-n", space, "snapshots", "--snapshotter", "nydus", "ls").stdout
        assert "extract-" not in listed
    clients.remove_images()


def ended_pulls(clients: Clients, nerdctl: Path, client: str, step: slice) -> None:
    """The client dies right before each of its calls to containerd; on 2.x, where containerd pulls by itself, before
    containerd's calls to the snapshotter. The next pull works, and what it pulled runs."""
    stack, containerd = clients.stack, clients.stack.containerd
    with contextlib.ExitStack() as exits:
        between = stack.calls
        if between is None:
            between = exits.enter_context(Interposer(stack.work / "i.sock", containerd.socket))
            socket, containerd.socket = containerd.socket, between.socket
            argv = clients.pull(client, nerdctl)
            containerd.socket = socket
        else:
            argv = clients.pull(client, nerdctl)
        exits.callback(between.reset)
        clients.remove_images()
        between.reset()
        run(argv, timeout=60, env=clients.environment())
        total = between.calls
        assert total > 5
        for number in range(1, total + 1)[step]:
            clients.remove_images()
            process = subprocess.Popen(
                argv, env=clients.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
            between.reset(lambda call, last=number, one=process: one.kill() if call == last else None)
            code, made = process.wait(60), between.calls
            if code == 0 and made < number:  # some of `total` may be containerd collecting garbage
                assert number > total * 3 // 4, f"{client} made fewer than {number} calls: {made} instead of {total}"
                break
            assert code == -signal.SIGKILL
            between.reset()
            again = run(clients.pull(client, nerdctl), timeout=60, check=False, env=clients.environment())
            assert again.returncode == 0, f"after an end at call {number}: {again.stderr}"
            said = stack.ctr_run(clients.ref, "sh", "-c", "cat /marker /payload.sha256; ls /shadowed")
            assert said.startswith("hello")
            assert said.endswith("above\n"), f"after an end at call {number}: {said}"


def test_pull_ended_and_tried_again(clients: Clients, nerdctl: Path) -> None:
    ended_pulls(clients, nerdctl, "nerdctl" if clients.runtime else "ctr-remote", slice(2, None, 8))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("client", ["ctr-remote", "nerdctl", "ctr"])
def test_pull_ended_at_every_step(clients: Clients, nerdctl: Path, client: str) -> None:
    if client == "ctr" and not clients.runtime:
        pytest.skip("ctr of containerd 1.x does not pull Nydus images")
    ended_pulls(clients, nerdctl, client, slice(None))


def test_a_plain_image_is_found_without_annotations(clients: Clients) -> None:
    """Its manifest is named by nobody; containerd has it while it pulls."""
    stack, cri = clients.stack, clients.cri
    clients.remove_images()
    small_image(stack.work / "found", "found", payload=PAYLOAD).push(stack.registry.host, "lab/found", "oci")
    stack.convert("lab/found:oci", "lab/found:nydus", "--with-referrer")
    pod, config = cri.sandbox(clients.runtime)
    try:
        cri.pull(clients.ref, config, runtime=clients.runtime)  # tells the registry's port, see docs/images.md
        mark = stack.registry.mark()
        pulled = cri.pull(f"{stack.host}/lab/found:oci", config, runtime=clients.runtime)
        assert cri.run(pod, config, pulled, "cat", "/marker") == (0, "found")
        assert stack.registry.since(mark).blobs().bytes < PAYLOAD // 2
    finally:
        cri.remove(pod)


def test_save_and_push_what_was_pulled_lazily(clients: Clients, nerdctl: Path, tmp_path: Path) -> None:
    """The blobs are not in containerd's content store. nerdctl fetches them first; ctr says which one is missing, and
    `ctr content fetch` gets them all."""
    stack, containerd = clients.stack, clients.stack.containerd
    clients.remove_images()
    stack.rpull(clients.ref)
    missing = containerd.ctr("images", "export", tmp_path / "a.tar", clients.ref, check=False)
    assert missing.returncode == 1
    assert re.search(r"content digest sha256:[0-9a-f]{64}: not found", missing.stderr)
    target = f"{stack.host}/lab/pushed:{'2' if clients.runtime else '1'}"
    if clients.runtime:  # nerdctl 2.3 saves, tags and pushes through services that 1.6 does not have
        containerd.nerdctl(nerdctl, "save", "-o", tmp_path / "b.tar", clients.ref)
        assert (tmp_path / "b.tar").stat().st_size > PAYLOAD
        clients.remove_images()
        containerd.nerdctl(nerdctl, "pull", "-q", clients.ref)
        containerd.nerdctl(nerdctl, "tag", clients.ref, target)
        containerd.nerdctl(nerdctl, "push", "-q", target)
    else:
        containerd.ctr("content", "fetch", "--plain-http", clients.ref)
        containerd.ctr("images", "export", tmp_path / "b.tar", clients.ref)
        assert (tmp_path / "b.tar").stat().st_size > PAYLOAD
        containerd.ctr("images", "push", "--plain-http", target, clients.ref)
    clients.remove_images()
    mark = stack.registry.mark()
    stack.rpull(target)
    assert stack.ctr_run(target, "cat", "/marker") == "hello"
    assert stack.registry.since(mark).blobs().bytes < PAYLOAD // 2
    clients.remove_images()


@pytest.mark.timeout(400)
@either
def test_blobs_are_shared_and_go_with_their_images(clients: Clients) -> None:
    """An image by this nydusify, the same by upstream's, and another with their lowest layer, in three repositories.

    What one has fetched the others do not, and a blob goes with the last image that has it.
    """
    stack = clients.stack
    cache = stack.snapshotter.root / "cache"
    clients.remove_images()
    images = {clients.ref: "hello", f"{stack.host}/lab/changed:nydus": "changed"}
    load_image(stack, "lab/changed", "changed", payload=PAYLOAD)
    if ref_bin("nydusify") and ref_bin("nydus-image"):
        stack.convert("lab/small:oci", "lab/theirs:nydus", upstream=True)
        images[f"{stack.host}/lab/theirs:nydus"] = "hello"

    def blobs() -> set[str]:
        return {path.name for path in cache.glob("*") if len(path.name) == 64}

    def removed(ref: str) -> None:
        for name in blobs():  # what a minute does
            os.utime(cache / name, (time.time() - 120, time.time() - 120))
        stack.containerd.ctr("images", "rm", "--sync", ref)

    for name in blobs():
        shutil.rmtree(cache / name)
    of: dict[str, set[str]] = {}
    for ref, marker in images.items():
        mark = stack.registry.mark()
        stack.rpull(ref)
        words = stack.ctr_run(ref, "sh", "-c", "cat /marker; echo; sha256sum < /payload; cat /payload.sha256").split()
        assert words[0] == marker
        assert words[1] == words[3]
        data = [one for one in stack.registry.since(mark).blobs().requests if one.status == 206]
        seen = set().union(*of.values()) if of else set()
        fetched = {one.path.rpartition(":")[2] for one in data} & blobs()
        assert not fetched & seen, "a blob of another image was fetched again"
        bootstraps = [*(stack.snapshotter.root / "snapshots").glob("*/fs/image/image.boot")]
        newest = max(bootstraps, key=lambda path: int(path.parts[-4]))
        with open_bootstrap(newest) as image:
            of[ref] = {blob.id for blob in image.blobs}
    first, second, *_ = images
    assert len(of[first] & of[second]) >= 1
    assert of[first] - of[second]
    left = dict(of)
    for ref in (second, *(one for one in images if one != second)):
        removed(ref)
        left.pop(ref)
        kept = set().union(*left.values()) if left else set()
        # at once; after a minute where the last container's reads were still being written when they were made old
        wait_until(lambda wanted=kept: blobs() <= wanted, 100, f"the end of the blobs of {ref}")
        for other in left:
            mark = stack.registry.mark()
            check = "cat /marker; echo; sha256sum < /payload; cat /payload.sha256"
            assert stack.ctr_run(other, "sh", "-c", check).split()[0] == images[other]
            assert stack.registry.since(mark).blobs().count == 0, "what the other image needs is gone"
    assert blobs() == set()
