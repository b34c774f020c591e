"""Power cuts under the cache: everything a real daemon wrote is cut off at any point, and read by a real reader.

    python -m tests.lab.powercut [--disk ext4|xfs|btrfs|files] [--driver fuse|erofs] [--states 1000] [--seed N] FOLDER

A nydusd works with its cache on a recording file system: images mounted, read, evicted, removed, its worker killed.
Then for each state, that is a moment and a choice of what the disk had by then, the next boot's daemon reads all
images. Wrong bytes are never right; what was lost is fetched again.

- `ext4`, ...: the log is that of a block device below a real file system. Between two flushes a disk may have taken
  any of the writes, whole or in part (sectors of 512 bytes).
- `files`: the log is that of file system calls, for a file system weaker than any real one: each name has any of the
  values it had since its directory was synced, each file any part of the data written since it was synced.

Everything happens in namespaces of its own, in a tmpfs at FOLDER: whatever way it ends, nothing stays.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import trio

from bootstrap.build import build_directory
from bootstrap.options import BuildOptions
from nydusfs.cache import store
from nydusfs.config import load_config
from nydusfs.profile import identity
from nydusfs.segments import SEGMENT_SIZE
from nydusfs.services import open_services
from tests.lab.daemon import Nydusd
from tests.lab.erofs import READ_ALL
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.process import run, wait_until
from tests.lab.recordfs import GROUP_BLOCKS, Entry, LoopDisk, RecordFs, Resize, Step, Sync, Write

DISK_SIZE = 32 << 20
SECTOR = 512
ROOT = 1
BATCH = 100
INSIDE = "NYDUS_POWERCUT_INSIDE"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
# Options that take away what ext4 does for programs that forget to sync.
OPTIONS = {"ext4": ["", "data=writeback,noauto_da_alloc", "nodelalloc,commit=1"]}


@dataclass
class Image:
    name: str
    bootstrap: Path
    blob_id: str
    files: dict[str, str]  # path -> SHA-256
    segments: dict[str, bytes] = field(default_factory=dict)  # file name in the cache -> what it must hold


@dataclass
class Report:
    disk: str
    driver: str
    steps: int = 0
    syncs: int = 0
    states: int = 0
    wrong: int = 0
    failed: int = 0  # states that could not be read at all
    repaired: int = 0  # file systems that needed fsck first: one sector of the superblock got to the disk
    segments_found: int = 0  # over all states: in the cache after the cut
    segments_lost: int = 0  # fetched again
    daemons: int = 0  # states that were also mounted by a whole daemon
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)


_Outcome: TypeAlias = tuple[list[str], int, int, bool]  # what is wrong, segments found and lost, fsck was needed


# -- the run that is recorded


def make_images(base: Path) -> list[Image]:
    """Version 6 and 5 (whose chunks lie at odd offsets), small chunks and files larger than a segment."""
    import hashlib

    images = []
    (base / "blobs").mkdir()
    for number, (version, chunk_size) in enumerate(((6, 0x10000), (5, 0x100000))):
        rng, root = random.Random(number), base / f"tree{number}"
        files: dict[str, str] = {}
        for index, size in enumerate((700_000, 3, 5_000, 131_072, 90_001, 400_000)):
            path = root / f"d{index % 2}" / f"f{index}"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = rng.randbytes(size)
            path.write_bytes(data)
            files[f"d{index % 2}/f{index}"] = hashlib.sha256(data).hexdigest()
        with (base / "out").open("w+b") as out:
            result = build_directory(os.fspath(root), out, BuildOptions(fs_version=version, chunk_size=chunk_size))
        os.rename(base / "out", base / "blobs" / result.blob_id)
        bootstrap = base / f"{number}.boot"
        bootstrap.write_bytes(result.bootstrap)
        images.append(Image(f"i{number}", bootstrap, result.blob_id, files))
    trio.run(_expect, base, images)
    return images


async def _expect(base: Path, images: list[Image]) -> None:
    async with open_services() as services:
        config = load_config(local_config(base / "blobs", base / "expected"), "expected")
        for image in images:
            reader = await services.open_image(str(image.bootstrap), config, name=image.name)
            for blob in reader.bootstrap.blobs:
                for number in range(-(-blob.uncompressed_size // SEGMENT_SIZE) + 1):
                    try:
                        segment = reader.segment(blob.index, number)
                    except KeyError:
                        continue
                    image.segments[segment.name] = bytes(await reader.whole(segment))
            reader.close()


def local_config(blobs: Path, work: Path) -> str:
    device = {
        "backend": {"type": "localfs", "config": {"dir": str(blobs)}},
        "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
    }
    return json.dumps({"device": device, "mode": "direct"})


def work(images: list[Image], disk: Path, driver: str, server: FaultyServer, write_out: Callable[[], None]) -> None:
    """What a node does with its cache, in a few seconds. `write_out` begins to write metadata in place."""

    def config(**cache: int) -> str:
        backend = {"scheme": "http", "host": server.netloc, "repo": "a/b"}
        device = {
            "backend": {"type": "registry", "config": backend},
            "cache": {"type": "blobcache", "config": {"work_dir": str(disk / "cache"), **cache}},
        }
        return json.dumps({"device": device, "mode": "direct"})

    def mount(image: Image, **cache: int) -> None:
        answer = daemon.mount(f"/{image.name}", image.bootstrap, config(**cache))
        assert answer.status == 204, (answer, daemon.log_text()[-2000:])

    def read(image: Image, *parts: str) -> None:
        for part in parts:
            folder = daemon.mnt / image.name / part
            found = json.loads(run([sys.executable, "-c", READ_ALL, folder], timeout=60).stdout)
            for name, digest in found.items():
                assert digest == image.files[f"{part}/{name}"], (image.name, part, name, digest)

    first, second = images
    with Nydusd("--fs-driver", driver) as daemon:
        mount(first)
        read(first, "d0")
        time.sleep(1.3)  # those get durable
        write_out()
        read(first, "d1")
        mount(second, limit=1_700_000)  # of 2.7 MB: segments are evicted from here on
        read(second, "d0", "d1")
        os.kill(daemon.worker_pid, 9)
        wait_until(daemon.running, 60, "the next worker")
        read(second, "d0")
        time.sleep(1.2)
        write_out()
        daemon.umount("/i0")
        daemon.call("DELETE", f"../v2/blobs?blob_id={first.blob_id}")
        mount(first, limit=1_700_000)
        read(first, "d0", "d1")
        write_out()
        time.sleep(0.6)  # some of it durable, some not


# -- states of a block device


class DiskStates:
    """`write(path, state)`: the disk of a state; states must come in ascending order of `state[0]`, the flush."""

    def __init__(self, base: bytes, steps: list[Step]) -> None:
        self._image = bytearray(base)
        self._at = 0
        self.epochs: list[list[Write]] = [[]]
        for step in steps:
            if isinstance(step, Write):
                self.epochs[-1].append(step)
            elif isinstance(step, Sync) and self.epochs[-1]:
                self.epochs.append([])

    def choose(self, rng: random.Random, count: int) -> list[tuple[int, int, int]]:
        """(flush, writes after it that came before the cut, seed): evenly over all writes."""
        moments = [(epoch, cut) for epoch, writes in enumerate(self.epochs) for cut in range(len(writes) + 1)]
        chosen = [rng.choice(moments) for _ in range(count)] if count < len(moments) else list(moments)
        chosen += [rng.choice(moments) for _ in range(count - len(chosen))]
        return sorted((*moment, rng.getrandbits(32)) for moment in chosen)

    def write(self, path: Path, state: tuple[int, int, int]) -> None:
        epoch, cut, seed = state
        while self._at < epoch:
            for step in self.epochs[self._at]:
                self._image[step.offset : step.offset + len(step.data)] = step.data
            self._at += 1
        with path.open("wb") as out:
            out.write(self._image)
            for offset, data in _some(random.Random(seed), self.epochs[epoch][:cut]):
                out.seek(offset)
                out.write(data)


def _some(rng: random.Random, writes: list[Write]) -> Iterator[tuple[int, bytes]]:
    """What the disk took of writes that it was free to reorder: a later one without an earlier one, parts of one."""
    kind = rng.choice(("all", "none", "few", "half", "most", "one lost", "one kept"))
    chance = {"all": 1.0, "none": 0.0, "few": 0.15, "half": 0.5, "most": 0.85, "one lost": 1.0, "one kept": 0.0}[kind]
    special = rng.randrange(len(writes)) if writes else 0
    for number, step in enumerate(writes):
        keep = rng.random() < chance if number != special or not kind.startswith("one") else kind == "one kept"
        torn = kind in ("few", "half", "most") and rng.random() < 0.2
        if torn:
            for at in range(0, len(step.data), SECTOR):
                if rng.random() < 0.5:
                    yield step.offset + at, step.data[at : at + SECTOR]
        elif keep:
            yield step.offset, step.data


# -- states of files


class FileStates:
    """The same for a tree of files. States are (steps before the cut, 0, seed)."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._at = 0
        self._durable: dict[int, bytearray] = {}  # files as of their last sync
        self._pending: dict[int, list[Write | Resize]] = {}
        self._folders = {ROOT} | {step.node for step in steps if isinstance(step, Entry) and step.is_folder}
        self._names: dict[tuple[int, str], list[int]] = {}  # values since the directory's last sync, that one's first

    def choose(self, rng: random.Random, count: int) -> list[tuple[int, int, int]]:
        moments = range(len(self._steps) + 1)
        chosen = list(moments) * (count // len(moments)) + rng.sample(moments, count % len(moments))
        return sorted((moment, 0, rng.getrandbits(32)) for moment in chosen)

    def _take(self, step: Step) -> None:
        if isinstance(step, Entry):
            self._names.setdefault((step.folder, step.name), [0]).append(step.node)
        elif isinstance(step, Sync):
            data = self._durable.setdefault(step.node, bytearray())
            for change in self._pending.pop(step.node, []):
                _apply(data, change)
            for (folder, _), values in self._names.items():
                if folder == step.node:
                    del values[:-1]
        else:
            self._pending.setdefault(step.node, []).append(step)

    def write(self, path: Path, state: tuple[int, int, int]) -> None:
        while self._at < state[0]:
            self._take(self._steps[self._at])
            self._at += 1
        rng = random.Random(state[2])
        fresh = rng.choice((0.3, 0.8, 1.0))  # how likely a name is as it was last
        names: dict[int, dict[str, int]] = {}
        for (folder, name), values in self._names.items():
            last = fresh if values[-1] not in self._folders else 0.95  # without its folder nothing is left to look at
            node = values[-1] if rng.random() < last else rng.choice(values)
            if node:
                names.setdefault(folder, {})[name] = node
        made: dict[int, Path] = {}
        self._lay_out(path, ROOT, names, made, rng)

    def _lay_out(
        self, path: Path, folder: int, names: dict[int, dict[str, int]], made: dict[int, Path], rng: random.Random
    ) -> None:
        path.mkdir()
        for name, node in names.get(folder, {}).items():
            where = path / name
            if node in self._folders:
                if node not in made:
                    made[node] = where
                    self._lay_out(where, node, names, made, rng)
            elif node in made:
                os.link(made[node], where)
            else:
                made[node] = where
                where.write_bytes(self._data(node, rng))

    def _data(self, node: int, rng: random.Random) -> bytes:
        data = bytearray(self._durable.get(node, b""))
        pending = self._pending.get(node, [])
        writes = [step for step in pending if isinstance(step, Write)]
        kept = dict.fromkeys((offset, bytes(part)) for offset, part in _some(rng, writes))
        for offset, part in kept:
            _apply(data, Write(node, offset, part))
        for step in pending:
            if isinstance(step, Resize) and rng.random() < 0.5:
                _apply(data, step)
        if writes and rng.random() < 0.3:  # the size got there, the data did not
            end = max(step.offset + len(step.data) for step in writes)
            data.extend(bytes(max(0, end - len(data))))
        return bytes(data)


def _apply(data: bytearray, change: Write | Resize) -> None:
    if isinstance(change, Resize):
        del data[change.size :]
        data.extend(bytes(change.size - len(data)))
        return
    data.extend(bytes(max(0, change.offset - len(data))))
    data[change.offset : change.offset + len(change.data)] = change.data


# -- the next boot


def check(images: list[Image], blobs: Path, cache: Path) -> tuple[list[str], int, int]:
    """What is wrong, segments found in the cache, segments fetched again."""
    wrong: list[str] = []
    store.boot_id = lambda: "0e270000"  # type: ignore[assignment]
    expected = {name: plain for image in images for name, plain in image.segments.items()}

    async def main() -> tuple[int, int]:
        async with open_services() as services:
            config = load_config(local_config(blobs, cache), "after the cut")
            readers = [await services.open_image(str(i.bootstrap), config, name=i.name) for i in images]
            for reader in readers:
                if reader.profiles is not None:
                    reader.profiles.load(identity(reader.bootstrap))
                for blob in reader.bootstrap.blobs:
                    reader.cache(blob)
            found = 0
            for path in _segments(cache):  # after the new daemon has thrown away what it does not trust
                plain, there = expected.get(path.name), path.read_bytes()
                found += 1
                if plain is None or not (there[: len(plain)] == plain and not any(there[len(plain) :])):
                    wrong.append(f"segment {path.name}: {len(there)} bytes that are not the image's")
            for reader, image in zip(readers, images, strict=True):
                for name, digest in image.files.items():
                    ino = reader.bootstrap.resolve(name.encode())
                    size = reader.bootstrap.attr(ino).size
                    data = b"".join([await reader.read(ino, at, 131072) for at in range(0, size, 131072)])
                    if _sha256(data) != digest:
                        wrong.append(f"{image.name}/{name}: {len(data)} bytes that are not the image's")
            lost = len(_segments(cache)) - found
            for reader in readers:
                reader.close()
            return found, lost

    return wrong, *trio.run(main)


def _segments(cache: Path) -> list[Path]:
    return list(cache.glob("[!.]*/*-*"))


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def check_daemon(images: list[Image], blobs: Path, cache: Path, driver: str) -> list[str]:
    """The same by a whole daemon through its mounts."""
    wrong: list[str] = []
    with Nydusd("--fs-driver", driver) as daemon:
        for image in images:
            answer = daemon.mount(f"/{image.name}", image.bootstrap, local_config(blobs, cache))
            if answer.status != 204:
                wrong.append(f"{image.name}: {answer}")
                continue
            found = json.loads(run([sys.executable, "-c", READ_ALL, daemon.mnt / image.name], timeout=60).stdout)
            for name, digest in image.files.items():
                if found.get(name) != digest:
                    wrong.append(f"{image.name}/{name}: {found.get(name)}")
    return wrong


def _each(tasks: Sequence[Callable[[], _Outcome]]) -> Iterator[_Outcome | None]:
    """What each returned, None for one that raised or whose process died. They run in forked processes, `BATCH` after
    another in each: a process per state took four times as long, most of it for copies of this one's pages."""
    done = 0
    while done < len(tasks):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                with os.fdopen(writing, "w", buffering=1) as out:
                    for task in tasks[done : done + BATCH]:
                        out.write(json.dumps(task()) + "\n")
                status = 0
            except BaseException as error:
                traceback.print_exception(error)
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                done += 1
                yield json.loads(line)
        if os.waitpid(pid, 0)[1] != 0:
            done += 1
            yield None


def cut(
    disk: str, driver: str, states: int, seed: int, base: Path, *, daemons: int = 0, forget_syncs: bool = False
) -> Report:
    """`daemons`: in how many states a whole daemon looks too. `forget_syncs`: as if nobody had synced, to see
    that this finds what it is made to find."""
    began, rng, report = time.monotonic(), random.Random(seed), Report(disk, driver)
    images = make_images(base)
    blobs = {path.name: path.read_bytes() for path in (base / "blobs").iterdir()}
    options = rng.choice(OPTIONS.get(disk, [""]))
    steps, content = _record(disk, driver, options, base, images, blobs)
    report.steps, report.syncs = len(steps), sum(isinstance(step, Sync) for step in steps)
    if forget_syncs:
        steps = [step for step in steps if not isinstance(step, Sync)]
    found: DiskStates | FileStates = FileStates(steps) if disk == "files" else DiskStates(content, steps)
    if os.path.exists(BOOT_ID):  # of the mount namespace: the daemons to come live in another boot
        (base / "boot").write_text("0e270000-0000-0000-0000-000000000000\n")
        run(["mount", "--bind", base / "boot", BOOT_ID])
    chosen = found.choose(rng, states)
    whole = set(rng.sample(range(len(chosen)), min(daemons, len(chosen))))
    where = base / "after"

    def look(number: int) -> _Outcome:
        repaired = False
        if disk == "files":
            found.write(where, chosen[number])
        else:
            where.mkdir(exist_ok=True)
            found.write(base / "disk.after", chosen[number])
            repaired = mount_as_at_boot(disk, base / "disk.after", where)
        try:
            if number in whole:  # alone: either of the two repairs what it finds
                return check_daemon(images, base / "blobs", where / "cache", driver), 0, 0, repaired
            return *check(images, base / "blobs", where / "cache"), repaired
        finally:
            if disk == "files":
                shutil.rmtree(where)
            else:
                gc.collect()  # maps of what lies there
                run(["umount", where])

    for number, outcome in enumerate(_each([partial(look, number) for number in range(len(chosen))])):
        report.states += 1
        report.daemons += number in whole
        if outcome is None:
            report.failed += 1
            report.said.append(f"state {chosen[number]}: could not be read, see stderr")
        else:
            wrong, there, lost, repaired = outcome
            report.wrong += bool(wrong)
            report.said += [f"state {chosen[number]}: {line}" for line in wrong[:3]]
            report.segments_found += there
            report.segments_lost += lost
            report.repaired += repaired
        if number % 500 == 499:
            print(f"{number + 1} states, {report.wrong} wrong", file=sys.stderr, flush=True)
    report.said = report.said[:20]
    report.seconds = round(time.monotonic() - began, 1)
    return report


def mount_as_at_boot(kind: str, disk: Path, where: Path) -> bool:
    """Whether the file system had to be repaired. Raises LabError."""
    command = ["mount", "-o", "loop", disk, where]
    if run(command, check=False).returncode == 0:
        return False
    if kind == "ext4" and run(["fsck.ext4", "-fy", disk], check=False).returncode >= 4:
        # It looks for the second superblock where the groups of larger disks begin.
        run(["fsck.ext4", "-fy", "-b", str(GROUP_BLOCKS), "-B", "4096", disk], check=False)
    for _ in range(5):  # another mount of this machine may take the same loop device
        if run(command, check=False).returncode == 0:
            return True
        time.sleep(0.3)
    run(command)
    return True


def _record(
    disk: str, driver: str, options: str, base: Path, images: list[Image], blobs: dict[str, bytes]
) -> tuple[list[Step], bytes]:
    """The log and, of a block device, what it held at its beginning."""
    with faulty_server(blobs) as server:
        if disk == "files":
            files = RecordFs(base / "record")
            try:
                work(images, files.mountpoint, driver, server, lambda: None)
                return files.log(), b""
            finally:
                files.close()
        loop = LoopDisk(base, DISK_SIZE, disk, options)
        try:
            run(["sync", "-f", loop.mountpoint])
            loop.fs.forget()
            content = loop.fs.content()
            work(images, loop.mountpoint, driver, server, loop.write_out)
            return loop.fs.log(), content
        finally:
            loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", default="ext4", choices=("ext4", "xfs", "btrfs", "files"))
    parser.add_argument("--driver", default="fuse", choices=("fuse", "erofs"))
    parser.add_argument("--states", type=int, default=1000)
    parser.add_argument("--daemons", type=int, default=0, help="states that a whole daemon reads through its mounts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--forget-syncs", action="store_true", help="as if files were never synced: must find damage")
    parser.add_argument("folder", type=Path, help="an empty folder for everything")
    options = parser.parse_args()
    if not os.environ.get(INSIDE):
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.environ[INSIDE] = "1"
        os.execvp(apart[0], [*apart, sys.executable, "-m", "tests.lab.powercut", *sys.argv[1:]])
    run(["mount", "-t", "tmpfs", "none", options.folder])
    report = cut(
        options.disk, options.driver, options.states, options.seed, options.folder,
        daemons=options.daemons, forget_syncs=options.forget_syncs,
    )  # fmt: skip
    print(json.dumps(asdict(report), indent=1))


if __name__ == "__main__":
    main()
