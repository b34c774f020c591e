"""nydus-image unpack"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, set_up_logging
from bootstrap.cli.data import backend_options


@click.command("unpack", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bootstrap", required=False)
@click.option("-B", "--bootstrap", "named", metavar="FILE", help="The bootstrap, for callers that name it so.")
@click.option("-b", "--blob", metavar="FILE", help="The data blob of an image that has one.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Directory of data blobs, named by their ids.")
@backend_options
@click.option("--output", metavar="TAR", required=True, help="Write the tar there: a file, a FIFO or /dev/stdout.")
@log_options
def unpack(bootstrap: str | None, named: str | None, **given: Any) -> None:
    """Unpack BOOTSTRAP (or a layer blob with one inside) and its data to the tar of an OCI layer.

    \b
    A layer blob as it lies in a registry: metadata and data in one file
        nydus-image unpack --blob layer --output layer.tar layer
    An image whose blobs are in a directory, straight into another program
        nydus-image unpack -D blobs/ --output /dev/stdout image.boot | tar -C tree -x
    Data from a registry
        nydus-image unpack --backend-type registry --backend-config
            '{"host": "ghcr.io", "repo": "owner/name"}' --output image.tar image.boot

    Every byte is checked against its digest. The same image gives the same tar, byte for byte; sockets have no place
    in one.
    """
    set_up_logging(given["log_level"], given["log_file"])
    path = named or bootstrap
    if not path:
        raise CommandError("missing parameter `bootstrap` or `BOOTSTRAP`")
    if not given["output"]:
        raise CommandError("invalid empty --output option")
    with clear_errors("fail to unpack"):
        from bootstrap.blobsource import open_blobs
        from bootstrap.cli.data import open_data
        from bootstrap.cli.images import opened
        from bootstrap.cli.output import output_file
        from bootstrap.cli.progress import bar
        from bootstrap.unpack import unpack as write_tar

        with opened(path) as image:
            source = open_data(image, given, "--blob, --blob-dir or --backend-type")
            total = sum(blob.uncompressed_size for blob in image.blobs)
            with (
                open_blobs(image, source) as blobs,
                bar("unpacking", total) as progress,
                output_file(Path(given["output"]), pipes=True) as out,
            ):
                write_tar(blobs, out, progress=progress)
