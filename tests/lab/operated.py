"""A node with all that its operators look at: a registry that wants a login, a mirror, metrics and the controllers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nydusfs.unixhttp import UnixConnection
from snapshotter import cgroup
from snapshotter.doctor.finding import Level
from snapshotter.doctor.run import findings
from snapshotter.node import Choices, Node
from tests.lab.process import free_port, remove_tree, unmount_below, work_dir
from tests.lab.registry import Registry
from tests.lab.sample import small_image
from tests.lab.stack import REPO, Stack, StackOptions, program
from tests.lab.tokens import TokenServer

REPOSITORY = "team/app"
CTL = [sys.executable, "-m", "snapshotter.nydusctl"]


class Lab:
    """A stack whose registry wants a login, with a mirror before it, and the operators' sockets."""

    def __init__(self, stack: Stack, work: Path, toml: Path, metrics: int, debug: int) -> None:
        self.stack, self.work, self.toml, self.metrics, self.debug = stack, work, toml, metrics, debug
        self.ref = f"{stack.host}/{REPOSITORY}:nydus"
        self.root = stack.snapshotter.root
        self.system = work / "system.sock"
        self.unit = work / "good.service"
        text = (REPO / "systemd" / "containerd-nydus-grpc.service").read_text()
        installed = str(program("containerd-nydus-grpc"))
        self.unit.write_text(text.replace("/usr/local/bin/containerd-nydus-grpc", installed))

    def choices(self, **more: Any) -> Choices:
        arguments = ("--config", str(self.toml), "--config-path", str(self.stack.snapshotter.work / "nydusd.json"),
                     "--address", str(self.stack.snapshotter.socket))  # fmt: skip
        return Choices(
            root=str(self.root),
            arguments=arguments,
            containerd=str(self.stack.containerd.socket),
            **{"unit": str(self.unit), **more},
        )

    def doctor(self, **more: Any) -> dict[str, Level]:
        """The worst level of each check, but for what is well and what this machine's kernel and disk are like."""
        found: dict[str, Level] = {}
        self.texts: dict[str, str] = {}
        for one in findings(Node(self.choices(**more))):
            if one.level > Level.OK and one.check != "machine.kernel":
                assert one.remedy, one
                found[one.check] = max(one.level, found.get(one.check, Level.OK))
                self.texts[one.check] = one.text
        return found

    def config_file(self) -> Path:
        """Of nydusd for the one image."""
        (path,) = self.root.glob("config/*/*/config.json")
        return path

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = UnixConnection(self.system, 30)
        with contextlib.closing(connection):
            connection.request(method, path, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def fetch(self, port: int, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text

    def mountpoint(self) -> Path:
        (mount,) = [path for path in (self.root / "mnt").iterdir() if path.name.isdecimal()]
        return mount


def group() -> Path:
    second = (cgroup.ROOT / "cgroup.controllers").exists()
    return cgroup.ROOT / cgroup.NAME if second else cgroup.ROOT / "memory" / cgroup.NAME


def remove_group() -> None:
    for path in (group(), group().parent):
        with contextlib.suppress(OSError):  # not empty: somebody else's as well
            path.rmdir()


@contextlib.contextmanager
def operated() -> Iterator[Lab]:
    with contextlib.ExitStack() as exits:
        work = work_dir()
        exits.callback(remove_tree, work)
        exits.callback(unmount_below, work)
        exits.callback(remove_group)
        tokens = exits.enter_context(TokenServer(work / "tokens"))
        with Registry(work / "reg") as open_door:
            small_image(work / "image", payload=8 << 20).push(open_door.host, REPOSITORY, "oci")
        registry = exits.enter_context(Registry(work / "reg", token_realm=tokens.realm))
        environment = {"DOCKER_CONFIG": str(tokens.docker_config(work / "login", registry.host))}
        metrics, debug = free_port(), free_port()
        toml = work / "snapshotter.toml"
        toml.write_text(
            f'version = 1\n[system]\nenable = true\naddress = "{work}/system.sock"\n'
            f'[system.debug]\npprof_address = "127.0.0.1:{debug}"\ndaemon_cpu_profile_duration_secs = 1\n'
            f'[metrics]\naddress = "127.0.0.1:{metrics}"\ncollect_interval = "1s"\nhung_io_interval = "1s"\n'
            '[log]\nformat = "json"\n'
            '[cgroup]\nenable = true\nmemory_limit = "1GiB"\n'
        )
        options = StackOptions(
            registry=registry, mirror=True, prefetch=False, env=environment,
            snapshotter_arguments=("--config", str(toml)))  # fmt: skip
        stack = exits.enter_context(Stack(options))
        stack.convert(f"{REPOSITORY}:oci", f"{REPOSITORY}:nydus", env={**os.environ, **environment})
        made = Lab(stack, work, toml, metrics, debug)
        stack.rpull(made.ref, env={**os.environ, **environment})
        assert stack.ctr_run(made.ref, "cat", "/marker").startswith("hello")
        yield made
    assert stack.leftovers == []
