"""Keys, names, labels, references, digests and namespaces nobody should send, through the real service.

Whatever they are: nothing outside of the root is touched, nothing below it gets a name that a client chose, and every
refusal is a gRPC error that says what is wrong. All ways of running an image lazily are switched on.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nydusfs.containerd.chain import chain_ids
from snapshotter.auth import explain
from tests.lab.daemon import can_mount_fuse
from tests.lab.drivers import fuse_only
from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.snapshots import PREFIX, REF, Client, mounted, option, pull
from tests.lab.stack import Snapshotter
from tests.lab.tiny import noise, tiny_image

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

Code = grpc.StatusCode
IMAGE = "127.0.0.1:1/lab/a:b"
REFUSALS = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.UNAVAILABLE}
# Directories of a snapshot by its number; `fs`, `work` and the rest below it.
OWN_NAMES = {"fs", "work", "mnt", "snapshot.json"}
LABELS = [
    REF,
    "containerd.io/gc.root",
    *(
        PREFIX + name
        for name in (
            "nydus-bootstrap", "nydus-blob", "nydus-ref", "nydus-signature", "cri.image-ref", "cri.layer-digest",
            "cri.image-layers", "cri.manifest-digest", "diff-id", "stargz", "stargz/toc.digest", "nydus-stargz-toc",
            "nydus-tarfs", "tarfs-hint", "nydus-twin", "nydus-index-alternative", "remote/stargz.reference",
            "uidmapping", "gidmapping", "overlay.volatile", "pullusername", "pullsecret",
        )
    ),
]  # fmt: skip


requests = fuse_only("what is asked for is looked at before anything is mounted")


@pytest.fixture(scope="module")
def node(fs_driver: str) -> Iterator[Snapshotter]:
    work = work_dir()
    try:
        case = work / "case"
        case.mkdir()
        made = tiny_image(case, {"f": noise(5000)})
        os.rename(made.bootstrap, case / "image.boot")
        (case / made.blob_id).write_bytes(made.blob)
        for place in ("victim", "r/victim", "r/snapshots/victim", "r/cache/victim", "r/auth/victim", "r/config/victim"):
            (work / place).mkdir(parents=True)
            (work / place / "file").write_text("here")
        (work / "s.toml").write_text(
            "version = 1\n[experimental]\nenable_stargz = true\nenable_referrer_detect = true\n"
            "enable_index_detect = true\n[experimental.tarfs]\nenable_tarfs = true\n"
        )
        backend = {"type": "localfs", "config": {"dir": str(case)}}
        template = {"device": {"backend": backend, "cache": {"type": "blobcache"}}, "mode": "direct"}
        with Snapshotter(work, template, arguments=("--config", str(work / "s.toml"))) as running:
            yield running
    finally:
        unmount_below(work)
        remove_tree(work)


def names(node: Snapshotter) -> st.SearchStrategy[str]:
    """Texts that would lead somewhere if any of them became a path, an option, a query or a line of a log."""
    victim = str(node.work / "victim")
    hostile = [
        "", ".", "..", "../victim", "../../victim", "../../../../../../victim/file", victim, f"/{victim}", "1", "1/fs",
        f"x/../../..{victim}", "victim", "victim/file", "new-1-1", "snapshot.json", "metadata.sqlite",
        "%2e%2e%2fvictim",
        "a\0b", "\0", "a\nlevel=error msg=forged", "\x1b[31m", "\u202e", "ü" * 300, "x" * 5000, "x" * 200_000, "~",
        "\U0001f600" * 50_000, "$HOME",
        "'; DROP TABLE snapshots; --", '"', "*", "a,b:c", "a,upperdir=/,lowerdir=/", "true", "-1", "9" * 30, "true\0",
        "sha256:" + "0" * 64, "sha256:../../victim", "sha256:" + "../" * 21 + "x", "sha256:" + "A" * 64,
        "sha256:" + "\u0663" * 64, "sha512:" + "0" * 128, IMAGE, "127.0.0.1:1/lab/../../victim",
        "127.0.0.1:1/a@sha256:0",
        "../..:5000/x", "127.0.0.1:1/a/b:../../victim", f"file://{victim}", "127.0.0.1:99999999/a", "[::1]:1/a/b",
        "@", ":",
        "0:0:1", "0:100000:65536", "0:4294967295:2", "0:-1:1", "0:1:1\n", "\u0661:\u0661:\u0661",
    ]  # fmt: skip
    return st.one_of(st.sampled_from(hostile), st.text(max_size=40))


def seen(node: Snapshotter) -> dict[str, tuple[int, int, int, int]]:
    """All that lies outside of the root, and the victims inside, with what a change of them would change."""
    found = {}
    # no glob: that fails where a directory goes while it looks
    victims = [Path(folder, "victim") for folder, folders, _ in os.walk(node.root) if "victim" in folders]
    for top in (node.work, *victims):
        for folder, folders, files in os.walk(top):
            if Path(folder) == node.work:
                folders.remove("r")
            for name in (".", *files):
                path = Path(folder, name)
                if path.name in ("snapshotter.log", "g.sock") or stat.S_ISSOCK(path.lstat().st_mode):
                    continue
                facts = path.lstat()
                found[str(path)] = (facts.st_ino, facts.st_mode, facts.st_size, facts.st_mtime_ns)
    return found


def foreign(node: Snapshotter) -> list[str]:
    """Paths in the snapshots directory that a client must have named."""
    found = []
    for entry in os.scandir(node.root / "snapshots"):
        if entry.name == "victim":
            continue
        if not entry.name.isdecimal():
            found.append(entry.name)
        else:
            found += [f"{entry.name}/{name}" for name in os.listdir(entry.path) if name not in OWN_NAMES]
    return found


def refused(error: grpc.RpcError) -> None:
    """The error is one that a client can act on."""
    code, said = error.code(), error.details()
    assert code in REFUSALS, (code, said)
    assert 5 <= len(said) <= 4096 and said.isprintable() and "Traceback" not in said, (code, said)


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@requests
def test_whatever_is_sent(node: Snapshotter, data: st.DataObject) -> None:
    text = names(node)
    labels = st.dictionaries(st.one_of(st.sampled_from(LABELS), text), text, max_size=4)
    before = seen(node)
    namespace = data.draw(st.sampled_from(["default", "../../victim", "/", "a b"]))
    with Client(node.socket, {"containerd-namespace": namespace}, data.draw(text)) as client:
        used = [""]

        def key() -> str:
            return str(data.draw(st.one_of(text, st.sampled_from(used))))

        calls: list[Callable[[], object]] = [
            lambda: used.append(fresh := key()) or client.prepare(fresh, key(), data.draw(labels)),
            lambda: used.append(fresh := key()) or client.view(fresh, key()),
            lambda: client.commit(key(), key(), data.draw(labels), data.draw(st.one_of(st.just(""), text))),
            lambda: client.mounts(key()),
            lambda: client.stat(key()),
            lambda: client.usage(key()),
            lambda: client.update(key(), data.draw(labels), data.draw(st.lists(text, max_size=2))),
            lambda: client.list(*data.draw(st.lists(text, max_size=2))),
            lambda: client.remove(key()),
            client.cleanup,
        ]
        for call in data.draw(st.lists(st.sampled_from(calls[:-1]), min_size=2, max_size=5)):
            try:
                call()
            except grpc.RpcError as error:
                refused(error)
        assert foreign(node) == []
        for info in client.list():
            for mount in client.mounts(info.name) if info.kind in (1, 2) else ():
                texts = [option(mount, name) for name in ("lowerdir", "upperdir", "workdir")]
                places = [mount.source] if mount.type == "bind" else ":".join(filter(None, texts)).split(":")
                assert all(place.startswith(f"{node.root}/") and ".." not in place for place in places), mount
                assert all(word in ("ro", "rw", "rbind", "volatile") or "=" in word for word in mount.options), mount
        for _ in range(6):  # children first
            for info in client.list():
                try:
                    client.remove(info.name)
                except grpc.RpcError as error:
                    refused(error)
        client.cleanup()
        assert client.list() == []
    assert seen(node) == before


def mapping(text: str) -> dict[str, str]:
    return {PREFIX + "uidmapping": text, PREFIX + "gidmapping": text}


DIGESTS = ["sha256:" + hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]
CHAIN = chain_ids(DIGESTS)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@requests
def test_whose_credentials_are_asked_for(node: Snapshotter, data: st.DataObject) -> None:
    before = seen(node)
    try:
        answer = explain.ask(str(node.socket), data.draw(names(node)), timeout=30)
        assert answer["source"] is None and explain.lines(answer)
    except grpc.RpcError as error:
        assert error.code() is Code.INVALID_ARGUMENT
        refused(error)
    assert seen(node) == before


@pytest.mark.parametrize(
    ("labels", "code", "says"),
    [
        ({PREFIX + "uidmapping": "0:1:1"}, Code.INVALID_ARGUMENT, "must be equal"),
        (mapping("../1"), Code.INVALID_ARGUMENT, "container:host:length"),
        (mapping("0:1:4294967296"), Code.INVALID_ARGUMENT, "32-bit"),
        ({REF: CHAIN[0], PREFIX + "nydus-blob": "1", PREFIX + "cri.layer-digest": DIGESTS[1]}, Code.INVALID_ARGUMENT,
         f"where {DIGESTS[1]} is right"),
        ({REF: DIGESTS[0], PREFIX + "nydus-blob": "1", PREFIX + "cri.layer-digest": DIGESTS[0]}, Code.ALREADY_EXISTS,
         f'target snapshot "{DIGESTS[0]}"'),
    ],
)  # fmt: skip
@requests
def test_labels_of_a_layer(node: Snapshotter, labels: dict[str, str], code: Code, says: str) -> None:
    with Client(node.socket) as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.prepare("k", "", labels)
        assert caught.value.code() is code and says in caught.value.details()
        for info in client.list():
            client.remove(info.name)


@requests
def test_a_data_layer_cannot_stand_for_a_layer_of_another_image(node: Snapshotter) -> None:
    """Its image's config would only have to claim the diff ids of that other image."""
    with Client(node.socket) as client:
        blob = {PREFIX + "nydus-blob": "true", PREFIX + "cri.image-ref": IMAGE}
        with pytest.raises(grpc.RpcError, match="target snapshot"):
            client.prepare("a", "", {REF: CHAIN[0], PREFIX + "cri.layer-digest": DIGESTS[0], **blob})
        with pytest.raises(grpc.RpcError, match="claims chain id"):
            client.prepare("b", CHAIN[0], {REF: CHAIN[2], PREFIX + "cri.layer-digest": DIGESTS[1], **blob})
        with pytest.raises(grpc.RpcError, match="target snapshot"):
            client.prepare("b", CHAIN[0], {REF: CHAIN[1], PREFIX + "cri.layer-digest": DIGESTS[1], **blob})
        assert sorted(info.name for info in client.list()) == sorted(CHAIN[:2])
        client.remove(CHAIN[1])
        client.remove(CHAIN[0])


