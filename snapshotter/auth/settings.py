"""Section `remote.auth` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AuthSettings:
    """Section `remote.auth` of the TOML file."""

    kubernetes: bool = False
    kubeconfig: str = ""
    cri: bool = False
    image_service: Path = Path("/run/containerd/containerd.sock")
    kubelet: bool = False
    provider_config: str = ""
    provider_bin_dir: str = ""
    renewal_seconds: float = 0.0
