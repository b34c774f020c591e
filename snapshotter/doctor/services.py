"""The snapshotter, its unit file and its nydusd processes."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc
from snapshotter.doctor.finding import Finding, error, note, ok, warning
from snapshotter.errors import SnapshotterError
from snapshotter.install.target import services_of
from snapshotter.node import Node
from snapshotter.nydusd_api import NydusdApi

UNIT_FOLDERS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
UNITS = ("containerd-nydus-grpc.service", "nydus-snapshotter.service")
START = "systemctl start containerd-nydus-grpc; its log says why it is not running"
HUNG_SECONDS = 10.0
STARTING_SECONDS = 10.0
EVENT_SECONDS = 3600.0


def settings(node: Node) -> Iterator[Finding]:
    if node.settings is None:
        yield error("snapshotter.settings", node.settings_problem, "correct the flag or key named")
        return
    try:
        found = node.template
    except SnapshotterError as failure:
        yield error("snapshotter.template", str(failure), "correct the file, or name another with --config-path")
        return
    yield ok("snapshotter.template", f"root {node.settings.root}, nydusd template {found.path}")


def snapshotter(node: Node) -> Iterator[Finding]:
    address = node.need().address
    if not address.exists():
        yield error("snapshotter.running", f"no snapshotter: {address} does not exist", START)
        return
    began = time.monotonic()
    try:
        with grpc.insecure_channel(f"unix:{address}", options=[("grpc.default_authority", "localhost")]) as channel:
            stub = rpc.SnapshotsStub(channel)  # type: ignore[no-untyped-call]
            stub.Stat(pb.StatSnapshotRequest(key="nydusctl-doctor"), timeout=10)
    except grpc.RpcError as failure:
        if failure.code() != grpc.StatusCode.NOT_FOUND:
            yield error(
                "snapshotter.running", f"no answer at {address}: {failure.details() or failure.code().name}", START
            )
            return
    took = 1000 * (time.monotonic() - began)
    pid = f"pid {node.pid}, " if node.pid else ""
    yield ok("snapshotter.running", f"{pid}answers at {address} within {took:.0f} ms")


def unit(node: Node) -> Iterator[Finding]:
    given = node.choices.unit
    places = [Path(given)] if given else [Path(folder, name) for name in UNITS for folder in UNIT_FOLDERS]
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        if Path("/run/systemd/system").is_dir() or given:
            yield warning(
                "snapshotter.unit",
                f"no unit file{f' {given}' if given else ''}: the snapshotter is not started at boot",
                "nydusctl node install; or systemd/containerd-nydus-grpc.service to /etc/systemd/system by hand",
            )
        else:
            yield note("snapshotter.unit", "systemd does not run here, no unit file is looked at")
        return
    values = read_unit(file)
    good = True
    if values.get("Service.KillMode", "control-group") not in ("process", "none"):
        good = False
        yield error(
            "snapshotter.killmode",
            f"{file}: KillMode is {values.get('Service.KillMode', 'control-group')}: a restart of the snapshotter ends "
            "every nydusd, and running containers get ENOTCONN",
            "KillMode=process in its [Service] section, then systemctl daemon-reload",
        )
    if values.get("Service.Restart", "no") == "no":
        good = False
        yield warning("snapshotter.restart", f"{file}: Restart is not set", "Restart=always in its [Service] section")
    services = services_of(str(node.containerd.file))
    if not set(services) <= set(values.get("Unit.Before", "").split()):
        good = False
        yield warning(
            "snapshotter.order",
            f"{file}: not ordered before containerd, whose CRI plugin does not load without its snapshotter",
            f"Before={' '.join(services)} in its [Unit] section",
        )
    program = values.get("Service.ExecStart", "").lstrip("-@:+!").partition(" ")[0]
    if not program or shutil.which(program) is None:
        good = False
        yield error("snapshotter.program", f"{file}: ExecStart names no program: {program!r}", "correct its ExecStart")
    if good:
        yield ok("snapshotter.unit", f"{file}: nydusd outlives a restart, started before containerd")


def read_unit(file: Path) -> dict[str, str]:
    """`Section.Key` -> the last value, of a unit file and its drop-ins; lists of ordering words are joined."""
    values: dict[str, str] = {}
    dropins = [path for folder in UNIT_FOLDERS for path in sorted(Path(folder, f"{file.name}.d").glob("*.conf"))]
    for path in (file, *dropins):
        section = ""
        for line in path.read_text(errors="replace").replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("[") and line.endswith("]"):
                section = line[1:-1]
            elif "=" in line and line[0] not in "#;":
                key, _, value = line.partition("=")
                name = f"{section}.{key.strip()}"
                joined = f"{values.get(name, '')} {value.strip()}" if section == "Unit" else value.strip()
                values[name] = joined.strip() or values.get(name, "")
    return values


def daemons(node: Node) -> Iterator[Finding]:
    program = node.need().nydusd
    if node.need().serve and shutil.which(program) is None:
        yield error("nydusd.program", f"nydusd is not there: {program}", "install it, or name it with --nydusd")
    found = node.daemons()
    for one in found:
        api = NydusdApi(one.socket)
        name = f"nydusd {one.id}"
        try:
            info = _started(api)
        except SnapshotterError as failure:
            yield error(
                "nydusd.running",
                f"{name} does not answer: {failure}",
                f"its log is in {node.need().log_dir / one.id}; the snapshotter starts it again when it is needed",
            )
            continue
        state = info.get("state")
        if state != "RUNNING":
            yield warning("nydusd.running", f"{name} is in state {state}", "wait, then look into its log")
        else:
            version = (info.get("version") or {}).get("package_ver")
            images = len(info.get("backend_collection") or {})
            yield ok("nydusd.running", f"{name} {version}, pid {info.get('worker_pid') or one.pid}, {images} images")
        yield from _hung(name, api)
        yield from _events(name, api, node.need().log_dir / one.id)
    if not found and node.pid:
        yield note("nydusd.running", "no nydusd: none was needed so far, or plain images only")


def _started(api: NydusdApi) -> dict[str, Any]:
    """What it says of itself. One without a socket is given time: after an installation it is being started."""
    deadline = time.monotonic() + STARTING_SECONDS
    while not api.path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return api.info(timeout=5)


def _hung(name: str, api: NydusdApi) -> Iterator[Finding]:
    try:
        waiting = api.metrics("inflight") or []
    except SnapshotterError:
        return
    ages = [time.time() - one.get("timestamp_secs", time.time()) for one in waiting]
    old = [age for age in ages if age > HUNG_SECONDS]
    if old:
        yield error(
            "nydusd.hung",
            f"{name}: {len(old)} reads wait for more than {HUNG_SECONDS:.0f} s, the oldest for {max(old):.0f} s",
            f"nydusctl --sock {api.path} metrics sources says which source does not answer, stacks what is waited for",
        )


def _events(name: str, api: NydusdApi, folder: Path) -> Iterator[Finding]:
    try:
        told = api.get("daemon/events")
        errors = [str(line) for line in (told or {}).get("errors", [])]
    except (SnapshotterError, AttributeError):
        return
    recent = [line for line in errors if _age(line) < EVENT_SECONDS]
    if recent:
        yield warning(
            "nydusd.errors",
            f"{name} logged {len(recent)} errors within the hour, the last one: {recent[-1].partition(' - ')[2][:400]}",
            f"{folder}/nydusd.log; docs/errors.md says what each means",
        )


def _age(line: str) -> float:
    try:
        when = time.strptime(line.partition(" - ")[0], "%a, %d %b %Y %H:%M:%S GMT")
    except ValueError:
        return 0.0
    import calendar

    return time.time() - calendar.timegm(when)


def listens(path: Path) -> bool:
    """Whether somebody accepts connections on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


CHECKS = (settings, snapshotter, unit, daemons)
