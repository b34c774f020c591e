"""`nydusify copy`: an image as it is, from one place to another.

Every manifest keeps its bytes, so digests and signatures stay true; only an index of which part is copied, and an image
that gets its blobs from a storage backend, become new documents. Blobs first, then manifests from the leaves up, the
name last: what breaks off leaves no half image, and going on skips what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nydusfs.convert.backends import BackendChoice, BlobStore
from nydusfs.convert.copy_backend import filled_from_backend
from nydusfs.convert.endpoints import Connections, Endpoint, Location, RegistryEndpoint
from nydusfs.convert.endpoints.base import Manifest
from nydusfs.convert.images import MAX_INDEX, MAX_LAYERS, Descriptor, parse_descriptor, parse_object
from nydusfs.convert.manifests import digest_of, indented
from nydusfs.convert.platforms import Platform
from nydusfs.convert.progress import Progress
from nydusfs.convert.pushing import Pusher
from nydusfs.convert.workdir import work_folder
from nydusfs.errors import ConvertError, NotFoundError
from nydusfs.registry import mediatypes as mt

log = logging.getLogger(__name__)

_MAX_DEPTH = 4  # an index in an index is rare, deeper is an attack
_ATTESTED = "vnd.docker.reference.digest"  # buildkit's attestations name the manifest they are about
_FOREIGN = ("foreign", "nondistributable")


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """`platforms` None: everything there is. `backend` holds blobs of a Nydus image that its manifest does not name."""

    source: Location
    target: Location
    platforms: tuple[Platform, ...] | None = None
    backend: BackendChoice | None = None
    referrers: bool = True
    work_dir: Path = Path("tmp")


@dataclass(slots=True)
class CopyResult:
    """`sent`: blobs whose bytes went out; the others of `blobs` were at the target or were taken over there."""

    digest: str = ""
    blobs: int = 0
    sent: int = 0


@dataclass(slots=True)
class _Plan:
    """Documents to push, leaves first, and where they come from. `top` is the last, under the image's name."""

    manifests: dict[str, Manifest] = field(default_factory=dict)
    blobs: dict[str, Descriptor] = field(default_factory=dict)


def copy(options: CopyOptions, progress: Progress) -> CopyResult:
    """Raises NydusError."""
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(options.work_dir))
        connections = stack.enter_context(Connections())
        source = stack.enter_context(options.source.prepare(folder / "source").open(connections))
        target = stack.enter_context(options.target.open(connections, create=True))
        store = stack.enter_context(options.backend.open()) if options.backend else None
        pusher = stack.enter_context(Pusher(target, progress))
        return _Copy(options, progress, source, target, store, pusher, folder).run()


