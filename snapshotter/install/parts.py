"""What an installation consists of, what is there of it already, and the record of what was put there.

The record makes an upgrade and an uninstall know what is ours: a file that somebody changed is neither overwritten
nor removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from snapshotter.errors import InstallError
from snapshotter.install.host import Host

UNIT = "containerd-nydus-grpc.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PACKAGED = (f"/usr/lib/systemd/system/{UNIT}", f"/lib/systemd/system/{UNIT}")
CONFIG = "/etc/nydus/config.json"
RECORD = "/etc/nydus/node-install.json"
PROGRAM = "containerd-nydus-grpc"
_TEMPLATE_PROGRAM = "/usr/local/bin/containerd-nydus-grpc"
_SOURCES = {UNIT: ("systemd", UNIT), "config.json": ("examples", "config.json")}


@dataclass
class Record:
    """`state`: installing, installed or uninstalling; what is not finished is told by it. `files`: path -> SHA-256."""

    state: str = ""
    containerd_config: str = ""
    created_config: bool = False  # containerd had no configuration file
    files: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(host: Host) -> Record | None:
        """None where nothing was installed. Raises InstallError."""
        text = host.read(RECORD)
        if text is None:
            return None
        try:
            value = json.loads(text)
            return Record(
                str(value["state"]),
                str(value["containerd_config"]),
                bool(value["created_config"]),
                {str(path): str(digest) for path, digest in value["files"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InstallError(f"{RECORD} is damaged: delete it and run `nydusctl node install` again") from None

    def write(self, host: Host) -> None:
        host.write(RECORD, json.dumps(self.__dict__, indent=1) + "\n")

    def ours(self, host: Host, path: str) -> bool:
        """Whether a file is as it was written by us."""
        text = host.read(path)
        return text is not None and self.files.get(path) == digest(text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shipped(name: str) -> str:
    """A file of this distribution: beside this module in a wheel, in the source tree otherwise."""
    beside = resources.files("snapshotter.install") / "data" / name
    if beside.is_file():
        return beside.read_text()
    return Path(__file__).parents[2].joinpath(*_SOURCES[name]).read_text()


def default_config() -> str:
    """The example without its mirror, which is of a Dragonfly that this node may not have."""
    value = json.loads(shipped("config.json"))
    del value["device"]["backend"]["config"]["mirrors"]
    return json.dumps(value, indent=2) + "\n"


def program_path(host: Host, folder: str) -> str:
    """The snapshotter's program on that machine: in `folder`, else beside this one. Raises InstallError."""
    places = [folder] if folder else [str(Path(sys.argv[0]).absolute().parent), str(Path(sys.executable).parent)]
    for place in places:
        if os.access(host.path(f"{place}/{PROGRAM}"), os.X_OK):
            return f"{place}/{PROGRAM}"
    if not folder and (found := host.program(PROGRAM)):
        return found
    raise InstallError(f"{PROGRAM} is not in {' or '.join(places)}{' of ' + str(host.root) if not host.here else ''}: "
                       "name its directory with --bin")  # fmt: skip


def unit_text(program: str) -> str:
    """Raises InstallError."""
    if any(one in " \"'\\%$;" for one in program):
        raise InstallError(f"{program!r} has a character that means something to systemd: install somewhere else")
    return shipped(UNIT).replace(_TEMPLATE_PROGRAM, program)


def packaged_unit(host: Host, program: str) -> str:
    """The unit file that a package brought for this very program, "" if none did."""
    for path in PACKAGED:
        text = host.read(path)
        if text is not None and any(line.startswith(f"ExecStart={program} ") for line in text.splitlines()):
            return path
    return ""


def checked_config(text: str, file: object) -> str:
    """nydusd's configuration as JSON. Raises InstallError for what is none."""
    try:
        value = json.loads(text)
    except ValueError as failure:
        raise InstallError(f"{file}: not JSON: {failure}") from None
    if not isinstance(value, dict) or "device" not in value:
        raise InstallError(f"{file}: a nydusd configuration has a key `device`, this has none")
    return text
