"""Whether `nydusctl node install` came to its end, and whether what it did is still there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from snapshotter.doctor.finding import Finding, error, ok, warning
from snapshotter.install.edit import has_block
from snapshotter.install.host import Host
from snapshotter.install.parts import CONFIG, PACKAGED, RECORD, UNIT, UNIT_FILE, Record
from snapshotter.node import Node

AGAIN = "nydusctl node install, which may be repeated; or nydusctl node uninstall"
_NEW = (".nydus-new", ".nydus-try")


def installed(node: Node) -> Iterator[Finding]:
    """Nothing on a node that was set up by hand."""
    yield from judge(Host(), str(node.containerd.file))


def judge(host: Host, file: str) -> Iterator[Finding]:
    """`file`: containerd's configuration where no record names one. Raises InstallError for a damaged record."""
    record = Record.read(host)
    file = record.containerd_config if record is not None else file
    edited = has_block(host.read(file) or "")
    if record is None:
        if edited:
            yield error("node.install", f"{file} has the lines of nydusctl node install, but {RECORD} is gone", AGAIN)
        return
    if record.state != "installed":
        yield error("node.install", f"{RECORD}: {record.state} was begun and did not come to its end", AGAIN)
        return
    good = True
    if not edited:
        good = False
        yield error("node.containerd", f"{file} does not have the lines any more that were put there", AGAIN)
    if not any(host.path(path).is_file() for path in (UNIT_FILE, *PACKAGED)):
        good = False
        yield error("node.unit", f"{UNIT_FILE} was installed and is gone", AGAIN)
    elif not host.enabled(UNIT):
        good = False
        yield warning("node.enabled", f"{UNIT} is not started at boot", f"systemctl enable {UNIT}")
    if not host.path(CONFIG).is_file():
        good = False
        yield error("node.config", f"{CONFIG} was installed and is gone", AGAIN)
    for path in (file, CONFIG, UNIT_FILE):
        for left in (Path(path + end) for end in _NEW if host.path(path + end).exists()):
            good = False
            yield warning("node.leftover", f"{left} is of a write that was interrupted", f"rm {left}")
    if good:
        yield ok("node.install", f"installed by nydusctl node install: {file}, {UNIT}")


CHECKS = (installed,)
