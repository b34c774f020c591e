"""The `nydusd` command. Everything heavy is imported only when a daemon really starts.

Exit status: 0 after a stop by signal, API or umount; 1 after any error, said in one line on stderr; 2 for wrong usage.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

_LATER = {
    "virtiofs": "it would serve virtual machines; only 'fuse' is there",
    "singleton": "it would need the kernel's fscache driver, which Linux gives up. Use 'fuse' without --bootstrap: one "
    "daemon for all images, mounted through its API, with --fs-driver auto where the kernel is to serve them itself",
    "nbd": "it would export block devices; 'nydus-image export --block' makes a disk image",
    "uffd": "it would serve page faults; only 'fuse' is there",
}
LOG_LEVELS = ("trace", "debug", "info", "warn", "error")


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


@cli.command()
@click.option("-M", "--mountpoint", required=True, metavar="DIR", help="Where to mount. The directory must exist.")
@click.option("-A", "--apisock", metavar="PATH", help="Unix socket of the HTTP API. Without it there is no API.")
@click.option("-B", "--bootstrap", metavar="FILE", help="RAFS metadata of the image. Without it: start empty.")
@click.option("-C", "--config", metavar="FILE", help="Configuration: version 1 JSON, or version 2 TOML or JSON.")
@click.option("-D", "--localfs-dir", metavar="DIR", help="Directory of the blobs; instead of --config.")
@click.option("-m", "--virtual-mountpoint", default="/", show_default=True, metavar="PATH",
              help="Where inside the mount the image appears.")  # fmt: skip
@click.option("--prefetch-files", metavar="FILE", help="List of absolute paths to fetch first, one per line.")
@click.option("--fuse-threads", "--thread-num", "threads", type=click.IntRange(1, 1024), default=4, show_default=True,
              help="Threads that take requests; reads that wait for the network keep none.")  # fmt: skip
@click.option("--fs-driver", type=click.Choice(["auto", "fuse", "erofs"]), default="fuse", show_default=True,
              help="How images reach the kernel. erofs: it serves them itself from the cache (Linux 6.15); auto: where "
                   "that is possible.")  # fmt: skip
@click.option("--failover-policy", type=click.Choice(["none", "resend", "flush"]), default="resend", show_default=True,
              help="Accepted for compatibility: what a dead worker left unanswered the next one answers.")  # fmt: skip
@click.option("--id", "daemon_id", metavar="ID", help="Name of this daemon in its API answers.")
@click.option("--supervisor", metavar="PATH", help="Socket to give the mount to and take it from; needs --id.")
@click.option("--upgrade", is_flag=True, help="Do not mount: wait for the API to say what to take over.")
@click.option("--keeper/--no-keeper", default=True, show_default=True,
              help="Serve from a worker process that is replaced, under the mount, when it dies.")  # fmt: skip
@click.option("-l", "--log-level", type=click.Choice(LOG_LEVELS, case_sensitive=False), default="info",
              show_default=True)  # fmt: skip
@click.option("-L", "--log-file", metavar="PATH", help="Log here and not to stdout; '.log' is added to a bare name.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="text: as upstream's nydusd writes; json: one object a line.")  # fmt: skip
@click.option("--log-rotation-size", type=click.IntRange(0), default=0, metavar="MB",
              help="Rotate the log at this size, keep 10 compressed files. 0: never.")  # fmt: skip
@click.option("--rlimit-nofile", type=click.IntRange(0), default=1_000_000, show_default=True,
              help="Open files to allow; clamped to what the machine permits. 0: leave it.")  # fmt: skip
@click.option("-s", "--shared-dir", hidden=True, callback=_unsupported("--shared-dir", "only RAFS images are served"))
@click.option("--writable", is_flag=True, hidden=True,
              callback=_unsupported("--writable", "put an overlay file system above the mount"))  # fmt: skip
@click.option("--dedup-db", hidden=True, callback=_unsupported("--dedup-db", "there is no local chunk database"))
@_version
def fuse(
    log_level: str,
    log_file: str | None,
    log_rotation_size: int,
    log_format: str,
    keeper: bool,
    shared_dir: str | None,
    writable: bool,
    dedup_db: str | None,
    **settings: Any,
) -> None:
    """Serve images by FUSE at one mountpoint.

    With --bootstrap one image is there at once; more are added and removed through the API as subtrees.
    """
    if settings["config"] and settings["localfs_dir"]:
        raise click.UsageError("the argument '--config <FILE>' cannot be used with '--localfs-dir <DIR>'")
    if settings["prefetch_files"] and not settings["bootstrap"]:
        raise click.UsageError("--prefetch-files needs --bootstrap")
    if bool(settings["supervisor"]) != bool(settings["daemon_id"]) and settings["supervisor"]:
        raise click.UsageError("--supervisor needs --id")
    spec = {
        "options": settings,
        "log_level": log_level,
        "log_file": log_file,
        "log_rotation_size": log_rotation_size,
        "log_format": log_format,
    }
    os.umask(os.umask(0o077) | 0o027)  # whoever started this: nothing is made for others, nothing for a group to write
    if keeper:
        from nydusfs.keeper import keeper as keeping

        sys.exit(keeping.run(spec))
    from nydusfs.daemon import worker

    sys.exit(worker.run(spec, None))


def main() -> None:
    cli(prog_name="nydusd")


if __name__ == "__main__":
    main()
