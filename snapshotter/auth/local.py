"""Sources that need nobody else: labels, what a CRI client sent, docker's configuration, the template."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nydusfs.registry.credentials import Credentials, config_path, decode_auth, docker_credentials
from nydusfs.registry.reference import DOCKER_HUB_HOSTS
from snapshotter.auth.base import Answer, Question
from snapshotter.auth.vault import CRI, LABELS, Vault
from snapshotter.labels import PULL_SECRET, PULL_USER


def label_credentials(labels: Mapping[str, str]) -> Credentials | None:
    """Both labels or nothing."""
    user, secret = labels.get(PULL_USER), labels.get(PULL_SECRET)
    return Credentials(user, secret) if user and secret else None


class LabelSource:
    """Labels `pullusername` and `pullsecret` of a snapshot, from the request itself or from an earlier one."""

    name = "labels"

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def ask(self, question: Question) -> Answer:
        if found := label_credentials(question.labels):
            return Answer(f"labels {PULL_USER} and {PULL_SECRET} of the snapshot", found)
        return _kept(self._vault, LABELS, question, f"no labels {PULL_USER} and {PULL_SECRET} came with this image")


class CriSource:
    """AuthConfig of the PullImage calls that came through this program's CRI image service."""

    name = "cri"

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def ask(self, question: Question) -> Answer:
        return _kept(self._vault, CRI, question, "no PullImage with credentials for this repository came through")


def _kept(vault: Vault, kind: str, question: Question, nothing: str) -> Answer:
    found = vault.find(kind, question.reference)
    if found is None:
        return Answer(nothing)
    kept, exact = found
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(kept.time))
    where = "this image" if exact else f"the same repository ({kept.image})"
    return Answer(f"came with {where} at {when}", kept.credentials)


class DockerSource:
    """config.json of docker, read anew each time; its helpers and stores included."""

    name = "docker"

    def ask(self, question: Question) -> Answer:
        path = config_path()
        if not path.exists():
            return Answer(f"{path} does not exist (DOCKER_CONFIG names its folder)")
        found = docker_credentials(question.reference.host)
        if found is None:
            return Answer(f"{path} and its helpers have nothing for {question.reference.host}")
        return Answer(f"{path} for {question.reference.host}", found)


class StaticSource:
    """`auth` or `registry_token` of the template. With a `host` beside it, it is for that registry alone."""

    name = "static"

    def __init__(self, path: str, backend: Mapping[str, Any]) -> None:
        self._path = path
        self._auth = backend.get("auth") or ""
        self._token = backend.get("registry_token") or ""
        self._host = str(backend.get("host") or "")

    def ask(self, question: Question) -> Answer:
        where = f"device.backend.config of {self._path}"
        if not (self._auth or self._token):
            return Answer(f"{where} has neither auth nor registry_token")
        host = question.reference.host
        if self._host and self._host != host and not {self._host, host} <= DOCKER_HUB_HOSTS:
            return Answer(f"{where} has credentials for {self._host} alone")
        if self._auth:
            found = decode_auth(str(self._auth))
            return (
                Answer(f"auth in {where}", found)
                if found
                else Answer(f"auth in {where} is not base64 of user:password")
            )
        return Answer(f"registry_token in {where}", Credentials(registry_token=str(self._token)))
