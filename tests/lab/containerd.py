"""A private containerd: own root, state, sockets and namespace, beside any the system runs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab.paths import REPO
from tests.lab.process import Child, LabError, end_processes, processes_mentioning, run, unmount_below

UNUSED_PLUGINS = [
    *(f"io.containerd.snapshotter.v1.{name}" for name in ("btrfs", "zfs", "aufs", "devmapper", "blockfile", "erofs")),
    "io.containerd.differ.v1.erofs",
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt",
]
CRI_2 = "io.containerd.grpc.v1.cri"
IMAGES_3, RUNTIME_3 = "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"
RUNC = "io.containerd.runc.v2"
NO_PAUSE = "127.0.0.1:1/none/pause:1"


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def _toml(table: Mapping[str, Any], *path: str) -> Iterator[str]:
    """What `tomllib` read, as text again; JSON writes strings, numbers and lists of them as TOML does."""
    if path:
        yield f"[{'.'.join(map(_key, path))}]\n"
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            items = (", ".join(f"{_key(name)} = {json.dumps(item)}" for name, item in one.items()) for one in value)
            yield f"{_key(key)} = [{', '.join('{' + item + '}' for item in items)}]\n"
        elif not isinstance(value, Mapping):
            yield f"{_key(key)} = {json.dumps(value)}\n"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _toml(value, *path, key)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def find_containerd() -> Path | None:
    found = shutil.which("containerd")
    return Path(found) if found else None


def version_of(binary: Path) -> tuple[int, ...]:
    """(1, 6, 20) of Debian's, (2, 3, 4) of a newer one."""
    text = run([binary, "--version"], timeout=20).stdout
    match = re.search(r"\bv?(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise LabError(f"{binary} --version says {text!r}")
    return tuple(int(part) for part in match.groups())


class Containerd:
    """`binary` is Debian's 1.6 or any newer one; its shim and ctr are taken from beside it, else from PATH.

    `changes`: to its configuration, table by table, None takes a key away. `snippet`: of another version than its own.
    """

    def __init__(
        self,
        work: Path,
        snapshotter_socket: Path | None = None,
        binary: Path | None = None,
        pause_ref: str = "",
        hosts: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        changes: Mapping[str, Any] | None = None,
        snippet: str = "",
        snapshotter_root: Path | None = None,
    ) -> None:
        found = binary or find_containerd()
        if found is None:
            raise LabError("containerd is not installed: apt-get install containerd runc")
        self.binary, self.work, self.snapshotter_socket = found, work, snapshotter_socket
        self.pause_ref, self.hosts, self.env = pause_ref, dict(hosts or {}), env
        self.changes, self.snippet, self.snapshotter_root = dict(changes or {}), snippet, snapshotter_root
        self.socket = work / "c.sock"
        self.log = work / "containerd.log"
        self.hosts_dir = work / "certs.d"
        self.cni_dir = work / "cni"
        self.namespace = f"ny{secrets.token_hex(4)}"  # /run/containerd/runc/NAMESPACE is shared with other instances
        self.version = version_of(found)
        beside = found.with_name("ctr")
        self.ctr_binary = beside if beside.exists() else Path(shutil.which("ctr") or "ctr")
        self._child: Child | None = None
        self._others = -1

    def start(self) -> Containerd:
        """Starts it; a proxy snapshotter must already answer: containerd backs off up to 3 s from one that does not."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.cni_dir.mkdir(exist_ok=True)
        for host, url in self.hosts.items():
            self.add_host(host, url)
        (self.cni_dir / "10-lo.conflist").write_text(
            '{"cniVersion": "0.4.0", "name": "lo", "plugins": [{"type": "loopback"}]}\n'
        )
        config = self.work / "config.toml"
        config.write_text(self._config())
        path = f"{self.binary.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        env = {"PATH": path, "HOME": str(self.work), "DOCKER_CONFIG": str(self.work), **(self.env or {})}
        if self._others < 0:  # else it was started before
            self._others = os.open("/run", os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._others, fcntl.LOCK_SH)
        self._child = Child("containerd", [self.binary, "-c", config], self.log, env=env)
        self._child.wait_ready(lambda: self.ctr("version", check=False).returncode == 0)
        return self

    @property
    def pid(self) -> int:
        if self._child is None:
            raise LabError("containerd is not running")
        return self._child.pid

    def add_host(self, host: str, url: str) -> None:
        """Plain-HTTP access to a registry for CRI and nerdctl (`--hosts-dir`)."""
        folder = self.hosts_dir / host
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts.toml").write_text(
            f'server = "{url}"\n[host."{url}"]\n  capabilities = ["pull", "resolve", "push"]\n'
        )

    def _config(self) -> str:
        """The snippet that people add for this version, this machine's needs, then what the test wants otherwise."""
        third = self.version >= (2, 0)
        config: dict[str, Any] = {"version": 3 if third else 2}
        if self.snapshotter_socket is not None:
            name = self.snippet or ("2.x" if third else "1.7" if self.version >= (1, 7) else "1.6")
            config = tomllib.loads((REPO / "examples" / "containerd" / f"config-{name}.toml").read_text())
            third = config["version"] >= 3
            proxy = config["proxy_plugins"]["nydus"]
            proxy["address"] = str(self.snapshotter_socket)
            if "exports" in proxy and self.snapshotter_root is not None:
                proxy["exports"]["root"] = str(self.snapshotter_root)
        lab: dict[str, Any] = {
            "root": f"{self.work}/root",
            "state": f"{self.work}/state",
            "oom_score": 0,
            "disabled_plugins": UNUSED_PLUGINS,
            "grpc": {"address": str(self.socket)},
            "plugins": self._cri_3() if third else self._cri_2(),
        }
        _merge(config, lab)
        _merge(config, self.changes)
        return "".join(_toml(config))

    def _cri_2(self) -> dict[str, Any]:
        return {
            CRI_2: {
                "sandbox_image": self.pause_ref or NO_PAUSE,
                "disable_apparmor": True,
                "disable_tcp_service": True,
                "stream_server_address": "127.0.0.1",
                "stream_server_port": "0",
                "restrict_oom_score_adj": True,
                "stats_collect_period": 1,
                "containerd": {
                    "runtimes": {"runc": {"runtime_type": RUNC, "options": {"SystemdCgroup": False}}},
                },
                "cni": {"bin_dir": "/usr/lib/cni", "conf_dir": str(self.cni_dir)},
                "registry": {"config_path": str(self.hosts_dir)},
            }
        }

    def _cri_3(self) -> dict[str, Any]:
        return {
            IMAGES_3: {
                "pinned_images": {"sandbox": self.pause_ref or NO_PAUSE},
                "registry": {"config_path": str(self.hosts_dir)},
                "stats_collect_period": 1,
            },
            RUNTIME_3: {
                "disable_apparmor": True,
                "restrict_oom_score_adj": True,
                "containerd": {
                    "runtimes": {"runc": {"runtime_type": RUNC, "options": {"SystemdCgroup": False}}},
                },
                "cni": {"bin_dirs": ["/usr/lib/cni"], "conf_dir": str(self.cni_dir)},
            },
            CRI_2: {
                "stream_server_address": "127.0.0.1",
                "stream_server_port": "0",
                "disable_tcp_service": True,
            },
        }

    def ctr_argv(self, *args: str | Path) -> list[str]:
        return [str(self.ctr_binary), "-a", str(self.socket), "-n", self.namespace, *map(str, args)]

    def ctr(self, *args: str | Path, timeout: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.ctr_argv(*args), timeout=timeout, check=check)

    def ctr_run(self, *args: str | Path, namespace: str = "", timeout: float = 120.0) -> str:
        """What a short container printed, on both of its streams; `args` as behind `ctr run`.

        Not by way of ctr: on a busy machine it drops what a container prints before ctr has opened its pipes (with
        overlayfs, `cat` of a small file beside three busy processes: 9 of 380 runs printed nothing and were a success).
        """
        return self._printed(["-n", namespace or self.namespace, "run"], *args, timeout=timeout)

    def ctr_exec(self, container: str, *command: str, timeout: float = 120.0) -> str:
        """The same of a command in a container that runs, of which ctr drops some too (1 of 150)."""
        number = f"e{time.monotonic_ns()}"
        return self._printed(["tasks", "exec"], "--exec-id", number, container, *command, timeout=timeout)

    def _printed(self, call: Sequence[str], *args: str | Path, timeout: float) -> str:
        said = self.work / f"said-{time.monotonic_ns()}"
        try:
            self.ctr(*call, "--log-uri", f"file://{said}", *args, timeout=timeout)
            return said.read_text(errors="replace")
        except LabError as error:
            raise LabError(f"{error}{said.read_text(errors='replace') if said.exists() else ''}") from None
        finally:
            said.unlink(missing_ok=True)

    def nerdctl_argv(self, nerdctl: Path, *args: str | Path, snapshotter: str = "nydus") -> list[str]:
        return [
            str(nerdctl),
            "--address",
            str(self.socket),
            "--namespace",
            self.namespace,
            "--snapshotter",
            snapshotter,
            "--data-root",
            str(self.work / "nerdctl"),
            "--cgroup-manager",
            "cgroupfs",
            "--hosts-dir",
            str(self.hosts_dir),
            "--cni-path",
            "/usr/lib/cni",
            "--cni-netconfpath",
            str(self.cni_dir),
            *map(str, args),
        ]

    def nerdctl(
        self, nerdctl: Path, *args: str | Path, snapshotter: str = "nydus", timeout: float = 180.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{self.binary.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.work),
            **(self.env or {}),
        }
        return run(self.nerdctl_argv(nerdctl, *args, snapshotter=snapshotter), timeout=timeout, check=check, env=env)

    def end_containers(self) -> None:
        """Kills every task and removes every container of every namespace."""
        for space in self._names("namespaces", "ls", "-q"):
            prefix = [str(self.ctr_binary), "-a", str(self.socket), "-n", space]
            for task in run([*prefix, "tasks", "ls", "-q"], timeout=30, check=False).stdout.split():
                run([*prefix, "tasks", "rm", "-f", task], timeout=30, check=False)
            for container in run([*prefix, "containers", "ls", "-q"], timeout=30, check=False).stdout.split():
                run([*prefix, "containers", "rm", container], timeout=30, check=False)

    def _names(self, *args: str) -> Sequence[str]:
        return run([self.ctr_binary, "-a", self.socket, *args], timeout=30, check=False).stdout.split()

    def stop(self) -> None:
        """Ends containers, containerd and the shims of this instance; unmounts what they left."""
        if self._child is None:
            return
        spaces = [self.namespace]
        if self._child.alive():
            try:
                spaces = sorted({self.namespace, *self._names("namespaces", "ls", "-q")})
                self.end_containers()
            except LabError:
                pass  # a containerd that does not answer is ended below all the same
            self._child.stop()
        # Shims outlive containerd; they carry our socket's path in `-address`.
        end_processes(processes_mentioning(str(self.socket)), timeout=5)
        unmount_below(self.work)
        for space in spaces:
            for folder in [Path("/sys/fs/cgroup", space), *Path("/sys/fs/cgroup").glob(f"*/{space}")]:
                try:
                    folder.rmdir()
                except OSError:
                    pass
            for base in ("/run/containerd/runc", "/run/containerd/fifo"):
                if space != "default" and space != "k8s.io":
                    shutil.rmtree(f"{base}/{space}", ignore_errors=True)
        try:
            # Another instance may have made one of these this moment, for what it is about to put there.
            fcntl.flock(self._others, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not Path("/run/containerd/containerd.sock").exists():
                # Made for our shims; a system containerd keeps its own here.
                for name in ("s", "fifo", "runc/k8s.io", "runc/default", "runc", ""):
                    with suppress(OSError):
                        Path("/run/containerd", name).rmdir()
        except BlockingIOError:
            pass  # the last one removes them
        finally:
            os.close(self._others)
            self._others = -1
        self._child = None

    def __enter__(self) -> Containerd:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
