"""What the first start of an image will read next, told by what it reads now.

The later starts follow the image's profile (`learning`); the first one has none, and waits for one round trip after the
other while the link idles. Three things can be known all the same:

- Programs. Who reads the head of an ELF file will load it: its tables, what relocations write to, its constructors,
  and the same of each library it names. Of the program in the image's prefetch table, which `nydusify` writes, this is
  known when the image is mounted, a third of a second before the container runs.
- Modules. Who runs a compiled Python module will read those that it imports (`pyc`, `imports`), and so on. Of
  a program with numpy, pandas and Django 39 requests were waited for, 114 without, and fewer bytes were fetched.
- Runs. Files of one directory lie side by side in a blob, and who reads one package reads its neighbours: of a Python
  program with numpy, pandas and Django three quarters of the segments asked for were followed by the next one. Two
  neighbours in a row are a run, and the next ones are fetched, more the longer it goes on. Where an answer is waited
  for longer than its bytes take (a fast link), one miss is enough for the next one. Four at once made 305 requests
  (41.4 MB) of that program's 215, one or two 242 (36.3 MB). Not where nodes share by exact range (a peer-to-peer
  mirror): small neighbours come in pairs there (`flights.together`), and guesses made it two requests and 0.2 MB more.

Programs and modules are followed only where an answer is waited for: to look into 800 modules takes as much of the
interpreter as to serve all that they read. With a Dragonfly peer on the node (1 to 2 ms) such a start took nydusd 1.7 s
of processor time with it, 1.2 without, and no longer on two cores; with 6 ms a request 3.2 s with it, 4.4 without.

Fetched ahead is at the rank of a profile (LEARNED): it does not wait for demand reads, and few requests are in flight.
"""

from __future__ import annotations

import logging
import stat
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import trio

from bootstrap.base import HOLE, Bootstrap
from bootstrap.errors import RafsError
from nydusfs import elf, pyc
from nydusfs.errors import CacheError, ReadError, SourceError
from nydusfs.flights import joinable
from nydusfs.imports import Importer
from nydusfs.paths import Paths
from nydusfs.sources import Priority

if TYPE_CHECKING:
    from nydusfs.fetch import FetchScheduler
    from nydusfs.flights import Job
    from nydusfs.image_reader import ImageReader
    from nydusfs.segments import Plain, Segment

log = logging.getLogger("nydusfs.foresight")

REQUESTS = 4  # in flight: see `learning`
MERGE = 512 * 1024  # compressed bytes of one request: a demand read behind it waits no longer than for one chunk
RUN = 2  # neighbours asked for one after the other that make a run
WINDOW = 2  # segments fetched ahead of a run at most
SMALL = 192 * 1024  # compressed bytes of a segment of small files; larger ones are pieces of one big file
INLINE = 32 << 10  # bytes of a module that is looked into at once: less than two switches to a thread cost
MAX_PROGRAMS = 2000  # files followed per mount: nobody starts more, and a scanner of all files is not helped
MAX_TABLES = 64 << 20
MAX_NAMES = 16 << 20  # bytes in which the names of a program's libraries lie, among those of its symbols
MAX_CONSTRUCTORS = 4096
ALWAYS = (b"/etc/passwd", b"/etc/group")  # which user a container runs as
LOADERS = (b"/etc/ld.so.cache",)  # what every glibc loader reads
_WRONG = (RafsError, CacheError, SourceError, ReadError, KeyError, ValueError, IndexError)


def programs(image: Bootstrap) -> list[int]:
    """Those in the prefetch table: what the image is started for. Other entries are lists somebody made."""
    found = []
    try:
        for ino in image.prefetch_inodes()[:MAX_PROGRAMS]:
            mode = image.attr(ino).mode
            if stat.S_ISREG(mode) and mode & 0o111:
                found.append(ino)
    except RafsError:
        pass  # of a table that is wrong; `prefetch` says so
    return found


