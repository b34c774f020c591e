"""What `nydusctl` looks at: the snapshotter of this node, its settings and records, and the containerd above it.

Everything is found from running processes, as their own command lines say; what does not run is looked for where it
is by default. Nothing is opened for writing.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click

from snapshotter import settings as settings_module
from snapshotter.cli import parse
from snapshotter.containerdfile import SOCKETS, installed_release, read_config, release_of_program
from snapshotter.database import NAME
from snapshotter.errors import SettingsError, SnapshotterError
from snapshotter.nydusd_config import Template, template_of
from snapshotter.records import INSTANCES, DaemonRecord, InstanceRecord, instances_of, own_mountpoint
from snapshotter.settings import Settings

CONTAINERD_SOCKET = SOCKETS[0]
CONTAINERD_CONFIG = "/etc/containerd/config.toml"


@dataclass(frozen=True)
class Process:
    pid: int
    arguments: tuple[str, ...]  # behind the program's name
    directory: str

    def path(self, text: str) -> Path:
        return Path(self.directory, text)


def processes(program: str) -> Iterator[Process]:
    """Processes of a program, also those that an interpreter runs (`python /usr/bin/PROGRAM ...`)."""
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
            directory = os.readlink(f"/proc/{name}/cwd")
        except OSError:
            continue
        for at, word in enumerate(words[:3]):
            if os.path.basename(word) == program and (at == 0 or "python" in os.path.basename(words[0])):
                yield Process(int(name), tuple(words[at + 1 :]), directory)
                break


def nydusds() -> Iterator[tuple[int, str]]:
    """Processes of nydusd, ours or upstream's, with the API socket each was given."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = [os.fsdecode(word) for word in file.read().split(b"\0")]
            except OSError:
                continue
            for at, word in enumerate(words[:-1]):
                if word in ("--apisock", "-A"):
                    yield int(name), words[at + 1]


def snapshotter_settings(arguments: list[str]) -> Settings:
    """What a command line of the snapshotter means. Raises SettingsError."""
    try:
        return settings_module.load(parse(arguments))
    except click.ClickException as failure:
        raise SettingsError(failure.format_message()) from None


@dataclass
class Containerd:
    """`config`: the file merged with what it imports; {} when there is none."""

    address: str
    file: Path
    pid: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    problem: str = ""  # with the file

    @property
    def version(self) -> int:
        version = self.config.get("version", 1)
        return version if isinstance(version, int) else 1

    def plugins(self) -> Mapping[str, Any]:
        return _table(self.config, "plugins")

    def proxies(self) -> dict[str, Any]:
        return {name: one for name, one in _table(self.config, "proxy_plugins").items() if isinstance(one, dict)}

    def snapshotter_name(self, address: Path) -> str:
        """What the proxy plugin for a socket is called, "" if there is none."""
        for name, one in self.proxies().items():
            if one.get("type") == "snapshot" and str(one.get("address", "")).removeprefix("unix://") == str(address):
                return name
        return ""


def _table(value: Any, *names: str) -> dict[str, Any]:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def grpc_address(config: Mapping[str, Any]) -> str:
    """The socket that a configuration of any version gives containerd."""
    return str(
        _table(config, "grpc").get("address")
        or _table(config, "plugins", "io.containerd.server.v1.grpc").get("address")
        or CONTAINERD_SOCKET
    )


def containerds() -> list[Containerd]:
    """Those that run here."""
    found = []
    for process in processes("containerd"):
        file, address = Path(CONTAINERD_CONFIG), ""
        words = iter(process.arguments)
        for word in words:
            name, equals, value = word.partition("=")
            if name in ("-c", "--config"):
                file = process.path(value if equals else next(words, CONTAINERD_CONFIG))
            elif name in ("-a", "--address"):
                address = value if equals else next(words, "")
        program = f"/proc/{process.pid}/exe"
        config, problem = read_config(file, partial(release_of_program, program), process.directory)
        address = address or grpc_address(config)
        found.append(Containerd(address, file, process.pid, config, problem))
    return found


@dataclass
class Choices:
    """What the command line says about where to look; "" and (): found out."""

    root: str = ""
    arguments: tuple[str, ...] = ()  # of a snapshotter that does not run
    containerd: str = ""
    containerd_config: str = ""
    unit: str = ""
    namespace: str = "default"


