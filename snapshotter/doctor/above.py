"""containerd: does it run, does it know this snapshotter, and does it tell it what a lazy pull needs to know?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from protos.containerd.services.version.v1 import version_pb2_grpc
from snapshotter.doctor.finding import Finding, error, note, ok, warning
from snapshotter.install.containerd import platform
from snapshotter.node import Containerd, Node
from snapshotter.system import start_time

SECONDS = 5.0
CRI_2 = "io.containerd.grpc.v1.cri"  # configuration version 2; [plugins.cri] in version 1
IMAGES_3 = "io.containerd.cri.v1.images"
TRANSFER = "io.containerd.transfer.v1.local"
_SNIPPETS = "nydusctl node install writes the lines, examples/containerd/ has them for each version"


def checks(node: Node) -> Iterator[Finding]:
    """All about containerd; what needs it running is left out when it is not."""
    containerd = node.containerd
    channel = grpc.insecure_channel(f"unix:{containerd.address}", options=[("grpc.default_authority", "localhost")])
    with channel:
        version, problem = _version(channel)
        if problem:
            yield error(
                "containerd.running",
                f"containerd does not answer at {containerd.address}: {problem}",
                "systemctl start containerd; or name its socket with --containerd",
            )
        else:
            yield from _judge_version(version, containerd)
        yield from _configuration(node, containerd)
        if not problem:
            yield from _plugins(node, containerd, channel)
    yield from _annotations(node, containerd, version)


def _version(channel: grpc.Channel) -> tuple[str, str]:
    stub: Any = version_pb2_grpc.VersionStub(channel)  # type: ignore[no-untyped-call]
    try:
        return str(stub.Version(Empty(), timeout=SECONDS).version), ""
    except grpc.RpcError as failure:
        return "", (failure.details() or failure.code().name).rpartition("error: ")[2]


def number(version: str) -> tuple[int, int]:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _judge_version(version: str, containerd: Containerd) -> Iterator[Finding]:
    if number(version) < (1, 5):
        yield warning("containerd.version", f"containerd {version} is older than 1.5", "a newer containerd")
    else:
        yield ok("containerd.running", f"containerd {version} at {containerd.address}, configuration {containerd.file}")


def _configuration(node: Node, containerd: Containerd) -> Iterator[Finding]:
    if containerd.problem:
        yield error("containerd.config", containerd.problem, "correct the file; or name it with --containerd-config")
    address = node.need().address
    name = containerd.snapshotter_name(address)
    others = {
        key: str(one.get("address", "")) for key, one in containerd.proxies().items() if one.get("type") == "snapshot"
    }
    if name:
        yield ok("containerd.proxy", f"proxy plugin {name} is this snapshotter")
    elif "nydus" in others:
        yield error(
            "containerd.proxy",
            f"proxy_plugins.nydus of {containerd.file} is {others['nydus']}, the snapshotter serves {address}",
            "the same address in both",
        )
    else:
        yield error(
            "containerd.proxy",
            f"{containerd.file} names no proxy plugin for {address}",
            f"add [proxy_plugins.nydus] and restart containerd: {_SNIPPETS}",
        )
    if name and "nydus" not in name:
        yield note(
            "containerd.name", f"the plugin is called {name}; nerdctl takes only names with nydus in them for lazy"
        )


def _plugins(node: Node, containerd: Containerd, channel: grpc.Channel) -> Iterator[Finding]:
    stub: Any = introspection_pb2_grpc.IntrospectionStub(channel)  # type: ignore[no-untyped-call]
    try:
        found = list(stub.Plugins(introspection_pb2.PluginsRequest(), timeout=SECONDS).plugins)
    except grpc.RpcError as failure:
        yield error("containerd.plugins", f"it lists no plugins: {failure.details()}", "look into containerd's log")
        return
    name = containerd.snapshotter_name(node.need().address)
    mine = [one for one in found if one.type == "io.containerd.snapshotter.v1" and one.id == name]
    if name and not mine:
        changed = _changed_since_start(containerd)
        yield error(
            "containerd.loaded",
            f"containerd has not loaded its plugin {name}"
            + (f": {containerd.file} is newer than the process" if changed else ""),
            "systemctl restart containerd",
        )
    elif mine and mine[0].init_err.message:
        yield error("containerd.loaded", f"plugin {name}: {mine[0].init_err.message}", "look into containerd's log")
    elif mine:
        yield ok("containerd.loaded", f"plugin {name} is loaded")
        if _changed_since_start(containerd):
            yield warning(
                "containerd.stale",
                f"{containerd.file} was changed after containerd's start: what is read here may not be in force",
                "systemctl restart containerd",
            )
    for one in found:
        if one.id == "cri" and one.init_err.message and "skip" not in one.init_err.message:
            yield error(
                "containerd.cri",
                f"containerd's CRI plugin did not load: {one.init_err.message}",
                "start the snapshotter first, then restart containerd",
            )


def _changed_since_start(containerd: Containerd) -> bool:
    ticks = start_time(containerd.pid) if containerd.pid else 0
    if not ticks:
        return False
    try:
        boot = next(
            int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime")
        )
        changed = containerd.file.stat().st_mtime
    except (OSError, StopIteration):
        return False
    return changed > boot + ticks / os.sysconf("SC_CLK_TCK") + 1


def _annotations(node: Node, containerd: Containerd, version: str) -> Iterator[Finding]:
    """Without the labels of which image a layer is containerd must be asked for the registry of a Nydus image."""
    name = containerd.snapshotter_name(node.need().address)
    if not name:
        return
    plugins = containerd.plugins()
    third = containerd.version >= 3 or (number(version) >= (2, 0) and IMAGES_3 in plugins)
    if third:
        place, table = f"plugins.'{IMAGES_3}'", _table(plugins, IMAGES_3)
        runtimes = [
            one.get("snapshotter") for one in _table(table, "runtime_platforms").values() if isinstance(one, dict)
        ]
    else:
        key = CRI_2 if containerd.version >= 2 else "cri"
        place, table = f'plugins."{key}".containerd', _table(plugins, key, "containerd")
        runtimes = [one.get("snapshotter") for one in _table(table, "runtimes").values() if isinstance(one, dict)]
    disabled = [str(one) for one in containerd.config.get("disabled_plugins", [])]
    if any(one.endswith(("v1.cri", "cri.v1.images")) or one == "cri" for one in disabled):
        yield note("containerd.cri", "the CRI plugin is disabled: kubelet cannot use this containerd")
        return
    if name not in [table.get("snapshotter"), *runtimes]:
        yield note(
            "containerd.cri",
            f"CRI pulls for snapshotter {table.get('snapshotter', 'overlayfs')}: images of Kubernetes are not lazy, "
            f"those of nerdctl and ctr with snapshotter {name} are",
            f'snapshotter = "{name}" in [{place}] of {containerd.file}',
        )
    elif table.get("disable_snapshot_annotations", True) is not False:
        yield warning(
            "containerd.annotations",
            f"snapshot annotations are disabled in [{place}] of {containerd.file}: which image a layer is of is asked "
            "of containerd when its first container comes, which takes some milliseconds more",
            f"disable_snapshot_annotations = false in [{place}], then restart containerd",
        )
    else:
        yield ok("containerd.annotations", "CRI tells which image a layer is of")
    if table.get("discard_unpacked_layers") is True:
        yield warning(
            "containerd.discard",
            "discard_unpacked_layers is true: an image pulled for another snapshotter cannot be unpacked for this one",
            f"discard_unpacked_layers = false in [{place}]",
        )
    if third and number(version) >= (2, 1):
        yield from _transfer(containerd, name)


def _transfer(containerd: Containerd, name: str) -> Iterator[Finding]:
    """The pulls of nerdctl 2.3 and ctr."""
    exports = _table(containerd.proxies().get(name), "exports")
    if exports.get("enable_remote_snapshot_annotations") != "true":
        yield warning(
            "containerd.transfer",
            "pulls by the transfer service (nerdctl, ctr) do not say which image a layer is of: containerd is asked",
            f'enable_remote_snapshot_annotations = "true" in [proxy_plugins.{name}.exports], then restart containerd',
        )
        return
    units = _table(containerd.plugins(), TRANSFER).get("unpack_config") or []
    ours = [str(one.get("platform", "")) for one in units if isinstance(one, dict) and one.get("snapshotter") == name]
    if not any(one.startswith(platform()) or not one for one in ours):
        yield warning(
            "containerd.transfer",
            f"the transfer service unpacks nothing for {name}" + (f" but images of {', '.join(ours)}" if ours else ""),
            f"[[plugins.'{TRANSFER}'.unpack_config]] with snapshotter = \"{name}\" and platform = \"{platform()}\": "
            f"{_SNIPPETS}",
        )
    else:
        yield ok("containerd.transfer", "the transfer service tells which image a layer is of")


def _table(value: Any, *names: str) -> dict[str, Any]:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


CHECKS = (checks,)
