"""Image references: `[host[:port]/]repository[:tag][@digest]`, read the way docker and containerd read them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nydusfs.errors import NydusError

DOCKER_HUB = "docker.io"
# Names people write for Docker Hub; requests go to the last one.
DOCKER_HUB_HOSTS = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})
DOCKER_HUB_ENDPOINT = "registry-1.docker.io"

_MAX_NAME = 255
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-f]{32,}")
SHA256_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ReferenceError(NydusError):
    """Not an image reference."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One image in one registry. `tag` is "" when only a digest was given; both may be given, the digest then wins."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ReferenceError. A bare name means docker.io/library/NAME:latest."""
        rest, _, digest = text.strip().partition("@")
        if "@" in text and not _DIGEST.fullmatch(digest):
            raise ReferenceError(f"image reference {text!r}: {digest!r} is not a digest (want sha256:<64 hex digits>)")
        if digest.startswith("sha256:") and not SHA256_DIGEST.fullmatch(digest):
            raise ReferenceError(f"image reference {text!r}: a sha256 digest has 64 hex digits")
        first, slash, remainder = rest.partition("/")
        # docker's rule: the first part is a host only if it could not be a repository component of Docker Hub
        if slash and (first == "localhost" or "." in first or ":" in first or first != first.lower()):
            host, path = first, remainder
        else:
            host, path = DOCKER_HUB, rest
        repository, colon, tag = path.partition(":")
        if not _HOST.fullmatch(host):
            raise ReferenceError(f"image reference {text!r}: {host!r} is not a registry host")
        if host in DOCKER_HUB_HOSTS:
            host = DOCKER_HUB
            if repository and "/" not in repository:
                repository = f"library/{repository}"
        if not _REPOSITORY.fullmatch(repository) or len(host) + len(repository) > _MAX_NAME:
            raise ReferenceError(
                f"image reference {text!r}: {repository!r} is not a repository name "
                "(lower case letters, digits, '.', '_', '-', '/')"
            )
        if colon and not _TAG.fullmatch(tag):
            raise ReferenceError(f"image reference {text!r}: {tag!r} is not a tag")
        if not tag and not digest:
            tag = "latest"
        return cls(host, repository, tag, digest)

    @property
    def endpoint(self) -> str:
        """Host (and port) that requests go to."""
        return DOCKER_HUB_ENDPOINT if self.host == DOCKER_HUB else self.host

    @property
    def hostname(self) -> str:
        """The host without its port, as containerd writes it into labels `containerd.io/distribution.source.HOST`."""
        if self.host.startswith("["):
            return self.host[1:].partition("]")[0]
        return self.host.partition(":")[0]

    @property
    def name(self) -> str:
        """Host and repository."""
        return f"{self.host}/{self.repository}"

    @property
    def selector(self) -> str:
        """What identifies the manifest within the repository: the digest, else the tag."""
        return self.digest or self.tag

    def with_tag(self, tag: str) -> Reference:
        """The same repository under another tag; raises ReferenceError if that is none."""
        if not _TAG.fullmatch(tag):
            raise ReferenceError(f"{tag!r} is not a tag")
        return replace(self, tag=tag, digest="")

    def with_digest(self, digest: str) -> Reference:
        return replace(self, tag="", digest=digest)

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def is_loopback(endpoint: str) -> bool:
    """Whether this host[:port] is the machine itself: plain HTTP is then the rule, as with docker and containerd."""
    host = endpoint.rsplit(":", 1)[0] if not endpoint.endswith("]") else endpoint
    host = host.strip("[]").lower()
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
