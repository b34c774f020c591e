"""`nydusctl node uninstall`: containerd's configuration, then the service, its nydusd, the files; data on request."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nydusfs.containerd.connection import Connection, ContainerdError, Missing
from nydusfs.containerd.containers import Containers
from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from snapshotter.containerdfile import read_config
from snapshotter.errors import InstallError
from snapshotter.install.edit import has_block, restored
from snapshotter.install.host import Host
from snapshotter.install.install import Plan, Say, address_of, restart_containerd
from snapshotter.install.parts import CONFIG, RECORD, UNIT, UNIT_FILE, Record, digest
from snapshotter.install.target import Target, find, installed
from snapshotter.node import Choices as Places
from snapshotter.node import Node
from snapshotter.settings import ADDRESS, OLD_ROOT

PROGRAM = "nydusctl"
END_SECONDS = 10.0
_SHOWN = 10
_ROUNDS = 200  # deeper than any chain of layers


@dataclass(frozen=True)
class Choices:
    containerd_config: str = ""
    force: bool = False
    purge: bool = False
    restart: bool = True
    dry_run: bool = False


def uninstall(host: Host, choices: Choices, say: Say) -> None:
    """Raises InstallError before anything was changed where it refuses; can be repeated where it was interrupted."""
    if host.here and os.geteuid() != 0 and not choices.dry_run:
        raise InstallError("must run as root: it writes to /etc and stops services")
    record = Record.read(host)
    given = choices.containerd_config
    target = installed(record.containerd_config) if record and not given else find(host, given)
    file = target.file
    before = host.read(file)
    after = restored(before, file) if before is not None else None
    if after is not None and record is not None and record.created_config:
        after = None if after == "" or record.files.get(file) == digest(after) else after
    plan = Plan({file: (before, after)})
    for path in (CONFIG, UNIT_FILE):
        text = host.read(path)
        if text is None:
            continue
        if (record is not None and record.ours(host, path)) or (path == CONFIG and choices.purge):
            plan.files[path] = (text, None)
        else:
            say(f"{path}: kept: it was not written by this program, or changed since")
    if record is None and before is not None and not has_block(before):
        say(f"nothing was installed here by `nydusctl node install`: {RECORD} is not there, no marks in {file}")
    node = _Node(host, target)
    node.data()  # as long as the process tells
    if host.here:
        node.look()
        if node.containers and not choices.force:
            shown = ", ".join(node.containers[:_SHOWN]) + (", …" if len(node.containers) > _SHOWN else "")
            raise InstallError(
                f"{len(node.containers)} containers use it: {shown}. Remove them first (kubectl drain, nerdctl rm -f), "
                "or take their files away with --force"
            )
        if node.unknown and not choices.force:
            raise InstallError(
                f"whether containers use it cannot be told: {node.unknown}. Start containerd, or go on with --force"
            )
    if choices.dry_run:
        say(plan.diff() or "no file would be changed")
        return
    if record is not None:
        record.state = "uninstalling"
        record.write(host)
    if choices.purge and host.here:
        node.forget(say)
    if plan.changed(file):
        if after is None:
            host.remove(file)
        else:
            host.write(file, after)
        say(f"{file}: as it was before")
    if host.systemd and choices.restart:
        if (
            host.is_active(target.service(host))
            and plan.changed(file)
            and (problem := restart_containerd(host, target, "", plugin=False))
        ):
            raise InstallError(f"{problem}. Its configuration is the one from before the installation")
        host.systemctl("disable", "--now", UNIT, check=False)
        say(f"{UNIT}: stopped and disabled")
    elif host.here:
        say(f"nothing was stopped: systemctl disable --now {UNIT}, systemctl restart {target.service(host)}")
    else:
        host.path(f"/etc/systemd/system/multi-user.target.wants/{UNIT}").unlink(missing_ok=True)
    if host.here and (choices.restart or not host.systemd):
        node.end_daemons(say)
    for path in (CONFIG, UNIT_FILE):
        if path in plan.files:
            host.remove(path)
            say(f"{path}: removed")
    if host.systemd and choices.restart:
        host.systemctl("daemon-reload")
    if choices.purge:
        node.purge(say)
    host.remove(RECORD)
    kept = "" if choices.purge else f"; images and cache stay in {node.data()[0]} (--purge removes them)"
    say(f"uninstalled{kept}")


class _Node:
    """What of the snapshotter is at work, and where its data is."""

    def __init__(self, host: Host, target: Target) -> None:
        self._host = host
        self._file = target.main
        self._places: list[Path] = []
        self.name = ""  # of the proxy plugin
        self.clients: list[Containers] = []  # one for each namespace
        self.containers: list[str] = []
        self.unknown = ""

    def look(self) -> None:
        """Which containers use it, as NAMESPACE/ID."""
        from snapshotter.node import Containerd

        config, _ = read_config(Path(self._file))
        self.name = Containerd("", Path(self._file), config=config).snapshotter_name(Path(ADDRESS))
        if not self.name:
            return
        address = address_of(self._file)
        try:
            with Connection(address, "default", PROGRAM) as connection:
                service = connection.stub(namespace_pb2_grpc.NamespacesStub)
                reply = connection.call("listing namespaces", service.List, namespace_pb2.ListNamespacesRequest())
                self.clients = [Containers(address, one.name, PROGRAM) for one in reply.namespaces]
            for client in self.clients:
                ours = [one.id for one in client.all() if one.snapshotter == self.name]
                self.containers += [f"{client.namespace}/{one}" for one in ours]
        except ContainerdError as failure:
            self.unknown = str(failure)

    def forget(self, say: Say) -> None:
        """Has containerd remove all snapshots it knows of ours: their names would stay in its database for ever."""
        removed = 0
        for client in self.clients:
            for _ in range(_ROUNDS):  # children first
                found = client.snapshots(self.name)
                leaves = found.keys() - set(found.values())
                for key in leaves:
                    try:
                        client.remove_snapshot(self.name, key)
                    except Missing:
                        continue  # containerd's garbage collector was here first
                    removed += 1
                if not leaves:
                    break
        if removed:
            say(f"{removed} snapshots removed from containerd; images of that name are to be pulled again")

    def end_daemons(self, say: Say) -> None:
        """Every nydusd of the snapshotter, which is stopped, and its mounts."""
        from snapshotter.processes import end, serving
        from snapshotter.system import detach, mountpoints

        root = self.data()[0]
        end((pid for folder in (root / "socket").glob("*") for socket in folder.glob("*") for pid in serving(socket)),
            END_SECONDS)  # fmt: skip
        mounts = [path for path in mountpoints() if root in Path(path).parents]
        for path in reversed(mounts):
            detach(path)
        if mounts:
            say(f"{len(mounts)} mounts below {root}: unmounted")

    def data(self) -> list[Path]:
        """Directories of the snapshotter on its machine: the root, and what lies elsewhere."""
        if not self._places:
            if not self._host.here:
                return [Path(OLD_ROOT)]
            settings = Node(Places()).need()
            root = Path(os.path.realpath(settings.root))
            others = [settings.cache_dir, settings.log_dir]
            self._places = [root, *(path for path in others if not path.resolve().is_relative_to(root))]
        return self._places

    def purge(self, say: Say) -> None:
        for path in self.data():
            shutil.rmtree(self._host.path(path), ignore_errors=True)
            say(f"{path}: removed")
