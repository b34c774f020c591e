"""One EROFS-mounted image: which segment a device is, and how it gets its bytes."""

from __future__ import annotations

import errno
import logging
import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable
from struct import error as StructError

import trio

from bootstrap.errors import RafsError
from nydusfs.cache import CacheStore
from nydusfs.cache.devices import DeviceFiles, write_whole
from nydusfs.cache.durability import resident
from nydusfs.cache.health import FULL
from nydusfs.drivers.erofs.events import Question
from nydusfs.drivers.erofs.filemap import FileMap
from nydusfs.drivers.erofs.image import DeviceFile, fingerprint, is_scattered, open_file_map, open_image
from nydusfs.drivers.stats import Fop
from nydusfs.drivers.volume import ImageVolume
from nydusfs.errors import ReadError
from nydusfs.hands import Hands
from nydusfs.image_reader import ImageReader
from nydusfs.segments import SEGMENT_SIZE, Plain, Segment

log = logging.getLogger("nydusfs.erofs")

READ_AHEAD = 4 << 20  # bytes in front of a sequential reader
HEAD = 128 << 10  # of a file whose beginning is read: as much as FUSE is asked for then
SINGLE = 16 << 10  # bytes: who is asked for more reads in sequence
SETTLED = 5.0  # seconds after the last write until devices are read past their page cache
FILLS = 4  # attempts to have a device complete that a cache at its limit empties meanwhile


