"""`nydusify convert`: flags to options, result to JSON."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import Duration, Number, client_options, flag, refuse_unsupported

log = logging.getLogger(__name__)

# Flags of upstream that are understood but have nothing behind them yet: name -> default
_LATER: dict[str, Any] = {
    "source_archive": None,
    "target_archive": None,
    "source_backend_type": None,
    "source_backend_config": None,
    "backend_type": None,
    "backend_config": None,
    "backend_config_file": None,
    "backend_force_push": False,
    "chunk_dict": None,
    "chunk_dict_insecure": False,
    "oci_ref": False,
    "reverse": False,
    "batch_size": 0,
}
_LATER_HELP = "Not supported yet."


@click.command(
    "convert",
    short_help="Convert an image of a registry into a Nydus image.",
    epilog="Example: nydusify convert --source python:3.12 --target registry.example/python:3.12-nydus",
)
@flag("--source", help="Image to convert.")
@flag("--target", help="Where the Nydus image goes. This or --target-suffix is required.")
@flag("--target-suffix", help="Target is the source with this appended to its tag.")
@flag("--source-insecure", is_flag=True, help="Source registry: accept any certificate, and plain HTTP.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to both registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for both registries.")
@flag(
    "--fs-version", default="6", type=click.Choice(["5", "6"]), help="RAFS version: 6 is also readable by Linux' EROFS."
)
@flag("--compressor", default="zstd", type=click.Choice(["none", "lz4_block", "zstd"]), help="Compression of chunks.")
@flag(
    "--fs-chunk-size", "--chunk-size", "chunk_size", default="0x100000", type=Number(),
    help="Bytes per chunk, a power of two from 0x1000 to 0x1000000.",
)  # fmt: skip
@flag(
    "--fs-align-chunk",
    "--backend-aligned-chunk",
    "align_chunk",
    is_flag=True,
    help="Align chunks to 4096 (RAFS 5 only).",
)
@flag(
    "--prefetch-dir",
    help="Absolute path in the image to fetch ahead at every start. Nothing is fetched ahead by default.",
)
@flag("--prefetch-patterns", is_flag=True, help="Read paths to fetch ahead from stdin, one per line.")
@flag("--platform", env=None, help="Platforms to convert, as linux/amd64,linux/arm64. Default: this machine's.")
@flag("--all-platforms", env=None, is_flag=True, help="Convert every platform of the source.")
@flag(
    "--merge-platform", "--multi-platform", "merge_platform", is_flag=True,
    help="Target is an index that holds the plain image and the Nydus image.",
)  # fmt: skip
@flag("--oci", is_flag=True, help="Use OCI media types where the source has Docker's.")
@flag("--docker-v2-format", is_flag=True, hidden=True)
@flag("--with-referrer", is_flag=True, help="Name the source image as subject of the target (OCI referrers).")
@flag("--build-cache", help="Image that remembers converted layers; read first, updated at the end.")
@flag("--build-cache-tag", help="Use the target's repository with this tag as build cache.")
@flag("--build-cache-version", default="v1", help="Ignore a build cache of another version.")
@flag("--build-cache-insecure", is_flag=True, help="Build cache's registry: as --target-insecure.")
@flag("--build-cache-max-records", default=200, type=click.IntRange(1, 200), help="Layers a build cache may hold.")
@flag("--cache-dir", type=click.Path(file_okay=False), help="Folder on this machine that remembers converted layers.")
@flag("--work-dir", default="./tmp", type=click.Path(file_okay=False), help="Folder for intermediate files.")
@flag("--workers", default=0, type=click.IntRange(0, 256), help="Layers converted at once; 0: one per CPU.")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; layers are built in process.")
@flag("--output-json", type=click.Path(dir_okay=False), help="Write sizes and elapsed times to this file.")
@flag("--push-retry-count", default=3, type=click.IntRange(0, 100), help="How often a failed push is repeated.")
@flag("--push-retry-delay", default="5s", type=Duration(), help="Pause before it is.")
@flag("--source-archive", help=_LATER_HELP)
@flag("--target-archive", help=_LATER_HELP)
@flag("--source-backend-type", help=_LATER_HELP)
@flag("--source-backend-config", help=_LATER_HELP)
@flag("--backend-type", help=_LATER_HELP)
@flag("--backend-config", help=_LATER_HELP)
@flag("--backend-config-file", help=_LATER_HELP)
@flag("--backend-force-push", is_flag=True, help=_LATER_HELP)
@flag("--chunk-dict", help=_LATER_HELP)
@flag("--chunk-dict-insecure", is_flag=True, help=_LATER_HELP)
@flag("--oci-ref", is_flag=True, help=_LATER_HELP)
@flag("--reverse", is_flag=True, help=_LATER_HELP)
@flag("--batch-size", default="0", type=Number(), help=_LATER_HELP)
def command(**given: Any) -> None:
    """Convert an image of a registry into a Nydus image, registry to registry.

    Layers are streamed from the source and converted in parallel; only converted layers touch the disk (--work-dir).
    A layer that a build cache or --cache-dir knows is neither downloaded nor converted again.

    The output of --output-json: SourceImageSize, TargetImageSize in bytes; SourcePullElapsed, ConversionElapsed,
    TargetPushElapsed in nanoseconds. Layers are pulled, converted and pushed at the same time, which all counts as
    conversion.
    """
    refuse_unsupported({name: given[name] for name in _LATER}, _LATER)
    from nydusfs.convert.convert import convert
    from nydusfs.convert.progress import make_progress

    options = _options(given)
    if given["nydus_image"] != "nydus-image":
        log.debug("--nydus-image %s is not used: layers are built in this process", given["nydus_image"])
    with make_progress() as progress:
        result = convert(options, progress)
    if given["output_json"]:
        document = {
            "SourceImageSize": result.source_size,
            "TargetImageSize": result.target_size,
            "SourcePullElapsed": int(result.pull_elapsed * 1e9),
            "ConversionElapsed": int(result.convert_elapsed * 1e9),
            "TargetPushElapsed": int(result.push_elapsed * 1e9),
        }
        Path(given["output_json"]).write_text(json.dumps(document), encoding="utf-8")


def _options(given: dict[str, Any]) -> Any:
    from nydusfs.convert.convert import ConvertOptions
    from nydusfs.convert.endpoints import Location, RegistryLocation, parse_location
    from nydusfs.convert.layers import LayerSettings
    from nydusfs.errors import ConvertError

    if not given["source"]:
        raise click.UsageError("--source is required")
    if bool(given["target"]) == bool(given["target_suffix"]):
        raise click.UsageError("give either --target or --target-suffix")
    if given["build_cache"] and given["build_cache_tag"]:
        raise click.UsageError("--build-cache and --build-cache-tag exclude each other")
    if given["prefetch_dir"] and given["prefetch_patterns"]:
        raise click.UsageError("--prefetch-dir and --prefetch-patterns exclude each other")
    if given["platform"] and given["all_platforms"]:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    size = given["chunk_size"]
    if not 0x1000 <= size <= 0x1000000 or size & (size - 1):
        raise click.UsageError(f"--chunk-size {size:#x} is not a power of two from 0x1000 to 0x1000000")

    def place(text: str, insecure: bool, *, create: bool = False, reference: str = "") -> Location:
        return parse_location(text, client_options(given, insecure), reference=reference, create=create)

    source = place(given["source"], given["source_insecure"])
    target_name = given["target"]
    if not target_name:
        if not isinstance(source, RegistryLocation) or not source.reference.tag:
            raise ConvertError(f"--target-suffix needs a source with a tag, not {source}")
        target_name = str(source.reference.with_tag(source.reference.tag + given["target_suffix"]))
    target = place(target_name, given["target_insecure"], create=True)
    cache = None
    if given["build_cache"]:
        cache = place(given["build_cache"], given["build_cache_insecure"], create=True)
    elif given["build_cache_tag"]:
        if not isinstance(target, RegistryLocation):
            raise ConvertError(f"--build-cache-tag needs a target in a registry, not {target}; give --build-cache")
        reference = target.reference.with_tag(given["build_cache_tag"])
        cache = place(str(reference), given["build_cache_insecure"])
    return ConvertOptions(
        source=source,
        target=target,
        platforms=_platforms(given),
        explicit_platforms=bool(given["platform"]),
        settings=LayerSettings(
            fs_version=int(given["fs_version"]),
            compressor=given["compressor"],
            chunk_size=size,
            aligned_chunk=given["align_chunk"] and given["fs_version"] == "5",
        ),
        prefetch=_prefetch(given),
        merge_platform=given["merge_platform"],
        oci=given["oci"] and not given["docker_v2_format"],
        referrer=given["with_referrer"],
        work_dir=Path(given["work_dir"]),
        build_cache=cache,
        build_cache_version=given["build_cache_version"],
        build_cache_records=given["build_cache_max_records"],
        cache_dir=Path(given["cache_dir"]) if given["cache_dir"] else None,
        push_retry_count=given["push_retry_count"],
        push_retry_delay=given["push_retry_delay"],
        workers=given["workers"],
    )


def _platforms(given: dict[str, Any]) -> Any:
    from nydusfs.convert.platforms import Platform, host_platform

    if given["all_platforms"]:
        return None
    return tuple(Platform.parse_list(given["platform"])) if given["platform"] else (host_platform(),)


def _prefetch(given: dict[str, Any]) -> tuple[str, ...]:
    lines: list[str] = []
    if given["prefetch_dir"]:
        lines = [given["prefetch_dir"]]
    elif given["prefetch_patterns"]:
        data = sys.stdin.buffer.read(64 << 20)
        lines = data.decode("utf-8", "surrogateescape").splitlines()
    patterns = tuple(line.strip() for line in lines if line.strip())
    for pattern in patterns:
        if not pattern.startswith("/"):
            raise click.UsageError(f"prefetch path {pattern!r} is not absolute")
    return patterns
