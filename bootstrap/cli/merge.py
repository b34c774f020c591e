"""nydus-image merge"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from bootstrap.cli.building import (
    PREFETCH_HELP,
    CommandError,
    clear_errors,
    log_options,
    read_patterns,
    report,
    set_up_logging,
)
from bootstrap.cli.conflicts import check_config, dictionary_path


@click.command(
    "merge",
    short_help="Merge layer metadata into the metadata of an image.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-B", "--bootstrap", metavar="FILE", help="Write the merged metadata there.")
@click.option("--parent-bootstrap", metavar="FILE", help="Put all layers on top of this image.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Write the metadata there, named by its SHA-256, without -B.")
@click.option("--chunk-dict", metavar="bootstrap=FILE", help="The image whose chunks the layers were built to reuse.")
@click.option(
    "--prefetch-policy", type=click.Choice(["fs", "blob", "none"]), default="none", show_default=True,
    help=PREFETCH_HELP,
)  # fmt: skip
@click.option("-J", "--output-json", metavar="FILE", help="Write the result there as JSON.")
@click.option("--blob-digests", metavar="LIST", help="SHA-256 of each layer's blob, comma separated.")
@click.option("--original-blob-ids", metavar="LIST", help="Id of each layer's data blob, comma separated.")
@click.option("--blob-sizes", metavar="LIST", help="Size of each layer's blob, comma separated.")
@click.option("--blob-toc-digests", metavar="LIST", help="SHA-256 of each table of contents, comma separated.")
@click.option("--blob-toc-sizes", metavar="LIST", help="Size of each table of contents, comma separated.")
@click.option("-C", "--config", metavar="FILE", help="Storage backend; not needed here.")
@log_options
def merge(sources: tuple[str, ...], **given: Any) -> None:
    """Merge the layers SOURCE..., lowest first, into one image.

    A SOURCE is a layer's metadata or its blob with the metadata inside, named after the blob: the file's name up to its
    first dot becomes the blob id. Files that upper layers remove are gone, and data blobs nobody needs are left out.

    Exit code 2: the layers do not fit together (RAFS version, chunk size, ownership or digest).
    """
    set_up_logging(given["log_level"], given["log_file"])
    if not given["bootstrap"] and not given["blob_dir"]:
        raise CommandError(
            "both --bootstrap and --blob-dir are missing, please specify one to store the generated metadata blob file"
        )
    if given["blob_dir"] and not os.path.isdir(given["blob_dir"]):
        raise CommandError(f"directory to store blobs does not exist: --blob-dir {given['blob_dir']}")
    check_config(given["config"])
    with clear_errors("cannot merge"):
        _run(sources, given)


def _run(sources: tuple[str, ...], given: dict[str, Any]) -> None:
    import time

    from bootstrap.merge import MergeSource, merge_layers

    def path_of(name: str) -> Path | None:
        return Path(given[name]) if given[name] else None

    count = len(sources)
    digests = _items(given["blob_digests"], count, "blob digest", "--blob-digests")
    ids = _items(given["original_blob_ids"], count, "original blob id", "--original-blob-ids")
    sizes = _numbers(given["blob_sizes"], count, "blob size", "--blob-sizes", 64)
    toc_digests = _items(given["blob_toc_digests"], count, "toc digest", "--blob-toc-digests")
    toc_sizes = _numbers(given["blob_toc_sizes"], count, "toc size", "--blob-toc-sizes", 32)
    layers = [
        MergeSource(Path(path), digest, identifier, size, toc_digest, toc_size)
        for path, digest, identifier, size, toc_digest, toc_size in zip(
            sources, digests, ids, sizes, toc_digests, toc_sizes, strict=True
        )
    ]
    patterns = read_patterns(given["prefetch_policy"])
    started = time.perf_counter()
    out = path_of("bootstrap") or Path(given["blob_dir"]) / f".merged.{os.getpid()}"
    result = merge_layers(
        layers,
        out,
        prefetch=patterns if given["prefetch_policy"] == "fs" else [],
        parent=path_of("parent_bootstrap"),
        chunk_dict=dictionary_path(given["chunk_dict"]),
    )
    if not given["bootstrap"]:
        out = out.replace(out.with_name(result.sha256))
    report(
        bootstrap=str(out),
        blobs=result.blobs,
        times={**result.timings, "total_build": round(time.perf_counter() - started, 6)},
        events={"inodes": result.inode_count},
        fs_version=result.fs_version,
        compressor=result.compressor.label,
        output_json=given["output_json"],
        blob_size=None,
    )


def _items(text: str | None, count: int, what: str, option: str) -> list[str | None]:
    """A comma list with one item per source; all None when it is not given."""
    if text is None:
        return [None] * count
    items = text.split(",")
    if len(items) != count:
        raise CommandError(f"{option}: number of {what} entries {len(items)} doesn't match number of sources {count}")
    return [item.strip() or None for item in items]


def _numbers(text: str | None, count: int, what: str, option: str, bits: int) -> list[int | None]:
    found: list[int | None] = []
    for item in _items(text, count, what, option):
        try:
            number = None if item is None else int(item, 0)
        except ValueError:
            number = -1
        if number is not None and not 0 <= number < 1 << bits:
            raise CommandError(f"invalid number in {option} option: {item!r}")
        found.append(number)
    return found
