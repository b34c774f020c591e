"""nydus-image compact"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, report, set_up_logging
from bootstrap.cli.data import FolderFirst, backend_options, open_data
from bootstrap.cli.params import Number

if TYPE_CHECKING:
    from bootstrap.blobsource import BlobReader
    from bootstrap.reader import Bootstrap

_NUMBER = Number()


@click.command("compact", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-B", "--bootstrap", metavar="FILE", required=True, help="The image to compact.")
@backend_options
@click.option(
    "--min-used-ratio", type=_NUMBER, default=0, show_default=True, metavar="PERCENT",
    help="Rebuild blobs of which less is still used: 1 to 99, 0 for none.",
)  # fmt: skip
@click.option(
    "--compact-blob-size", type=_NUMBER, default=10 << 20, show_default=True, metavar="BYTES",
    help="Merge blobs smaller than this.",
)  # fmt: skip
@click.option(
    "--max-compact-size", type=_NUMBER, default=100 << 20, show_default=True, metavar="BYTES",
    help="Make none larger than this by merging.",
)  # fmt: skip
@click.option(
    "--layers-to-compact", type=_NUMBER, default=0, show_default=True, metavar="N",
    help="Do nothing for an image with fewer blobs.",
)  # fmt: skip
@click.option(
    "-D", "--blob-dir", metavar="DIR", required=True,
    help="Blobs that are not in the backend, named by their ids; new blobs are written there too.",
)  # fmt: skip
@click.option("--chunk-dict", metavar="bootstrap=FILE", help="Leave the blobs of this chunk dictionary alone.")
@click.option(
    "-O", "--output-bootstrap", metavar="FILE",
    help="Write the new metadata there (default: beside the old, with the extension .bootstrap.compact).",
)  # fmt: skip
@click.option("-J", "--output-json", metavar="FILE", help="Write the result there as JSON.")
@log_options
def compact(bootstrap: str, **given: Any) -> None:
    """Give an image fewer and fuller data blobs: drop what no file uses, merge small ones.

    \b
    Rebuild blobs of which less than 40 percent is used, and merge those below 10 MiB
        nydus-image compact -B image.boot -D blobs/ --min-used-ratio 40 -O compact.boot
    Only for images of at least 32 layers
        nydus-image compact -B image.boot -D blobs/ --layers-to-compact 32

    Every chunk is checked against its digest on the way. Old blobs are not removed. With nothing to do the output is a
    copy of the image.
    """
    set_up_logging(given["log_level"], given["log_file"])
    with clear_errors(f"cannot compact {bootstrap}"):
        _run(Path(bootstrap), given)


def _run(path: Path, given: dict[str, Any]) -> None:
    from bootstrap.blobsource import open_blobs
    from bootstrap.cli.images import opened
    from bootstrap.cli.progress import bar
    from bootstrap.compact import CompactOptions
    from bootstrap.compact import compact as make
    from bootstrap.merge import write_file
    from bootstrap.rewrite import copy

    started = time.perf_counter()
    options = CompactOptions(
        given["min_used_ratio"], given["compact_blob_size"], given["max_compact_size"], given["layers_to_compact"]
    )
    folder = Path(given["blob_dir"])
    if not folder.is_dir():
        raise CommandError(f"--blob-dir {folder} is not a directory")
    out = Path(given["output_bootstrap"] or path.with_suffix(".bootstrap.compact"))
    dictionary = _dictionary(given["chunk_dict"])
    with opened(path) as image:
        total = sum(blob.uncompressed_size for blob in image.blobs)
        with open_blobs(image, _source(image, folder, given)) as blobs, bar("compacting", total) as progress:
            result = make(blobs, folder, options, dictionary=dictionary, progress=progress)
        log = logging.getLogger(__name__)
        for blob in result.dropped:
            log.info("compactor: delete unused blob %s", blob)
        for blob in result.new:
            log.info("compactor: successfully rebuild blob %s", blob)
        if result.bootstrap is None:
            log.info("compactor: no chance to compact data blobs")
        write_file(out, copy(image) if result.bootstrap is None else result.bootstrap)
        report(
            bootstrap=str(out),
            blobs=result.blobs,
            times={"total_build": round(time.perf_counter() - started, 6)},
            events={"new_blobs": len(result.new), "dropped_blobs": len(result.dropped)},
            fs_version=image.version,
            compressor=image.compressor.label,
            output_json=given["output_json"],
            blob_size=None,
        )


def _source(image: Bootstrap, folder: Path, given: dict[str, Any]) -> BlobReader:
    if given["backend_type"]:
        return FolderFirst(str(folder), open_data(image, {**given, "blob_dir": None}, ""))
    return open_data(image, given, "--blob-dir or --backend-type")


def _dictionary(argument: str | None) -> list[str]:
    """The blob ids of a dictionary given as bootstrap=FILE."""
    if argument is None:
        return []
    from bootstrap.cli.images import opened

    kind, separator, path = argument.partition("=")
    if not separator:
        kind, path = "bootstrap", argument
    if kind != "bootstrap":
        raise CommandError(f"invalid chunk dict argument {argument}: bootstrap=FILE is expected")
    with opened(path) as image:
        return [blob.id for blob in image.blobs]
