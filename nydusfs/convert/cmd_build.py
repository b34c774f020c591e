"""`nydusify build` (alias `pack`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bootstrap.cli.params import Number
from nydusfs.convert.options import backend_flags, flag


@click.command(
    "build",
    short_help="Make a Nydus image of a directory: a bootstrap and a blob.",
    epilog="Example: nydusify build --source-dir ./tree --name app -o out && nydusd fuse --bootstrap out/app.meta ...",
)
@flag("--source-dir", "--target-dir", "source_dir", type=click.Path(), help="Directory to build from.")
@flag("--name", "--meta", "--bootstrap", "name", env=["BOOTSTRAP", "IMAGE_NAME"],
      help="Name of the image: NAME.meta and NAME.blob are written.")  # fmt: skip
@flag("-o", "--output-dir", "output_dir", env="OUTPUT_DIR", type=click.Path(file_okay=False),
      help="Directory for them, and for output.json.  [default: .nydus-build-output]")  # fmt: skip
@flag("--fs-version", default="6", type=click.Choice(["5", "6"]), help="RAFS version.")
@flag("--compressor", default="zstd", type=click.Choice(["none", "lz4_block", "zstd"]), help="Compression of chunks.")
@flag("--chunk-size", default="0x100000", type=Number(), help="Bytes per chunk: a power of two, 0x1000 to 0x1000000.")
@flag("--chunk-dict", help="bootstrap=PATH of an image whose chunks need not be stored again.")
@flag("--parent-bootstrap", type=click.Path(dir_okay=False), help="Bootstrap of an image to build onto.")
@flag("--compact", is_flag=True, help="First give the parent fewer and fuller blobs, if that is worth while.")
@flag("--compact-config-file", type=click.Path(dir_okay=False), help="When that is: JSON with min_used_ratio (5), "
      "compact_blob_size (10485760), max_compact_size (104857600), layers_to_compact (32).")  # fmt: skip
@flag("--backend-push", is_flag=True, help="Push the image to the backend: blobs by id, the bootstrap by its name.")
@backend_flags("", "the parent's blobs are and new ones go", default="oss")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; images are built in process.")
def command(**given: Any) -> None:
    """Make a Nydus image of a directory: a bootstrap and a data blob, for nydusd with a storage backend.

    With --parent-bootstrap the directory lies on top of another image, whiteouts (.wh.NAME) included, and chunks that
    it has are not stored again. The backend's configuration is nydusd's; blob_prefix and meta_prefix in it keep blobs
    and bootstraps apart.
    """
    for name in ("source_dir", "name"):
        if not given[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is required")
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.pack import DEFAULT_OUTPUT, PackOptions, chunk_dictionary, compact_options, pack
    from nydusfs.convert.progress import make_progress
    from nydusfs.errors import ConvertError

    size = given["chunk_size"]
    if not 0x1000 <= size <= 0x1000000 or size & (size - 1):
        raise click.UsageError(f"--chunk-size {size:#x} is not a power of two from 0x1000 to 0x1000000")
    if "/" in given["name"]:
        raise click.UsageError(f"--name {given['name']!r} is a path: choose the directory with --output-dir")
    if given["compact"] and not given["parent_bootstrap"]:
        raise click.UsageError("--compact makes a parent smaller: it needs --parent-bootstrap")
    source = Path(given["source_dir"])
    if not source.is_dir():
        raise ConvertError(f"source path {str(source)!r} is not a directory")
    remote = given["backend_push"] or given["compact"]
    config = Path(path) if (path := given["compact_config_file"]) else None
    options = PackOptions(
        source=source,
        name=given["name"],
        output=Path(given["output_dir"] or DEFAULT_OUTPUT),
        fs_version=int(given["fs_version"]),
        compressor=given["compressor"],
        chunk_size=size,
        chunk_dict=chunk_dictionary(given["chunk_dict"]) if given["chunk_dict"] else None,
        parent=Path(given["parent_bootstrap"]) if given["parent_bootstrap"] else None,
        compact=compact_options(config) if given["compact"] else None,
        backend=chosen_backend(given, required=True) if remote else None,
        push=given["backend_push"],
    )
    with make_progress() as progress:
        pack(options, progress)
