#!/usr/bin/env python3
"""Man pages of all programs and their commands, from the same objects that print `--help`.

    packaging/manpages.py DIRECTORY        # DIRECTORY/man1/nydusify-convert.1 ...

The date of the pages is $SOURCE_DATE_EPOCH, else today.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

# program -> (module, attribute or function that makes the command, section, one line)
PROGRAMS: dict[str, tuple[str, str, int, str]] = {
    "containerd-nydus-grpc": ("snapshotter.cli", "_command()", 8, "snapshotter for containerd with lazy Nydus images"),
    "nydusd": ("nydusfs.daemon.commands", "cli", 8, "serve container images whose data is fetched while they run"),
    "nydus-overlayfs": ("snapshotter.overlayfs", "", 8, "mount helper for overlays that have extra options"),
    "nydusctl": ("nydusfs.daemon.ctl", "cli", 1, "ask or change a running nydusd, look after a whole node"),
    "nydusify": ("nydusfs.convert.cli", "cli", 1, "make, check and mount Nydus images"),
    "nydus-image": ("bootstrap.cli", "main", 1, "build, check and look at RAFS images"),
    "ctr-remote": ("snapshotter.client.cli", "cli", 1, "pull images with the labels that a lazy snapshotter needs"),
}


def version() -> str:
    found = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def date() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    day = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC) if epoch else datetime.datetime.now(datetime.UTC)
    return day.strftime("%Y-%m-%d")


def root_command(program: str) -> click.Command:
    module, attribute, _, _ = PROGRAMS[program]
    loaded = importlib.import_module(module)
    found = getattr(loaded, attribute.removesuffix("()"))
    command: click.Command = found() if attribute.endswith("()") else found
    if program == "nydusctl":
        from snapshotter.nydusctl import COMMANDS

        command.later = COMMANDS  # type: ignore[attr-defined]
    return command


def pages() -> Iterator[tuple[str, str]]:
    """Path below the directory and text."""
    for program, (module, attribute, section, line) in PROGRAMS.items():
        if not attribute:
            yield f"man{section}/{program}.{section}", helper_page(program, module, section, line)
            continue
        for words, context in commands(program):
            name = "-".join(words)
            text = page(words, context, section, line if len(words) == 1 else "")
            yield f"man{section}/{name}.{section}", text


def commands(program: str) -> Iterator[tuple[list[str], click.Context]]:
    """Each command below a program, itself first, with the context that its help is printed in."""
    top = _context(root_command(program), program, None)
    waiting: list[tuple[list[str], click.Context]] = [([program], top)]
    while waiting:
        words, context = waiting.pop(0)
        yield words, context
        waiting += [([*words, name], _context(command, name, context)) for name, command in children(context)]


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def children(context: click.Context) -> list[tuple[str, click.Command]]:
    command = context.command
    if not isinstance(command, click.Group):
        return []
    found = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [(name, one) for name, one in found if one is not None and not one.hidden]


def page(words: list[str], context: click.Context, section: int, line: str) -> str:
    command = context.command
    name = "-".join(words)
    usage = context.command.get_usage(context).removeprefix("Usage: ").split()
    out = [
        heading(name, section),
        ".SH NAME",
        *name_lines(name, line or one_line(command)),
        ".SH SYNOPSIS",
        f".B {escaped(' '.join(words))}",
        *filled(" ".join(usage)[len(" ".join(words)) :]),
    ]
    if text := help_text(command):
        out += [".SH DESCRIPTION", *rendered(text)]
    options = [record for record in (one.get_help_record(context) for one in command.get_params(context)) if record]
    if options:
        out += [".SH OPTIONS"]
        for names, help in options:
            out += [".TP", f"\\fB{escaped(names)}\\fR", *filled(help or "No more to say.")]
    if below := children(context):
        out += [".SH COMMANDS"]
        for child, command_below in below:
            out += [".TP", f"\\fB{escaped(f'{name}-{child}')}\\fR({section})", *filled(one_line(command_below) + ".")]
    if command.epilog:
        out += [".SH NOTES", *rendered(inspect.cleandoc(command.epilog))]
    related = {f"{name}-{child}": section for child, _ in below}
    if len(words) > 1:
        related["-".join(words[:-1])] = section
    else:
        related.update((one, number) for one, (_, _, number, _) in PROGRAMS.items() if one != name)
    refs = sorted(related.items())
    out += [".SH SEE ALSO"]
    for at, (one, number) in enumerate(refs):
        out.append(f".BR {escaped(one)} ({number}){',' if at < len(refs) - 1 else ''}")
    return "\n".join(out) + "\n"


def name_lines(name: str, line: str) -> list[str]:
    first, *more = textwrap.wrap(line, 72 - len(name), break_long_words=False, break_on_hyphens=False)
    return [f"{escaped(name)} \\- {escaped(first)}", *filled(" ".join(more))]


def helper_page(program: str, module: str, section: int, line: str) -> str:
    """Of a program without options of its own, called by others."""
    text = inspect.cleandoc(importlib.import_module(module).__doc__ or "")
    heads = [heading(program, section), ".SH NAME", *name_lines(program, line), ".SH DESCRIPTION"]
    return "\n".join([*heads, *rendered(text), ".SH SEE ALSO", ".BR containerd\\-nydus\\-grpc (8)"]) + "\n"


def heading(name: str, section: int) -> str:
    return f".TH {quoted(name.upper())} {section} {date()} {quoted(f'nydus-py {version()}')} {quoted('Nydus')}"


def one_line(command: click.Command) -> str:
    text = command.get_short_help_str(1000).rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def help_text(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").partition("\f")[0]


def rendered(text: str) -> list[str]:
    """Paragraphs; those behind click's \\b keep their lines."""
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if out:
            out.append(".PP")
        if paragraph.startswith("\b"):
            lines = paragraph.removeprefix("\b").strip("\n").splitlines()
            out += [".nf", *(starting(escaped(one)) for one in lines), ".fi"]
        else:
            out += filled(paragraph)
    return out


def filled(text: str) -> list[str]:
    """Lines of a length that diffs and mandoc like; formatters fill them again."""
    lines = textwrap.wrap(" ".join(text.split()), 72, break_long_words=False, break_on_hyphens=False)
    return [starting(escaped(line)) for line in lines]


def escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return text.replace("^", "\\(ha").replace("~", "\\(ti").replace("…", "...")


def starting(line: str) -> str:
    """A line that is text although it begins like a request."""
    return f"\\&{line}" if line[:1] in (".", "'") else line


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for place, text in pages():
        path = Path(sys.argv[1], place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
