"""The chain as configured, and the parts of it that run: made in one place, started and ended together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.auth.base import Off, Source
from snapshotter.auth.chain import Chain
from snapshotter.auth.cri import CriImageService
from snapshotter.auth.kubelet import KubeletSource
from snapshotter.auth.local import CriSource, DockerSource, LabelSource, StaticSource
from snapshotter.auth.settings import AuthSettings
from snapshotter.auth.vault import Vault
from snapshotter.nydusd_config import Template

if TYPE_CHECKING:
    from snapshotter.auth.kubernetes.secrets import SecretsSource

log = logging.getLogger(__name__)


class Auth:
    """`chain` answers from the start; `start` begins what runs beside it. Raises SettingsError."""

    def __init__(self, settings: AuthSettings, template: Template, folder: Path) -> None:
        self.vault = Vault(folder)
        self.cri = CriImageService(settings.image_service, self.vault) if settings.cri else None
        self._secrets: SecretsSource | None = None
        if settings.kubernetes:
            # imported when needed: it takes longer than the start of the program
            from snapshotter.auth.kubernetes import access
            from snapshotter.auth.kubernetes.secrets import SecretsSource

            self._secrets = SecretsSource(access.find(settings.kubeconfig))
        key = "remote.auth.enable_{}"
        sources: list[Source] = [
            LabelSource(self.vault),
            CriSource(self.vault) if settings.cri else Off(CriSource.name, key.format("cri_keychain")),
            DockerSource(),
            KubeletSource(Path(settings.provider_config), Path(settings.provider_bin_dir))
            if settings.kubelet
            else Off(KubeletSource.name, key.format("kubelet_credential_providers")),
            self._secrets or Off("kubernetes", key.format("kubeconfig_keychain")),
            StaticSource(str(template.path), template.registry),
        ]
        self.chain = Chain(sources)

    def start(self, on_change: Callable[[], None]) -> None:
        """`on_change`: some source knows something new."""
        self.vault.on_change = lambda image: on_change()
        if self._secrets is not None:
            self._secrets.on_change = on_change
            self._secrets.start()

    def close(self) -> None:
        if self._secrets is not None:
            self._secrets.close()
        if self.cri is not None:
            self.cri.close()
