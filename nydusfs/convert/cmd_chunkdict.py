"""`nydusify chunkdict generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import CommaList, backend_flags, client_options, flag, flattened


@click.group("chunkdict", short_help="Find chunks that many Nydus images have.")
def command() -> None:
    """Find chunks that many Nydus images have, for --chunk-dict of convert."""


@command.command(
    "generate",
    short_help="Make a chunk dictionary of several Nydus images.",
    epilog="Example: nydusify chunkdict generate --sources r.example/a:nydus,r.example/b:nydus "
    "--target r.example/dict:1 && nydusify convert --chunk-dict bootstrap:registry:r.example/dict:1 ...",
)
@flag("--sources", multiple=True, type=CommaList(), help="Nydus images, with commas between them or repeated.")
@flag("--target", help="Where the dictionary goes. Without it it is only left in --work-dir.")
@flag("--source-insecure", is_flag=True, help="Source registries: accept any certificate, and plain HTTP.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to all registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for all registries.")
@flag("--platform", env=None, help="Platforms to look at, as linux/amd64,linux/arm64. Default: this machine's.")
@flag("--all-platforms", env=None, is_flag=True, help="Look at every platform of the sources.")
@backend_flags("", "the images' blobs are, if not in layers")
@flag("--work-dir", default="./output", type=click.Path(file_okay=False), help="Folder for what was fetched; kept.")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; bootstraps are read in process.")
def generate(**given: Any) -> None:
    """Make an image of the chunks that at least two of several Nydus images have, for --chunk-dict of convert.

    Only bootstraps are fetched. The dictionary refers to the blobs that hold the shared chunks, in as few blobs as
    possible; they are copied into the target's repository.
    """
    names = flattened(given["sources"])
    if not names:
        raise click.UsageError("--sources is required")
    if given["platform"] and given["all_platforms"]:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.endpoints import parse_location
    from nydusfs.convert.generate import GenerateOptions
    from nydusfs.convert.generate import generate as make
    from nydusfs.convert.platforms import Platform, host_platform
    from nydusfs.convert.progress import make_progress

    platforms = None
    if not given["all_platforms"]:
        platforms = tuple(Platform.parse_list(given["platform"])) if given["platform"] else (host_platform(),)
    target = None
    if given["target"]:
        target = parse_location(given["target"], client_options(given, given["target_insecure"]), create=True)
    source_client = client_options(given, given["source_insecure"])
    options = GenerateOptions(
        sources=tuple(parse_location(name, source_client) for name in dict.fromkeys(names)),
        target=target,
        platforms=platforms,
        backend=chosen_backend(given),
        work_dir=Path(given["work_dir"]),
    )
    with make_progress() as progress:
        result = make(options, progress)
    if result.digest:
        click.echo(result.digest)
