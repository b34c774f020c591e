"""Registry, shaped link, mirror, snapshotter and containerd as one context manager under one short directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from snapshotter.nydusd_api import NydusdApi
from tests.lab import daemon
from tests.lab.containerd import Containerd
from tests.lab.interpose import Interposer
from tests.lab.mirror import Mirror
from tests.lab.paths import ref_bin
from tests.lab.process import (
    Child,
    LabError,
    can_connect,
    end_processes,
    parent_of,
    processes_mentioning,
    remove_tree,
    run,
    unmount_below,
    work_dir,
)
from tests.lab.registry import Registry
from tests.lab.shaper import ShapedLink

REPO = Path(__file__).resolve().parents[2]
LINES = 80  # of each log that a failure shows
_live: weakref.WeakSet[Snapshotter] = weakref.WeakSet()


def last_words() -> list[str]:
    """What the snapshotters and nydusd said that run now: whichever client ran a container that failed, by this it can
    be explained. An error that ends them has it as a note."""
    return [said for one in list(_live) if (said := one.said())]


def program(name: str) -> Path:
    """A console script of this package: beside the running interpreter, else in PATH."""
    beside = Path(sys.executable).with_name(name)
    found = beside if beside.exists() else Path(shutil.which(name) or "")
    if not found.is_file():
        raise LabError(f"{name} is not installed beside {sys.executable}: pip install -e {REPO}")
    return found


def daemon_config(
    mirrors: list[dict[str, Any]] | None = None,
    *,
    prefetch: bool = True,
    work_dir: str = "/var/lib/nydus/cache/",
    **backend: Any,
) -> dict[str, Any]:
    """The JSON of the deployment scenario (examples/config.json), for a plain-HTTP registry on loopback."""
    config: dict[str, Any] = json.loads((REPO / "examples" / "config.json").read_text())
    settings = config["device"]["backend"]["config"]
    settings.update({"scheme": "http", **backend})
    settings["mirrors"] = mirrors or []
    if not mirrors:
        del settings["mirrors"]
    config["fs_prefetch"]["enable"] = prefetch
    config["device"]["cache"]["config"]["work_dir"] = work_dir
    return config


def unit_environment() -> dict[str, str]:
    """What the unit file sets. Upstream's program does not look at it."""
    lines = (REPO / "systemd" / "containerd-nydus-grpc.service").read_text().splitlines()
    words = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    return {name: value for name, _, value in (word.partition("=") for word in words) if name != "HOME"}


