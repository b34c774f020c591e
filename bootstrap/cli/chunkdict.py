"""nydus-image chunkdict"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, report, set_up_logging


@click.group("chunkdict", context_settings={"help_option_names": ["-h", "--help"]})
@log_options
def chunkdict(**given: Any) -> None:
    """Find chunks that many images have, for --chunk-dict of create and merge."""
    click.get_current_context().default_map = {"generate": given}


@chunkdict.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--database", metavar="URL", default="sqlite://:memory:", show_default=True,
    help="Where the chunks of all images are kept: sqlite:///ABSOLUTE/PATH to remember them for later runs.",
)  # fmt: skip
@click.option("-B", "--bootstrap", metavar="FILE", help="Write the dictionary there.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Write the dictionary there, named by its SHA-256, without -B.")
@click.option("--prefetch-policy", type=click.Choice(["fs", "blob", "none"]), default="none", hidden=True)
@click.option("-J", "--output-json", metavar="FILE", help="Write the result there as JSON.")
@click.option("-C", "--config", metavar="FILE", help="Accepted for compatibility; no data is read.")
@click.option("-v", "--verbose", is_flag=True, help="List the images that share nothing with another one.")
@log_options
def generate(sources: tuple[str, ...], **given: Any) -> None:
    """Make a chunk dictionary of the images SOURCE... (and of those the database remembers).

    Images are named after the directory of their bootstrap, "name:tag". The dictionary holds the chunks at least two
    images have, in as few data blobs as possible, and whatever else these blobs hold.

    \b
        nydus-image chunkdict generate --database sqlite:///var/lib/dict.db -B dict.boot \\
            redis:7.0/image.boot redis:7.2/image.boot
        nydus-image create --chunk-dict bootstrap=dict.boot ...
        nydus-image merge --chunk-dict bootstrap=dict.boot ...
    """
    set_up_logging(given["log_level"], given["log_file"])
    if not given["bootstrap"] and not given["blob_dir"]:
        raise CommandError(
            "both --bootstrap and --blob-dir are missing, please specify one to store the generated metadata blob file"
        )
    if not given["bootstrap"] and not Path(given["blob_dir"]).is_dir():
        raise CommandError("Directory to store blobs does not exist")
    with clear_errors("cannot generate a chunk dictionary"):
        _run([Path(source) for source in sources], given)


def _run(sources: list[Path], given: dict[str, Any]) -> None:
    import hashlib
    import time

    from bootstrap.chunkdb import ChunkDatabase, Form, form_of
    from bootstrap.chunkdb import generate as make
    from bootstrap.cli.images import opened
    from bootstrap.merge import write_file

    log = logging.getLogger(__name__)
    started = time.perf_counter()
    names = [_name(path) for path in sources]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise CommandError(
                f"{sources[names.index(name)]} and {sources[number]} are both {':'.join(name)}: images are named after "
                f"the directory of their bootstrap"
            )
    form: Form | None = None
    with ChunkDatabase(_database(given["database"])) as database:
        for path, name in zip(sources, names, strict=True):
            with opened(path) as image:
                found = form_of(image)
                if form is None:
                    form = found
                elif difference := _difference(form, found):
                    raise CommandError(
                        f"Bootstrap versions are inconsistent, cannot use chunkdict: {path} has {difference} of "
                        f"{sources[0]}"
                    )
                log.debug("%s: %d chunks", path, database.add(image, *name))
        assert form is not None
        result = make(database, form)
    for blob in result.small_blobs:
        log.warning("blob %s has too few shared bytes to be part of the dictionary", blob)
    if given["verbose"]:
        for image_name in result.lonely_images:
            click.echo(f"shares nothing: {image_name}")
    if not result.chunk_count:
        log.warning("no two images share a chunk: the dictionary is empty")
    out = Path(given["bootstrap"] or Path(given["blob_dir"]) / hashlib.sha256(result.bootstrap).hexdigest())
    write_file(out, result.bootstrap)
    report(
        bootstrap=str(out),
        blobs=result.blobs,
        times={"total_build": round(time.perf_counter() - started, 6)},
        events={"chunks": result.chunk_count, "uncompressed_size": result.uncompressed_size},
        fs_version=form.version,
        compressor=form.compressor.label,
        output_json=given["output_json"],
        blob_size=None,
    )


def _difference(first: Any, second: Any) -> str:
    """What two forms do not share, in words."""
    words = {
        "version": "RAFS version {} instead of {}",
        "chunk_size": "chunk size {:#x} instead of {:#x}",
        "digester": "digests {} instead of {}",
        "explicit_owners": "owners stored: {} instead of {}",
    }
    for key, text in words.items():
        mine, other = getattr(first, key), getattr(second, key)
        if mine != other:
            return text.format(*(getattr(value, "label", value) for value in (other, mine)))
    return ""


def _name(path: Path) -> tuple[str, str]:
    """Name and tag of an image: the directory's, or directory and file where the directory has no tag."""
    folder = path.resolve().parent.name
    name, colon, tag = folder.rpartition(":")
    return (name, tag) if colon else (folder, path.name)


def _database(url: str) -> str:
    kind, separator, path = url.partition("://")
    if not separator or not path.startswith(("/", ":")):
        raise CommandError(f"Invalid database URL: {url}")
    if kind != "sqlite":
        raise CommandError(
            f"Unsupported database type: {kind}, please use a valid database URI, such as "
            f"'sqlite:///path/to/chunkdict.db'."
        )
    return path
