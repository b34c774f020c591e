"""Which key of a set of credentials is for an image: kubelet's rules for `matchImages` and for dockerconfigjson keys.

Per dot-separated part of the host a shell pattern, ports equal, the path a plain prefix; the longest key wins.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from nydusfs.registry.reference import DOCKER_HUB, DOCKER_HUB_HOSTS, Reference


def matches(pattern: str, reference: Reference) -> bool:
    """Whether a key or `matchImages` entry covers this image. Docker Hub's names are one."""
    host, path = split(pattern)
    if not host:
        return False
    name, port = _port(host)
    for candidate in DOCKER_HUB_HOSTS if reference.host == DOCKER_HUB else (reference.host,):
        other, other_port = _port(candidate)
        parts, wanted = name.split("."), other.split(".")
        if (
            port == other_port
            and len(parts) == len(wanted)
            and all(one == part or fnmatch.fnmatchcase(one, part) for part, one in zip(parts, wanted, strict=True))
        ):
            return f"/{reference.repository}".startswith(path)
    return False


def best_first(patterns: Iterable[str]) -> list[str]:
    """The order in which kubelet tries them."""
    return sorted(patterns, reverse=True)


def split(pattern: str) -> tuple[str, str]:
    """(host[:port], path with slash or ""): the `/v1/` and `/v2/` of docker's keys are none."""
    text = re.sub(r"^https?://", "", pattern.strip())
    host, slash, path = text.partition("/")
    path = re.sub(r"^(v1|v2)(/|$)", "", path).rstrip("/") if slash else ""
    return host, f"/{path}" if path else ""


def _port(host: str) -> tuple[str, str]:
    name, colon, port = host.rpartition(":")
    if colon and not host.endswith("]"):
        return name.lower(), port
    return host.lower(), ""
