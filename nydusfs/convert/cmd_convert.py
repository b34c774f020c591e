"""`nydusify convert`: flags to options, result to JSON."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bootstrap.cli.params import Number
from nydusfs.convert.options import Duration, client_options, flag

if TYPE_CHECKING:
    from nydusfs.convert.convert import ConvertOptions
    from nydusfs.convert.endpoints import Location
    from nydusfs.convert.layers import LayerSettings
    from nydusfs.convert.platforms import Platform

log = logging.getLogger(__name__)

_MAX_PATTERNS = 64 << 20


@click.command(
    "convert",
    short_help="Convert an image into a Nydus image, or back.",
    epilog="Example: nydusify convert --source python:3.12 --target registry.example/python:3.12-nydus",
)
@flag("--source", help="Image to convert: a reference, oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE or a path.")
@flag("--source-archive", help="Read the image from this archive or layout; --source is then only its name.")
@flag(
    "--target", help="Where the result goes, in the same forms. This, --target-suffix or --target-archive is required."
)
@flag("--target-archive", help="Write the result to this OCI archive; --target is then only its name.")
@flag("--target-suffix", help="Target is the source with this appended to its tag.")
@flag("--source-insecure", is_flag=True, help="Source registry: accept any certificate, and plain HTTP.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to all registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for all registries.")
@flag(
    "--fs-version", default="6", type=click.Choice(["5", "6"]), help="RAFS version: 6 is also readable by Linux' EROFS."
)
@flag("--compressor", default="zstd", type=click.Choice(["none", "lz4_block", "zstd"]), help="Compression of chunks.")
@flag(
    "--fs-chunk-size", "--chunk-size", "chunk_size", default="0x100000", type=Number(),
    help="Bytes per chunk, a power of two from 0x1000 to 0x1000000.",
)  # fmt: skip
@flag(
    "--batch-size", default="0", type=Number(),
    help="Compress chunks smaller than half of this together (RAFS 6): a power of two from 0x1000 to the chunk size; "
    "0 for none.",
)  # fmt: skip
@flag(
    "--fs-align-chunk",
    "--backend-aligned-chunk",
    "align_chunk",
    env=["FS_ALIGN_CHUNK", "BACKEND_ALIGNED_CHUNK"],
    is_flag=True,
    help="Align chunks to 4096 (RAFS 5 only).",
)
@flag("--chunk-dict", help="Reuse chunks of bootstrap:registry:REFERENCE or bootstrap:local:FILE.")
@flag("--chunk-dict-insecure", is_flag=True, help="Dictionary's registry: as --target-insecure.")
@flag(
    "--prefetch-dir",
    help="Absolute path in the image to fetch ahead at every start. Default: the program the image starts.",
)
@flag("--prefetch-patterns", is_flag=True, help="Read paths to fetch ahead from stdin, one per line.")
@flag("--platform", env=None, help="Platforms to convert, as linux/amd64,linux/arm64. Default: this machine's.")
@flag("--all-platforms", env=None, is_flag=True, help="Convert every platform of the source.")
@flag(
    "--merge-platform", "--multi-platform", "merge_platform", is_flag=True,
    help="Target is an index that holds the plain image and the Nydus image.",
)  # fmt: skip
@flag(
    "--oci-ref", is_flag=True,
    help="Leave the data in the source's gzip layers and only describe them (zran); they are copied to the target's "
    "repository if that is another one.",
)  # fmt: skip
@flag("--oci", is_flag=True, help="Use OCI media types where the source has Docker's.")
@flag("--docker-v2-format", is_flag=True, hidden=True)
@flag("--with-referrer", is_flag=True, help="Name the source image as subject of the target (OCI referrers).")
@flag("--reverse", is_flag=True, help="Make a plain OCI image of a Nydus image.")
@flag("--backend-type", help="Put data blobs into oss, s3 or localfs storage and not into the target.")
@flag("--backend-config", help="Its configuration, a JSON object with nydusd's keys.")
@flag("--backend-config-file", type=click.Path(dir_okay=False), help="File with its configuration.")
@flag("--backend-force-push", is_flag=True, help="Send blobs that the storage has already.")
@flag("--source-backend-type", help="With --reverse: storage (oss, s3, localfs) that holds the source's data blobs.")
@flag("--source-backend-config", help="Its configuration, a JSON object with nydusd's keys.")
@flag("--build-cache", help="Image that remembers converted layers; read first, written as layers get ready.")
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
def command(**given: Any) -> None:
    """Convert an image into a Nydus image, registry to registry or from and to layouts and archives.

    Layers are streamed from the source and converted in parallel; only converted layers touch the disk (--work-dir).
    A layer that a build cache or --cache-dir knows is neither downloaded nor converted again, and no blob is sent that
    the target has. The target's tag is written last.

    The output of --output-json: SourceImageSize, TargetImageSize in bytes; SourcePullElapsed, ConversionElapsed,
    TargetPushElapsed in nanoseconds. Layers are pulled, converted and pushed at the same time, which all counts as
    conversion.
    """
    from nydusfs.convert.progress import make_progress

    if given["output_json"] and not Path(given["output_json"]).absolute().parent.is_dir():
        raise click.UsageError(f"--output-json {given['output_json']}: there is no such directory")
    if given["nydus_image"] != "nydus-image":
        log.debug("--nydus-image %s is not used: layers are built in this process", given["nydus_image"])
    if given["reverse"]:
        from nydusfs.convert.reverse import reverse

        reversing = _reverse_options(given)
        with make_progress() as progress:
            result = reverse(reversing, progress)
    else:
        from nydusfs.convert.convert import convert

        options = _options(given)
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


def _options(given: dict[str, Any]) -> ConvertOptions:
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.convert import ConvertOptions
    from nydusfs.convert.dictionary import DictionaryChoice

    settings = _settings(given)
    source, target = _places(given)
    if given["backend_type"] and given["oci_ref"]:
        raise click.UsageError("--oci-ref and --backend-type exclude each other: the data stays in the registry")
    backend = chosen_backend(given)
    if given["source_backend_type"] in ("modelfile", "model-artifact"):
        raise click.UsageError(f"--source-backend-type {given['source_backend_type']}: models cannot be converted")
    if given["chunk_dict"] and given["oci_ref"]:
        raise click.UsageError("--oci-ref and --chunk-dict exclude each other: no chunk is stored")
    dictionary = None
    if given["chunk_dict"]:
        dictionary = DictionaryChoice.parse(given["chunk_dict"], client_options(given, given["chunk_dict_insecure"]))
    return ConvertOptions(
        source=source,
        target=target,
        platforms=_platforms(given),
        explicit_platforms=bool(given["platform"]),
        settings=settings,
        prefetch=_prefetch(given),
        merge_platform=given["merge_platform"],
        oci=(given["oci"] and not given["docker_v2_format"]) or given["oci_ref"],
        referrer=given["with_referrer"],
        work_dir=Path(given["work_dir"]),
        chunk_dict=dictionary,
        backend=backend,
        backend_force_push=given["backend_force_push"],
        build_cache=_build_cache(given, target),
        build_cache_version=given["build_cache_version"],
        build_cache_records=given["build_cache_max_records"],
        cache_dir=Path(given["cache_dir"]) if given["cache_dir"] else None,
        push_retry_count=given["push_retry_count"],
        push_retry_delay=given["push_retry_delay"],
        workers=given["workers"],
    )


def _reverse_options(given: dict[str, Any]) -> Any:
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.reverse import ReverseOptions

    for name in ("oci_ref", "chunk_dict", "merge_platform", "with_referrer", "build_cache", "build_cache_tag"):
        if given[name]:
            raise click.UsageError(f"--reverse and --{name.replace('_', '-')} exclude each other")
    source, target = _places(given)
    return ReverseOptions(
        source=source,
        target=target,
        platforms=_platforms(given),
        oci=given["oci"] and not given["docker_v2_format"],
        backend=chosen_backend({**given, "source_backend_config_file": None}, "source-"),
        work_dir=Path(given["work_dir"]),
        push_retry_count=given["push_retry_count"],
        push_retry_delay=given["push_retry_delay"],
        workers=given["workers"],
    )


def _settings(given: dict[str, Any]) -> LayerSettings:
    from bootstrap.errors import BuildError
    from nydusfs.convert.layers import LayerSettings, build_options

    size, version = given["chunk_size"], int(given["fs_version"])
    if not 0x1000 <= size <= 0x1000000 or size & (size - 1):
        raise click.UsageError(f"--chunk-size {size:#x} is not a power of two from 0x1000 to 0x1000000")
    if given["oci_ref"] and version != 6:
        raise click.UsageError(f"--oci-ref needs --fs-version 6, not {version}")
    if given["oci_ref"] and given["batch_size"]:
        raise click.UsageError("--oci-ref and --batch-size exclude each other: no chunk is stored")
    settings = LayerSettings(
        fs_version=version,
        compressor=given["compressor"],
        chunk_size=size,
        aligned_chunk=given["align_chunk"] and version == 5,
        batch_size=given["batch_size"],
        oci_ref=given["oci_ref"],
    )
    try:
        build_options(settings)
    except BuildError as error:
        raise click.UsageError(str(error)) from error
    return settings


def _places(given: dict[str, Any]) -> tuple[Location, Location]:
    """Source and target. An archive flag makes the reference a mere name."""
    from nydusfs.convert.endpoints import RegistryLocation, is_local, parse_location
    from nydusfs.errors import ConvertError

    def place(text: str, insecure: bool, *, create: bool = False, reference: str = "") -> Location:
        return parse_location(text, client_options(given, insecure), reference=reference, create=create)

    if not given["source"] and not given["source_archive"]:
        raise click.UsageError("--source is required")
    name = given["source"] or ""
    if given["source_archive"]:
        path = given["source_archive"]
        source = place(path if is_local(path) else f"./{path}", False, reference=name)
    else:
        source = place(name, given["source_insecure"])
    if given["target"] and given["target_suffix"]:
        raise click.UsageError("--target and --target-suffix exclude each other")
    target = given["target"]
    if given["target_suffix"]:
        named = place(name, False) if name else source
        if not isinstance(named, RegistryLocation) or not named.reference.tag:
            raise ConvertError(f"--target-suffix needs a source with a tag, not {named}")
        target = str(named.reference.with_tag(named.reference.tag + given["target_suffix"]))
    if not target and not given["target_archive"]:
        raise click.UsageError("give --target, --target-suffix or --target-archive")
    if not given["target_archive"]:
        return source, place(target, given["target_insecure"], create=True)
    archive = given["target_archive"]
    if not is_local(archive) or archive.startswith(("/", ".")):
        archive = f"oci-archive:{archive}"
    return source, place(archive, False, create=True, reference=target or name)


def _build_cache(given: dict[str, Any], target: Location) -> Location | None:
    from nydusfs.convert.endpoints import RegistryLocation, parse_location
    from nydusfs.errors import ConvertError

    if given["build_cache"] and given["build_cache_tag"]:
        raise click.UsageError("--build-cache and --build-cache-tag exclude each other")
    options = client_options(given, given["build_cache_insecure"])
    if given["build_cache"]:
        return parse_location(given["build_cache"], options, create=True)
    if not given["build_cache_tag"]:
        return None
    if not isinstance(target, RegistryLocation):
        raise ConvertError(f"--build-cache-tag needs a target in a registry, not {target}; give --build-cache")
    return parse_location(str(target.reference.with_tag(given["build_cache_tag"])), options)


def _platforms(given: dict[str, Any]) -> tuple[Platform, ...] | None:
    from nydusfs.convert.platforms import Platform, host_platform

    if given["platform"] and given["all_platforms"]:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    if given["all_platforms"]:
        return None
    return tuple(Platform.parse_list(given["platform"])) if given["platform"] else (host_platform(),)


def _prefetch(given: dict[str, Any]) -> tuple[str, ...] | None:
    """None when nothing is said."""
    if not given["prefetch_dir"] and not given["prefetch_patterns"]:
        return None
    if given["prefetch_dir"] and given["prefetch_patterns"]:
        raise click.UsageError("--prefetch-dir and --prefetch-patterns exclude each other")
    lines: list[str] = []
    if given["prefetch_dir"]:
        lines = [given["prefetch_dir"]]
    elif given["prefetch_patterns"]:
        data = sys.stdin.buffer.read(_MAX_PATTERNS)
        lines = data.decode("utf-8", "surrogateescape").splitlines()
    patterns = tuple(line.strip() for line in lines if line.strip())
    for pattern in patterns:
        if not pattern.startswith("/"):
            raise click.UsageError(f"prefetch path {pattern!r} is not absolute")
    return patterns
