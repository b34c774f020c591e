"""`nydusctl doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click


def where_to_look(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all commands that look at the whole node."""
    for option in (
        click.option("--namespace", "-n", default="default", envvar="CONTAINERD_NAMESPACE", show_default=True,
                     help="containerd's namespace; k8s.io is Kubernetes'."),
        click.option("--containerd", "-a", default="", metavar="SOCKET", help="containerd [default: that which runs]."),
        click.option("--containerd-config", default="", metavar="FILE", help="Its file [default: as it was started]."),
        click.option("--root", default="", metavar="DIR", help="Of the snapshotter [default: the one that runs]."),
        click.option("--config", default="", metavar="FILE", help="Its configuration, where none runs."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("doctor")
@where_to_look
@click.option("--unit", default="", metavar="FILE", help="The snapshotter's unit file [default: where systemd looks].")
@click.option("--image", "images", multiple=True, metavar="REF", help="Try this image's registry too; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of findings.")
@click.option("--strict", is_flag=True, help="Warnings make the exit status 1 as well.")
@click.option("--quiet", "-q", is_flag=True, help="Only what needs attention.")
def command(
    root: str,
    config: str,
    containerd: str,
    containerd_config: str,
    namespace: str,
    unit: str,
    images: tuple[str, ...],
    as_json: bool,
    strict: bool,
    quiet: bool,
) -> None:
    """Find out what is wrong on this node and what to do about it. Nothing is changed.

    Exit status: 0 all is well (warnings are shown), 1 an error was found, 2 wrong usage.
    """
    from snapshotter.doctor.finding import Level
    from snapshotter.doctor.run import findings
    from snapshotter.errors import SnapshotterError
    from snapshotter.node import Choices, Node

    arguments = ("--config", config) if config else ()
    try:
        node = Node(Choices(root, arguments, containerd, containerd_config, unit, namespace))
    except SnapshotterError as failure:
        raise click.ClickException(str(failure)) from None
    found = []
    for finding in findings(node, images):
        found.append(finding)
        if not as_json and not (quiet and finding.level < Level.WARNING):
            _show(finding.level, finding.check, finding.text, finding.remedy)
    worst = max((finding.level for finding in found), default=Level.OK)
    if as_json:
        click.echo(json.dumps(
            [{"check": one.check, "level": one.level.name.lower(), "text": one.text, "remedy": one.remedy}
             for one in found], indent=1))  # fmt: skip
    elif not quiet:
        counts = {level: sum(one.level is level for one in found) for level in Level}
        click.echo(f"\n{counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings, {len(found)} findings")
    raise SystemExit(1 if worst is Level.ERROR or (strict and worst is Level.WARNING) else 0)


_MARKS = {"OK": ("ok", "green"), "NOTE": ("note", "blue"), "WARNING": ("warn", "yellow"), "ERROR": ("ERROR", "red")}


def _show(level: Any, check: str, text: str, remedy: str) -> None:
    mark, colour = _MARKS[level.name]
    click.echo(f"{click.style(f'{mark:<5}', fg=colour, bold=level.name == 'ERROR')} {check:<24} {text}")
    if remedy:
        click.echo(f"{'':30} -> {remedy}")
