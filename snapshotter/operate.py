"""`nydusctl snapshotter ...`: the running snapshotter itself, over its socket below the root."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from snapshotter.nydusd_api import NydusdApi

UPGRADE_SECONDS = 3600.0  # hundreds of nydusd, one after the other; each is bounded

_root = click.option("--root", default="", metavar="DIR", help="Of the snapshotter [default: the one that runs].")


def api(root: str) -> NydusdApi:
    """Its socket. Raises click.ClickException."""
    from snapshotter.controller import SOCKET
    from snapshotter.errors import SnapshotterError
    from snapshotter.node import Choices, Node

    try:
        return NydusdApi((Path(root) if root else Node(Choices()).root) / SOCKET)
    except SnapshotterError as failure:
        raise click.ClickException(str(failure)) from None


def answers(path: Path) -> bool:
    from snapshotter.doctor.services import listens

    return path.exists() and listens(path)


@click.group("snapshotter")
def command() -> None:
    """The running snapshotter: what it does, how much it logs, its nydusd."""


@command.command()
@_root
def stacks(root: str) -> None:
    """Where each of its threads is: what a snapshotter that hangs is waiting for."""
    from nydusfs.stacks import as_text

    value = _asked(api(root), "GET", "/api/v1/stacks")
    click.echo(as_text({"threads": value["threads"], "tasks": value["tasks"]}))


@command.command("log-level")
@click.argument("level")
@_root
@click.option("--daemons", is_flag=True, help="And of every nydusd.")
def log_level(level: str, root: str, daemons: bool) -> None:
    """Change what is logged from now on: trace, debug, info, warn or error."""
    _asked(api(root), "PUT", "/api/v1/log", {"level": level, "daemons": daemons})


@command.command()
@_root
@click.option("--wait", default=0.0, metavar="SECONDS", help="For a snapshotter that was started a moment ago.")
def upgrade(root: str, wait: float) -> None:
    """Have every nydusd go over to the code that is installed now, under its mounts."""
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and not answers(api(root).path):
        time.sleep(0.1)
    _asked(api(root), "PUT", "/api/v1/daemons/upgrade", {"policy": "rolling"}, UPGRADE_SECONDS)


@command.command()
@_root
def daemons(root: str) -> None:
    """The nydusd processes and their images, as JSON."""
    click.echo(json.dumps(_asked(api(root), "GET", "/api/v1/daemons"), indent=1))


def _asked(
    found: NydusdApi, method: str, path: str, body: object = None, *timeout: float
) -> dict[str, list[dict[str, object]]]:
    from snapshotter.errors import SnapshotterError
    from snapshotter.nydusd_api import ApiError, ApiUnreachable

    try:
        return found.call(method, path, body, *timeout) or {}
    except ApiUnreachable as failure:
        hung = f"the snapshotter at {found.path} does not answer in time"
        raise click.ClickException(hung if failure.hung else f"no snapshotter answers at {found.path}") from None
    except ApiError as failure:
        raise click.ClickException(failure.message) from None
    except SnapshotterError as failure:
        raise click.ClickException(str(failure)) from None
