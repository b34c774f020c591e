"""Files that a pod's annotation names are fetched before its containers read them, by upstream's NRI plugin."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import nothing_stays, require_programs
from tests.lab.cri import Cri
from tests.lab.drivers import both
from tests.lab.process import run, wait_until
from tests.lab.registry import Registry
from tests.lab.sample import pause_image, small_image
from tests.lab.stack import Stack, StackOptions

pytestmark = pytest.mark.timeout(240)

PAYLOAD = 6 << 20


def plugin_sends(controller: Path, annotation: str) -> bytes:
    """At RunPodSandbox prefetchfiles-nri-plugin sends the annotation `containerd.io/nydus-prefetch` to the system
    controller as it is, with Go's HTTP client, and looks at the status alone."""
    body = annotation.encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(controller))
        client.sendall(
            b"PUT /api/v1/prefetch HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\n"
            b"Content-Length: %d\r\nAccept-Encoding: gzip\r\n\r\n%s" % (len(body), body)
        )
        return client.recv(200).split(b"\r\n")[0]


@both
def test_what_a_pods_annotation_names_is_fetched_before_anything_reads_it(tmp_path: Path) -> None:
    require_programs()
    with Registry(tmp_path / "registry") as registry:
        pause_image(tmp_path / "pause").push(registry.host, "lab/pause", "1")
        small_image(tmp_path / "image", payload=PAYLOAD).push(registry.host, "lab/small", "oci")
        toml, controller = tmp_path / "snapshotter.toml", tmp_path / "system.sock"
        toml.write_text(f'version = 1\n[system]\nenable = true\naddress = "{controller}"\n')
        options = StackOptions(
            registry=registry, pause_ref=f"{registry.host}/lab/pause:1", snapshotter_arguments=("--config", str(toml))
        )
        with Stack(options) as stack:
            stack.convert("lab/small:oci", "lab/small:nydus", "--prefetch-dir", "/marker")  # not all of the image
            pods(stack, controller)
            nothing_stays(stack)
    assert stack.leftovers == []


def pods(stack: Stack, controller: Path) -> None:
    ref, root = f"{stack.host}/lab/small:nydus", stack.snapshotter.root
    cri = Cri(stack.containerd.socket, stack.work)

    def explained() -> dict[str, Any]:
        command = [sys.executable, "-m", "snapshotter.nydusctl", "explain", ref, "--json", "--namespace", "k8s.io",
                   "--root", root, "-a", stack.containerd.socket]  # fmt: skip
        return dict(json.loads(run(command, timeout=60).stdout))

    try:
        pod, config = cri.sandbox()
        assert plugin_sends(controller, '[{"image": 7}, "no JSON object"]') == b"HTTP/1.1 200 OK"
        annotation = json.dumps([{"image": ref, "prefetch": "/payload\n/nowhere"}])
        assert plugin_sends(controller, annotation) == b"HTTP/1.1 200 OK"
        log = (root / "logs" / "nydus-snapshotter.log").read_text()
        assert f"2 paths are fetched first at the next mount of {ref}" in log
        image = cri.pull(ref, config)
        container, _ = cri.start(pod, config, image, "sleep", "300")
        wait_until(
            lambda: sum(layer["cached"] for layer in explained()["layers"]) >= PAYLOAD, 60, "the payload in the cache"
        )
        assert explained()["reads"]["bytes"] < PAYLOAD
        cri.stop(container)
        cri.remove(pod)
        cri.remove_image(ref)
    finally:
        cri.close()