@requests
def test_an_image_cannot_say_what_only_the_snapshotter_may(node: Snapshotter) -> None:
    """Annotations of a layer become labels. With these a shared base layer would become somebody else's image."""
    own = {PREFIX + name: "true" for name in ("stargz", "nydus-stargz-toc", "nydus-tarfs", "nydus-index-alternative")}
    own |= {PREFIX + "nydus-twin": DIGESTS[0]}
    # without the image's name, or this node would make a tarfs layer of it
    said = {REF: DIGESTS[1], PREFIX + "cri.layer-digest": DIGESTS[1], "x": "y"}
    with Client(node.socket) as client:
        client.prepare("extract", "", {**said, **own})
        client.commit("base", "extract", {**said, **own})
        assert dict(client.stat("base").labels) == said
        for mask in ((), ("labels",), tuple(f"labels.{name}" for name in own)):
            client.update("base", {**said, **own}, mask)
            assert dict(client.stat("base").labels) == said, mask
        (mount,) = client.prepare("c", "base", own)
        assert option(mount, "lowerdir") == f"{node.root}/snapshots/{_number(client, 'base')}/fs"
        for key in ("c", "base"):
            client.remove(key)


def _number(client: Client, key: str) -> str:
    (mount,) = client.view("look", key)
    client.remove("look")
    return Path(mount.source).parent.name


