"""`nydusify optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import Size, backend_flags, client_options, flag

_POLICIES = ("separated-blob-with-prefetch-files",)


@click.command(
    "optimize",
    short_help="Put what a container reads first into a blob of its own.",
    epilog="Example: nydusify optimize --source r.example/app:nydus --target r.example/app:fast --prefetch-files list",
)
@flag("--source", help="Nydus image to optimize.")
@flag("--target", help="Where the new image goes.")
@flag("--prefetch-files", type=click.Path(dir_okay=False),
      help='The files: one absolute path a line, or JSON {"version": "v1", "files": [{"path": "/a"}]}.')  # fmt: skip
@flag("--policy", env="OPTIMIZE_POLICY", default=_POLICIES[0], type=click.Choice(_POLICIES), help="How to optimize.")
@flag("--platform", env=None, help="Platform to choose from an index. Default: this machine's.")
@flag("--source-insecure", is_flag=True, help="Source registry: accept any certificate, and plain HTTP.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to both registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for both registries.")
@flag("--push-chunk-size", default="0MB", type=Size(), env=None, help="Send blobs in requests of this size; 0: in one.")
@backend_flags("source-", "the image's blobs are, if not in layers, and the new one goes")
@flag("--work-dir", default="./tmp", type=click.Path(file_okay=False), help="Folder for intermediate files.")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; images are built in process.")
def command(**given: Any) -> None:
    """Put what a container reads first into a blob of its own, in the order of a list.

    nydusd fetches that blob first, in few large requests. Only the bootstrap and the listed files are fetched from the
    image; its other layers are kept.
    """
    for name in ("source", "target", "prefetch_files"):
        if not given[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is required")
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.endpoints import parse_location
    from nydusfs.convert.optimize import OptimizeOptions, optimize
    from nydusfs.convert.platforms import Platform, host_platform
    from nydusfs.convert.progress import make_progress

    options = OptimizeOptions(
        source=parse_location(given["source"], client_options(given, given["source_insecure"])),
        target=parse_location(
            given["target"],
            client_options(given, given["target_insecure"]),
            create=True,
            chunk_size=given["push_chunk_size"],
        ),
        prefetch_files=Path(given["prefetch_files"]),
        platform=Platform.parse(given["platform"]) if given["platform"] else host_platform(),
        backend=chosen_backend(given, "source-"),
        work_dir=Path(given["work_dir"]),
    )
    with make_progress() as progress:
        result = optimize(options, progress)
    click.echo(result.digest)
