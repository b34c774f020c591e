"""nydus-image create"""

from __future__ import annotations

import errno
import io
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from bootstrap.cli.building import (
    PREFETCH_HELP,
    clear_errors,
    log_options,
    read_patterns,
    report,
    set_up_logging,
)
from bootstrap.cli.conflicts import InOrder, check_config, check_conflicts, check_source, dictionary_path
from bootstrap.cli.params import Number
from bootstrap.outputs import replaceable

if TYPE_CHECKING:
    from bootstrap.build import BuildOptions, BuildResult
    from bootstrap.external import ExternalFile
    from bootstrap.kinds import Kind

TYPES = (
    "directory",
    "dir-rafs",
    "estargz-rafs",
    "estargz-ref",
    "estargztoc-ref",
    "tar-rafs",
    "tar-tarfs",
    "targz-rafs",
    "targz-ref",
    "stargz_index",
)


@click.command(
    "create",
    cls=InOrder,
    short_help="Build an image or a layer from a directory or a tar.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("source")
@click.option(
    "-t",
    "--type",
    "--source-type",
    "kind",
    type=click.Choice(TYPES),
    default="dir-rafs",
    show_default=True,
    metavar="TYPE",
    help="What SOURCE is and what to make of it, see below.",
)
@click.option("-B", "--bootstrap", metavar="FILE", help="Write the metadata there.")
@click.option(
    "-D", "--blob-dir", metavar="DIR", help="Write the data there, named by its SHA-256; the metadata too without -B."
)
@click.option("-b", "--blob", metavar="FILE", help="Write the data there; may be a FIFO.")
@click.option(
    "--blob-inline-meta",
    "--inline-bootstrap",
    is_flag=True,
    help="Append the metadata to the data: one layer blob, no -B.",
)
@click.option("--blob-id", metavar="ID", help="Id of the data blob instead of its SHA-256.")
@click.option(
    "--chunk-size",
    type=Number(),
    metavar="SIZE",
    help="Unit of deduplication and fetching: a power of two, 0x1000 to 0x1000000 (default 0x100000).",
)
@click.option(
    "--batch-size",
    type=Number(),
    default=0,
    metavar="SIZE",
    help="Compress chunks below half of this together (v6): a power of two up to the chunk size; 0: never.",
)
@click.option(
    "--compressor", type=click.Choice(["none", "lz4_block", "zstd"]), help="How to compress chunks (default zstd).",
)  # fmt: skip
@click.option(
    "--digester", type=click.Choice(["blake3", "sha256"]), default="blake3", show_default=True,
    help="How to name and verify chunks.",
)  # fmt: skip
@click.option("-v", "--fs-version", type=click.Choice(["5", "6"]), default="6", show_default=True, help="RAFS version.")
@click.option("--features", type=click.Choice(["blob-toc"]), multiple=True, help="Add a table of contents (v6).")
@click.option("--aligned-chunk", is_flag=True, help="Align chunks to 4 KiB in v5; v6 always does.")
@click.option("--repeatable", is_flag=True, help="Leave owners out, so that the image depends on content alone.")
@click.option(
    "--whiteout-spec",
    type=click.Choice(["oci", "overlayfs", "none"]),
    default="oci",
    show_default=True,
    help="What marks removed files in a directory source. Layers of a tar keep theirs for 'merge'.",
)
@click.option(
    "--prefetch-policy", type=click.Choice(["fs", "blob", "none"]), default="none", show_default=True,
    help=PREFETCH_HELP,
)  # fmt: skip
@click.option("-J", "--output-json", metavar="FILE", help="Write the result there as JSON.")
@click.option("--parent-bootstrap", metavar="FILE", help="Build on top of this image: whiteouts of SOURCE act on it.")
@click.option("--chunk-dict", metavar="bootstrap=FILE", help="Reuse chunks of this image: they are not stored again.")
@click.option("-E", "--encrypt", is_flag=True, help="Encrypt the data with a new key, which the metadata holds (v6).")
@click.option("--external-blob", metavar="FILE", help="Where --attributes puts its image with --blob-inline-meta.")
@click.option("--blob-data-size", metavar="HEX", help="Bytes of the layer for estargztoc-ref, in hexadecimal.")
@click.option(
    "--blob-cache-dir",
    metavar="DIR",
    help="Instead of a blob write what a daemon's cache would hold of it: ID.blob.data and ID.blob.meta (v6).",
)
@click.option(
    "--attributes",
    metavar="FILE",
    help="Files of a directory whose content lies elsewhere, one a line: PATH type=external blob_index=N blob_id=ID "
    "chunk_size=SIZE chunk_0_compressed_offset=N compressed_size=N [file_size=N] [crcs=0x..,0x..]. They make a second "
    "image beside the first, FILE.external.",
)
@click.option("-C", "--config", metavar="FILE", help="Storage of the parent's blobs; only checked, no blob is needed.")
@click.option("--disable-check", is_flag=True, hidden=True)
@click.option("--blob-offset", type=int, default=0, hidden=True)
@log_options
def create(source: str, **given: Any) -> None:
    """Build an image from SOURCE: a directory, or a layer tar (file, FIFO or /dev/stdin).

    \b
    An image of a directory, metadata and data apart:
        nydus-image create -B image.boot -D blobs/ DIRECTORY
    A layer as registries hold it, to be merged later:
        nydus-image create --type tar-rafs --blob-inline-meta --features blob-toc --blob layer.nydus layer.tar.gz

    \b
    TYPE:
        dir-rafs, directory                  a directory
        tar-rafs, targz-rafs, estargz-rafs   a tar: plain, gzip or zstd, whichever of the three names is given
        targz-ref, estargz-ref               keep a gzip or plain tar layer as it is: SOURCE stays the image's blob,
                                             what is written says where each chunk lies in it and how to get there
        estargztoc-ref, stargz_index         the same for an eStargz layer, SOURCE is its table of contents (JSON);
                                             needs --blob-id and --blob-data-size
        tar-tarfs                            a plain tar, which is itself the blob; only metadata is written
    """
    set_up_logging(given["log_level"], given["log_file"])
    with clear_errors(f"cannot build {source}"):
        kind = _kind(given)
        check_conflicts(given)
        check_source(source, kind)
        check_config(given["config"])
        options = _options(kind, given)
        result, bootstrap_path = _build(source, kind, options, given)
        external_path = _write_external(result, options, given, bootstrap_path)
        report(
            bootstrap=bootstrap_path,
            blobs=result.blobs,
            times=result.timings,
            events={"blob_uncompressed_size": result.uncompressed_size},
            fs_version=options.fs_version,
            compressor=options.compressor.label,
            output_json=given["output_json"],
            blob_size=result.blob_size,
            external_bootstrap=external_path,
            external_blobs=result.external_blobs,
        )


def _kind(given: dict[str, Any]) -> Kind:
    from bootstrap.kinds import ALIASES, KINDS

    name = ALIASES.get(given["kind"], given["kind"])
    return KINDS[name]


def _options(kind: Kind, given: dict[str, Any]) -> BuildOptions:
    from bootstrap.build import BuildOptions
    from bootstrap.layout import estargz
    from bootstrap.layout.common import DEFAULT_CHUNK_SIZE, Compressor, Digester

    chunk_size = estargz.DEFAULT_CHUNK_SIZE if kind.source == "toc" else DEFAULT_CHUNK_SIZE
    policy = given["prefetch_policy"]
    default = "none" if given["blob_cache_dir"] else "zstd"
    secret = None
    if given["encrypt"]:
        from bootstrap import crypt

        secret = crypt.generate()
    options = BuildOptions(
        fs_version=int(given["fs_version"]),
        compressor=Compressor[(given["compressor"] or default).upper()],
        digester=Digester[given["digester"].upper()],
        chunk_size=given["chunk_size"] or chunk_size,
        aligned_chunk=given["aligned_chunk"],
        whiteout_spec=given["whiteout_spec"],
        inline_meta=given["blob_inline_meta"],
        blob_toc=bool(given["features"]),
        prefetch_policy=policy,
        blob_id=given["blob_id"] or None,
        repeatable=given["repeatable"],
        threads=max(1, min(4, len(os.sched_getaffinity(0)))),
        batch_size=given["batch_size"],
        secret=secret,
        blob_offset=given["blob_offset"],
        chunk_dict=dictionary_path(given["chunk_dict"]),
        cache_dir=Path(given["blob_cache_dir"]) if given["blob_cache_dir"] else None,
    )
    # stdin last: whoever uses the options wrongly need not type patterns first
    return replace(kind.settle(options), prefetch=read_patterns(policy))


def _build(source: str, kind: Kind, options: BuildOptions, given: dict[str, Any]) -> tuple[BuildResult, str]:
    """Run the build into the files asked for; the path of the metadata, "" when it is inlined."""
    from bootstrap.build import build_directory, build_layer, open_source
    from bootstrap.merge import write_file

    cache_dir, parent = given["blob_cache_dir"], given["parent_bootstrap"]
    external = _external_files(given["attributes"])
    with ExitStack() as stack:
        layer = None
        if kind.source == "tar":
            layer = stack.enter_context(open_source(source))
            layer = stack.enter_context(kind.open(layer))
        if cache_dir:
            kind = kind.with_cache_files()
        target = stack.enter_context(_Output(given["blob"], given["blob_dir"], discard=bool(cache_dir)))
        assert target.file is not None
        try:
            if kind.source == "toc":
                result = _build_toc(source, target.file, options, int(given["blob_data_size"], 16))
            elif layer is not None:
                result = build_layer(layer, target.file, options, parent=parent, kind=kind)
            else:
                result = build_directory(source, target.file, options, parent=parent, external=external, kind=kind)
            blob_id = result.blob_id if result.chunk_count or options.inline_meta else ""
            target.keep(blob_id)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not error.filename:
                error.filename = target.path  # write() does not say which disk is full
            raise
    if options.inline_meta:
        return result, ""
    path = given["bootstrap"]
    if path is None:
        import hashlib

        path = os.path.join(given["blob_dir"], hashlib.sha256(result.bootstrap).hexdigest())
    write_file(Path(path), result.bootstrap)
    return result, path


def _external_files(path: str | None) -> dict[bytes, ExternalFile] | None:
    if not path:
        return None
    from bootstrap.external import parse_attributes

    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return parse_attributes(file.read())


def _write_external(result: BuildResult, options: BuildOptions, given: dict[str, Any], bootstrap: str) -> str:
    """The second image of a build: beside the first bootstrap, or with trailers into the file given. Its path."""
    data, target = result.external_bootstrap, given["external_blob"]
    if options.inline_meta:
        if data is not None:
            from bootstrap.blobfile import BlobFile
            from bootstrap.cli.output import output_file

            with output_file(Path(target), pipes=True) as out:
                blob = BlobFile(out, framed=True)
                blob.add_bootstrap(data, packed=options.blob_toc)
                if options.blob_toc:
                    blob.add_toc()
        return ""
    if data is None:
        return ""
    from bootstrap.merge import write_file

    path = Path(bootstrap).with_suffix(".external")
    write_file(path, data)
    return str(path)


def _build_toc(source: str, out: BinaryIO, options: BuildOptions, blob_size: int) -> BuildResult:
    from bootstrap.build import open_source
    from bootstrap.estargz import MAX_TOC, build_toc, parse_toc

    with open_source(source) as file, io.BufferedReader(file) as text:  # type: ignore[type-var]
        toc = parse_toc(text.read(MAX_TOC), blob_size)
    return build_toc(toc, out, options, (options.blob_id or "", blob_size))


class _Output:
    """Where the data goes: a file or FIFO as it is, a file in a directory that gets its name at the end, or nowhere.

    What a failed build has written to a regular file is removed.
    """

    def __init__(self, blob: str | None, blob_dir: str | None, *, discard: bool) -> None:
        self._dir = blob_dir if blob is None else None
        self._discard = discard
        self.path = blob if blob is not None else os.path.join(blob_dir or ".", f".blob.{os.getpid()}.tmp")
        self._kept = False
        self.file: BinaryIO | None = None

    def __enter__(self) -> _Output:
        path = os.devnull if self._discard else self.path
        self.file = open(path, "wb", buffering=1 << 16)  # closed in __exit__
        return self

    def keep(self, blob_id: str) -> None:
        """The build is done; without an id there is no data and no file is left."""
        assert self.file is not None
        self.file.close()
        if self._dir is not None and blob_id:
            os.replace(self.path, os.path.join(self._dir, blob_id))
        self._kept = bool(blob_id)

    def __exit__(self, *exc: object) -> None:
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
        if self._kept or self._discard:
            return
        with suppress(OSError):
            if target := replaceable(Path(self.path)):
                target.unlink(missing_ok=True)
