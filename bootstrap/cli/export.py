"""nydus-image export"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, set_up_logging


@click.command("export", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--block", is_flag=True, required=True, help="Export as a raw block disk image (EROFS).")
@click.option("-B", "--bootstrap", metavar="FILE", help="The image to export, RAFS v6.")
@click.option("-C", "--config", metavar="FILE", help="Configuration of a blob cache entry whose backend has the blobs.")
@click.option("-D", "--localfs-dir", metavar="DIR", help="Directory of data blobs, named by their ids.")
@click.option(
    "--threads", type=click.IntRange(1, 32), default=4, show_default=True, help="How many threads decode the data."
)
@click.option(
    "-O", "--output", metavar="FILE", help="Write the disk image there (default: DIR/NAME.disk, NAME of the bootstrap)."
)
@click.option("--verity", is_flag=True, help="Append dm-verity hashes and print the options that open the device.")
@log_options
def export(block: bool, bootstrap: str | None, **given: Any) -> None:
    """Write an image and its data to one file that Linux mounts as it is.

    \b
        nydus-image export --block -B image.boot -D blobs/ -O image.disk
        mount -t erofs -o ro,loop image.disk /mnt

    \b
    With a hash tree, so that the kernel checks every block it reads
        nydus-image export --block --verity -B image.boot -D blobs/ -O image.disk
        veritysetup open image.disk NAME image.disk OPTIONS-AS-PRINTED
        mount -t erofs -o ro /dev/mapper/NAME /mnt
    """
    set_up_logging(given["log_level"], given["log_file"])
    if not given["config"] and not given["localfs_dir"]:
        raise CommandError("both option `-C/--config` and `-D/--localfs-dir` are missing")
    path = bootstrap or (_metadata_path(given["config"]) if given["config"] else None)
    if not path:
        raise CommandError("missing parameter `bootstrap`: give -B, or metadata_path in the configuration")
    with clear_errors("failed to export RAFS filesystem as raw block device image"):
        _run(path, given)


def _run(path: str, given: dict[str, Any]) -> None:
    from bootstrap.blobsource import open_blobs
    from bootstrap.cli.data import open_data
    from bootstrap.cli.images import opened
    from bootstrap.cli.output import output_file
    from bootstrap.cli.progress import bar
    from bootstrap.export import export_block
    from bootstrap.outputs import replaceable
    from bootstrap.verity import append_tree

    out = Path(given["output"] or Path(given["localfs_dir"] or ".") / f"{Path(path).name}.disk")
    if replaceable(out) is None:
        raise CommandError(f"{out} is no regular file: the disk image is not written front to back")
    options = None
    with opened(path) as image:
        source = open_data(image, {"blob_dir": given["localfs_dir"], "config": given["config"]}, "--localfs-dir")
        total = sum(blob.uncompressed_size for blob in image.blobs)
        with (
            open_blobs(image, source) as blobs,
            bar("exporting", total) as progress,
            output_file(out) as file,
        ):
            size, unit = export_block(blobs, file, threads=given["threads"], progress=progress)
            if given["verity"]:
                options = append_tree(file, size, unit)
    if options is not None:
        click.echo(f"dm-verity options: {options.as_options()}")


def _metadata_path(config: str) -> str | None:
    """`metadata_path` of a blob cache entry."""
    try:
        document = json.loads(Path(config).read_text())
        for key in ("config_v2", "config"):
            found = document.get(key, {}).get("metadata_path")
            if isinstance(found, str):
                return found
    except (OSError, ValueError, AttributeError):
        pass  # what is wrong with it is said when its backend is read
    return None