def test_files_of_a_meta_layer_are_not_followed(node: Snapshotter, tmp_path: Path) -> None:
    """What a layer unpacks where a bootstrap is looked for: links, devices, pipes, giants, in each part of the path."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "image.boot").write_bytes((node.work / "case" / "image.boot").read_bytes())

    def link(fs: Path) -> None:
        (fs / "image").mkdir()
        (fs / "image" / "image.boot").symlink_to(secret / "image.boot")

    def folder_link(fs: Path) -> None:
        (fs / "image").symlink_to(secret)

    def dangling(fs: Path) -> None:
        (fs / "image").mkdir()
        (fs / "image" / "image.boot").symlink_to("/nowhere/at/all")

    def loop(fs: Path) -> None:
        (fs / "image").symlink_to("image")

    def relative(fs: Path) -> None:
        (fs / "image.boot").symlink_to(os.path.relpath(secret / "image.boot", fs))

    def pipe(fs: Path) -> None:
        (fs / "image").mkdir()
        os.mkfifo(fs / "image" / "image.boot")

    def device(fs: Path) -> None:
        (fs / "image").mkdir()
        os.mknod(fs / "image" / "image.boot", stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero

    def directory(fs: Path) -> None:
        (fs / "image" / "image.boot").mkdir(parents=True)

    def sparse(fs: Path) -> None:
        (fs / "image").mkdir()
        with (fs / "image" / "image.boot").open("wb") as file:
            file.truncate(1 << 40)

    def sparse_v6(fs: Path) -> None:
        (fs / "image").mkdir()
        with (fs / "image" / "image.boot").open("wb") as file:
            file.write((secret / "image.boot").read_bytes())
            file.truncate(1 << 40)

    kinds = (link, folder_link, dangling, loop, relative, pipe, device, directory, sparse)
    said = {REF: DIGESTS[2], PREFIX + "cri.image-ref": IMAGE, PREFIX + "nydus-bootstrap": "true"}
    with Client(node.socket) as client:
        for number, kind in enumerate(kinds):
            with mounted(client.prepare(f"x{number}", "", said), tmp_path / "unpack") as fs:
                kind(fs)
            client.commit(f"meta{number}", f"x{number}", said)
            with pytest.raises(grpc.RpcError) as caught:
                client.prepare(f"c{number}", f"meta{number}")
            assert caught.value.code() is Code.NOT_FOUND, (kind.__name__, caught.value)
            refused(caught.value)
        # a giant that begins like an image costs nothing but its name
        with mounted(client.prepare("giant", "", said), tmp_path / "unpack") as fs:
            sparse_v6(fs)
        client.commit("giant-meta", "giant", said)
        try:
            client.prepare("giant-c", "giant-meta")
        except grpc.RpcError as error:
            assert error.code() is not Code.INTERNAL, error
            said = error.details()
            assert "image.boot" in said or "its metadata of 1048576 MiB is more than" in said
        # beside all of them a good image runs, and what is removed goes
        meta = pull(client, node.work / "case", tmp_path, IMAGE)
        client.prepare("good", meta)
        for _ in range(3):
            for info in client.list():
                try:
                    client.remove(info.name)
                except grpc.RpcError as error:
                    refused(error)
        client.cleanup()
    assert (secret / "image.boot").exists()
