"""nydus-image: build, check and look at RAFS images. One file per command, imported when it is run.

Exit codes: 0 done; 1 the image, a file or an option is wrong (one line on stderr says what); 2 usage, or layers that
do not fit together (`merge`).
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from types import FrameType
from typing import Any

import click

_COMMANDS = {
    "create": "Create RAFS images from directories or layer tars",
    "merge": "Merge layer bootstraps into the bootstrap of an image",
    "check": "Validate a bootstrap, with -D its data too",
    "inspect": "Look into a bootstrap, interactively or with one request",
    "export": "Write an image and its data as one disk image",
    "compact": "Drop unused data of an image and merge its small blobs",
    "optimize": "Put what is read first into a blob of its own",
    "chunkdict": "Find chunks that many images have (chunkdict generate)",
    "unpack": "Unpack an image to the tar of an OCI layer",
    "stat": "Count files, sizes and chunks of images, and what they share",
}


class _Listed(click.Command):
    """Stands for a command in the list of --help, so that showing it imports none of them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, short_help=_COMMANDS[name])


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Commands(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what is half written is removed
            if signal.getsignal(number) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
                signal.signal(number, _terminated)
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # a full disk below standard output
            click.echo(f"Error: {error.strerror or error}", err=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"bootstrap.cli.{cmd_name}")
        found: click.Command = getattr(module, cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _Listed(name).get_short_help_str(80)) for name in _COMMANDS])


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from bootstrap.cli.building import version_text

        click.echo(version_text())
        ctx.exit()


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="'nydus-image COMMAND -h' tells the rest.",
)
@click.option("-L", "--log-file", metavar="FILE", help="Write messages there instead of to stderr.")
@click.option(
    "-l",
    "--log-level",
    type=click.Choice(["trace", "debug", "info", "warn", "error"]),
    help="How much to say (default info).",
)
@click.option("-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
@click.pass_context
def main(ctx: click.Context, log_file: str | None, log_level: str | None) -> None:
    """Build, check and look at RAFS images (Nydus), versions 5 and 6."""
    given = {key: value for key, value in (("log_file", log_file), ("log_level", log_level)) if value}
    ctx.default_map = dict.fromkeys(_COMMANDS, given)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


