"""A private containerd: own root, state, sockets and namespace, beside any the system runs."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.lab.process import Child, LabError, end_processes, processes_mentioning, run, unmount_below

UNUSED_PLUGINS = [
    *(f"io.containerd.snapshotter.v1.{name}" for name in ("btrfs", "zfs", "aufs", "devmapper", "blockfile", "erofs")),
    "io.containerd.differ.v1.erofs",
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt",
]


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
    """`binary` is Debian's 1.6 or any newer one; its shim and ctr are taken from beside it, else from PATH."""

    def __init__(
        self,
        work: Path,
        snapshotter_socket: Path | None = None,
        binary: Path | None = None,
        pause_ref: str = "",
        hosts: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        found = binary or find_containerd()
        if found is None:
            raise LabError("containerd is not installed: apt-get install containerd runc")
        self.binary, self.work, self.snapshotter_socket = found, work, snapshotter_socket
        self.pause_ref, self.hosts, self.env = pause_ref, dict(hosts or {}), env
        self.socket = work / "c.sock"
        self.log = work / "containerd.log"
        self.hosts_dir = work / "certs.d"
        self.cni_dir = work / "cni"
        self.namespace = f"ny{secrets.token_hex(4)}"  # /run/containerd/runc/NAMESPACE is shared with other instances
        self.version = version_of(found)
        beside = found.with_name("ctr")
        self.ctr_binary = beside if beside.exists() else Path(shutil.which("ctr") or "ctr")
        self._child: Child | None = None

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
        third = self.version >= (2, 0)
        lines = [
            f"version = {3 if third else 2}",
            f'root = "{self.work}/root"',
            f'state = "{self.work}/state"',
            "oom_score = 0",
            f"disabled_plugins = {json.dumps(UNUSED_PLUGINS)}",
            "[grpc]",
            f'  address = "{self.socket}"',
        ]
        if self.snapshotter_socket is not None:
            lines += ["[proxy_plugins.nydus]", '  type = "snapshot"', f'  address = "{self.snapshotter_socket}"']
            if third:
                lines += ["  [proxy_plugins.nydus.exports]", '    enable_remote_snapshot_annotations = "true"']
        lines += self._cri_3() if third else self._cri_2()
        return "\n".join(lines) + "\n"

    def _cri_2(self) -> list[str]:
        cri = '[plugins."io.containerd.grpc.v1.cri"'
        return [
            f"{cri}]",
            f'  sandbox_image = "{self.pause_ref or "127.0.0.1:1/none/pause:1"}"',
            "  disable_apparmor = true",
            "  disable_tcp_service = true",
            '  stream_server_address = "127.0.0.1"',
            '  stream_server_port = "0"',
            "  restrict_oom_score_adj = true",
            f"{cri}.containerd]",
            f'  snapshotter = "{"nydus" if self.snapshotter_socket else "overlayfs"}"',
            "  disable_snapshot_annotations = false",
            "  discard_unpacked_layers = false",
            f"{cri}.containerd.runtimes.runc]",
            '  runtime_type = "io.containerd.runc.v2"',
            f"{cri}.containerd.runtimes.runc.options]",
            "  SystemdCgroup = false",
            f"{cri}.cni]",
            '  bin_dir = "/usr/lib/cni"',
            f'  conf_dir = "{self.cni_dir}"',
            f"{cri}.registry]",
            f'  config_path = "{self.hosts_dir}"',
        ]

    def _cri_3(self) -> list[str]:
        images, runtime = "[plugins.'io.containerd.cri.v1.images'", "[plugins.'io.containerd.cri.v1.runtime'"
        lines = [
            f"{images}]",
            f'  snapshotter = "{"nydus" if self.snapshotter_socket else "overlayfs"}"',
            "  disable_snapshot_annotations = false",
            "  discard_unpacked_layers = false",
            f"{images}.pinned_images]",
            f'  sandbox = "{self.pause_ref or "127.0.0.1:1/none/pause:1"}"',
            f"{images}.registry]",
            f'  config_path = "{self.hosts_dir}"',
            f"{runtime}]",
            "  disable_apparmor = true",
            "  restrict_oom_score_adj = true",
            f"{runtime}.containerd.runtimes.runc]",
            '  runtime_type = "io.containerd.runc.v2"',
            f"{runtime}.containerd.runtimes.runc.options]",
            "  SystemdCgroup = false",
            f"{runtime}.cni]",
            '  bin_dirs = ["/usr/lib/cni"]',
            f'  conf_dir = "{self.cni_dir}"',
            "[plugins.'io.containerd.grpc.v1.cri']",
            '  stream_server_address = "127.0.0.1"',
            '  stream_server_port = "0"',
            "  disable_tcp_service = true",
        ]
        if self.snapshotter_socket is not None:
            lines += [
                "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]",
                '  platform = "linux/amd64"',
                '  snapshotter = "nydus"',
                "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]",
                '  platform = "linux/amd64"',
                '  snapshotter = "overlayfs"',
            ]
        return lines

    def ctr_argv(self, *args: str | Path) -> list[str]:
        return [str(self.ctr_binary), "-a", str(self.socket), "-n", self.namespace, *map(str, args)]

    def ctr(self, *args: str | Path, timeout: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.ctr_argv(*args), timeout=timeout, check=check)

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
        if not Path("/run/containerd/containerd.sock").exists():
            # Made for our shims; a system containerd keeps its own here.
            for name in ("s", "fifo", "runc/k8s.io", "runc/default", "runc", ""):
                try:
                    Path("/run/containerd", name).rmdir()
                except OSError:
                    pass
        self._child = None

    def __enter__(self) -> Containerd:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
