"""Credentials that came with a pull and that nobody can be asked for again: kept for mounts after a restart.

One file of mode 0600 per image and source below `<root>/auth`. Label values and CRI requests go here and nowhere else:
not into the database, not into logs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nydusfs.errors import NydusError
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.reference import Reference
from snapshotter.nydusd_config import write_private

log = logging.getLogger(__name__)

LABELS, CRI = "labels", "cri"
FRESH_SECONDS = 3600.0  # a pull may take so long to make the snapshot that names its image


@dataclass(frozen=True, slots=True)
class Kept:
    kind: str
    image: str
    time: float  # seconds since the epoch
    credentials: Credentials = field(repr=False)


def image_key(reference: Reference) -> str:
    """One name for an image however it is written; a digest makes the tag beside it meaningless, as in containerd."""
    return f"{reference.name}@{reference.digest}" if reference.digest else str(reference)


class Vault:
    """Thread-safe. `on_change` is called with the image's key after something new was learned of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, str], Kept] = {}
        self.on_change: Callable[[str], None] = lambda image: None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        for path in folder.iterdir():
            if path.name.startswith(".new-"):  # cut short by a kill
                path.unlink(missing_ok=True)
            elif path.suffix == ".json" and (kept := _read(path)) is not None:
                self._kept[kept.kind, kept.image] = kept

    def remember(self, kind: str, reference: Reference, credentials: Credentials) -> Credentials | None:
        """Returns what was there before, for `restore`."""
        key = kind, image_key(reference)
        with self._lock:
            before = self._kept.get(key)
            if before is not None and before.credentials == credentials:
                return before.credentials
            self._put(Kept(kind, key[1], time.time(), credentials))
        self.on_change(key[1])
        return before.credentials if before else None

    def restore(self, kind: str, reference: Reference, before: Credentials | None) -> None:
        """Credentials turned out to be wrong: what was known before counts again."""
        if before is None:
            self.forget(kind, reference)
        else:
            self.remember(kind, reference, before)

    def forget(self, kind: str, reference: Reference) -> None:
        with self._lock:
            self._drop((kind, image_key(reference)))

    def find(self, kind: str, reference: Reference) -> tuple[Kept, bool] | None:
        """What was kept for this image; else the newest for another image of its repository (False)."""
        with self._lock:
            exact = self._kept.get((kind, image_key(reference)))
            if exact is not None:
                return exact, True
            same = [
                kept
                for (one, image), kept in self._kept.items()
                if one == kind and image.startswith((reference.name + ":", reference.name + "@"))
            ]
        return (max(same, key=lambda kept: kept.time), False) if same else None

    def sweep(self, images: Callable[[], Iterable[str]]) -> None:
        """Forgets what is of no image any more. `images` gives the references of all snapshots, if it must be asked."""
        if not self._kept:
            return
        live = set()
        for text in images():
            try:
                live.add(image_key(Reference.parse(text)))
            except NydusError:
                continue
        with self._lock:
            for key, kept in list(self._kept.items()):
                if key[1] not in live and time.time() - kept.time > FRESH_SECONDS:
                    self._drop(key)

    def _put(self, kept: Kept) -> None:
        self._kept[kept.kind, kept.image] = kept
        document = {"kind": kept.kind, "image": kept.image, "time": kept.time, "credentials": asdict(kept.credentials)}
        try:
            write_private(self._path(kept.kind, kept.image), json.dumps(document))
        except OSError as error:
            log.warning("credentials of %s will not survive a restart: %s", kept.image, error.strerror)

    def _drop(self, key: tuple[str, str]) -> None:
        if self._kept.pop(key, None) is not None:
            self._path(*key).unlink(missing_ok=True)

    def _path(self, kind: str, image: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{kind} {image}'.encode()).hexdigest()}.json"


def _read(path: Path) -> Kept | None:
    try:
        document = json.loads(path.read_bytes())
        credentials = Credentials(**{name: str(value) for name, value in document["credentials"].items()})
        return Kept(str(document["kind"]), str(document["image"]), float(document["time"]), credentials)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        log.warning("%s cannot be read: ignored", path)
        return None
