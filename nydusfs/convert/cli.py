"""`nydusify`: the command group. Each command lives in a module of its own that is imported when it is used."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from types import FrameType

import click

from bootstrap.cli.output import LogFile
from nydusfs.levels import LEVELS

_COMMANDS = {
    "convert": ("nydusfs.convert.cmd_convert", "Convert an image of a registry into a Nydus image"),
    "check": ("nydusfs.convert.cmd_check", "Check a Nydus image, and compare it with its source entry by entry"),
    "copy": ("nydusfs.convert.cmd_copy", "Copy an image between registries and archives"),
    "mount": ("nydusfs.convert.cmd_mount", "Mount a Nydus image as a folder until Ctrl-C"),
    "build": ("nydusfs.convert.cmd_build", "Make a Nydus image of a directory: a bootstrap and a blob"),
    "optimize": ("nydusfs.convert.cmd_optimize", "Put what a container reads first into a blob of its own"),
    "chunkdict": ("nydusfs.convert.cmd_chunkdict", "Find chunks that many Nydus images have"),
    "commit": ("nydusfs.convert.cmd_commit", "Make a new image of what a container changed"),
}
_ALIASES = {"view": "mount", "pack": "build"}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(_ALIASES.get(cmd_name, cmd_name))
        if entry is None:
            return None
        command: click.Command = importlib.import_module(entry[0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nydusfs.convert.convert import builder_version

        click.echo(f"Version: {builder_version()}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit codes: 0 done; 1 failed, or `check` found differences; 2 wrong usage; 130 interrupted.",
)
@click.option("-D", "--debug", is_flag=True, envvar="DEBUG_LOG_LEVEL", help="Log everything.")
@click.option(
    "-l", "--log-level", default="info", envvar="LOG_LEVEL", type=click.Choice(list(LEVELS), case_sensitive=False),
    show_default=True, help="Least severe level to log.",
)  # fmt: skip
@click.option("--log-file", envvar="LOG_FILE", type=click.Path(dir_okay=False), help="Log into a file, not to stderr.")
@click.option(
    "-v", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
def cli(debug: bool, log_level: str, log_file: str | None) -> None:
    """Make, check and mount Nydus images.

    A Nydus image starts before it is downloaded: its files are fetched when they are read. Registry credentials come
    from docker's config.json ($DOCKER_CONFIG, ~/.docker) and its credential helpers. Every flag can also be given by
    an environment variable, shown in brackets.
    """
    mine = bool(logging.getLogger().handlers)  # of a program that calls this in its own process
    level = logging.DEBUG if debug else LEVELS[log_level.lower()]
    try:
        logging.basicConfig(
            level=level,
            handlers=[LogFile(log_file)] if log_file and not mine else None,
            format="%(asctime)s %(levelname)s %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )
    except OSError as error:
        raise click.ClickException(f"log file {log_file} cannot be written: {error.strerror}") from error
    if level > logging.DEBUG and not mine:
        for handler in logging.getLogger().handlers:
            handler.addFilter(_of_this_program)
    for noisy in ("httpx", "httpcore"):  # never more: they would log header fields
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _of_this_program(record: logging.LogRecord) -> bool:
    """What the daemon's modules say of themselves (`check` reads with them) is for nydusd's log."""
    return record.levelno >= logging.WARNING or not record.name.startswith("nydusfs") or "convert" in record.name


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Console script. Every failure is one line on stderr and an exit code; a traceback only with --debug."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code: object = cli.main(arguments, prog_name="nydusify", standalone_mode=False)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("nydusify: interrupted", err=True)
        code = 130
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG) and logging.getLogger().handlers:
            logging.getLogger(__name__).debug("where it happened", exc_info=True)
        text = " ".join(_sentence(error).split()) or type(error).__name__
        known = _is_known(error)
        click.echo(f"nydusify: error: {text if known else f'internal: {type(error).__name__}: {text}'}", err=True)
        code = getattr(error, "exit_code", 1) if known else 1
    sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> str:
    from nydusfs.errors import os_reason

    return os_reason(error) if isinstance(error, OSError) else str(error)


def _is_known(error: Exception) -> bool:
    from bootstrap.errors import RafsError
    from nydusfs.errors import NydusError

    return isinstance(error, NydusError | RafsError | OSError)
