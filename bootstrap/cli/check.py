"""nydus-image check"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, set_up_logging, version, write_json

if TYPE_CHECKING:
    from bootstrap.reader import Blob, Bootstrap

_FEATURE_NAMES = (
    ("ALIGNED", "aligned"),
    ("BATCH", "batch"),
    ("CAP_TAR_TOC", "cap_toc"),
    ("INLINED_CHUNK_DIGEST", "chunk-digest"),
    ("CHUNK_INFO_V2", "chunk-v2"),
    ("INLINED_FS_META", "fs-meta"),
    ("SEPARATE", "separate"),
    ("HAS_TAR_HEADER", "tar-header"),
    ("HAS_TOC", "toc"),
    ("ZRAN", "zran"),
    ("ENCRYPTED", "encrypted"),
    ("IS_CHUNKDICT_GENERATED", "is-chunkdict-generated"),
)


@click.command("check", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bootstrap", required=False)
@click.option("-B", "--bootstrap", "named", metavar="FILE", help="The bootstrap, for callers that name it so.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Also check all data: blobs are in this directory, named by id.")
@click.option("-C", "--config", metavar="FILE", help="Accepted for compatibility; the data is read from -D only.")
@click.option("-v", "--verbose", is_flag=True, help="List every path and chunk.")
@click.option("-J", "--output-json", metavar="FILE", help="Write the result there as JSON.")
@log_options
def check(
    bootstrap: str | None,
    named: str | None,
    blob_dir: str | None,
    config: str | None,
    verbose: bool,
    output_json: str | None,
    log_level: str,
    log_file: str | None,
) -> None:
    """Validate BOOTSTRAP, the metadata of an image (or a layer blob with it inside).

    \b
    Metadata alone: layout, names, links, chunks, in v5 every digest
        nydus-image check image.boot
    Its data too: every chunk is decompressed and its digest compared
        nydus-image check -D blobs/ image.boot

    Ends with exit code 1 and one line at the first flaw.
    """
    set_up_logging(log_level, log_file)
    path = named or bootstrap
    if not path:
        raise CommandError("missing parameter `bootstrap` or `BOOTSTRAP`")
    with clear_errors(f"check of {path} failed"):
        _run(path, blob_dir, verbose, output_json)


def _run(path: str, blob_dir: str | None, verbose: bool, output_json: str | None) -> None:
    from bootstrap.check import check_bootstrap
    from bootstrap.reader import open_bootstrap

    started = time.perf_counter()
    with open_bootstrap(path) as image:
        check_bootstrap(image)
        if blob_dir is not None:
            from bootstrap.checkblob import check_blobs
            from bootstrap.cli.progress import bar

            with bar("checking", sum(blob.uncompressed_size for blob in image.blobs)) as progress:
                check_blobs(image, blob_dir, progress=progress)
        if verbose:
            from bootstrap.cli.listing import listing

            for line in listing(image):
                click.echo(line)
        click.echo("RAFS filesystem metadata is valid, referenced data blobs: ")
        for blob in image.blobs:
            click.echo(_describe(blob))
        if output_json is not None:
            document = report(image, path, time.perf_counter() - started)
            write_json(output_json, json.dumps(document, separators=(",", ":")))


def report(image: Bootstrap, path: str, seconds: float) -> dict[str, Any]:
    """What --output-json holds."""
    return {
        "version": version(),
        "bootstrap": path,
        "blobs": [blob.id for blob in image.blobs],
        "external_bootstrap": "",
        "external_blobs": [],
        "trace": {
            "consumed_time": {"load_tree_from_bootstrap": seconds},
            "registered_events": {},
        },
        "fs_version": str(image.version),
        "compressor": image.compressor.label,
    }


def _describe(blob: Blob) -> str:
    from bootstrap.layout.common import BlobFeatures

    features = " ".join(name for key, name in _FEATURE_NAMES if blob.features & BlobFeatures[key])
    return (
        f"\t {blob.index}: {blob.id}, compressed size {blob.compressed_size}, uncompressed size "
        f"{blob.uncompressed_size}, chunk size: {blob.chunk_size}, chunk count: {blob.chunk_count}, "
        f"features: {features}"
    )
