"""A node for `nydusctl node`: own mount and PID namespaces, a real containerd and a stand-in for systemd:

    unshare --mount --pid --fork --kill-child --mount-proc python -m tests.lab.installing WORK CONTAINERD KIND

With the kind `k3s` containerd is that of a service which, like k3s, writes a configuration at each start that imports a
directory.
Installs, runs a container, tries to uninstall under it, upgrades, uninstalls, and installs with a containerd that
does not come back. Prints what was seen as JSON; asserting it is the caller's part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snapshotter.doctor.services import listens
from snapshotter.settings import ADDRESS
from snapshotter.system import mountpoints
from tests.lab.containerd import version_of
from tests.lab.cri import Cri
from tests.lab.process import run, wait_until
from tests.lab.registry import Registry
from tests.lab.sample import pause_image, small_image
from tests.lab.stack import program

DATA = Path("/var/lib/containerd-nydus")
K3S = Path("/var/lib/rancher/k3s")


class Lab:
    def __init__(self, work: Path, containerd: Path, kind: str) -> None:
        self.work, self.containerd, self.k3s = work, containerd, kind == "k3s"
        folder = K3S / "agent/etc/containerd" if self.k3s else Path("/etc/containerd")
        self.config = folder / "config.toml"
        self.edited = folder / "config-v3.toml.d/nydus.toml" if self.k3s else self.config
        self.socket = "/run/k3s/containerd/containerd.sock" if self.k3s else "/run/containerd/containerd.sock"
        self.unit = "k3s.service" if self.k3s else "containerd.service"
        self.ctr_program = containerd.with_name("ctr")
        self.newer = version_of(containerd) >= (2, 0)
        self.seen: dict[str, Any] = {}

    def prepare(self) -> None:
        """Own /etc, /run and data directories; the machine's are not touched."""
        run(["mount", "--make-rprivate", "/"], timeout=10)
        for name in ("/etc", "/var/lib"):
            above = self.work / name.replace("/", "_")
            for part in ("up", "work"):
                (above / part).mkdir(parents=True)
            options = f"lowerdir={name},upperdir={above}/up,workdir={above}/work"
            run(["mount", "-t", "overlay", "overlay", "-o", options, name], timeout=10)
        run(["mount", "-t", "tmpfs", "tmpfs", "/run"], timeout=10)
        Path("/run/systemd/system").mkdir(parents=True)
        for place in (
            DATA,
            Path("/run/containerd"),
            Path("/etc/cni/net.d"),
            Path("/etc/systemd/system"),
            self.config.parent,
            *([K3S / "data/current/bin", Path("/run/k3s/containerd")] if self.k3s else []),
        ):
            place.mkdir(parents=True, exist_ok=True)
        (self.work / "data").mkdir()
        run(["mount", "--bind", self.work / "data", DATA], timeout=10)
        bin = self.work / "bin"
        bin.mkdir()
        (bin / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.lab.systemctl "$@"\n')
        # refuses to start with what is written while /run/refuse is there; k3s writes its file first
        generate = f"cp {bin}/generated {self.config}\n" if self.k3s else ""
        (bin / "containerd-fussy").write_text(
            f"#!/bin/sh\n{generate}[ -e /run/refuse ] && grep -qs containerd-nydus-grpc {self.edited} && exit 1\n"
            f'exec {self.containerd} "$@"\n'
        )
        if self.k3s:
            (K3S / "data/current/bin/containerd").symlink_to(self.containerd)
        for path in bin.iterdir():
            path.chmod(0o755)
        os.environ["PATH"] = f"{bin}:{self.containerd.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        default = run([self.containerd, "config", "default"], timeout=60).stdout
        for quote in ("'", '"'):
            default = default.replace(f"root = {quote}/var/lib/containerd{quote}", f'root = "{self.work}/c"', 1)
            imports = f'["{self.edited.parent}/*.toml"]' if self.k3s else "[]"
            default = default.replace(
                f"imports = [{quote}/etc/containerd/conf.d/*.toml{quote}]", f"imports = {imports}"
            )
            default = default.replace(f"{quote}/run/containerd/containerd.sock{quote}", f'"{self.socket}"')
        # what this machine's kernel and network do not have
        default = re.sub(r"sandbox = '.*'", f"sandbox = '{self.host}/lab/pause:1'", default)
        default = default.replace("disable_apparmor = false", "disable_apparmor = true")
        default = default.replace("restrict_oom_score_adj = false", "restrict_oom_score_adj = true")
        self.config.write_text(default)
        (bin / "generated").write_text(default)
        loopback = '{"cniVersion": "0.4.0", "name": "lo", "plugins": [{"type": "loopback"}]}'
        Path("/etc/cni/net.d/10-lo.conflist").write_text(loopback)
        Path("/etc/systemd/system", self.unit).write_text(
            f"[Service]\nType=notify\nExecStart={bin}/containerd-fussy -c {self.config}\nKillMode=process\n"
        )

    def ctr(self, *words: str) -> str:
        done = run([self.ctr_program, "-a", self.socket, *words], timeout=180, check=False)
        return done.stdout + done.stderr

    def reads(self, number: str) -> str:
        """What the container has; not by way of ctr, see `Containerd.ctr_run`."""
        said = self.work / f"said-{number}"
        said.unlink(missing_ok=True)
        told = self.ctr("tasks", "exec", "--log-uri", f"file://{said}", "--exec-id", number, "app", "cat", "/marker")
        return said.read_text() if said.exists() else told

    def node(self, *words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "snapshotter.nydusctl", "node", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def state(self) -> dict[str, str]:
        """Of everything the installation may touch: a digest of each file."""
        found = {}
        for folder in (str(self.config.parent), "/etc/nydus", "/etc/systemd/system"):
            for path in sorted(Path(folder).rglob("*")):
                if path.is_symlink():
                    found[str(path)] = str(path.readlink())
                elif path.is_file():
                    found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def pid(self, unit: str = "") -> int:
        from tests.lab.systemctl import main_pid

        return main_pid(unit or self.unit)

    def nydusds(self) -> list[str]:
        found = []
        for name in os.listdir("/proc"):
            if name.isdecimal():
                try:
                    words = Path(f"/proc/{name}/cmdline").read_bytes()
                except OSError:
                    continue
                if b"--apisock" in words:
                    found.append(name)
        return found

    def run(self) -> None:
        see = self.seen
        self.prepare()
        before = self.state()
        run(["systemctl", "start", self.unit], timeout=120)
        see["dry"] = self.node("install", "--dry-run")
        see["dry changed"] = self.state() != before
        with self.other_snapshotter():
            see["other"] = self.node("install")
            see["other changed"] = self.state() != before
        see["install"] = self.node("install")
        see["plugins"] = [line.split() for line in self.ctr("plugins", "ls").splitlines() if " nydus " in line]
        installed, pids = self.state(), (self.pid(), self.pid("containerd-nydus-grpc.service"))
        see["again"] = self.node("install")
        see["again changed"] = self.state() != installed
        see["again restarted"] = pids != (self.pid(), self.pid("containerd-nydus-grpc.service"))
        self.container()
        see["refused"] = self.node("uninstall")
        see["refused changed"] = self.state() != installed
        see["still reads"] = self.reads("x")
        self.ctr("tasks", "rm", "-f", "app")
        self.ctr("containers", "rm", "app")
        see["nydusd before"] = len(self.nydusds())
        see["uninstall"] = self.node("uninstall")
        see["uninstall left"] = {key: value for key, value in self.state().items() if before.get(key) != value}
        see["uninstall lost"] = sorted(before.keys() - self.state().keys())
        see["nydusd after"] = self.nydusds()
        see["mounts after"] = [path for path in mountpoints() if path.startswith(f"{DATA}/")]
        see["data kept"] = (DATA / "cache").is_dir()
        see["containerd after"] = bool(self.pid())
        see["plugins after"] = [line for line in self.ctr("plugins", "ls").splitlines() if " nydus " in line]
        self.break_containerd(before)
        if self.newer:
            self.one_runtime()
        see["install 2"] = self.node("install")
        self.container()
        see["second life"] = self.reads("x")
        see["purge"] = self.node("uninstall", "--purge", "--force")
        see["purge left"] = sorted(path.name for path in DATA.iterdir()) if DATA.is_dir() else []
        see["purge state"] = self.state() == before
        for unit in (self.unit, "containerd-nydus-grpc.service"):
            run(["systemctl", "stop", unit], timeout=120)

    @contextlib.contextmanager
    def other_snapshotter(self) -> Iterator[None]:
        """As upstream's service, which has another name."""
        place = Path(ADDRESS)
        place.parent.mkdir(exist_ok=True)
        listen = "import socket, time; s = socket.socket(socket.AF_UNIX); "
        listen += f"s.bind({ADDRESS!r}); s.listen(); time.sleep(600)"
        with subprocess.Popen([sys.executable, "-c", listen]) as other:
            try:
                wait_until(lambda: listens(place), 60, "the other snapshotter")
                yield
            finally:
                other.kill()

    def break_containerd(self, before: dict[str, str]) -> None:
        """One that does not start any more with our lines."""
        Path("/run/refuse").touch()
        self.seen["broken"] = self.node("install")
        self.seen["broken config"] = self.state().get(str(self.edited)) == before.get(str(self.edited))
        self.seen["broken alive"] = bool(self.pid()) and "io.containerd" in self.ctr("plugins", "ls")
        Path("/run/refuse").unlink()

    def one_runtime(self) -> None:
        """Only the pods of a RuntimeClass, as in examples/kubernetes/runtimeclass.yaml."""
        self.seen["runtime"] = self.node("install", "--runtime", "nydus")
        cri = Cri(Path(self.socket), self.work)
        try:
            pod, config = cri.sandbox("nydus")
            image = cri.pull(f"{self.host}/lab/app:nydus", config)
            self.seen["runtime pod"] = cri.run(pod, config, image, "cat", "/marker")
            snapshots = ("-n", "k8s.io", "snapshots", "--snapshotter", "nydus", "ls")
            self.seen["runtime snapshots"] = len(self.ctr(*snapshots).splitlines()) - 1
            cri.remove(pod)
        finally:
            cri.close()
        self.ctr("-n", "k8s.io", "images", "rm", f"{self.host}/lab/app:nydus")

    def container(self) -> None:
        ref = f"{self.host}/lab/app:nydus"
        rpull = [program("ctr-remote"), "-a", self.socket, "images", "rpull", "--plain-http", ref]
        self.seen.setdefault("rpull", []).append(run(rpull, timeout=180, check=False).stdout)
        words = ("run", "-d", "--net-host", "--snapshotter", "nydus", ref, "app", "sleep", "600")
        self.seen.setdefault("run", []).append(self.ctr(*words))

    def with_image(self, then: Callable[[], None]) -> None:
        with Registry(self.work / "reg") as registry:
            self.host = registry.host
            pause_image(self.work / "pause").push(registry.host, "lab/pause", "1")
            small_image(self.work / "image", payload=1 << 20).push(registry.host, "lab/app", "oci")
            convert = [program("nydusify"), "convert", "--source", f"{self.host}/lab/app:oci", "--target",
                       f"{self.host}/lab/app:nydus", "--source-insecure", "--target-insecure",
                       "--work-dir", self.work / "nydusify"]  # fmt: skip
            run(convert, timeout=180)
            then()


def main() -> None:
    lab = Lab(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    began = time.monotonic()
    lab.with_image(lab.run)
    lab.seen["seconds"] = time.monotonic() - began
    print(json.dumps(lab.seen))


if __name__ == "__main__":
    main()
