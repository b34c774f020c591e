"""What the commands that build images share: numbers, prefetch patterns, the result as JSON, failing cleanly."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

PREFETCH_HELP = (
    "What to fetch ahead at run time: 'fs' records the paths read from stdin (one absolute path a line, to the end of "
    "input), 'blob' also puts their data first (v5), 'none' reads nothing."
)


def log_options(command: F) -> F:
    """-L and -l, which every command of the builder has."""
    command = click.option(
        "-l",
        "--log-level",
        type=click.Choice(["trace", "debug", "info", "warn", "error"], case_sensitive=False),
        default="info",
        show_default=True,
        help="How much to say.",
    )(command)
    return click.option("-L", "--log-file", metavar="FILE", help="Write messages there instead of to stderr.")(command)


def set_up_logging(level: str, log_file: str | None) -> None:
    """Messages of this command to stderr or `log_file`; ClickException if that cannot be opened."""
    names = {"trace": logging.DEBUG, "debug": logging.DEBUG, "warn": logging.WARNING, "error": logging.ERROR}
    from bootstrap.cli.output import LogFile

    try:
        handler: logging.Handler = LogFile(log_file) if log_file else logging.StreamHandler()
    except OSError as error:
        raise click.ClickException(f"cannot write the log file {log_file}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(names.get(level.lower(), logging.INFO))


class CommandError(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        setattr(self, "exit_code", exit_code)  # noqa: B010  click declares it on the class


@contextmanager
def clear_errors(doing: str) -> Iterator[None]:
    """Turn what can go wrong into one line: domain errors (exit 1, layers that do not fit 2), full disks, Ctrl-C."""
    from bootstrap.errors import RafsError
    from bootstrap.merge import InconsistentError

    try:
        yield
    except InconsistentError as error:
        raise CommandError(f"{doing}: {error}", 2) from error
    except RafsError as error:
        raise CommandError(f"{doing}: {error}") from error
    except BrokenPipeError as error:
        raise CommandError(f"{doing}: whoever reads the output went away") from error
    except OSError as error:
        where = f" {os.fsdecode(error.filename)}:" if error.filename else ""
        raise CommandError(f"{doing}:{where} {error.strerror or error}") from error
    except MemoryError as error:
        raise CommandError(f"{doing}: not enough memory") from error


def read_patterns(policy: str) -> list[bytes]:
    """Prefetch patterns from stdin if the policy wants some; dropped ones are logged."""
    if policy == "none":
        return []
    from bootstrap.tree import clean_patterns

    kept, warnings = clean_patterns(sys.stdin.buffer.read().splitlines())
    for warning in warnings:
        logging.getLogger(__name__).warning("%s", warning)
    return kept


def version() -> str:
    """Our version as callers parse it: v1.2.3."""
    try:
        return "v" + metadata.version("nydus-py")
    except metadata.PackageNotFoundError:
        return "v0.0.0"


def version_text() -> str:
    """The answer to --version: five lines as upstream's; callers match `Version:\\s*(v.*)` in it."""
    commit = os.environ.get("NYDUS_BUILD_COMMIT", "unknown")
    built = os.environ.get("NYDUS_BUILD_TIME", "unknown")
    return (
        f"Version: \t{version()}\nGit Commit: \t{commit}\nBuild Time: \t{built}\nProfile: \trelease\n"
        f"Rustc: \t\t{platform.python_implementation()} {platform.python_version()}"
    )


def report(
    *,
    bootstrap: str,
    blobs: Sequence[str],
    times: dict[str, float],
    events: dict[str, int | str],
    fs_version: int,
    compressor: str,
    output_json: str | None,
    blob_size: int | None,
    external_bootstrap: str = "",
    external_blobs: Sequence[str] = (),
) -> None:
    """Say what was built, in the log and in the JSON file that callers read."""
    size = "" if blob_size is None else f"data blob size: {blob_size:#x}\n"
    logging.getLogger(__name__).info(
        "successfully built RAFS filesystem: \nmeta blob path: %s\n%sdata blobs: %s",
        bootstrap or "<none>",
        size,
        json.dumps(list(blobs)),
    )
    if output_json is None:
        return
    document = {
        "version": version(),
        "bootstrap": bootstrap,
        "blobs": list(blobs),
        "external_bootstrap": external_bootstrap,
        "external_blobs": list(external_blobs),
        "trace": {
            "consumed_time": times,
            "registered_events": {**events, "egid": str(os.getegid()), "euid": str(os.geteuid())},
        },
        "fs_version": str(fs_version),
        "compressor": compressor,
    }
    write_json(output_json, json.dumps(document, indent=2))


def write_json(path: str, text: str) -> None:
    """The result that -J asks for; an OSError names `path`."""
    from bootstrap.cli.output import output_file

    with output_file(Path(path), pipes=True) as out:
        out.write(text.encode())
