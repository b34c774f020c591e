"""Credentials in labels: used for the image, kept apart from everything that stores or shows labels."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path

import grpc
import pytest

from snapshotter.auth.explain import ask
from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.snapshots import PREFIX, REF, Client
from tests.lab.stack import Snapshotter

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.timeout(120),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

IMAGE = "127.0.0.1:1/lab/merged:v6"
SECRET = "s3cret-of-a-label"
LOGIN = {PREFIX + "pullusername": "agent", PREFIX + "pullsecret": SECRET}


def test_labels_are_used_and_not_stored() -> None:
    template = {
        "device": {"backend": {"type": "registry", "config": {"scheme": "http"}}, "cache": {"type": "blobcache"}}
    }
    work = work_dir()
    try:
        with Snapshotter(work / "s", template, arguments=("--log-level", "debug")) as ours:
            with Client(ours.socket) as client:
                image = {PREFIX + "cri.image-ref": IMAGE}
                labels = {REF: "sha256:meta", PREFIX + "nydus-bootstrap": "true", **image, **LOGIN}
                (mount,) = client.prepare("default/2/extract meta", "", labels)
                (Path(mount.source) / "image").mkdir()
                boot = image_case("v6-merged3") / "image.boot"
                (Path(mount.source) / "image" / "image.boot").write_bytes(boot.read_bytes())
                client.commit("default/3/meta", "default/2/extract meta", labels)
                client.update("default/3/meta", {**labels, PREFIX + "more": "x"})
                client.prepare("default/4/c1", "default/3/meta")
                assert all(SECRET not in str(info) for info in client.list())
                assert client.stat("default/3/meta").labels[PREFIX + "more"] == "x"
            told = ask(str(ours.socket), IMAGE)
            assert (told["source"], told["username"]) == ("labels", "agent")
            (config,) = (ours.root / "config").rglob("config.json")
            auth = json.loads(config.read_text())["device"]["backend"]["config"]["auth"]
            assert base64.b64decode(auth).decode() == f"agent:{SECRET}"
            ours.stop()
            ours.start()
            assert ask(str(ours.socket), IMAGE)["source"] == "labels"  # nobody will send them again
            with pytest.raises(grpc.RpcError) as refused:
                ask(str(ours.socket), "No Image")
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            private = (ours.root / "auth", ours.root / "config")
            seen = 0
            for folder, _, names in os.walk(ours.root):  # both programs are at work in it
                for path in (Path(folder, name) for name in names):
                    with contextlib.suppress(FileNotFoundError):
                        if not path.is_file() or path.is_relative_to(ours.root / "mnt"):
                            continue
                        if any(path.is_relative_to(folder) for folder in private):
                            assert oct(path.stat().st_mode)[-3:] == "600", path
                            seen += 1
                        else:
                            assert SECRET.encode() not in path.read_bytes(), path
            assert seen > 1
    finally:
        unmount_below(work)
        remove_tree(work)
