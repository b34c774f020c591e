"""`nydusd` as a command for people: help, versions, and what is wrong with a command line. See `flags.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from nydusfs.daemon import flags
from nydusfs.daemon.cli import start

_LATER = {
    "virtiofs": "it would serve virtual machines; only 'fuse' is there",
    "singleton": "it would need the kernel's fscache driver, which Linux gives up. Use 'fuse' without --bootstrap: one "
    "daemon for all images, mounted through its API, with --fs-driver auto where the kernel is to serve them itself",
    "nbd": "it would export block devices; 'nydus-image export --block' makes a disk image",
    "uffd": "it would serve page faults; only 'fuse' is there",
}


class _DefaultFuse(click.Group):
    """`nydusd FLAGS` means `nydusd fuse FLAGS`, as nydusify and the smoke tests call it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in _LATER:
            raise click.UsageError(f"the subcommand '{args[0]}' is not supported by this nydusd: {_LATER[args[0]]}")
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "-V", "--version"):
            if args[0].startswith("-"):
                args = ["fuse", *args]
            else:
                raise click.UsageError(f"unknown subcommand '{args[0]}': this nydusd has 'fuse'")
        return super().parse_args(ctx, args)


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from nydusfs.daemon.version import version_text

        click.echo(version_text())
        ctx.exit()


_version = click.option(
    "-V", "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version."
)
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_DefaultFuse, context_settings=_HELP)
@_version
def cli() -> None:
    """Serve container images whose data is fetched while they run.

    \b
    One image, from a directory of blobs:
      nydusd fuse -B image.boot -D /blobs -M /mnt
    One image from a registry, as the configuration says:
      nydusd fuse -B image.boot -C nydusd.json -M /mnt -A /run/nydusd.sock
    No image yet; mount them through the API (nydusctl mount):
      nydusd fuse -M /mnt -A /run/nydusd.sock

    Exit status: 0 stopped by signal, API or umount; 1 any error; 2 wrong usage.
    """


def _unsupported(flag: str, why: str) -> Any:
    def refuse(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        if value:
            raise click.UsageError(f"{flag} is not supported by this nydusd: {why}")
        return value

    return refuse


def _option(flag: flags.Flag) -> Callable[[Any], Any]:
    kind: Any = flag.kind
    if flag.kind is int:
        kind = click.IntRange(flag.low, flag.high)
    elif isinstance(flag.kind, tuple):
        kind = click.Choice(flag.kind, case_sensitive=False)
    switch = flag.kind is bool
    names = ("/".join(flag.names),) if switch else flag.names
    return click.option(
        *names,
        flag.key,
        type=None if switch else kind,
        is_flag=switch,
        default=flag.default,
        required=flag.key == "mountpoint",
        show_default=flag.default not in (None, False),
        metavar=flag.metavar,
        help=flag.help or None,
    )


def _options(command: Any) -> Any:
    for flag in reversed(flags.FLAGS):
        command = _option(flag)(command)
    return command


@cli.command()
@_options
@click.option("-s", "--shared-dir", hidden=True, callback=_unsupported("--shared-dir", "only RAFS images are served"))
@click.option("--writable", is_flag=True, hidden=True,
              callback=_unsupported("--writable", "put an overlay file system above the mount"))  # fmt: skip
@click.option("--dedup-db", hidden=True, callback=_unsupported("--dedup-db", "there is no local chunk database"))
@_version
def fuse(shared_dir: str | None, writable: bool, dedup_db: str | None, **settings: Any) -> None:
    """Serve images by FUSE at one mountpoint.

    With --bootstrap one image is there at once; more are added and removed through the API as subtrees.
    """
    if why := flags.conflict(settings):
        raise click.UsageError(why)
    sys.exit(start(settings))