class Snapshotter:
    """`containerd-nydus-grpc`: ours, or upstream's with its nydusd when `upstream` is true."""

    def __init__(
        self,
        work: Path,
        config: Mapping[str, Any],
        *,
        upstream: bool = False,
        env: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        mode: str = "",
        nydusd: str = "nydusd",
    ) -> None:
        if daemon.DRIVER and not upstream:
            config = {"fs_driver": daemon.DRIVER, **config}
        self.work, self.config, self.upstream, self.arguments = work, config, upstream, arguments
        self.nydusd = nydusd
        self.root, self.socket, self.log = work / "r", work / "g.sock", work / "snapshotter.log"
        self.env = dict(env or {})
        self.mode = mode or ("dedicated" if upstream else "shared")
        self._child: Child | None = None

    def argv(self) -> list[str]:
        template = self.work / "nydusd.json"
        template.write_text(json.dumps(self.config, indent=2))
        if not self.upstream:
            return [
                str(program("containerd-nydus-grpc")),
                "--config-path",
                str(template),
                "--root",
                str(self.root),
                "--address",
                str(self.socket),
                "--log-level",
                "info",
                *self.arguments,
            ]
        names = ("containerd-nydus-grpc", self.nydusd, "nydus-image")
        binaries = [ref_bin(name) for name in names]
        if None in binaries:
            raise LabError("interop: the reference programs are not here")
        grpc, nydusd, image = (str(binary) for binary in binaries)
        wrapper = self.work / "nydusd"
        # Upstream dies where RLIMIT_NOFILE cannot be raised.
        wrapper.write_text(
            f'#!/bin/sh\ncase "$1" in fuse|singleton) s=$1; shift; exec {nydusd} "$s" --rlimit-nofile 0 "$@";; '
            f'*) exec {nydusd} "$@";; esac\n'
        )
        wrapper.chmod(0o755)
        toml = self.work / "snapshotter.toml"
        toml.write_text(
            f'version = 1\nroot = "{self.root}"\naddress = "{self.socket}"\ndaemon_mode = "{self.mode}"\n'
            f'[system]\nenable = false\n[daemon]\nnydusd_path = "{wrapper}"\nnydusimage_path = "{image}"\n'
            f'nydusd_config = "{template}"\nfs_driver = "fusedev"\nrecover_policy = "restart"\n'
            'failover_policy = "resend"\n'
            '[cgroup]\nenable = false\n[metrics]\naddress = ""\n[log]\nlog_to_stdout = true\nlevel = "info"\n'
        )
        return [grpc, "--config", str(toml), *self.arguments]

    def start(self, timeout: float = 60.0, longest_pause: float = 0.1) -> Snapshotter:
        self.work.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        (self.work / "docker").mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        # An empty docker configuration: a developer's logins must not leak into tests.
        env = {"PATH": path, "HOME": str(self.work), "DOCKER_CONFIG": str(self.work / "docker"), **self.env}
        if "PYTHONPATH" in os.environ:  # the code under test, where it is not what is installed
            env.setdefault("PYTHONPATH", os.environ["PYTHONPATH"])
        self._child = Child("containerd-nydus-grpc", self.argv(), self.log, env=env)
        _live.add(self)
        self._child.wait_ready(lambda: can_connect(self.socket), timeout, longest_pause)
        return self

    @property
    def pid(self) -> int:
        if self._child is None:
            raise LabError("the snapshotter is not running")
        return self._child.pid

    def daemons(self) -> list[int]:
        """Pids of the nydusd processes and other helpers that work for this root."""
        return [pid for pid in processes_mentioning(str(self.root)) if self._child is None or pid != self._child.pid]

    def log_lines(self) -> list[str]:
        return (self.root / "logs" / "nydus-snapshotter.log").read_text().splitlines()

    def said(self) -> str:
        """The end of what it and each nydusd of it said; empty once its directory is gone."""
        try:
            own = "" if self.upstream else "\n".join(self.log_lines()[-LINES:])
        except FileNotFoundError:
            own = ""
        return f"{own}\n{self.nydusd_log()}".strip()

    def nydusd_log(self, lines: int = LINES) -> str:
        """The end of what each nydusd said."""
        found = []
        for path in sorted((self.root / "logs").glob("*/nydusd.*")):
            found += [f"{path.parent.name}/{path.name}:", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(found)

    def services(self) -> list[int]:
        """Those of them that none of the others started: one for each nydusd."""
        pids = self.daemons()
        parents = {pid: parent_of(pid) for pid in pids}
        return [pid for pid in pids if parents[pid] and parents[pid] not in pids]  # 0: a helper that has just ended

    def serving(self) -> list[tuple[int, ...]]:
        """Of each nydusd its keeper and its worker, as it says, and at last their first processes: `daemons` has those
        as well that do one thing and end."""
        infos = [NydusdApi(path).info() for path in sorted((self.root / "socket").glob("*/api.sock"))]
        each = [(int(info.get("keeper_pid") or 0), int(info.get("worker_pid") or 0)) for info in infos]
        return [*each, tuple(self.services())]

    def stop(self) -> None:
        """SIGTERM to the snapshotter alone: by design its daemons live on."""
        if self._child is not None:
            self._child.stop(60)  # what is asserted behind it is what it does last
            self._child = None

    def kill(self) -> None:
        """SIGKILL to the snapshotter alone."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def end_daemons(self) -> None:
        for _ in range(5):  # one of them may be starting another
            pids = processes_mentioning(str(self.root))
            if not pids:
                break
            end_processes(pids)

    def __enter__(self) -> Snapshotter:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.said())
        self.stop()
        self.end_daemons()
        unmount_below(self.work)


@dataclass
class StackOptions:
    """`rtt_ms` and `mbit` together switch the shaped link on; `mirror` a forwarding mirror before it."""

    upstream: bool = False
    rtt_ms: float = 0.0
    mbit: float = 0.0
    mirror: bool = False
    mirror_keep: bool = False
    prefetch: bool = True
    containerd: Path | None = None
    backend: dict[str, Any] = field(default_factory=dict)
    registry: Registry | None = None
    env: dict[str, str] = field(default_factory=dict)
    pause_ref: str = ""
    snapshotter_arguments: tuple[str, ...] = ()
    mode: str = ""
    nydusd: str = "nydusd"  # which of upstream's
    fs_driver: str = ""
    changes: dict[str, Any] = field(default_factory=dict)  # to containerd's configuration
    snippet: str = ""  # of examples/containerd, instead of the one for its version
    interpose: bool = False  # `stack.calls` is between containerd and the snapshotter


class Stack:
    """`with Stack(StackOptions(...)) as stack:` everything up; at the end nothing of it is left.

    Images are pushed to `stack.registry` and named by `stack.host`, which is the shaped link when there is one.
    """

    def __init__(self, options: StackOptions | None = None, work: Path | None = None) -> None:
        self.options = options or StackOptions()
        self.work = work or work_dir()
        self.leftovers: list[str] = []
        self.calls: Interposer | None = None
        self.snapshotter: Snapshotter
        self.containerd: Containerd
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        options = self.options
        try:
            self._exits.callback(self._sweep)
            self.registry = options.registry or self._exits.enter_context(Registry(self.work / "reg"))
            self.link: ShapedLink | None = None
            self.host = self.registry.host
            if options.mbit or options.rtt_ms:
                self.link = self._exits.enter_context(
                    ShapedLink(self.work / "link", self.registry.host, options.rtt_ms, options.mbit)
                )
                self.host = self.link.host
            self.mirror: Mirror | None = None
            mirrors = []
            if options.mirror:
                self.mirror = self._exits.enter_context(
                    Mirror(self.work / "mirror", f"http://{self.host}", keep=options.mirror_keep)
                )
                mirrors.append(
                    {
                        "host": self.mirror.url,
                        "auth_through": False,
                        "headers": {"X-Dragonfly-Registry": f"http://{self.host}"},
                    }
                )
            config = daemon_config(mirrors, prefetch=options.prefetch, **options.backend)
            if options.fs_driver:
                config["fs_driver"] = options.fs_driver
            self.new_node(config)
        except BaseException:
            self._exits.close()
            raise
        return self

    def new_node(self, config: Mapping[str, Any] | None = None, *, number: int | None = None) -> None:
        """A fresh snapshotter and containerd with empty caches; the ones before are ended first."""
        self.end_node()
        self._number = number if number is not None else getattr(self, "_number", 0) + 1
        config = config or self.snapshotter.config
        self.node = self.work / f"n{self._number}"
        self.snapshotter = Snapshotter(
            self.node / "s",
            config,
            upstream=self.options.upstream,
            env=self.options.env,
            # through an interposer nothing shows whose snapshotter this is
            arguments=(
                *self.options.snapshotter_arguments,
                *(["--image-service-address", str(self.node / "c" / "c.sock")] if self.options.interpose else []),
            ),
            mode=self.options.mode,
            nydusd=self.options.nydusd,
        )
        self.snapshotter.start()
        socket = self.snapshotter.socket
        if self.options.interpose:
            self.calls = self._exits.enter_context(Interposer(self.node / "i.sock", socket))
            socket = self.calls.socket
        self.containerd = Containerd(
            self.node / "c",
            socket,
            self.options.containerd,
            pause_ref=self.options.pause_ref or f"{self.registry.host}/lab/pause:1",
            hosts={self.host: f"http://{self.host}", self.registry.host: self.registry.url},
            env=self.options.env,
            changes=self.options.changes,
            snippet=self.options.snippet,
            snapshotter_root=self.snapshotter.root,
        )
        self.containerd.start()
        probe = f"probe-{time.monotonic_ns()}"  # reaches the plugin itself, unlike `plugin ls` and `snapshots ls`
        self.containerd.ctr("snapshots", "--snapshotter", "nydus", "prepare", probe, timeout=30)
        self.containerd.ctr("snapshots", "--snapshotter", "nydus", "rm", probe, timeout=30)

    def end_node(self) -> None:
        """Containers, containerd, snapshotter, daemons, mounts: in the order in which nothing hangs."""
        if not hasattr(self, "snapshotter"):
            return
        if hasattr(self, "containerd"):
            self.containerd.stop()
        self.snapshotter.stop()
        self.snapshotter.end_daemons()
        unmount_below(self.node)

    def _sweep(self) -> None:
        """Last of all, whatever went wrong: end by pid, unmount, delete. `leftovers` says what had to be forced."""
        self.end_node()
        pids = processes_mentioning(str(self.work))
        end_processes(pids)
        self.leftovers = [f"pid {pid}" for pid in pids] + unmount_below(self.work)
        remove_tree(self.work)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.snapshotter.said())
        self._exits.close()

    # Programs against this stack

    def ctr_run(
        self, ref: str, *command: str, snapshotter: str = "nydus", timeout: float = 120.0, net_host: bool = True
    ) -> str:
        """Output of a short command in a container of an image that has been pulled.

        A shim of containerd 1.6 that runs a mount helper may reap it before it has waited for it. It tries ten times
        and gives up: seen once in some twenty full runs on a busy machine, whatever the helper did.
        """
        network = ["--net-host"] if net_host else []
        for last in (False, False, True):
            name = f"c{time.monotonic_ns()}"
            words = ["--rm", *network, "--snapshotter", snapshotter, ref, name, *command]
            try:
                return self.containerd.ctr_run(*words, timeout=timeout)
            except LabError as error:
                if last or "failed with ECHILD" not in str(error):
                    raise
        raise AssertionError("the last round returns or raises")

    def rpull(
        self,
        ref: str,
        *args: str,
        snapshotter: str = "nydus",
        timeout: float = 120.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> str:
        done = run(
            [
                program("ctr-remote"),
                "-a",
                self.containerd.socket,
                "-n",
                self.containerd.namespace,
                "images",
                "rpull",
                "--plain-http",
                "--snapshotter",
                snapshotter,
                *args,
                ref,
            ],
            timeout=timeout,
            check=check,
            env=env,
        )
        return done.stdout + done.stderr

    def convert(
        self,
        source: str,
        target: str,
        *args: str,
        upstream: bool = False,
        timeout: float = 300.0,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """`nydusify convert` on the registry's own port (conversion does not pass the shaped link)."""
        nydusify, image = program("nydusify"), program("nydus-image")
        if upstream:
            other, other_image = ref_bin("nydusify"), ref_bin("nydus-image")
            if other is None or other_image is None:
                raise LabError("interop: the reference programs are not here")
            nydusify, image = other, other_image
        done = run(
            [
                nydusify,
                "convert",
                "--nydus-image",
                image,
                "--source",
                f"{self.registry.host}/{source}",
                "--target",
                f"{self.registry.host}/{target}",
                "--source-insecure",
                "--target-insecure",
                "--work-dir",
                self.work / "nydusify",
                *args,
            ],
            timeout=timeout,
            env=env,
        )
        return done.stdout + done.stderr
