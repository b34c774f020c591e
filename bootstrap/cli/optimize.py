"""nydus-image optimize"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, report, set_up_logging
from bootstrap.cli.data import backend_options


@click.command("optimize", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-B", "--bootstrap", metavar="FILE", required=True, help="The image to optimize.")
@click.option("-p", "--prefetch-files", metavar="LIST", help="The files to put together, see below.")
@click.option("-C", "--config", metavar="FILE", help="Configuration whose backend has the blobs.")
@backend_options
@click.option("-D", "--blob-dir", metavar="DIR", help="Directory of data blobs, named by their ids.")
@click.option("-b", "--blob", metavar="FILE", help="The data blob of an image that has one.")
@click.option(
    "-O", "--output-bootstrap", metavar="FILE", default="optimized_bootstrap", show_default=True,
    help="Write the new metadata there.",
)  # fmt: skip
@click.option("--output-blob-dir", metavar="DIR", help="Write the new blob there, named by its id.")
@click.option("-J", "--output-json", metavar="FILE", help="Write the result there as JSON.")
@log_options
def optimize(bootstrap: str, **given: Any) -> None:
    """Put what a container reads first into a data blob of its own, which nydusd fetches ahead as a whole.

    LIST is JSON, or plain text with one absolute path a line. Without ranges ([offset, size] in bytes) all of a file is
    taken; a directory stands for all files below it.

    \b
        {"version": "v1", "files": [
            {"path": "/usr/bin/python3"},
            {"path": "/usr/lib/libbig.so", "ranges": [[0, 4096], [1048576, 65536]]}]}

    \b
        nydus-image optimize -B image.boot -D blobs/ -p list.json \\
            -O optimized.boot --output-blob-dir blobs/
    """
    set_up_logging(given["log_level"], given["log_file"])
    for key in ("output_blob_dir", "prefetch_files"):
        if not given[key]:
            raise CommandError(f"missing parameter `{key.replace('_', '-')}`")
    with clear_errors(f"cannot optimize {bootstrap}"):
        _run(Path(bootstrap), given)


def _run(path: Path, given: dict[str, Any]) -> None:
    from bootstrap.blobsource import open_blobs
    from bootstrap.cli.data import open_data
    from bootstrap.cli.images import opened
    from bootstrap.cli.progress import bar
    from bootstrap.merge import write_file
    from bootstrap.optimize import optimize as make
    from bootstrap.optimize import parse_list
    from bootstrap.rewrite import copy

    log = logging.getLogger(__name__)
    started = time.perf_counter()
    try:
        wanted = parse_list(Path(given["prefetch_files"]).read_bytes())
    except OSError as error:
        raise CommandError(f"failed to read prefetch files from {given['prefetch_files']}: {error.strerror}") from error
    folder = Path(given["output_blob_dir"])
    if not folder.is_dir():
        raise CommandError(f"--output-blob-dir {folder} is not a directory")
    out = Path(given["output_bootstrap"])
    with opened(path) as image:
        source = open_data(image, given, "--blob-dir or --backend-type")
        total = sum(blob.uncompressed_size for blob in image.blobs)
        with open_blobs(image, source) as blobs, bar("optimizing", total) as progress:
            result = make(blobs, wanted, folder, progress=progress)
        for missing in result.missing:
            log.warning("prefetch file %s is bad, skip it", os.fsdecode(missing))
        if result.bootstrap is None:
            log.warning("the list names no data of this image: the output is a copy of it")
        write_file(out, copy(image) if result.bootstrap is None else result.bootstrap)
        report(
            bootstrap=str(out),
            blobs=result.blobs,
            times={"total_build": round(time.perf_counter() - started, 6)},
            events={"prefetch_chunks": result.chunk_count, "prefetch_size": result.size},
            fs_version=image.version,
            compressor=image.compressor.label,
            output_json=given["output_json"],
            blob_size=None,
        )
