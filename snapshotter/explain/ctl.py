"""`nydusctl explain`."""

from __future__ import annotations

import json

import click

from snapshotter.doctor.ctl import where_to_look


@click.command("explain")
@click.argument("name", metavar="CONTAINER|IMAGE")
@where_to_look
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(
    name: str, root: str, config: str, containerd: str, containerd_config: str, namespace: str, as_json: bool
) -> None:
    """Was it lazy, which layers were not and why, where did its bytes come from, what did it wait for?

    The name is a container's (its id or the beginning of it, or nerdctl's name), else an image reference. Numbers are
    those of the nydusd that serves the image now, since that process began; containers of one image share them.
    """
    from nydusfs.errors import NydusError
    from snapshotter.errors import SnapshotterError
    from snapshotter.explain.facts import explain
    from snapshotter.node import Choices, Node

    arguments = ("--config", config) if config else ()
    try:
        found = explain(Node(Choices(root, arguments, containerd, containerd_config, "", namespace)), name)
    except (SnapshotterError, NydusError) as failure:
        raise click.ClickException(str(failure)) from None
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
        return
    from rich.console import Console

    from snapshotter.explain.show import show

    show(found, Console(soft_wrap=False))
