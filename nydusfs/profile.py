"""What starts of an image read first: recorded by itself, kept on the node, fetched ahead at the next cold start.

A run records the segments that readers ask for, in order, from the first read until nothing new was asked for during
`SETTLED` seconds, for `WINDOW` seconds at most. Runs are merged: the order of the last cold run, weights that fade
for what it did not read; once for all runs and once for each command (`nydusfs.command`). The file lies beside the
cache and outlives it; it names segments by blob and number, so it fits every node and may be copied to others. What
it says is only ever fetched, never believed: each byte is verified as usual, segments that the image does not have
are left out, and a replay that readers do not follow is given up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bootstrap.base import Bootstrap
from bootstrap.errors import RafsError
from nydusfs.command import FirstCommand
from nydusfs.segments import Segment

log = logging.getLogger("nydusfs.profile")

VERSION = 1
WINDOW = 60.0
SETTLED = 5.0
FADE = 0.6  # weight of a segment that the last cold run did not read, against before
FORGET = 0.3  # below: three cold runs without it
COLD = 0.5  # of the known segments read: less, and the run says nothing of those it did not read (pages were cached)
MAX_FILE = 8 << 20
MAX_ENTRIES = 65_536
MAX_PROFILES = 1024  # kept per cache; those whose images were started longest ago make room
MAX_COMMANDS = 8  # of an image; the one whose last run is longest ago makes room
# A replay is given up when readers asked for this many segments whose turn had not come, and for more of them than of
# others: the image runs something else today, or the profile is of no use.
STRANGERS = 8

Key = tuple[str, int]
"""A segment on every node: blob id and number."""


@dataclass(frozen=True, slots=True)
class Course:
    """What some runs read. `segments`: (blob id, number) -> weight, in the order of reading. `inodes`: files read, in
    order."""

    runs: int = 0
    segments: dict[Key, float] = field(default_factory=dict)
    inodes: tuple[int, ...] = ()

    def merged(self, segments: Sequence[Key], inodes: Iterable[int]) -> Course:
        """With one more run."""
        seen = dict.fromkeys(segments)
        known = self.segments
        cold = not known or sum(key in seen for key in known) >= COLD * len(known)
        if cold:
            result = {key: min(known.get(key, 0.0) * FADE + 1.0, 2.5) for key in seen}
            rest = {key: weight * FADE for key, weight in known.items() if key not in seen and weight * FADE >= FORGET}
        else:
            result = dict(known)
            rest = {key: 1.0 for key in seen if key not in known}
        result |= rest
        files = tuple(dict.fromkeys([*inodes, *self.inodes] if cold else [*self.inodes, *inodes]))
        return Course(self.runs + 1, dict(list(result.items())[:MAX_ENTRIES]), files[:MAX_ENTRIES])

    def value(self) -> dict[str, Any]:
        segments = [[blob, number, round(weight, 3)] for (blob, number), weight in self.segments.items()]
        return {"runs": self.runs, "segments": segments, "inodes": self.inodes}


@dataclass(frozen=True, slots=True)
class Profile:
    """`all`: every run of the image; `commands`: those of one command each, the last run last."""

    all: Course = Course()
    commands: dict[str, Course] = field(default_factory=dict)

    def merged(self, segments: Sequence[Key], inodes: Sequence[int], command: str = "") -> Profile:
        """With one more run, of a command if it is known."""
        commands = dict(self.commands)
        if command:
            commands[command] = commands.pop(command, Course()).merged(segments, inodes)
        kept = dict(list(commands.items())[-MAX_COMMANDS:])
        return Profile(self.all.merged(segments, inodes), kept)

    def common(self) -> list[Key]:
        """What every command reads, in the order of the one that ran last; all there is while only one is known."""
        if len(self.commands) < 2:
            return list(self.all.segments)
        *others, last = self.commands.values()
        return [key for key in last.segments if all(key in other.segments for other in others)]

    def of(self, command: str) -> list[Key]:
        """What a command reads, as far as one can tell."""
        return list(self.commands.get(command, self.all).segments)

    def encode(self) -> bytes:
        value = {"version": VERSION, **self.all.value()}
        value["commands"] = {name: course.value() for name, course in self.commands.items()}
        return json.dumps(value, separators=(",", ":")).encode()


def decode(data: bytes) -> Profile:
    """Raises ValueError for what is no profile."""
    try:
        value = json.loads(data)
        if value["version"] != VERSION:
            raise ValueError(f"version {value['version']}, this program reads {VERSION}")
        commands: dict[str, Course] = {}
        for name, course in list(value.get("commands", {}).items())[:MAX_COMMANDS]:
            commands[name] = _course(course)
        return Profile(_course(value), commands)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a profile ({type(error).__name__}: {error})") from None


def _course(value: Any) -> Course:
    segments: dict[Key, float] = {}
    for blob, number, weight in value["segments"][:MAX_ENTRIES]:
        if not isinstance(blob, str) or not isinstance(number, int) or not 0 <= number < 1 << 32:
            raise ValueError("a segment is not [blob id, number, weight]")
        if math.isnan(weight := float(weight)):
            raise ValueError(f"segment {number} of blob {blob} has no weight")
        segments[blob, number] = min(max(weight, 0.0), 2.5)
    inodes = tuple(int(ino) for ino in value["inodes"][:MAX_ENTRIES])
    return Course(min(max(int(value["runs"]), 0), 1 << 30), segments, inodes)


def identity(bootstrap: Bootstrap) -> str:
    """The same for every copy of an image's metadata."""
    hasher = blake2b(b"%d %d %d" % (bootstrap.version, bootstrap.size, bootstrap.inode_count), digest_size=16)
    for blob in bootstrap.blobs:
        hasher.update(b"\0" + blob.id.encode())
    return hasher.hexdigest()


