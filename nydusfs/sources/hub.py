"""What all sources of one process share: connections, tokens and the health of mirrors.

Images of one registry are many; their connections and what was learnt about a mirror belong to the node.
"""

from __future__ import annotations

from nydusfs.config import ConnectionConfig, MirrorConfig
from nydusfs.http import HttpClient, Origin
from nydusfs.sources.auth import Authenticator
from nydusfs.sources.health import Health

# `timeout: 0` means no limit upstream. A reader must get its errno in bounded time, so ours is a minute.
NO_LIMIT = 60.0


def seconds(value: int) -> float:
    return float(value) if value else NO_LIMIT


class SourceHub:
    """Keyed by settings, so that two mounts with different credentials or roots share nothing they should not."""

    def __init__(self) -> None:
        self._clients: dict[tuple[tuple[str, ...], bool], HttpClient] = {}
        self._authenticators: dict[tuple[object, ...], Authenticator] = {}
        self._health: dict[tuple[object, ...], Health] = {}

    def client(self, connection: ConnectionConfig) -> HttpClient:
        key = (connection.ca_cert_files, connection.skip_verify)
        if key not in self._clients:
            self._clients[key] = HttpClient(connection.ca_cert_files, connection.skip_verify)
        return self._clients[key]

    def authenticator(
        self,
        connection: ConnectionConfig,
        registry: Origin,
        repo: str,
        auth: str,
        registry_token: str,
        through: Origin | None = None,
    ) -> Authenticator:
        key = (connection.ca_cert_files, connection.skip_verify, registry, repo, auth, registry_token, through)
        if key not in self._authenticators:
            self._authenticators[key] = Authenticator(
                self.client(connection),
                auth,
                registry_token,
                connect_timeout=seconds(connection.connect_timeout),
                timeout=seconds(connection.timeout),
                through=through,
            )
        return self._authenticators[key]

    def forget(self, authenticator: Authenticator) -> None:
        """Its credentials were replaced: whoever still uses it does, nobody new gets it."""
        self._authenticators = {key: one for key, one in self._authenticators.items() if one is not authenticator}

    def mirror_health(self, mirror: MirrorConfig) -> Health:
        key = (mirror.host, tuple(sorted(mirror.headers.items())), mirror.failure_limit, mirror.health_check_interval)
        if key not in self._health:
            self._health[key] = Health(mirror.failure_limit, float(mirror.health_check_interval))
        return self._health[key]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
