"""What `nydus-image create` refuses before it builds: options that exclude each other, sources of the wrong type.

The texts are upstream's where its own tests or callers match on them (reference nydusd 9.2).
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bootstrap.cli.building import CommandError

if TYPE_CHECKING:
    from bootstrap.kinds import Kind

_SHOWN = {
    "blob": "--blob <blob>",
    "blob_dir": "--blob-dir <blob-dir>",
    "blob_inline_meta": "--blob-inline-meta",
    "blob_cache_dir": "--blob-cache-dir <blob-cache-dir>",
    "bootstrap": "--bootstrap <bootstrap>",
    "compressor": "--compressor <compressor>",
}
_EXCLUDE = (
    ("bootstrap", "blob_inline_meta"),
    ("blob_cache_dir", "blob"),
    ("blob_cache_dir", "blob_dir"),
    ("blob_cache_dir", "blob_inline_meta"),
    ("blob_cache_dir", "compressor"),
)


class InOrder(click.Command):
    """Remembers the order of the options: a message about two of them names the first one first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta["order"] = [param.name for param in order]
        return super().parse_args(ctx, args)


def check_conflicts(given: dict[str, Any]) -> None:
    """Raises CommandError for options that contradict each other or miss one; exit code 2 where clap would say so."""
    order = click.get_current_context().meta["order"]
    for pair in _EXCLUDE:
        if all(given[name] for name in pair):
            first, second = sorted(pair, key=order.index)
            raise CommandError(f"the argument '{_SHOWN[first]}' cannot be used with '{_SHOWN[second]}'", 2)
    inline, cache_dir = given["blob_inline_meta"], given["blob_cache_dir"]
    blob, blob_dir = given["blob"], given["blob_dir"]
    if not blob and not blob_dir and not cache_dir:
        raise CommandError("give --blob FILE or --blob-dir DIRECTORY for the data", 2)
    if not inline and not given["bootstrap"] and not blob_dir:
        raise CommandError("give --bootstrap FILE for the metadata (or --blob-inline-meta, or --blob-dir)", 2)
    for option, folder in (("--blob-dir", blob_dir), ("--blob-cache-dir", cache_dir)):
        if folder and not os.path.isdir(folder):
            raise CommandError(f"directory to store blobs does not exist: {option} {folder}")
    _check_kind(given)
    _check_version(given)
    _check_sizes(given)
    _check_blob_id(given["blob_id"])


def _check_kind(given: dict[str, Any]) -> None:
    kind, size = given["kind"], given["blob_data_size"]
    if given["attributes"] and kind not in ("directory", "dir-rafs"):
        raise CommandError(f"conversion type '{kind}' conflicts with '--attributes': only directories have those")
    if given["attributes"] and given["blob_inline_meta"] and not given["external_blob"]:
        raise CommandError("--attributes with --blob-inline-meta makes a second file: give --external-blob FILE", 2)
    if kind == "tar-tarfs" and given["blob"]:
        raise CommandError("conversion type `tar-tarfs` conflicts with `--blob`")
    if kind not in ("estargztoc-ref", "stargz_index"):
        if size:
            raise CommandError(f"conversion type '{kind}' conflicts with '--blob-data-size'")
        return
    if not given["blob_id"]:
        raise CommandError("the following required arguments were not provided: --blob-id <blob-id>", 2)
    if not size:
        raise CommandError("no value specified for '--blob-data-size'")
    try:
        valid = int(size, 16) > 0
    except ValueError:
        valid = False
    if not valid:
        raise CommandError(f"invalid value {size!r} for '--blob-data-size': a hexadecimal number of bytes")


def _check_version(given: dict[str, Any]) -> None:
    if given["fs_version"] == "6":
        return
    if given["batch_size"]:
        raise CommandError("`--batch-size` with non-zero value conflicts with `--fs-version 5`")
    if given["features"]:
        raise CommandError("`--features blob-toc` can't be used with `--version 5`")
    for name in ("encrypt", "blob_cache_dir"):  # upstream says nothing and writes what nobody asked for
        if given[name]:
            raise CommandError(f"`--{name.replace('_', '-')}` conflicts with `--fs-version 5`")


def _check_sizes(given: dict[str, Any]) -> None:
    from bootstrap.layout.common import DEFAULT_CHUNK_SIZE, is_chunk_size

    chunk_size, batch_size = given["chunk_size"], given["batch_size"]
    if chunk_size is not None and not is_chunk_size(chunk_size):
        raise CommandError(f"invalid chunk size: {chunk_size}, it must be a power of two from 0x1000 to 0x1000000")
    if not batch_size:
        return
    if not is_chunk_size(batch_size):
        raise CommandError(f"invalid batch size: {batch_size}, it must be 0 or a power of two from 0x1000 to 0x1000000")
    chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
    if batch_size > chunk_size:
        raise CommandError(f"batch size {batch_size:#x} is bigger than chunk size {chunk_size:#x}")


def _check_blob_id(blob_id: str | None) -> None:
    from bootstrap.layout.common import MAX_BLOB_ID

    if not blob_id:
        return
    size = len(os.fsencode(blob_id))
    if size > 255:
        raise CommandError("blob id is limited to length 255")
    if size > MAX_BLOB_ID:
        raise CommandError(f"blob id length is bigger than {MAX_BLOB_ID} bytes, blob id {blob_id!r}")
    if "/" in blob_id or not blob_id.isprintable() or blob_id in (".", ".."):
        raise CommandError(f"blob id {blob_id!r} cannot be the name of a file")


def check_source(source: str, kind: Kind) -> None:
    """Raises CommandError unless SOURCE exists and is what the conversion type reads."""
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError) as error:
        raise CommandError(f'failed to access path "{source}": {getattr(error, "strerror", None) or error}') from error
    if kind.source == "directory":
        if not stat.S_ISDIR(mode):
            raise CommandError(f'specified path must be a directory: "{source}"')
    elif not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise CommandError(f'specified path must be a regular/fifo/char_device file: "{source}"')


def dictionary_path(text: str | None) -> Path | None:
    """FILE of `bootstrap=FILE`; a name without "=" is a file too."""
    if not text:
        return None
    kind, found, path = text.partition("=")
    if not found:
        kind, path = "bootstrap", text
    if kind != "bootstrap":
        raise CommandError(f"invalid chunk dict type {kind}: only bootstrap=FILE exists")
    if not path:
        raise CommandError("--chunk-dict names no file: give bootstrap=FILE")
    return Path(path)


def check_config(path: str | None) -> None:
    """Raises CommandError unless the configuration can be read and is JSON or TOML. Its content is not needed."""
    if path is None:
        return
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise CommandError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        text = ""
    for parse in (json.loads, tomllib.loads):
        try:
            found = parse(text)
        except ValueError:
            continue
        if isinstance(found, dict) and found:
            return
    raise CommandError(f"failed to parse configuration information: {path} is neither JSON nor TOML with settings")
