"""`nydusctl node`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@click.group("node")
def command() -> None:
    """Make this machine a node with this snapshotter, or take it away again."""


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--no-restart", is_flag=True, help="Start, stop and restart no service."),
        click.option("--dry-run", is_flag=True, help="Show what would be changed in files, as a diff."),
        click.option("--containerd-config", default="", metavar="FILE",
                     help="containerd's [default: of the one that runs, else /etc/containerd/config.toml]."),
        click.option("--root", default="/", metavar="DIR", help="The tree of another machine; nothing is started."),
    ):  # fmt: skip
        function = option(function)
    return function


@command.command()
@_common
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME",
              help="Only for this runtime of CRI (a RuntimeClass handler), not for all; repeatable.")  # fmt: skip
@click.option("--replace", is_flag=True, help="Change keys too that are set to something of their own.")
@click.option("--bin", default="", metavar="DIR", help="Where the programs are [default: beside this one].")
@click.option("--config", default="", metavar="FILE", help="What becomes /etc/nydus/config.json if there is none.")
def install(
    root: str, containerd_config: str, dry_run: bool, no_restart: bool,
    runtimes: tuple[str, ...], replace: bool, bin: str, config: str,
) -> None:  # fmt: skip
    """Service, /etc/nydus/config.json, and containerd's configuration between marks; then start and restart.

    May be repeated. What was changed by hand is not overwritten. A containerd that does not come back with the new
    configuration gets its old one again.

    Exit status: 0 done, 1 refused or failed, said in one line, 2 wrong usage.

    \b
      nydusctl node install --dry-run
      nydusctl node install --runtime nydus
    """
    from snapshotter.install.host import Host
    from snapshotter.install.install import Choices
    from snapshotter.install.install import install as run

    choices = Choices(containerd_config, runtimes, replace, bin, config, not no_restart, dry_run)
    _guarded(run, Host(Path(root).resolve()), choices, click.echo)


@command.command()
@_common
@click.option("--force", is_flag=True, help="Although containers use it: they lose their files.")
@click.option("--purge", is_flag=True, help="Images, cache, logs and configuration too.")
def uninstall(root: str, containerd_config: str, dry_run: bool, no_restart: bool, force: bool, purge: bool) -> None:
    """Stop the service, bring back containerd's configuration, remove what was installed. Keeps images and cache.

    Refuses while containers use it, and names them. A file that was changed by hand stays.

    Exit status: 0 done, 1 refused or failed, said in one line, 2 wrong usage.
    """
    from snapshotter.install.host import Host
    from snapshotter.install.uninstall import Choices
    from snapshotter.install.uninstall import uninstall as run

    choices = Choices(containerd_config, force, purge, not no_restart, dry_run)
    _guarded(run, Host(Path(root).resolve()), choices, click.echo)


def _guarded(run: Callable[..., None], *arguments: Any) -> None:
    from nydusfs.errors import NydusError, os_reason
    from snapshotter.errors import SnapshotterError

    try:
        run(*arguments)
    except (SnapshotterError, NydusError) as failure:
        raise click.ClickException(str(failure)) from None
    except OSError as failure:
        raise click.ClickException(os_reason(failure)) from None