class ProfileStore:
    """A directory of profiles, one file per image."""

    def __init__(self, work_dir: str) -> None:
        self.path = Path(f"{os.path.normpath(work_dir)}.profiles")

    def load(self, name: str) -> Profile | None:
        """None when there is none; a damaged one is deleted."""
        path = self.path / f"{name}.json"
        try:
            if path.stat().st_size > MAX_FILE:
                raise ValueError("larger than any profile")
            profile = decode(path.read_bytes())
            with contextlib.suppress(OSError):
                os.utime(path)  # of an image that is started from the cache alone nothing is saved
            return profile
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("profile %s is of no use (%s): starting a new one", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError as error:
            log.warning("profile %s cannot be read: %s", path, error.strerror)
        return None

    def save(self, name: str, profile: Profile) -> None:
        """Failure costs the next start its head start, nothing else. Of commands those that fit are kept."""
        data = profile.encode()
        while len(data) > MAX_FILE and profile.commands:
            profile = Profile(profile.all, dict(list(profile.commands.items())[1:]))
            data = profile.encode()
        made = ""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".new-", delete=False) as file:
                made = file.name
                file.write(data)
            os.rename(made, self.path / f"{name}.json")
            with contextlib.suppress(OSError):  # another process's are renamed and deleted as well
                self._make_room()
        except OSError as error:
            log.info("profile of %s is not kept: %s", name, error.strerror)
            if made:
                with contextlib.suppress(OSError):
                    os.unlink(made)  # a full disk shall not get fuller at every start

    def _make_room(self) -> None:
        """What was being written when its worker was killed goes, too. Raises OSError."""
        if len(os.listdir(self.path)) > MAX_PROFILES:
            for path in sorted(self.path.iterdir(), key=lambda path: path.stat().st_mtime)[:-MAX_PROFILES]:
                path.unlink()


def export(bootstrap: Bootstrap, store: ProfileStore) -> dict[str, Any]:
    """The profile of an image as a JSON value, with the paths of its files in the order of reading: the list that
    `nydusify convert --prefetch-patterns` and `nydus-image create --prefetch-policy fs` take."""
    profile = store.load(identity(bootstrap)) or Profile()
    wanted = set(profile.all.inodes)
    paths: dict[int, str] = {}
    try:
        for path, entry in bootstrap.walk():
            if entry.ino in wanted and entry.ino not in paths:
                paths[entry.ino] = "/" + os.fsencode(path).decode("utf-8", "surrogateescape")
                if len(paths) == len(wanted):
                    break
    except RafsError as error:
        log.warning("not all files of the profile can be named: %s", error)
    value: dict[str, Any] = json.loads(profile.encode())
    value["files"] = [paths[ino] for ino in profile.all.inodes if ino in paths]
    return value


class Recorder:
    """What one run reads. `note` from any thread: dictionary operations only. Times are of time.monotonic."""

    def __init__(self) -> None:
        self.segments: dict[Key, None] = {}
        self.inodes: dict[int, None] = {}
        self.command = FirstCommand()
        self.planned: set[Key] = set()  # what was fetched ahead, or is about to be
        self.familiar = self.strangers = 0
        self.born = time.monotonic()
        self.first = self.last = 0.0  # of the first read and of the last new segment

    def note(self, ino: int, segments: Iterable[Segment | None]) -> None:
        """`ino` 0: of a file that the reader does not know."""
        if ino and ino not in self.inodes:
            self.inodes[ino] = None
        for segment in segments:
            if segment is None:
                continue
            key = (segment.blob.id, segment.number)
            if key in self.segments:
                continue
            self.segments[key] = None
            self.last = time.monotonic()
            self.first = self.first or self.last
            if key in self.planned:
                self.familiar += 1
            else:
                self.strangers += 1

    def strange(self, segments: Iterable[Segment]) -> bool:
        """Whether this replay does not know of one of them yet."""
        return any((segment.blob.id, segment.number) not in self.planned for segment in segments)

    @property
    def astray(self) -> bool:
        """Whether readers do something else than the profile says."""
        return self.strangers >= STRANGERS and self.strangers > self.familiar

    def quiet(self) -> float:
        """Seconds since a reader asked for something new; 0 before the first read."""
        return time.monotonic() - self.last if self.first else 0.0

    def over(self) -> float:
        """Seconds until this run may end; 0: it is over."""
        now = time.monotonic()
        if not self.first:
            return SETTLED if now < self.born + WINDOW else 0.0
        return max(0.0, min(self.first + WINDOW, self.last + SETTLED) - now)
