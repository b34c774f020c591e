"""`nydusctl auth`: what the running snapshotter knows about credentials."""

from __future__ import annotations

import json

import click


@click.group("auth")
def command() -> None:
    """Registry credentials, as the running snapshotter finds them."""


@command.command()
@click.argument("image", metavar="REF")
@click.option("-a", "--address", default="", metavar="SOCKET", help="Its socket [default: of the one that runs].")
@click.option("--root", default="", metavar="DIR", help="Of the snapshotter, where several run.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(image: str, address: str, root: str, as_json: bool) -> None:
    """Which source has credentials for an image, and why the others have none. Shows no secrets.

    \b
      nydusctl auth explain registry.example/team/app:1
    """
    import grpc

    from snapshotter.auth.explain import ask, lines
    from snapshotter.errors import SnapshotterError
    from snapshotter.node import Choices, Node

    try:
        address = address or str(Node(Choices(root)).need().address)
        answer = ask(address, image)
    except SnapshotterError as failure:
        raise click.ClickException(str(failure)) from None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise click.ClickException(f"no snapshotter answers at {address}: name its socket with --address") from None
        raise click.ClickException(str(error.details())) from None
    click.echo(json.dumps(answer) if as_json else "\n".join(lines(answer)))
