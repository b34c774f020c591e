"""nydus-image stat"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, set_up_logging, write_json


@click.command("stat", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-B", "--bootstrap", metavar="FILE", help="The image to count: a bootstrap, or a layer blob with one.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Count all images in this directory together, as one base.")
@click.option("-T", "--target", metavar="FILE", help="Another image: how much of it the base already has.")
@click.option("-C", "--config", metavar="FILE", help="Accepted for compatibility; no data is read.")
@click.option(
    "--digester", type=click.Choice(["blake3", "sha256"]),
    help="Only count chunks of images with this digest as shared (default: those of every image).",
)  # fmt: skip
@click.option("-J", "--output-json", metavar="FILE", help="Write the statistics there as JSON, print nothing.")
@log_options
def stat(
    bootstrap: str | None,
    blob_dir: str | None,
    target: str | None,
    config: str | None,
    digester: str | None,
    output_json: str | None,
    log_level: str,
    log_file: str | None,
) -> None:
    """Count files, sizes and chunks of images, and what they share.

    \b
    One image
        nydus-image stat -B image.boot
    What would a chunk dictionary of all images in a directory save?
        nydus-image stat -D images/ -J stat.json
    How much of a new image is in them already?
        nydus-image stat -D images/ -T new.boot

    With -D, files without an extension are taken (bootstraps and layer blobs named by digest); if none of them is an
    image, all files are tried.
    """
    set_up_logging(log_level, log_file)
    if not bootstrap and not blob_dir:
        raise CommandError("one of `--bootstrap` and `--blob-dir` must be specified")
    with clear_errors("cannot make statistics"):
        from bootstrap.cli.images import opened
        from bootstrap.layout.common import Digester
        from bootstrap.stat import ImageStat

        numbers = ImageStat(dedup=not bootstrap, digester=Digester[digester.upper()] if digester else None)
        if bootstrap:
            with opened(bootstrap) as image:
                numbers.add(image)
        else:
            assert blob_dir is not None
            for path in _images(Path(blob_dir), Path(target) if target else None):
                with opened(path) as image:
                    numbers.add(image)
        if target:
            with opened(target) as image:
                numbers.add(image, target=True)
        numbers.finish()
        if output_json is not None:
            write_json(output_json, json.dumps(numbers.as_json(), separators=(",", ":")))
        else:
            click.echo("\n".join(numbers.as_text()))


def _images(folder: Path, target: Path | None) -> list[Path]:
    """The files of a folder that are images, by name; the target is none of them. Others are logged and skipped."""
    from bootstrap.errors import RafsError
    from bootstrap.reader import open_bootstrap

    if not folder.is_dir():
        raise CommandError(f"specified path must be a directory: {folder}")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and (target is None or path != target)]
    bare = [path for path in files if not path.suffix]
    for candidates in (bare, [path for path in files if path.suffix]):
        found = []
        for path in candidates:
            try:
                open_bootstrap(path).close()
            except RafsError as error:
                logging.getLogger(__name__).debug("%s is no image: %s", path, error)
            else:
                found.append(path)
        if found:
            return found
    raise CommandError(f"no RAFS image in {folder}: neither a bootstrap nor a layer blob with one inside")
