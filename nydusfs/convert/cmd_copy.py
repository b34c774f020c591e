"""`nydusify copy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import Size, backend_flags, client_options, flag


@click.command(
    "copy",
    short_help="Copy an image between registries and archives.",
    epilog="Example: nydusify copy --source a.example/app:nydus --target file:///tmp/app.tar --all-platforms",
)
@flag("--source", help="Image to copy: a reference, or file:///PATH of an archive or OCI layout.")
@flag("--target", help="Where it goes: a reference, or file:///PATH (an archive if it ends in .tar, else a layout).")
@flag("--source-insecure", is_flag=True, help="Source registry: accept any certificate, and plain HTTP.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to both registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for both registries.")
@flag("--platform", env=None, help="Platforms to copy, as linux/amd64,linux/arm64. Default: this machine's.")
@flag("--all-platforms", env=None, is_flag=True, help="Copy the image with all platforms.")
@flag("--referrers/--no-referrers", "referrers", default=True, env=None,
      help="Between registries, copy what refers to the image, too: signatures, referring Nydus images.")  # fmt: skip
@flag("--push-chunk-size", default="0MB", type=Size(), env=None, help="Send blobs in requests of this size; 0: in one.")
@backend_flags("source-", "the blobs of a Nydus image are, if not in layers")
@flag("--work-dir", default="./tmp", type=click.Path(file_okay=False), help="Folder for intermediate files.")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; bootstraps are read in process.")
def command(**given: Any) -> None:
    """Copy an image as it is: manifests keep their digests.

    Blobs that the target has are skipped, and those of another repository of the same registry are taken over there
    without moving bytes. With --source-backend-type the blobs of a Nydus image move into the registry as layers, which
    changes its digest.
    """
    for name in ("source", "target"):
        if not given[name]:
            raise click.UsageError(f"--{name} is required")
    if given["platform"] and given["all_platforms"]:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.copy import CopyOptions, copy
    from nydusfs.convert.endpoints import is_local, parse_location
    from nydusfs.convert.platforms import Platform, host_platform
    from nydusfs.convert.progress import make_progress
    from nydusfs.registry.reference import Reference

    platforms = None
    if not given["all_platforms"]:
        platforms = tuple(Platform.parse_list(given["platform"])) if given["platform"] else (host_platform(),)
    options = CopyOptions(
        source=parse_location(given["source"], client_options(given, given["source_insecure"])),
        target=parse_location(
            given["target"],
            client_options(given, given["target_insecure"]),
            # what an archive calls the image when it is unpacked again
            reference="" if is_local(given["source"]) else str(Reference.parse(given["source"])),
            create=True,
            chunk_size=given["push_chunk_size"],
        ),
        platforms=platforms,
        backend=chosen_backend(given, "source-"),
        referrers=given["referrers"],
        work_dir=Path(given["work_dir"]),
    )
    with make_progress() as progress:
        result = copy(options, progress)
    click.echo(result.digest)