class _Copy:
    def __init__(
        self,
        options: CopyOptions,
        progress: Progress,
        source: Endpoint,
        target: Endpoint,
        store: BlobStore | None,
        pusher: Pusher,
        folder: Path,
    ) -> None:
        self._options = options
        self._progress = progress
        self._source = source
        self._target = target
        self._store = store
        self._pusher = pusher
        self._folder = folder
        self._plan = _Plan()

    def run(self) -> CopyResult:
        options, plan = self._options, self._plan
        self._progress.say(f"copying image {options.source}")
        top = self._collect(self._source.manifest(), options.platforms, 0)
        plan.manifests.pop(top.digest)
        if options.referrers:
            self._collect_referrers(top)
        for blob in plan.blobs.values():
            self._pusher.copy(self._source, blob)
        self._pusher.wait()
        for manifest in plan.manifests.values():
            self._pusher.manifest(manifest.media_type, manifest.body)
        digest = self._pusher.image(top.media_type, top.body)
        result = CopyResult(digest, len(self._pusher), self._pusher.sent)
        self._progress.say(
            f"copied image {options.target}@{digest}: {result.blobs} blob(s), {result.sent} sent, "
            f"{len(plan.manifests) + 1} manifest(s)"
        )
        return result

    def _collect(self, found: Manifest, platforms: Sequence[Platform] | None, depth: int) -> Manifest:
        """Plans a manifest and all it names; gives it as it will be pushed."""
        if found.media_type in mt.INDEXES:
            found = self._collect_index(found, platforms, depth)
        else:
            found = self._collect_manifest(found)
        self._plan.manifests[found.digest] = found
        return found

    def _collect_index(self, found: Manifest, platforms: Sequence[Platform] | None, depth: int) -> Manifest:
        what = f"index {found.digest} of {self._source.name}"
        if depth >= _MAX_DEPTH:
            raise ConvertError(f"{what}: indexes lie in one another more than {_MAX_DEPTH} deep")
        document = parse_object(found.body, what)
        entries = document.get("manifests")
        if not isinstance(entries, list) or len(entries) > MAX_INDEX:
            raise ConvertError(f"{what} has no usable list of manifests")
        chosen = entries if platforms is None else self._chosen(entries, platforms, what)
        fresh: list[dict[str, Any]] = []
        for entry in chosen:
            descriptor = parse_descriptor(entry, what)
            below = self._collect(self._source.manifest(descriptor.digest), platforms, depth + 1)
            entry = {**entry, "digest": below.digest, "size": len(below.body)}
            fresh.append(entry)
        if fresh == entries:
            return found
        if len(fresh) == 1 and depth == 0:
            return self._plan.manifests.pop(fresh[0]["digest"])
        body = indented({**document, "manifests": fresh})
        return Manifest(digest_of(body), found.media_type, body)

    def _chosen(self, entries: list[Any], platforms: Sequence[Platform], what: str) -> list[Any]:
        """Entries of these platforms with what is attested of them."""
        chosen, seen = [], []
        for entry in entries:
            parse_descriptor(entry, what)
            platform_json = entry.get("platform")
            platform = Platform.of(platform_json if isinstance(platform_json, dict) else {})
            if platform.os in ("", "unknown"):
                continue
            seen.append(str(platform))
            if any(wanted.matches(platform) for wanted in platforms):
                chosen.append(entry)
        if not chosen:
            raise ConvertError(
                f"{self._source.name} has no image for {', '.join(map(str, platforms))}; it has: "
                f"{', '.join(sorted(set(seen))) or 'none'} (choose with --platform or --all-platforms)"
            )
        digests = {entry["digest"] for entry in chosen}
        return [
            entry
            for entry in entries
            if entry["digest"] in digests or (entry.get("annotations") or {}).get(_ATTESTED) in digests
        ]

    def _collect_manifest(self, found: Manifest) -> Manifest:
        """An image, or any other artifact of an OCI registry."""
        what = f"manifest {found.digest} of {self._source.name}"
        document = parse_object(found.body, what)
        if document.get("schemaVersion") == 1:
            raise ConvertError(f"{what} is a Docker schema 1 manifest, which registries no longer take: push it anew")
        if self._store is not None:
            filled = filled_from_backend(self._source, self._store, found, self._pusher, self._folder)
            if filled is not None:
                body = indented(filled)
                found, document = Manifest(digest_of(body), found.media_type, body), filled
        named = [document["config"]] if document.get("config") is not None else []
        for key in ("layers", "blobs"):  # the second: artifacts of before OCI 1.1
            values = document.get(key) or []
            if not isinstance(values, list) or len(values) > MAX_LAYERS:
                raise ConvertError(f"{what} has no usable list of {key}")
            named += values
        for value in named:
            self._collect_blob(parse_descriptor(value, what))
        return found

    def _collect_blob(self, blob: Descriptor) -> None:
        if self._pusher.knows(blob.digest):
            return
        if any(word in blob.media_type for word in _FOREIGN) and not self._source.has_blob(blob.digest, blob.size):
            log.info("layer %s is kept elsewhere by its licence: it is named, not copied", blob.digest)
            return
        self._plan.blobs[blob.digest] = blob
        if reference := blob.annotations.get(mt.ANNOTATION_REF):
            # the data of an OCI reference layer are in the plain layer, which the manifest does not name
            self._plan.blobs.setdefault(reference, Descriptor("", reference, self._source.blob_size(reference)))

    def _collect_referrers(self, top: Manifest) -> None:
        """Signatures, attestations and other images about what is copied."""
        source, target = self._source, self._target
        if not isinstance(source, RegistryEndpoint) or not isinstance(target, RegistryEndpoint):
            return
        if (source.client.host, source.repository) == (target.client.host, target.repository):
            return
        seen = {top.digest, *self._plan.manifests}
        waiting = list(seen)
        while waiting:
            subject = waiting.pop()
            for entry in source.client.referrers(source.repository, subject):
                descriptor = parse_descriptor(entry, f"referrers of {subject} in {source.name}")
                if descriptor.digest in seen:
                    continue
                seen.add(descriptor.digest)
                try:
                    self._collect(source.manifest(descriptor.digest), None, 1)
                except NotFoundError:
                    log.warning("%s: referrer %s of %s is gone: left out", source.name, descriptor.digest, subject)
                    continue
                waiting.append(descriptor.digest)
