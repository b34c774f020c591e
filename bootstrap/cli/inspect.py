"""nydus-image inspect"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from enum import IntFlag
from typing import TYPE_CHECKING, Any

import click

from bootstrap.cli.building import CommandError, clear_errors, log_options, set_up_logging

if TYPE_CHECKING:
    from bootstrap.base import DirEntry
    from bootstrap.chunkmap import Chunk, ChunkMap
    from bootstrap.reader import Bootstrap

_HELP = """
    stats:              Show what the superblock says
    ls [DIR]:           List a directory
    cd DIR:             Change the directory
    stat NAME:          Show one entry, a file with its chunks
    blobs:              Show the blob table
    prefetch:           Show the prefetch table
    chunk OFFSET:       Show the chunks stored at this offset of a blob, and the files that use them
    icheck INODE:       Show the paths of an inode
    exit:               Leave (as does the end of input)
"""
_LETTERS = {4: "d", 8: "-", 10: "l", 2: "c", 6: "b", 1: "p", 12: "s"}


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bootstrap", required=False)
@click.option("-B", "--bootstrap", "named", metavar="FILE", help="The bootstrap, for callers that name it so.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Accepted for compatibility; no data is read.")
@click.option("-C", "--config", metavar="FILE", help="Accepted for compatibility; no data is read.")
@click.option("-R", "--request", metavar="CMD", help="Answer one request in JSON: stats, blobs or prefetch.")
@log_options
def inspect(
    bootstrap: str | None,
    named: str | None,
    blob_dir: str | None,
    config: str | None,
    request: str | None,
    log_level: str,
    log_file: str | None,
) -> None:
    """Look into BOOTSTRAP, the metadata of an image (or a layer blob with it inside).

    \b
        nydus-image inspect image.boot                  a small shell: ls, cd, stat, chunk, icheck ...
        nydus-image inspect -R blobs image.boot         the blob table as JSON
    """
    set_up_logging(log_level, log_file)
    path = bootstrap or named
    if not path:
        raise CommandError("give the bootstrap to look into: nydus-image inspect FILE", 2)
    from bootstrap.reader import open_bootstrap

    with clear_errors(f"cannot inspect {path}"), open_bootstrap(path) as image:
        if request is not None:
            click.echo(json.dumps(answer(image, request), separators=(",", ":")))
        else:
            _Shell(image).run()


def answer(image: Bootstrap, request: str) -> Any:
    """The JSON document for `-R`; None for a request there is no document for."""
    if request == "stats":
        return {"inodes_count": image.inode_count}
    if request == "blobs":
        return [
            {
                "blob_id": blob.id,
                "compressed_size": blob.compressed_size,
                "decompressed_size": blob.uncompressed_size,
                "readahead_offset": blob.readahead_offset,
                "readahead_size": blob.readahead_size,
            }
            for blob in image.blobs
        ]
    if request == "prefetch":
        paths = _paths_of(image, set(image.prefetch_inodes()))
        return [{"inode": ino, "path": paths.get(ino, [])} for ino in image.prefetch_inodes()]
    return None


def _flags(flags: IntFlag) -> str:
    return " | ".join(str(flag.name) for flag in flags) or "none"


def _show(path: bytes) -> str:
    return "/" + path.decode("utf-8", "backslashreplace")


def _paths_of(image: Bootstrap, wanted: set[int]) -> dict[int, list[str]]:
    """All paths of some inodes; directories end with a slash."""
    found: dict[int, list[str]] = {image.root: ["/"]} if image.root in wanted else {}
    if wanted - found.keys():
        for path, entry in image.walk():
            if entry.ino in wanted:
                found.setdefault(entry.ino, []).append(_show(path) + ("/" if entry.dtype == 4 else ""))
    return found


class _Shell:
    """Reads commands until "exit" or the end of input; a wrong one says so and the next is read."""

    def __init__(self, image: Bootstrap) -> None:
        self._image = image
        self._here = b""
        self._chunks: ChunkMap | None = None

    def run(self) -> None:
        from bootstrap.errors import RafsError

        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  line editing for input()
        while True:
            try:
                line = input("Inspecting RAFS :> " if interactive else "")
                words = shlex.split(line)
            except (EOFError, KeyboardInterrupt):
                return
            except (ValueError, UnicodeDecodeError) as error:
                click.echo(f"cannot read that line: {error}")
                continue
            if not words:
                continue
            if words[0] in ("exit", "quit", "q"):
                return
            try:
                for out in self._do(words[0], words[1:]):
                    click.echo(out)
            except RafsError as error:
                click.echo(f"the image is damaged: {error}")

    def _do(self, command: str, arguments: list[str]) -> Iterator[str]:
        argument = arguments[0] if arguments else ""
        if command == "stats":
            return self._stats()
        if command == "ls":
            return self._ls(argument)
        if command == "blobs":
            return self._blobs()
        if command == "prefetch":
            return self._prefetch()
        if command == "help":
            return iter([_HELP])
        if not argument and command in ("cd", "stat", "chunk", "icheck"):
            return iter([f"{command} needs an argument"])
        if command == "cd":
            return self._cd(argument)
        if command == "stat":
            return self._stat(argument)
        if command in ("chunk", "icheck"):
            try:
                number = int(argument, 0)
            except ValueError:
                return iter([f"{argument!r} is not a number"])
            return self._chunk(number) if command == "chunk" else self._icheck(number)
        return iter([f"Unsupported command: {command}", _HELP])

    def _target(self, argument: str) -> bytes:
        """Path from the root, "." and ".." resolved."""
        given = argument.encode("utf-8", "surrogateescape")
        start = b"" if given.startswith(b"/") else self._here
        parts: list[bytes] = []
        for part in (start + b"/" + given).split(b"/"):
            if part == b"..":
                del parts[-1:]
            elif part not in (b"", b"."):
                parts.append(part)
        return b"/".join(parts)

    def _entries(self, path: bytes) -> Iterator[DirEntry] | None:
        ino = self._image.resolve(path)
        if not ino or self._image.attr(ino).mode >> 12 != 4:
            return None
        return self._image.list_dir(ino)

    def _stats(self) -> Iterator[str]:
        image = self._image
        yield f"Version:                {image.version}"
        yield f"Inodes Count:           {image.inode_count}"
        yield f"Chunk Size:             {image.chunk_size // 1024}KB"
        yield f"Root Inode:             {image.root}"
        yield f"Flags:                  {_flags(image.flags)}"
        yield f"Blobs:                  {len(image.blobs)}"
        yield f"Prefetch table entries: {len(image.prefetch_inodes())}"

    def _ls(self, argument: str) -> Iterator[str]:
        entries = self._entries(self._target(argument))
        if entries is None:
            yield f"{argument}: no such directory"
            return
        for entry in entries:
            yield f'{_LETTERS[entry.dtype]}    {entry.ino:<8} "{_show(entry.name)[1:]}"'

    def _cd(self, argument: str) -> Iterator[str]:
        path = self._target(argument)
        if self._entries(path) is None:
            yield f"{argument}: no such directory"
        else:
            self._here = path

    def _blobs(self) -> Iterator[str]:
        for blob in self._image.blobs:
            yield f"Blob Index:             {blob.index}"
            yield f"Blob ID:                {blob.id}"
            yield f"Blob Size:              {blob.compressed_size}"
            yield f"Compressed Data Size:   {blob.data_size}"
            yield f"Uncompressed Data Size: {blob.uncompressed_size}"
            yield f"Features:               {_flags(blob.features)}"
            yield f"Compressor:             {blob.compressor.label}"
            yield f"Digester:               {blob.digester.label}"
            yield f"Chunk Size:             {blob.chunk_size:#x}"
            yield f"Chunk Count:            {blob.chunk_count}"
            yield f"Meta Offset:            {blob.ci_offset}"
            yield f"Meta Compressed Size:   {blob.ci_compressed_size}"
            yield f"Meta Uncompressed Size: {blob.ci_uncompressed_size}"
            yield f"ToC Size:               {blob.toc_size}"
            yield f"ToC Digest:             {blob.toc_digest.hex()}\n"

    def _prefetch(self) -> Iterator[str]:
        inodes = self._image.prefetch_inodes()
        paths = _paths_of(self._image, set(inodes))
        yield f"Total Prefetching Files: {len(inodes)}"
        for ino in inodes:
            for path in paths.get(ino, ["(no path)"]):
                yield f'Inode Number: {ino:>9} | Path: "{path}"'

    def _stat(self, argument: str) -> Iterator[str]:
        ino = self._image.resolve(self._target(argument))
        if not ino:
            yield f"{argument}: no such entry"
            return
        yield from self._describe(ino, argument)

    def _describe(self, ino: int, name: str) -> Iterator[str]:
        image, attr = self._image, self._image.attr(ino)
        yield f"Inode Number:       {ino}"
        yield f'Name:               "{name}"'
        yield f"Size:               {attr.size}"
        yield f"Mode:               {attr.mode:#X}"
        yield f"Permissions:        {attr.mode:o}"
        yield f"Nlink:              {attr.nlink}"
        yield f"UID:                {attr.uid}"
        yield f"GID:                {attr.gid}"
        yield f"Mtime:              {attr.mtime}"
        yield f"MtimeNsec:          {attr.mtime_nsec}"
        yield f"Blocks:             {attr.blocks}"
        for key, value in sorted(image.xattrs(ino).items()):
            yield f"Xattr:              {key!r} = {value!r}"
        kind = attr.mode >> 12
        if kind in (2, 6):
            yield f"Device:             {attr.rdev:#x}"
        if kind == 10:
            yield f"Target:             {_show(image.readlink(ino))[1:]}"
        if kind == 8:
            for number, ref in enumerate(image.chunk_refs(ino)):
                yield (
                    f"    chunk {ref.chunk_index} of blob {ref.blob_index} at file offset "
                    f"{number * image.chunk_size}, decompressed offset {ref.uncompressed_offset}"
                )

    def _icheck(self, ino: int) -> Iterator[str]:
        paths = _paths_of(self._image, {ino}).get(ino)
        if not paths:
            yield f"inode {ino} has no path"
            return
        yield from paths
        yield from self._describe(ino, paths[0].rstrip("/").rpartition("/")[2])

    def _chunk(self, offset: int) -> Iterator[str]:
        from bootstrap.chunkmap import ChunkMap, iter_chunks

        image = self._image
        if self._chunks is None:
            self._chunks = ChunkMap.open(image, None)
        found: dict[tuple[int, int], tuple[Chunk, list[str]]] = {}
        for blob in image.blobs:
            for chunk in iter_chunks(self._chunks, blob.index):
                if chunk.compressed_offset <= offset < chunk.compressed_offset + max(chunk.compressed_size, 1):
                    found[blob.index, chunk.index] = (chunk, [])
        if not found:
            yield f"no chunk at offset {offset}"
            return
        for path, entry in image.walk():
            if entry.dtype == 8:
                for ref in image.chunk_refs(entry.ino):
                    if (ref.blob_index, ref.chunk_index) in found:
                        found[ref.blob_index, ref.chunk_index][1].append(_show(path))
        for chunk, paths in found.values():
            yield f"Chunk {chunk.index} of blob {image.blobs[chunk.blob_index].id}"
            yield f"Compressed Offset: {chunk.compressed_offset}, Compressed Size: {chunk.compressed_size}"
            yield f"Decompressed Offset: {chunk.uncompressed_offset}, Decompressed Size: {chunk.uncompressed_size}"
            yield f"Chunk ID: {chunk.digest.hex()}"
            for file in dict.fromkeys(paths):
                yield f"File: {file}"
