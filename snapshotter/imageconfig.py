"""nydusd's configuration of each image: derived from the template with the image's credentials, kept in a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from nydusfs.registry.credentials import Credentials
from snapshotter.auth.chain import Chain, parse
from snapshotter.auth.renewal import Renewal, Result
from snapshotter.directories import make_private
from snapshotter.errors import SnapshotterError
from snapshotter.nydusd_api import ApiError, NydusdApi
from snapshotter.nydusd_config import Template, credentials_of, derive, write_private
from snapshotter.records import InstanceRecord

log = logging.getLogger(__name__)


class ImageConfigs:
    """`shared`: whether an image is served by the daemon of all. The texts may hold passwords."""

    def __init__(
        self,
        directory: Path,
        template: Template,
        cache_dir: Path,
        chain: Chain,
        shared: Callable[[InstanceRecord], bool],
    ) -> None:
        self._directory = directory
        self._template = template
        self._cache_dir = cache_dir
        self._chain = chain
        self._shared = shared
        self.on_credentials: Callable[[str, float | None], None] = lambda instance, expires: None

    def folder(self, daemon: str) -> Path:
        return self._directory / daemon

    def path(self, record: InstanceRecord) -> Path:
        if self._shared(record):
            return self.folder(record.daemon) / record.name / "config.json"
        return self.folder(record.daemon) / "config.json"

    def found(self, record: InstanceRecord, labels: Mapping[str, str]) -> tuple[str, float | None]:
        """The text with what the chain of credentials says now, and when that ends. Raises what finding them raises."""
        found = self._chain.find(parse(record.image), labels)
        return self._derive(record, found.credentials), found.expires

    def write(self, record: InstanceRecord, labels: Mapping[str, str], *, known: bool = False) -> str:
        """Also written to the image's file. `known`: with the credentials of that file, if there is one: at a restart
        nobody is asked, as registries, clusters and helpers may come up later than containers; renewal follows."""
        before = ""
        try:
            if not known:
                raise FileNotFoundError
            before = self.path(record).read_text()
            kept = credentials_of(before)
        except (OSError, ValueError):
            text, expires = self.found(record, labels)
            self.on_credentials(record.name, expires)
        else:
            text = self._derive(record, kept)
        make_private(self._cache_dir)
        if text != before:
            write_private(self.path(record), text)
        return text

    def renew(self, record: InstanceRecord, labels: Callable[[], Mapping[str, str]], api: NydusdApi) -> Renewal:
        """Looks the credentials up again; what is new goes to the nydusd behind `api` and to the file. Raises
        nothing."""
        try:
            found = self._chain.find(parse(record.image), labels())
            path = self.path(record)
            old = credentials_of(path.read_text())
            if found.credentials == old or (found.credentials is None and found.failed):
                return Renewal(record.image, Result.FAILED if found.failed else Result.SAME, found.expires)
            text, refused = self._derive(record, found.credentials), None
            try:
                if found.credentials is None or not found.credentials.registry_token:
                    api.set_registry_auth(f"/{record.name}", found.credentials.basic if found.credentials else "")
            except ApiError as error:  # an old release, which has them from the file when it starts again
                refused = error
            if path.exists():  # else it was unmounted meanwhile
                write_private(path, text)  # now that they are taken: else they would not be said again
            if refused is not None:
                raise refused
        except (SnapshotterError, OSError, ValueError, KeyError) as error:
            log.warning("credentials of image %s cannot be renewed: %s", record.image, error)
            return Renewal(record.image, Result.FAILED, None)
        log.info("credentials of image %s renewed from %s", record.image, found.source or "nowhere")
        return Renewal(record.image, Result.RENEWED, found.expires)

    def _derive(self, record: InstanceRecord, credentials: Credentials | None) -> str:
        return derive(
            self._template,
            image=record.image,
            instance=record.name,
            mapping=record.mapping,
            cache_dir=self._cache_dir,
            credentials=credentials,
        )
