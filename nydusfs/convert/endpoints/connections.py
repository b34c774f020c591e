"""Registry clients shared by the endpoints of one process: connections and tokens are used again."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from nydusfs.registry.client import RegistryClient
from nydusfs.registry.hosts import ClientOptions


class Connections:
    """Thread-safe. One client per registry and set of options, closed with this object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, ClientOptions], RegistryClient] = {}

    def client(self, host: str, options: ClientOptions) -> RegistryClient:
        with self._lock:
            found = self._clients.get((host, options))
            if found is None:
                found = self._clients[host, options] = RegistryClient(host, options)
            return found

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