class ErofsImage:
    """`files`: the devices in the order of the mount, `mark`: the metadata image's fingerprint; both empty for an image
    of an earlier worker until they are needed."""

    def __init__(
        self,
        where: str,
        volume: ImageVolume,
        reader: ImageReader,
        devices: DeviceFiles,
        files: list[DeviceFile],
        mark: bytes = b"",
    ) -> None:
        assert reader.store is not None
        self.mark = mark
        self.where = where
        self.volume = volume
        self.reader = reader
        self.store: CacheStore = reader.store
        self.devices = devices
        self.files = files
        self.indexes = {blob.id: blob.index for blob in reader.bootstrap.blobs}
        self.blob_ids = self.indexes.keys()
        self.keys = [f"{devices.key}/{blob.id}" for blob in reader.bootstrap.blobs]
        self._token = trio.lowlevel.current_trio_token()
        self._scopes: set[trio.CancelScope] = set()
        self._hands: set[Hands] = set()
        self._next: dict[int, tuple[int, int]] = {}  # by blob: row a sequential reader comes to, segments in a row
        self.direct: bool | None = None  # as the kernel was told to read devices; None: not known
        self.asked_before = False  # about one of its devices
        self._read: set[str] = set()  # while a start is recorded
        self._file_map: FileMap | None = None
        self._slots = array("Q")  # blob << 40 | segment of each device
        self._place: tuple[Question | None, tuple[int, int]] = None, (0, 0)  # what `file_at` was asked last
        self._watched: set[str] = set()  # devices filled ahead of a reader: their first event says that he goes on

    def names(self) -> set[tuple[str, str]]:
        """Of its devices: blob and segment."""
        blobs = self.reader.bootstrap.blobs
        return {(blobs[file.blob_index].id, file.name) for file in self._all_files()}

    def _all_files(self) -> list[DeviceFile]:
        if not self.files:
            for xattrs in (True, False):
                mark = fingerprint(self.reader.bootstrap, xattrs)
                if found := open_image(self.devices.images / mark.hex(), mark):
                    self.files, self.mark = found, mark
                    break
        return self.files

    def image_names(self) -> set[str]:
        """Of its metadata image in the cache; both that it may have while that is not known. For a thread. Raises
        ValueError once the image is closed."""
        marks = [self.mark] if self.mark else [fingerprint(self.reader.bootstrap, xattrs) for xattrs in (True, False)]
        return {mark.hex() for mark in marks}

    def direct_now(self) -> bool:
        """Whether devices are better read past their page cache now: nothing was written to them for a while. What is
        not on the disk yet would be written out before each read."""
        caches = [self.reader.cache(blob) for blob in self.reader.bootstrap.blobs]
        return all(cache is None or time.monotonic() - cache.wrote > SETTLED for cache in caches)

    def scattered(self) -> bool:
        """See `image.is_scattered`. Raises OSError."""
        try:
            return is_scattered(self.devices.images / self.mark.hex())
        except StructError:
            return True

    # -- files

    def know_files(self) -> None:
        """From now on it is known which file is read, if the image's metadata was a v6 bootstrap. For a thread."""
        self.asked_before = True
        files = self._all_files()
        found = open_file_map(self.devices.images / self.mark.hex(), self.mark, self.reader.bootstrap.chunk_size)
        if found is not None:
            self._slots = array("Q", (file.blob_index << 40 | int(file.name.partition("-")[0]) for file in files))
            self._file_map = found

    def file_at(self, question: Question) -> tuple[int, int]:
        """The inode that is read and where; 0, 0: not known. From any thread."""
        last, place = self._place
        if last is not question:
            place = self._find(question)
            self._place = question, place
        return place

    def _find(self, question: Question) -> tuple[int, int]:
        segment = self.segment(question.name)
        if self._file_map is None or segment is None or not question.size:
            return 0, 0
        slot = segment.blob.index << 40 | segment.number
        device = bisect_left(self._slots, slot)
        if device == len(self._slots) or self._slots[device] != slot:
            return 0, 0
        return self._file_map.find(device, question.offset) or (0, 0)

    def answered(self, question: Question, began: int, failed: bool = False, *, missed: bool = True) -> None:
        """Account for a read: `began` of time.perf_counter_ns(). `missed`: its data was not here. From any thread."""
        ino, at = self.file_at(question)
        stats, took = self.volume.stats, time.perf_counter_ns() - began
        shown = ino or self.volume.root_ino
        if failed:
            if self.segment(question.name) is not None:
                stats.count(Fop.READ, shown, took, True)
            return
        size = question.size
        if ino:
            size = max(0, min(size, self.volume.attr(ino).size - at))  # the last block is asked for as a whole
        stats.count_read(shown, question.size, size, took)
        foresight = self.reader.foresight
        # Of a miss alone, as by FUSE: what is here was mostly looked at before, and to wake the loop for each file that
        # is begun took a tenth of the processor time of a program with many modules.
        if missed and ino and at == 0 and question.fd >= 0 and foresight is not None:
            try:
                self.soon(foresight.opened, ino, os.pread(question.fd, 4, question.offset))
            except OSError:
                pass

    def soon(self, call: Callable[..., object], *args: object) -> None:
        """Call this on the event loop, if it still runs."""
        try:
            self._token.run_sync_soon(call, *args)
        except trio.RunFinishedError:
            pass

    def segment(self, device: str) -> Segment | None:
        """The segment a device is; None when this image has no such one, or not now. From any thread."""
        _, blob_id, name = device.split("/")
        index, number = self.indexes.get(blob_id), name.partition("-")[0]
        if index is None or not number.isdecimal():
            return None
        try:
            segment = self.reader.segment(index, int(number))
        except (KeyError, ValueError, RafsError):
            return None
        return segment if segment.name == name else None

    def is_durable(self, device: str) -> bool:
        """Whether the cache has this device's bytes on the disk. From any thread."""
        segment = self.segment(device)
        return segment is not None and self.reader.is_durable(segment)

    def curious(self, device: str) -> bool:
        """Whether this image wants to know that a device is read although it is complete."""
        unread = self.reader.recorder is not None and device not in self._read
        return unread or device in self._watched or self.volume.stats.watched

    def asked(self, question: Question, size: int) -> bool | None:
        """A device of this size is to be read: whether it is complete; None when it is not of this image.

        From the reading threads.
        """
        device = question.name
        segment = self.segment(device)
        if segment is None:
            return None
        if (recorder := self.reader.recorder) is not None:
            recorder.note(self.file_at(question)[0], [segment])
            recorder.command.seen(question.pid)
            self._read.add(device)
        if (quota := self.store.quota) is not None:
            quota.used((segment.blob.id, segment.key))
        if size < segment.padded:
            return False
        ino, at = self.file_at(question)
        watched = device in self._watched
        if watched:
            self._watched.discard(device)
        # To wake the loop takes 0.25 ms of a reader's time while it is busy: not for each device fetched ahead of him.
        if self.reader.goes_on(ino, at + question.size, segment) if ino else watched:
            if self.reader.by_threads:
                self._follow(question, segment, True)
            else:
                self.soon(self._follow, question, segment, True)
        return True

    def at_hand(self, question: Question) -> bool:
        """Whether `fill_now` may do something."""
        segment = self.segment(question.name)
        return segment is not None and self.reader.at_hand(segment)

    def fill_now(self, question: Question) -> bool:
        """`fill` in a thread that is not the event loop's, where that can have the data by itself; False: ask that."""
        segment = self.segment(question.name)
        if segment is None:
            return False
        began, hands = time.perf_counter_ns(), Hands()
        self._hands.add(hands)
        try:
            done = self.reader.fill(segment, hands, lambda: self.begin_next(question))
        finally:
            self._hands.discard(hands)
        done = done and self._sure(question.name, segment, question.fd)
        if done:
            self.answered(question, began)
        return done

    async def fill(self, question: Question) -> bool:
        """Give a device its bytes; False when they cannot be had (the log says why), when it is none of this image or
        the image is being unmounted."""
        began, failed = time.perf_counter_ns(), True
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                failed = not await self._fill(question)
            except ReadError:
                pass  # logged where it was raised
            except OSError as error:
                log.error("image %s: device %s: %s", self.where, question.name, error.strerror or error)
            finally:
                self._scopes.discard(scope)
                self.answered(question, began, failed)
        return not failed

    def give_up(self) -> None:
        """Threads wait for no server any more."""
        for hands in list(self._hands):
            hands.give_up(errno.EIO)

    def cancel(self) -> None:
        self.give_up()
        for scope in list(self._scopes):
            scope.cancel()

    async def _fill(self, question: Question) -> bool:
        device, fd = question.name, question.fd
        _, blob_id, name = device.split("/")
        await self.reader.need_table(self.indexes[blob_id])
        segment = self.segment(device)
        if segment is None:
            return False
        own = -1 if fd >= 0 else self.devices.open(blob_id, name)
        target = fd if fd >= 0 else own
        if target < 0:
            return False  # deleted under us; the kernel asks again and brings a descriptor
        try:
            for _ in range(FILLS):
                if self._sure(device, segment, target):
                    break
                plain = await self.reader.whole(segment, self.file_at(question)[0])
                # Mostly the cache has put them there. Not if the folder was cleaned up under us, if it had the segment
                # before this device was made, or if the disk does not take it.
                if self._sure(device, segment, target) or (
                    await self._keep(segment, plain) and self._sure(device, segment, target)
                ):
                    break
                if await trio.to_thread.run_sync(self._write_durably, device, segment, target, plain):
                    break
            else:
                log.error("image %s: device %s finds no room that lasts: EIO", self.where, device)
                return False
        finally:
            if own >= 0:
                os.close(own)
        return True

    async def _keep(self, segment: Segment, plain: Plain) -> bool:
        """Put into the cache what it did not take, for a want of room it seems."""
        cache = self.reader.cache(segment.blob)
        if cache is None or segment.key in cache or not self.store.health.full():
            return False
        if not await trio.to_thread.run_sync(lambda: cache.write(segment, plain, must=True)):
            return False
        cache.add(segment, plain)
        return True

    def _write_durably(self, device: str, segment: Segment, fd: int, plain: Plain) -> bool:
        """Whether it will be there for a moment: False when somebody emptied it, or room for it had to be made.

        Raises OSError; the device is then empty, if the disk allows."""
        leaving = self.devices.leaving
        try:
            with leaving.writing(device):
                # Several readers may wait for one device, each with a fill of his own.
                if not self._right(device, segment, fd):
                    try:
                        write_whole(fd, plain, segment.padded)
                        os.fdatasync(fd)
                    except OSError:
                        try:
                            os.ftruncate(fd, 0)
                        except OSError:
                            pass
                        raise
        except OSError as error:
            if error.errno not in FULL or not self.store.make_room(2 * segment.padded):
                raise
            return False
        leaving.keep_when_written(device)
        return os.fstat(fd).st_size >= segment.padded

    def _right(self, device: str, segment: Segment, fd: int) -> bool:
        """Whether what the kernel reads from a device is what was verified."""
        return os.fstat(fd).st_size >= segment.padded and (self.is_durable(device) or resident(fd))

    def _sure(self, device: str, segment: Segment, fd: int) -> bool:
        """The same, and whether it will be so for a moment."""
        return self.devices.leaving.keep(device) and self._right(device, segment, fd)

    def begin_next(self, question: Question) -> None:
        """A reader waits for a device: fetch what he will ask for next. The kernel asks for one device after the other;
        where a file goes on in another one, that is fetched at once and not one round trip later."""
        (ino, at), segment = self.file_at(question), self.segment(question.name)
        if segment is None:
            return
        end = at + question.size
        if question.size > SINGLE and question.offset + question.size >= segment.padded:
            end += 1  # the kernel's window goes on in the next device, which it asks for when this one is here
        if at == 0:
            end = max(end, HEAD)
        if ino and end > at and not self.reader.from_files:  # there is no round trip to be saved
            try:
                others = [one for one in self.reader.segments_of(ino, at, end - at) if one.key != segment.key]
                self.reader.start(others)
            except (KeyError, IndexError, ValueError, RafsError):
                pass  # the read itself will say so
        self._follow(question, segment, False)

    def _follow(self, question: Question, segment: Segment, cached: bool) -> None:
        """Fetch in front of a reader who reads on."""
        ino, at = self.file_at(question)
        if ino:
            here = at + segment.padded - question.offset  # all of the segment comes at once
            missing = self.reader.follow(ino, at, question.size, segment, here, cached=cached)
            self._watched.update(self.devices.device(one.blob.id, one.name) for one in missing)
        else:
            self._follow_segments(segment)

    def _follow_segments(self, segment: Segment) -> None:
        """Where nothing is known of files: one segment after the other."""
        index = segment.blob.index
        expected, run = self._next.get(index, (-1, 0))
        run = run + 1 if expected == segment.rows.start else 0
        self._next[index] = (segment.rows.stop, run)
        if not run:
            return
        ahead: list[Segment] = []
        row = segment.rows.stop
        left = min(READ_AHEAD, (run + 1) * 2 * SEGMENT_SIZE)
        try:
            while left > 0:
                following = self.reader.segment_of(index, row)
                row, left = following.rows.stop, left - following.size
                ahead.append(following)
        except (KeyError, IndexError, ValueError, RafsError):
            pass  # the blob ends there
        if missing := [segment for segment in ahead if not self.reader.is_ready(segment)]:
            self._watched.update(self.devices.device(segment.blob.id, segment.name) for segment in missing)
            self.reader.start(missing)
