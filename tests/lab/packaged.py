"""The lab node of `tests.lab.installing`, installed by a package or as a Kubernetes pod does it:

    unshare ... python -m tests.lab.packaged WORK CONTAINERD deb|rpm PACKAGE
    unshare ... python -m tests.lab.packaged WORK CONTAINERD pod BUNDLE

Prints what was seen as JSON. A pod is a mount namespace whose root is a tree of its own; `nsenter --target 1` leads
from there to the node, as with hostPID.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from tests.lab.installing import Lab
from tests.lab.process import run, wait_until
from tests.lab.stack import REPO

UNIT = "containerd-nydus-grpc.service"
PLACE = Path("/opt/nydus-py")
POD = """set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/nydus-py /mnt/host /mnt/run /mnt/config
mount --bind "$1" /mnt/nydus-py
mount --bind /opt/nydus-py /mnt/host
for name in bin sbin lib lib64 usr etc proc dev tmp; do
    if [ -L /$name ]; then cp -a /$name /mnt/
    elif [ -d /$name ]; then mkdir -p /mnt/$name; mount --rbind /$name /mnt/$name
    fi
done
cp /etc/pod-config.json /mnt/config/config.json
cp "$2" /mnt/node.sh
shift 2
exec chroot /mnt /node.sh "$@"
"""


class Pod:
    """`node.sh` with the same isolation and the same view as its container."""

    def __init__(self, bundle: Path, *words: str) -> None:
        script = REPO / "packaging" / "node.sh"
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", POD, "sh", bundle, script, *words], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**os.environ, "RETRY": "1"}, start_new_session=True,
        )  # fmt: skip
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(self._process.stdout)

    def says(self, text: str, seconds: float = 60) -> str:
        """All it said, when that was in it."""
        wait_until(lambda: text in self.text(), seconds, f"{text!r} in {self.text()!r}")
        return self.text()

    def text(self) -> str:
        return "".join(self._lines)

    def end(self) -> int:
        self._process.terminate()
        return self._process.wait(10)


class Packaged(Lab):
    def prepare(self) -> None:
        super().prepare()
        for name in ("/usr", "/opt"):
            above = self.work / name.strip("/")
            for part in ("up", "work"):
                (above / part).mkdir(parents=True)
            options = f"lowerdir={name},upperdir={above}/up,workdir={above}/work"
            run(["mount", "-t", "overlay", "overlay", "-o", options, name], timeout=10)
        # containers' images forbid packages to start services
        policy = Path("/usr/sbin/policy-rc.d")
        policy.write_text("#!/bin/sh\nexit 0\n")
        policy.chmod(0o755)
        # what is installed must be what is in the package: neither this interpreter's nor the source tree's
        source = os.environ.pop("PYTHONPATH", str(REPO))
        stand_in = f'#!/bin/sh\nPYTHONPATH={source} exec {sys.executable} -m tests.lab.systemctl "$@"\n'
        (self.work / "bin/systemctl").write_text(stand_in)
        os.environ["PATH"] = f"{self.work}/bin:{self.containerd.parent}:/usr/sbin:/usr/bin:/sbin:/bin"

    def image_and_container(self) -> None:
        os.environ["PYTHONPATH"] = str(REPO)
        try:
            self.container()
        finally:
            del os.environ["PYTHONPATH"]

    def end_container(self) -> None:
        self.ctr("tasks", "rm", "-f", "app")
        self.ctr("containers", "rm", "app")

    def say(self, *words: str | Path) -> tuple[int, str]:
        done = run(words, timeout=300, check=False)  # all modules are compiled
        return done.returncode, done.stdout + done.stderr

    def deb(self, package: Path) -> None:
        see = self.seen
        self.prepare()
        before = self.state()
        run(["systemctl", "start", self.unit], timeout=40)
        see["install"] = self.say("dpkg", "-i", package)
        see["version"] = self.say("nydusctl", "--version")
        see["files"] = sorted(self.state().keys() - before.keys())
        see["runs"] = bool(self.pid(UNIT))
        see["node"] = self.say("nydusctl", "node", "install")
        self.image_and_container()
        see["nydusd before"], see["unit before"] = self.nydusds(), self.pid(UNIT)
        see["upgrade"] = self.say("dpkg", "-i", package)
        see["nydusd after"], see["unit after"] = self.nydusds(), self.pid(UNIT)
        see["reads after"] = self.reads("1")
        see["busy"] = self.say("dpkg", "-r", "nydus-py")
        see["reads busy"] = self.reads("2")
        self.end_container()
        see["remove"] = self.say("dpkg", "-r", "nydus-py")
        left = {key for key, value in self.state().items() if before.get(key) != value}
        see["remove left"], see["remove nydusd"] = sorted(left), self.nydusds()
        see["containerd"] = bool(self.pid())
        see["purge"] = self.say("dpkg", "-P", "nydus-py")
        see["purge state"] = self.state() == before
        see["purge left"] = [str(one) for one in (Path("/usr/lib/nydus-py"), Path("/etc/nydus")) if one.exists()]
        run(["systemctl", "stop", self.unit], timeout=40)

    def rpm(self, package: Path) -> None:
        """With a database of its own: this machine's packages are Debian's, so dependencies are not looked at."""
        see = self.seen
        self.prepare()
        before = self.state()
        run(["systemctl", "start", self.unit], timeout=40)
        own = ("--dbpath", self.work / "rpmdb", "--define", f"_install_script_path {os.environ['PATH']}")

        def rpm(*words: str | Path) -> tuple[int, str]:
            return self.say("rpm", *own, *words)

        see["install"] = rpm("--nodeps", "-i", package)
        see["version"] = self.say("nydusctl", "--version")
        see["files"] = sorted(self.state().keys() - before.keys())
        see["compiled"] = len(list(Path("/usr/lib/nydus-py/lib").rglob("*.pyc")))
        see["node"] = self.say("nydusctl", "node", "install")
        see["runs"] = bool(self.pid(UNIT))
        see["verify"] = rpm("--nodeps", "-V", "nydus-py")
        self.image_and_container()
        see["nydusd before"], see["unit before"] = self.nydusds(), self.pid(UNIT)
        see["upgrade"] = rpm("--nodeps", "-U", "--replacepkgs", package)
        see["nydusd after"], see["unit after"] = self.nydusds(), self.pid(UNIT)
        see["reads after"] = self.reads("1")
        see["busy"] = rpm("-e", "nydus-py")
        see["reads busy"] = self.reads("2")
        self.end_container()
        see["remove"] = rpm("-e", "nydus-py")
        see["remove state"], see["remove nydusd"] = self.state() == before, self.nydusds()
        see["remove left"] = [str(one) for one in (Path("/usr/lib/nydus-py"), Path("/etc/nydus")) if one.exists()]
        see["containerd"] = bool(self.pid())
        run(["systemctl", "stop", self.unit], timeout=40)

    def pod(self, bundle: Path) -> None:
        see = self.seen
        self.prepare()
        PLACE.mkdir()
        Path("/etc/pod-config.json").write_text((REPO / "examples/config.json").read_text())
        before = self.state()
        run(["systemctl", "start", self.unit], timeout=40)
        pod = Pod(bundle, "install")
        see["install"] = pod.says("node install: done")
        see["end"] = pod.end()
        see["runs"] = bool(self.pid(UNIT))
        self.image_and_container()
        see["nydusd before"], see["unit before"] = self.nydusds(), self.pid(UNIT)
        other = self.work / "other"
        shutil.copytree(bundle, other, symlinks=True)
        (other / "BUILD").write_text("another\n")
        pod = Pod(other, "install")
        see["upgrade"] = pod.says("node install: done")
        pod.end()
        see["nydusd after"], see["unit after"] = self.nydusds(), self.pid(UNIT)
        see["reads after"] = self.reads("1")
        pod = Pod(other, "uninstall")
        see["busy"] = pod.says("again in 1 s")
        see["reads busy"] = self.reads("2")
        self.end_container()
        see["uninstall"] = pod.says("node uninstall: done")
        pod.end()
        see["left"] = os.listdir(PLACE)
        see["same"] = self.state() == before
        see["nydusd gone"] = self.nydusds()
        see["containerd"] = bool(self.pid())
        run(["systemctl", "stop", self.unit], timeout=40)


def main() -> None:
    lab = Packaged(Path(sys.argv[1]), Path(sys.argv[2]), "debian")
    what = {"deb": lab.deb, "rpm": lab.rpm, "pod": lab.pod}[sys.argv[3]]
    lab.with_image(lambda: what(Path(sys.argv[4])))
    print(json.dumps(lab.seen))


if __name__ == "__main__":
    main()
