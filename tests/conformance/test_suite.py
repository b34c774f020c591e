"""containerd's own snapshotter checks, all 21: one after another, side by side, and with SIGKILL between them."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from tests.lab.paths import ref_bin
from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.snapshots import PREFIX, Client, clean
from tests.lab.stack import Snapshotter, daemon_config

pytestmark = [pytest.mark.root, pytest.mark.interop, pytest.mark.timeout(600)]

CHECKS = 21


def run_suite(parallel: int, between: Callable[[Snapshotter], None] | None = None) -> None:
    """All checks must pass. `between` is called when a check has ended and before the next begins."""
    suite = ref_bin("snapshot-suite")
    if suite is None:
        pytest.skip("interop: containerd's snapshot-suite is not here")
    work = work_dir()
    scratch = work / "tmp"
    scratch.mkdir()
    env = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": str(scratch),
        "SNAPSHOT_SUITE_NAME": "overlayfs",  # other names ask for renames of lower directories: no overlayfs
    }

    def checks(ours: Snapshotter, *arguments: str) -> list[tuple[str, str]]:
        done = subprocess.run(
            [suite, "-test.v", "-test.root", *arguments],
            env={**env, "SNAPSHOT_SOCKET": str(ours.socket)},
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=540,  # 128 layers are as many commits, of which a slow disk has one a second
        )
        results = re.findall(r"^\s+--- (PASS|FAIL|SKIP): \S+/(\w+)", done.stdout, re.M)
        failed = [name for verdict, name in results if verdict != "PASS"]
        assert not failed, f"{failed}\n{done.stdout[-6000:]}"
        assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:])
        return results

    try:
        with Snapshotter(work / "s", daemon_config(prefetch=False)) as ours:
            if between is None:
                results = checks(ours, "-test.parallel", str(parallel))
            else:
                listed = subprocess.run([suite, "-test.list", "."], env=env, cwd=work, capture_output=True, text=True)
                (top,) = re.findall(r"^Test\w+", listed.stdout, re.M)
                results = []
                for name in NAMES:
                    results += checks(ours, "-test.run", f"^{top}$/^{name}$")
                    between(ours)
            with Client(ours.socket) as client:
                left = clean(client, ours.root)
                rows = len(client.list())
        assert len(results) == CHECKS
        assert len({name for _, name in results}) == CHECKS
        assert all(name.isdecimal() for name in left)
        assert len(left) == rows
    finally:
        unmount_below(work)
        remove_tree(work)


NAMES = [
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove",
    "Walk", "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "ViewReadonly",
    "StatInWalk", "CloseTwice", "RootPermission", "Rename", "128LayersMount",
]  # fmt: skip


def test_containerds_suite_passes_21_of_21() -> None:
    run_suite(parallel=1)


def test_with_all_checks_at_once() -> None:
    run_suite(parallel=CHECKS)


def test_with_a_sigkill_between_any_two_checks() -> None:
    def kill(ours: Snapshotter) -> None:
        ours.kill()
        ours.start()

    run_suite(parallel=1, between=kill)


def test_what_containerd_2_says_besides() -> None:
    """Layers unpacked side by side (rebase at Commit), the labels of 2.2, fields of messages to come."""
    work = work_dir()
    try:
        arguments = ("--daemon-mode", "dedicated")
        with (
            Snapshotter(work / "s", daemon_config(prefetch=False), arguments=arguments) as ours,
            Client(ours.socket) as client,
        ):
            layers = range(8)
            labels = {PREFIX + "diff-id": "sha256:d", PREFIX + "parent-chain-id": "sha256:p"}

            def unpack(number: int) -> None:
                (mount,) = client.prepare(f"extract-{number}", "", labels)
                (Path(mount.source) / f"layer{number}").write_text("x")

            threads = [threading.Thread(target=unpack, args=(number,)) for number in layers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            for number in layers:
                client.commit(f"c{number}", f"extract-{number}", labels, parent=f"c{number - 1}" if number else "")
                info = client.stat(f"c{number}")
                assert info.parent == (f"c{number - 1}" if number else "")
                assert dict(info.labels) == labels
            (mount,) = client.prepare("container", f"c{layers[-1]}")
            (lower,) = [text for text in mount.options if text.startswith("lowerdir=")]
            assert [next(Path(path).iterdir()).name for path in lower[9:].split(":")] == [
                f"layer{number}" for number in reversed(layers)
            ]
            # refused as containerd's own store refuses it, with the active snapshot as it was
            client.prepare("free")
            client.prepare("bound", "c0")
            for key, parent, code in (
                ("bound", "c1", grpc.StatusCode.INVALID_ARGUMENT),
                ("free", "nobody", grpc.StatusCode.NOT_FOUND),
                ("free", "container", grpc.StatusCode.FAILED_PRECONDITION),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    client.commit("late", key, parent=parent)
                assert caught.value.code() == code
            client.commit("same", "bound", parent="c0")
            # a field nobody knows yet is not an error
            message = pb.PrepareSnapshotRequest(key="future").SerializeToString() + b"\xfa\x01\x03abc"
            prepare = client.channel.unary_unary("/containerd.services.snapshots.v1.Snapshots/Prepare")
            assert prepare(message, timeout=60)
            assert client.stat("future").kind == 2
    finally:
        unmount_below(work)
        remove_tree(work)
