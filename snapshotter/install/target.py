"""Which containerd of a node is meant: the file to edit, the one it is started with, the service that starts it.

k3s and rke2 bring a containerd of their own and write its configuration anew at each start: from 2.x on with a
directory of files that it imports, before that from a template (`{{ template "base" . }}` can add to theirs, and not
change a key of it). So the file to edit is one of our own in that directory, or else a template made of what is there.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from snapshotter.errors import InstallError
from snapshotter.install.host import CONTAINERD, Host
from snapshotter.install.tomlfile import dumped, lookup, parse, statements

CONTAINERD_CONFIG = "/etc/containerd/config.toml"


@dataclass(frozen=True)
class Distribution:
    """A Kubernetes that brings its containerd. `programs`: where that is."""

    name: str
    services: tuple[str, ...]
    programs: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"/var/lib/rancher/{self.name}/agent/etc/containerd"

    @property
    def main(self) -> str:
        return f"{self.folder}/config.toml"


DISTRIBUTIONS = (
    Distribution("k3s", ("k3s.service", "k3s-agent.service"), ("/var/lib/rancher/k3s/data/current/bin/containerd",)),
    Distribution("rke2", ("rke2-server.service", "rke2-agent.service"), ("/var/lib/rancher/rke2/bin/containerd",)),
)


@dataclass(frozen=True)
class Target:
    """`file` is edited, `main` read by containerd: the same file but for a distribution. `start`: what a new `file`
    begins with. `beside`: what `main` says without `file`."""

    file: str
    main: str
    services: tuple[str, ...] = (CONTAINERD,)
    programs: tuple[str, ...] = ()
    start: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def imported(self) -> bool:
        return bool(self.beside)

    def program(self, host: Host) -> str:
        """containerd's, "" if it is not there."""
        if not self.programs:
            return host.program("containerd")
        return next((one for one in self.programs if os.access(host.path(one), os.X_OK)), "")

    def service(self, host: Host) -> str:
        """The one of them that runs, else the first."""
        if host.systemd and len(self.services) > 1:
            return next((one for one in self.services if host.is_active(one)), self.services[0])
        return self.services[0]

    def trial(self, host: Host) -> str:
        """`main` as it would be with the trial of `file` in its place. Only for a file that is imported."""
        lines = (host.read(self.main) or "").splitlines(keepends=True)
        (found,) = (one for one in statements(lines, self.main) if one.path == ("imports",))
        names = {name for pattern in found.value for name in glob.glob(str(host.path(pattern)))}
        names = {f"/{Path(name).relative_to(host.root)}" for name in names} | {self.file}
        imports = [trial_of(name) if name == self.file else name for name in sorted(names)]
        return "".join([*lines[: found.first], f"imports = {dumped(imports)}\n", *lines[found.last :]])


def trial_of(file: str) -> str:
    """Where a file lies while containerd judges it; no pattern of an import finds it there."""
    return f"{file}.nydus-try"


def find(host: Host, given: str) -> Target:
    """`given`: containerd's configuration, "" if it is to be found. Raises InstallError where that cannot be told."""
    if given:
        one = _distribution(given)
        return _of(host, one) if one else Target(given, given)
    there = [Target(one.main, one.main, one.services) for one in DISTRIBUTIONS if host.path(one.main).is_file()]
    usual = Target(CONTAINERD_CONFIG, CONTAINERD_CONFIG)
    if host.here:
        from snapshotter.containerdfile import SOCKETS
        from snapshotter.node import containerds

        running = {str(one.file): one.address for one in containerds() if one.address in SOCKETS}
        there = [one for one in there if one.main in running] or ([] if running else there)
        known = {one.main for one in DISTRIBUTIONS}
        there += [Target(name, name) for name, at in running.items() if at == SOCKETS[0] and name not in known][:1]
    elif host.path(CONTAINERD_CONFIG).is_file() or host.program("containerd"):
        there.append(usual)
    if len(there) > 1:
        files = " or ".join(one.main for one in there)
        raise InstallError(f"there are several containerd here: choose one with --containerd-config {files}")
    chosen = there[0] if there else usual
    one = _distribution(chosen.main)
    return _of(host, one) if one else chosen


def services_of(main: str) -> tuple[str, ...]:
    """What starts the containerd with this configuration."""
    return next((one.services for one in DISTRIBUTIONS if one.main == main), (CONTAINERD,))


def installed(file: str) -> Target:
    """The target of an installation that edited `file`, whatever became of the rest since."""
    one = _distribution(file)
    return Target(file, one.main, one.services, one.programs) if one else Target(file, file)


def _distribution(file: str) -> Distribution | None:
    return next((one for one in DISTRIBUTIONS if Path(file).is_relative_to(one.folder)), None)


def _of(host: Host, one: Distribution) -> Target:
    text = host.read(one.main)
    if text is None:
        raise InstallError(f"{one.main} is not there: start {one.name} once, it writes this file")
    value = parse(text, one.main)
    known = Target("", one.main, one.services, one.programs)
    for pattern in lookup(value, ("imports",)) or []:
        if re.fullmatch(rf"{re.escape(one.folder)}/config(-v\d+)?\.toml\.d/\*\.toml", str(pattern)) and (
            _version(value) >= 3  # 1.x lets an imported file replace the whole section of CRI
        ):
            return replace(known, file=str(Path(str(pattern)).parent / "nydus.toml"), beside=value)
    file = f"{one.folder}/config{'-v3' if _version(value) >= 3 else ''}.toml.tmpl"
    template = host.read(file)
    if "{{" in (template if template is not None else text):
        raise InstallError(
            f"{file if template is not None else one.main} is a template with actions ({{{{ … }}}}), which is not "
            f"edited: add the lines of examples/containerd to {file} by hand, then restart {one.name}"
        )
    note = f"{file}: made of {one.main} as it is now; from now on {one.name} does not change it: after an upgrade or a "
    note += f"new setting of {one.name} run `nydusctl node uninstall`, then install, again"
    return replace(known, file=file, start=text, note=note)


def _version(value: Mapping[str, Any]) -> int:
    found = value.get("version", 1)
    return found if isinstance(found, int) else 1