class Foresight:
    def __init__(self, reader: ImageReader, scheduler: FetchScheduler) -> None:
        self._reader = reader
        self._scheduler = scheduler
        self._paths = Paths(reader.bootstrap)
        self._slots = trio.Semaphore(REQUESTS)
        self._news = trio.Event()
        self._opened: deque[tuple[int, bool]] = deque()
        self._missed: deque[Segment] = deque()
        self._programs: set[int] = set()
        self._runs: dict[tuple[int, int], int] = {}  # (blob, row behind a run) -> its length in segments
        self._folders: list[bytes] = []  # of libraries found so far
        self._indexed: dict[bytes, int] | None = None
        self._imports = Importer(self._paths.listing)
        # Modules to look into: the last one that somebody read first, then in the order in which they are run.
        self._modules: list[tuple[tuple[int, ...], int]] = []
        self._more = trio.Event()
        self._turns = 0

    # -- what readers do; both return at once

    def opened(self, ino: int, head: Plain) -> None:
        """Somebody read the beginning of a file."""
        if self._reader.source.instant():
            return
        if ino not in self._programs and (head[:4] == elf.MAGIC or head[2:4] == pyc.MARK):
            self._opened.append((ino, head[:4] == elf.MAGIC))
            self._news.set()

    def missed(self, segments: Iterable[Segment]) -> None:
        """Somebody waits for these."""
        self._missed.extend(segments)
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            for ino in [*programs(self._reader.bootstrap), *map(self._paths.file, ALWAYS)]:
                self._start(nursery, ino)
            for _ in range(REQUESTS):
                nursery.start_soon(self._follow_modules)
            while True:
                while self._opened:
                    ino, program = self._opened.popleft()
                    if program:
                        self._start(nursery, ino)
                    else:
                        self._turns -= 1
                        self._push((self._turns,), ino)
                while self._missed:
                    ahead = self._run_goes_on(self._missed.popleft())
                    if ahead:
                        nursery.start_soon(self._fetch, ahead)
                await self._news.wait()
                self._news = trio.Event()

    # -- runs

    def _run_goes_on(self, segment: Segment) -> list[Segment]:
        if self._reader.source.by_range:
            return []  # a neighbour comes with it
        blob, first, behind = segment.blob.index, segment.rows.start, segment.rows.stop
        length = self._runs.pop((blob, first), 0) + 1
        ahead: list[Segment] = []
        cheap = self._reader.source.cheap(segment.compressed_end - segment.compressed_start)
        if length >= RUN or cheap:
            rows = self._reader.chunks.blob_rows(blob)
            for _ in range(min(length, WINDOW)):
                try:
                    following = self._reader.segment_of(blob, behind) if behind < rows.stop else None
                except _WRONG:
                    following = None
                if following is None or following.compressed_end - following.compressed_start > SMALL:
                    break
                ahead.append(following)
                behind = following.rows.stop
        self._runs[blob, behind] = length + len(ahead)
        if len(self._runs) > 4096:
            self._runs.clear()
        return [segment for segment in ahead if not self._reader.is_ready(segment)]

    # -- modules

    def _push(self, turn: tuple[int, ...], ino: int) -> None:
        if ino not in self._programs and len(self._programs) < MAX_PROGRAMS:
            self._programs.add(ino)
            heappush(self._modules, (turn, ino))
            self._more.set()

    async def _follow_modules(self) -> None:
        while True:
            while not self._modules:
                self._more = trio.Event() if self._more.is_set() else self._more
                await self._more.wait()
            turn, ino = heappop(self._modules)
            if self._reader.source.instant():
                self._programs.discard(ino)  # until somebody reads it when the source is slow
                continue
            try:
                for number, found in enumerate(await self._imported(ino)):
                    self._push((*turn, number), found)
            except _WRONG as error:
                log.debug("image %s: module %d is not followed: %s", self._reader.name, ino, error)

    async def _imported(self, ino: int) -> list[int]:
        """Have a module fetched; the files that it imports."""
        size = self._reader.bootstrap.attr(ino).size
        head = await self._reader.peek(ino, 0, min(size, pyc.MAX_SIZE))
        if head[:4] == elf.MAGIC:
            async with trio.open_nursery() as nursery:
                await self._program(nursery, ino)
            return []
        if size > pyc.MAX_SIZE:
            return []
        module = await trio.to_thread.run_sync(pyc.read, head) if size > INLINE else pyc.read(head)
        return self._imports.follow(ino, module) if module is not None else []

    # -- programs

    def _start(self, nursery: trio.Nursery, ino: int) -> None:
        if ino and ino not in self._programs and len(self._programs) < MAX_PROGRAMS:
            self._programs.add(ino)
            nursery.start_soon(self._program, nursery, ino)

    async def _program(self, nursery: trio.Nursery, ino: int) -> None:
        reader = self._reader
        try:
            head = await reader.peek(ino, 0, elf.HEAD)
            if head[:2] == b"#!":
                self._start(nursery, self._script(head))
            shape = elf.layout(head)
            if shape is None:
                return
            if shape.dynamic is not None:
                nursery.start_soon(self._linked, nursery, ino, shape)
            if shape.interpreter is not None:
                name = (await reader.peek(ino, *shape.interpreter)).rstrip(b"\0")
                self._start(nursery, self._paths.file(name))
                for path in LOADERS:
                    if found := self._paths.file(path):
                        nursery.start_soon(self._read, found, 0, MAX_TABLES)
                if shape.entry and (place := shape.offset(shape.entry)) is not None:
                    nursery.start_soon(self._read, ino, place, 1)
        except _WRONG as error:
            log.debug("image %s: program %d is not followed: %s", reader.name, ino, error)

    def _script(self, head: bytes) -> int:
        words = head[2:256].partition(b"\n")[0].split()
        if len(words) > 1 and words[0].endswith(b"/env"):
            found = (self._paths.file(folder + words[1]) for folder in (b"/usr/local/bin/", b"/usr/bin/", b"/bin/"))
            return next((ino for ino in found if ino), 0)
        return self._paths.file(words[0]) if words else 0

    async def _linked(self, nursery: trio.Nursery, ino: int, shape: elf.Layout) -> None:
        """Libraries by name, then what this file's own loading reads."""
        reader = self._reader
        assert shape.dynamic is not None
        try:
            tags = elf.dynamic(await reader.peek(ino, *shape.dynamic))
            place = shape.offset(tags[elf.STRTAB][0]) if elf.STRTAB in tags else None
            size = tags.get(elf.STRSZ, [0])[0]
            wanted = [*tags.get(elf.NEEDED, []), *tags.get(elf.RUNPATH, tags.get(elf.RPATH, []))]
            if place is not None and wanted:
                low, high = min(wanted), min(max(wanted) + 256, size)
                names = await reader.peek(ino, place + low, min(high - low, MAX_NAMES))
                paths = b":".join(elf.string(names, at - low) for at in wanted[len(tags.get(elf.NEEDED, [])) :])
                for at in tags.get(elf.NEEDED, []):
                    await trio.lowlevel.checkpoint()  # a thousand names are not to keep all others from the loop
                    found = await self._library(ino, elf.string(names, at - low), paths, shape.machine)
                    self._start(nursery, found)
            for start, length in shape.written:
                await self._read(ino, start, min(length, MAX_TABLES))
            for start, length in elf.tables(shape, tags):
                await self._read(ino, start, min(length, MAX_TABLES))
            for start in await self._constructors(ino, shape, tags):
                await self._read(ino, start, 1)
        except _WRONG as error:
            log.debug("image %s: libraries of %d are not followed: %s", reader.name, ino, error)

    async def _constructors(self, ino: int, shape: elf.Layout, tags: dict[int, list[int]]) -> Sequence[int]:
        """Offsets of the functions that run when the file is loaded: their addresses are addends of relocations, which
        linkers sort by the place they change."""
        if not all(tag in tags for tag in (elf.INIT_ARRAY, elf.INIT_ARRAYSZ, elf.RELATAB, elf.RELACOUNT)):
            return ()
        table, count = shape.offset(tags[elf.RELATAB][0]), tags[elf.RELACOUNT][0]
        array, size = tags[elf.INIT_ARRAY][0], tags[elf.INIT_ARRAYSZ][0]
        width = elf.RELA.size
        if table is None or not 8 < size <= 8 * MAX_CONSTRUCTORS or not 0 < count * width <= MAX_TABLES:
            return ()
        data = await self._reader.peek(ino, table, count * width)
        rows = range(len(data) // width)
        first = bisect_left(rows, array, key=lambda row: elf.RELA.unpack_from(data, row * width)[0])
        found: list[int] = []
        for row in rows[first : first + size // 8]:
            place, _, addend = elf.RELA.unpack_from(data, row * width)
            if not array <= place < array + size:
                break
            if (offset := shape.offset(addend)) is not None:
                found.append(offset)
        return found

    async def _library(self, ino: int, name: bytes, paths: bytes, machine: int) -> int:
        """The inode of a library that this file needs, as the loader would find it; 0: not found."""
        if not name:
            return 0
        if b"/" in name:
            return self._paths.file(name)
        triple = elf.MULTIARCH.get(machine, b"")
        usual = [b"/lib/" + triple, b"/usr/lib/" + triple] if triple else []
        origin = self._imports.origins.get(ino)
        if origin is not None:
            paths = paths.replace(b"${ORIGIN}", b"$ORIGIN").replace(b"$ORIGIN", origin)
        given = [path for path in paths.split(b":") if path.startswith(b"/")]
        for folder in dict.fromkeys([*given, *self._folders, *usual, b"/lib64", b"/usr/lib64", b"/lib", b"/usr/lib"]):
            if found := self._paths.file(folder + b"/" + name):
                if folder not in self._folders:
                    self._folders.append(folder)
                self._imports.origins[found] = folder
                return found
        if b"$ORIGIN" in paths or b"${ORIGIN}" in paths:
            if self._indexed is None:
                self._indexed = await trio.to_thread.run_sync(self._index)
            return self._indexed.get(name, 0)
        return 0

    def _index(self) -> dict[bytes, int]:
        """All libraries of the image by name: those beside a program are found without knowing where that lies. It is
        known of what was imported or linked: the walk took a sixteenth of the interpreter's time of a Python start."""
        found: dict[bytes, int] = {}
        try:
            for steps, (path, entry) in enumerate(self._reader.bootstrap.walk()):
                if steps > 200_000:
                    break
                name = path.rpartition(b"/")[2]
                if b".so" in name and entry.dtype == 8:
                    found.setdefault(name, entry.ino)
        except (RafsError, ValueError):
            pass
        return found

    # -- fetching

    async def _read(self, ino: int, offset: int, size: int) -> None:
        """Have part of a file fetched."""
        reader = self._reader
        size = min(size, reader.bootstrap.attr(ino).size - offset)
        if size <= 0:
            return
        segments: dict[bytes, Segment] = {}
        for extent in reader.bootstrap.extents(ino, offset, size):
            if extent.blob_index == HOLE or reader.chunks.lacks_meta(extent.blob_index):
                continue
            for row, _, _ in reader.chunks.pieces(extent.blob_index, extent.blob_offset, extent.size):
                segment = reader.segment_of(extent.blob_index, row)
                if not reader.is_ready(segment):
                    segments.setdefault(segment.key, segment)
        await self._fetch(list(segments.values()))

    async def _fetch(self, segments: Sequence[Segment]) -> None:
        async with trio.open_nursery() as nursery:
            for group in self._groups(segments):
                await self._slots.acquire()
                missing = [job for job in group if not self._comes(job)]
                nursery.start_soon(self._fetch_group, missing)

    def _groups(self, segments: Sequence[Segment]) -> Iterator[list[Job]]:
        group: list[Job] = []
        for segment in segments:
            if self._reader.is_ready(segment):
                continue
            job = self._reader.job(segment)
            if group and not joinable(group, job, MERGE):
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def _comes(self, job: Job) -> bool:
        return self._reader.is_ready(job.segment) or self._scheduler.in_flight(job)

    async def _fetch_group(self, group: list[Job]) -> None:
        try:
            await self._scheduler.fetch(group, Priority.LEARNED, MERGE)
        except SourceError as error:
            log.debug("image %s: %s", self._reader.name, error)
        finally:
            self._slots.release()
