"""nydus-image inspect"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, set_up_logging

if TYPE_CHECKING:
    from bootstrap.base import DirEntry
    from bootstrap.reader import Bootstrap

_HELP = """
    stats:              Show what the superblock says
    ls [DIR]:           List a directory
    cd DIR:             Change the directory
    stat NAME:          Show one entry, a file with its chunks
    blobs:              Show the blob table
    prefetch:           Show the prefetch table
    chunk OFFSET:       Show the chunks stored at this offset of a blob, and the files that use them
    icheck INODE:       Show the paths of an inode
    exit:               Leave (as does the end of input)
"""


class Refused(Exception):
    """A command that cannot be carried out: said in the shell, an error in a request."""


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bootstrap", required=False)
@click.option("-B", "--bootstrap", "named", metavar="FILE", help="The bootstrap, for callers that name it so.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Accepted for compatibility; no data is read.")
@click.option("-C", "--config", metavar="FILE", help="Accepted for compatibility; no data is read.")
@click.option("-R", "--request", metavar="CMD", help="Answer one request: stats, blobs and prefetch in JSON.")
@log_options
def inspect(
    bootstrap: str | None,
    named: str | None,
    blob_dir: str | None,
    config: str | None,
    request: str | None,
    log_level: str,
    log_file: str | None,
) -> None:
    """Look into BOOTSTRAP, the metadata of an image (or a layer blob with it inside).

    \b
    A small shell; "help" lists its commands
        nydus-image inspect image.boot
    One answer in JSON
        nydus-image inspect -R blobs image.boot
    Which files use the chunk at offset 4096 of a blob?
        nydus-image inspect -R "chunk 4096" image.boot

    Requests without a JSON document (ls, stat, chunk, icheck) print what the shell would, then null.
    """
    set_up_logging(log_level, log_file)
    path = named or bootstrap
    if not path:
        raise CommandError("missing parameter `bootstrap` or `BOOTSTRAP`")
    from bootstrap.reader import open_bootstrap

    with clear_errors(f"cannot inspect {path}"), open_bootstrap(path) as image:
        if request is not None:
            _answer(image, request)
        else:
            _Shell(image).run()


def _answer(image: Bootstrap, request: str) -> None:
    from bootstrap.cli.views import Absent, requested

    document = requested(image, request.strip())
    if document is None:
        words = request.split()
        if words and words[0] not in ("exit", "q", "quit"):
            try:
                for line in _Shell(image).do(words[0], words[1:]):
                    click.echo(line)
            except Absent as error:
                click.echo(str(error), err=True)
            except Refused as error:
                raise CommandError(f"unsupported inspect request `{request}`: {error}") from error
    click.echo(json.dumps(document, separators=(",", ":")), nl=False)


class _Shell:
    """Reads commands until "exit" or the end of input; a wrong one says so and the next is read."""

    def __init__(self, image: Bootstrap) -> None:
        self._image = image
        self._here = b""

    def run(self) -> None:
        from bootstrap.cli.views import Absent
        from bootstrap.errors import RafsError

        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  line editing for input()
        while True:
            try:
                line = input("Inspecting RAFS :> " if interactive else "")
                words = shlex.split(line)
            except (EOFError, KeyboardInterrupt):
                return
            except (ValueError, UnicodeDecodeError) as error:
                click.echo(f"cannot read that line: {error}")
                continue
            if not words:
                continue
            if words[0] in ("exit", "quit", "q"):
                return
            try:
                for out in self.do(words[0], words[1:]):
                    click.echo(out)
            except (Absent, Refused) as error:
                click.echo(str(error))
            except RafsError as error:
                click.echo(f"the image is damaged: {error}")

    def do(self, command: str, arguments: list[str]) -> Iterator[str]:
        """Lines of the answer; Refused for a wrong command, Absent (perhaps from the iterator) for a name not here."""
        from bootstrap.cli import views

        image = self._image
        argument = arguments[0] if arguments else ""
        if command == "stats":
            return views.superblock(image)
        if command == "ls":
            return self._ls(argument)
        if command == "blobs":
            return views.blob_table(image)
        if command == "prefetch":
            return views.prefetch_table(image)
        if command == "help":
            return iter([_HELP])
        if command not in ("cd", "stat", "chunk", "icheck"):
            raise Refused(f"Unsupported command: {command}\n{_HELP}")
        if not argument:
            raise Refused(f"{command} needs an argument")
        if command == "cd":
            return self._cd(argument)
        if command == "stat":
            return self._stat(argument)
        try:
            number = int(argument, 0)
        except ValueError:
            raise Refused(f"{argument!r} is not a number") from None
        if number < 0:
            raise Refused(f"{argument!r} is below 0")
        return views.chunk_users(image, number) if command == "chunk" else self._icheck(number)

    def _target(self, argument: str) -> bytes:
        """Path from the root, "." and ".." resolved."""
        given = argument.encode("utf-8", "surrogateescape")
        start = b"" if given.startswith(b"/") else self._here
        parts: list[bytes] = []
        for part in (start + b"/" + given).split(b"/"):
            if part == b"..":
                del parts[-1:]
            elif part not in (b"", b"."):
                parts.append(part)
        return b"/".join(parts)

    def _entries(self, path: bytes, argument: str) -> Iterator[DirEntry]:
        from bootstrap.cli.views import Absent

        ino = self._image.resolve(path)
        if not ino:
            raise Absent(f"{argument}: no such directory")
        if self._image.attr(ino).mode >> 12 != 4:
            raise Absent(f"{argument} is not a directory")
        return self._image.list_dir(ino)

    def _ls(self, argument: str) -> Iterator[str]:
        from bootstrap.cli.listing import quoted
        from bootstrap.cli.views import LETTERS

        for entry in self._entries(self._target(argument), argument):
            yield f"{LETTERS[entry.dtype]}    {entry.ino:<8} {quoted(entry.name)}"

    def _cd(self, argument: str) -> Iterator[str]:
        path = self._target(argument)
        self._entries(path, argument)
        self._here = path
        return iter(())

    def _stat(self, argument: str) -> Iterator[str]:
        from bootstrap.cli import views

        image, path = self._image, self._target(argument)
        ino = image.resolve(path)
        if not ino:
            raise views.Absent(f"{argument}: no such entry")
        folder, _, name = path.rpartition(b"/")
        yield from views.inode(image, ino, image.resolve(folder), name or b"/")
        if image.attr(ino).mode >> 12 == 8:
            from bootstrap.grouped import FileChunks

            yield from views.file_chunks(image, FileChunks(image).of(ino))

    def _icheck(self, ino: int) -> Iterator[str]:
        from bootstrap.cli import views

        image = self._image
        found = views.paths_of(image, {ino}).get(ino)
        if not found:
            raise views.Absent(f"inode {ino} has no path")
        for path in found:
            yield views.path_text(path)
            folder, _, name = path.rpartition(b"/")
            yield from views.inode(image, ino, image.resolve(folder), name or b"/")