class Unreadable(SnapshotterError):
    """The snapshotter's database."""


class Node:
    """Raises SnapshotterError (in the constructor) when several snapshotters run and none is chosen."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.pid = 0
        self.unreachable: set[str] = set()  # registries that do not answer, as an earlier check found
        self.settings: Settings | None = None
        self.settings_problem = ""
        self._find_snapshotter()
        self.containerd = self._find_containerd()

    def _find_snapshotter(self) -> None:
        found: list[tuple[Process, Settings | None, str]] = []
        for process in processes("containerd-nydus-grpc"):
            words = [str(process.path(word)) if word.startswith(("./", "../")) else word for word in process.arguments]
            try:
                found.append((process, snapshotter_settings(words), ""))
            except SettingsError as failure:
                found.append((process, None, str(failure)))
        if self.choices.root:
            root = os.path.realpath(self.choices.root)
            found = [one for one in found if one[1] is not None and os.path.realpath(one[1].root) == root]
        if len(found) > 1:
            roots = ", ".join(str(one[1].root) if one[1] else f"pid {one[0].pid}" for one in found)
            raise SnapshotterError(f"several snapshotters run here: choose one with --root ({roots})")
        if found:
            process, self.settings, self.settings_problem = found[0]
            self.pid = process.pid
            return
        arguments = list(self.choices.arguments)
        if self.choices.root:
            arguments += ["--root", self.choices.root]
        try:
            self.settings = snapshotter_settings(arguments)
        except SettingsError as failure:
            self.settings_problem = str(failure)

    def _find_containerd(self) -> Containerd:
        running = containerds()
        if self.choices.containerd:
            address = self.choices.containerd.removeprefix("unix://")
            for one in running:
                if one.address == address and not self.choices.containerd_config:
                    return one
        elif not self.choices.containerd_config:
            ours = [one for one in running if self.settings and one.snapshotter_name(self.settings.address)]
            others = [one for place in SOCKETS for one in running if one.address == place]
            for one in [*ours, *others]:
                return one
        file = Path(self.choices.containerd_config or CONTAINERD_CONFIG)
        pid = {one.file: one.pid for one in running}.get(file)
        reader = partial(release_of_program, f"/proc/{pid}/exe") if pid else installed_release
        config, problem = read_config(file, reader)
        address = self.choices.containerd or grpc_address(config)
        pid = next((one.pid for one in running if one.address == address), 0)
        return Containerd(address, file, pid, config, problem)

    @property
    def root(self) -> Path:
        """Resolved, as paths in mount tables are. Raises SnapshotterError without settings."""
        return Path(os.path.realpath(self.need().root))

    def need(self) -> Settings:
        if self.settings is None:
            raise SnapshotterError(f"the snapshotter's settings are not usable: {self.settings_problem}")
        return self.settings

    @cached_property
    def template(self) -> Template:
        """Raises SettingsError."""
        return template_of(self.need())

    # ---- what the snapshotter wrote down

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Raises Unreadable. The file is opened read-only: also beside a snapshotter at work."""
        path = self.root / NAME
        if not path.exists():
            return []
        try:
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
            try:
                return connection.execute(statement).fetchall()
            finally:
                connection.close()
        except sqlite3.Error as failure:
            raise Unreadable(f"{path}: {failure}") from None

    def daemons(self) -> list[DaemonRecord]:
        rows = self.query("SELECT id, shared, pid, started, socket, mountpoint FROM daemons")
        return [DaemonRecord(row[0], bool(row[1]), row[2], row[3], Path(row[4]), Path(row[5])) for row in rows]

    def instances(self) -> list[InstanceRecord]:
        return instances_of(self.query(INSTANCES))

    def instance_config(self, instance: InstanceRecord, shared: bool) -> Path:
        """The nydusd configuration of an image as it was derived last."""
        folder = self.root / "config" / instance.daemon
        return folder / instance.name / "config.json" if shared else folder / "config.json"

    def mountpoint(self, instance: InstanceRecord, shared: bool) -> Path:
        if shared:
            return self.root / "mnt" / instance.name
        return own_mountpoint(self.root / "snapshots", instance.snapshot, instance.mapping)
