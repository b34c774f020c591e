"""`nydusctl cache ls|verify|gc|import`.

Exit status: 0 done, and nothing was wrong; 1 damage was found, or something could not be done; 2 wrong usage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from snapshotter.cachectl.place import Place

THREADS = min(4, os.cpu_count() or 1)


def where(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="For programs: one object."),
        click.option("--bootstrap", "-B", "given", multiple=True, metavar="FILE", type=click.Path(dir_okay=False),
                     help="Metadata of an image that no snapshot here has; repeatable."),
        click.option("--cache-dir", default="", metavar="DIR", help="The cache [default: the snapshotter's]."),
        click.option("--config", default="", metavar="FILE", help="Its configuration, where none runs."),
        click.option("--root", default="", metavar="DIR", help="Of the snapshotter [default: the one that runs]."),
    ):  # fmt: skip
        command = option(command)
    return command


_threads = click.option(
    "--threads", type=click.IntRange(1, 64), default=THREADS, show_default=True, help="That read and hash."
)


@contextmanager
def _place(root: str, config: str, cache_dir: str, given: tuple[str, ...]) -> Iterator[Place]:
    """Errors become one line and exit status 1."""
    from bootstrap.errors import RafsError
    from nydusfs.errors import NydusError, os_reason
    from snapshotter.cachectl.place import Place
    from snapshotter.errors import SnapshotterError
    from snapshotter.node import Choices, Node

    for file in given:
        if not Path(file).is_file():
            raise click.ClickException(f"bootstrap {file}: no such file")
    try:
        node = None
        if root or config or not cache_dir:
            node = Node(Choices(root, ("--config", config) if config else ()))
        else:
            # the cache alone was named; a snapshotter that runs here still knows images, and uses, of it
            try:
                node = Node(Choices())
                if os.path.realpath(node.need().cache_dir) != os.path.realpath(cache_dir):
                    node = None
            except SnapshotterError:
                node = None
        place = Place(node, cache_dir, [Path(file) for file in given])
        yield place
    except OSError as failure:
        raise click.ClickException(os_reason(failure)) from None
    except (SnapshotterError, NydusError, RafsError) as failure:
        raise click.ClickException(str(failure)) from None


@click.group("cache")
def command() -> None:
    """What the cache of this node holds; whether it is right; what of it nobody uses; filling it from files.

    \b
      nydusctl cache ls
      nydusctl cache verify
      nydusctl cache gc --dry-run
      nydusctl cache import /media/usb/cache --bootstrap image.boot
    """


@command.command("ls")
@where
@click.option("--sort", type=click.Choice(["size", "used", "blob", "image"]), default="size", show_default=True)
def ls(root: str, config: str, cache_dir: str, given: tuple[str, ...], as_json: bool, sort: str) -> None:
    """Each blob: how much of it is here, when it was last read, which images use it, and whether they are mounted."""
    from snapshotter.cachectl.listing import look, show

    with _place(root, config, cache_dir, given) as place:
        found = look(place, sort)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show(found)


@command.command("verify")
@where
@_threads
@click.option("--keep", is_flag=True, help="Only report: damaged segments stay.")
@click.option("--strict", is_flag=True, help="Exit status 1 also when something cannot be verified.")
@click.argument("blobs", nargs=-1, metavar="[BLOB]...")
def verify(
    root: str, config: str, cache_dir: str, given: tuple[str, ...], as_json: bool, threads: int, keep: bool,
    strict: bool, blobs: tuple[str, ...],
) -> None:  # fmt: skip
    """Read every complete segment again, from the disk, and compare it with the digests of the images here.

    A damaged one is deleted, also under a running nydusd: the next read of it fetches it again. BLOB (the beginning of
    an id) restricts it to some. Exit status: 0 what can be verified is right, 1 damage was found (and dealt with, or
    not).
    """
    from snapshotter.cachectl.checking import run

    with _place(root, config, cache_dir, given) as place:
        found = run(place, blobs, threads=threads, keep=keep, quiet=as_json)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    wrong = found["damaged"] or found["problems"] or (strict and found["unsure"])
    raise SystemExit(1 if wrong else 0)


@command.command("gc")
@where
@click.option("--dry-run", "-n", is_flag=True, help="Say what would go and leave it.")
@click.option("--imported", is_flag=True, help="Also what was imported for images that were never pulled.")
def gc(
    root: str, config: str, cache_dir: str, given: tuple[str, ...], as_json: bool, dry_run: bool, imported: bool
) -> None:
    """Delete what no image of this node uses: blobs, parts of blobs, rests of killed writers.

    Nothing goes unless the bootstraps of all mounted images could be read. What is not known to be nydusd's own stays
    and is listed.
    The snapshotter does the same for whole blobs whenever an image is removed.
    """
    from snapshotter.cachectl.collecting import run

    with _place(root, config, cache_dir, given) as place:
        found = run(place, dry_run=dry_run, imported=imported, quiet=as_json)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    raise SystemExit(1 if found["problems"] else 0)


@command.command("import")
@where
@_threads
@click.argument("source", metavar="DIRECTORY", type=click.Path(file_okay=False))
def import_(
    root: str, config: str, cache_dir: str, given: tuple[str, ...], as_json: bool, threads: int, source: str
) -> None:
    """Fill the cache from DIRECTORY, without a network, beside a running nydusd or before any.

    It may be a cache directory of upstream's nydusd, one of another node, a directory of blobs named by their digests,
    or an OCI layout. Every byte is verified against an image's metadata: that of images pulled here, of files given by
    --bootstrap, of `*.boot` in DIRECTORY. Nothing is evicted for it: it ends at the cache's limit.
    Exit status: 0 done, 1 something was damaged or could not be taken.
    """
    from snapshotter.cachectl.importing import run

    with _place(root, config, cache_dir, given) as place:
        found = run(place, Path(source), threads=threads, quiet=as_json)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    raise SystemExit(0 if found["ok"] else 1)
