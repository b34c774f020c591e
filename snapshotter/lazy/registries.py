"""The snapshotter's own requests to registries: with the credentials of the chain, as the template says to connect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.reference import Reference
from snapshotter.auth.chain import Chain
from snapshotter.nydusd_config import Template

if TYPE_CHECKING:  # its import takes longer than the start of the program
    from nydusfs.registry.client import RegistryClient

HOSTS_DIR = "/etc/containerd/certs.d"
# A pull waits for these; a registry that hangs must not hold it much longer than it holds containerd's own requests.
CONNECT_SECONDS, READ_SECONDS, RETRIES = 5.0, 15.0, 1


class Registries:
    def __init__(self, template: Template, chain: Chain) -> None:
        backend = template.registry
        self._chain = chain
        self._options = ClientOptions(
            insecure=bool(backend.get("skip_verify")),
            plain_http=backend.get("scheme") == "http",
            hosts_dir=str(backend.get("hosts_dir", HOSTS_DIR)),
            ca_files=tuple(map(str, backend.get("ca_cert_files") or ())),
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries=RETRIES,
        )

    @contextmanager
    def open(self, image: Reference, labels: Mapping[str, str]) -> Iterator[RegistryClient]:
        """A client for the image's registry. Its methods raise RegistryError, it itself ConfigError."""
        from nydusfs.registry.client import RegistryClient

        with RegistryClient(image.host, self._options, lambda: self._chain.find(image, labels).credentials) as client:
            yield client
