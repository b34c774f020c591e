"""Kubelet's credential provider plugins: its CredentialProviderConfig, its exec protocol, its caching."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nydusfs.registry.credentials import Credentials
from snapshotter.auth import durations
from snapshotter.auth.base import Answer, Question
from snapshotter.auth.documents import load
from snapshotter.auth.patterns import best_first, matches
from snapshotter.errors import SettingsError

log = logging.getLogger(__name__)

EXEC_SECONDS = 60.0
MAX_REPLY = 1 << 20
CONFIG_VERSIONS = ("kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1")
PLUGIN_VERSIONS = tuple(f"credentialprovider.kubelet.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))
RENEW_SHARE = 0.9  # of the time a plugin gives: asked for again then, while the old ones still work


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of `providers`."""

    name: str
    images: tuple[str, ...]
    cache_seconds: float
    api_version: str
    program: Path
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = field(repr=False)
    needs_token: bool


@dataclass(frozen=True, slots=True)
class _Reply:
    auth: Mapping[str, Credentials]
    key: tuple[str, str]
    renew_at: float  # monotonic
    ends_at: float
    expires: float  # seconds since the epoch: renew_at by the other clock


class PluginError(Exception):
    """A plugin did not do what the protocol says. The text holds nothing that it printed to standard output."""


class KubeletSource:
    """Asks the plugins whose `matchImages` cover an image, in the order of the file."""

    name = "kubelet"

    def __init__(self, config: Path, bin_dir: Path) -> None:
        """Raises SettingsError."""
        self._config = config
        self._providers = read_config(config, bin_dir)
        self._lock = threading.Lock()
        self._replies: dict[tuple[str, str, str], _Reply] = {}
        self._busy: dict[tuple[str, str], threading.Lock] = {}

    def ask(self, question: Question) -> Answer:
        image = question.image
        fitting = [one for one in self._providers if any(matches(rule, question.reference) for rule in one.images)]
        if not fitting:
            return Answer(f"matchImages of no provider in {self._config} covers this image")
        said, failed = [], False
        for provider in fitting:
            if provider.needs_token:
                said.append(f"{provider.name} wants a pod's service account token, which only kubelet has")
                continue
            try:
                reply = self._reply(provider, question)
            except PluginError as error:
                log.warning("credential provider %s, image %s: %s", provider.name, image, error)
                said.append(f"{provider.name}: {error}")
                failed = True
                continue
            for pattern in best_first(reply.auth):
                if matches(pattern, question.reference):
                    now = time.monotonic()
                    expires = reply.expires if reply.ends_at > now else None
                    old = reply.renew_at <= now < reply.ends_at  # the plugin had nothing new
                    return Answer(f"plugin {provider.name} for {pattern}", reply.auth[pattern], expires, old)
            said.append(f"{provider.name} answered with nothing for this image")
        return Answer("; ".join(said), failed=failed)

    def _reply(self, provider: Provider, question: Question) -> _Reply:
        """Raises PluginError. One process per provider and image at a time, the others take what it brought."""
        reference = question.reference
        keys = [("Image", question.image), ("Registry", reference.host), ("Global", "")]
        with self._lock:
            busy = self._busy.setdefault((provider.name, question.image), threading.Lock())
        with busy:
            old = None
            with self._lock:
                for key in keys:
                    reply = self._replies.get((provider.name, *key))
                    if reply is not None and time.monotonic() < reply.ends_at:
                        old = old or reply
                        if time.monotonic() < reply.renew_at:
                            return reply
            try:
                reply = run(provider, question)
            except PluginError:
                if old is None:
                    raise
                log.warning("credential provider %s fails: going on with what it gave before", provider.name)
                return old
            if reply.ends_at > time.monotonic():
                with self._lock:
                    self._replies[(provider.name, *reply.key)] = reply
                    self._replies = {k: r for k, r in self._replies.items() if r.ends_at > time.monotonic()}
            return reply


def read_config(path: Path, bin_dir: Path) -> list[Provider]:
    """Providers of a CredentialProviderConfig file (YAML or JSON). Raises SettingsError naming the file and the key."""
    what = "credential_provider_config"
    document = load(path, what)
    if document.get("kind") != "CredentialProviderConfig" or document.get("apiVersion") not in CONFIG_VERSIONS:
        raise SettingsError(
            f"{what} {path}: is {document.get('apiVersion')}, {document.get('kind')}: "
            f"expected CredentialProviderConfig of {', '.join(CONFIG_VERSIONS)}"
        )
    entries = document.get("providers")
    if not isinstance(entries, list) or not entries:
        raise SettingsError(f"{what} {path}: providers: expected a list with entries")
    providers = [_provider(entry, f"{what} {path}: providers[{at}]", bin_dir) for at, entry in enumerate(entries)]
    names = [provider.name for provider in providers]
    if len(set(names)) != len(names):
        raise SettingsError(f"{what} {path}: providers: a name is there twice")
    return providers


def _provider(entry: Any, where: str, bin_dir: Path) -> Provider:
    if not isinstance(entry, dict):
        raise SettingsError(f"{where}: expected a mapping")
    name = entry.get("name")
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or " " in name:
        raise SettingsError(f"{where}.name: {name!r} is not the name of a program in {bin_dir}")
    version = entry.get("apiVersion")
    if version not in PLUGIN_VERSIONS:
        raise SettingsError(f"{where}.apiVersion: {version!r}: use one of {', '.join(PLUGIN_VERSIONS)}")
    images = entry.get("matchImages")
    if not isinstance(images, list) or not images or not all(isinstance(one, str) and one for one in images):
        raise SettingsError(f"{where}.matchImages: expected a list of patterns")
    try:
        cache = durations.seconds(str(entry["defaultCacheDuration"]))
    except KeyError:
        raise SettingsError(f"{where}.defaultCacheDuration is missing") from None
    except ValueError as error:
        raise SettingsError(f"{where}.defaultCacheDuration: {error}") from None
    args, env = entry.get("args") or [], entry.get("env") or []
    if not isinstance(args, list) or not isinstance(env, list) or not all(isinstance(one, dict) for one in env):
        raise SettingsError(f"{where}: args and env: expected lists")
    program = bin_dir / name
    if not os.access(program, os.X_OK):
        log.warning("credential provider %s: %s is not there or not executable", name, program)
    return Provider(
        name=name,
        images=tuple(images),
        cache_seconds=cache,
        api_version=version,
        program=program,
        args=tuple(map(str, args)),
        env=tuple((str(one.get("name", "")), str(one.get("value", ""))) for one in env),
        needs_token=bool(entry.get("tokenAttributes")),
    )


def run(provider: Provider, question: Question) -> _Reply:
    """One exchange. Raises PluginError."""
    request = {"kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": question.image}
    started = time.monotonic(), time.time()
    try:
        done = subprocess.run(
            [provider.program, *provider.args],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=EXEC_SECONDS,
            env={**os.environ, **dict(provider.env)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PluginError(f"no answer within {EXEC_SECONDS:.0f} s") from None
    except OSError as error:
        raise PluginError(f"{provider.program} cannot be run: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise PluginError(f"exit status {done.returncode}: {said[-1][:200] if said else 'it said nothing'}")
    try:
        reply = json.loads(done.stdout[:MAX_REPLY])
        kind, version, key_kind = reply["kind"], reply["apiVersion"], reply["cacheKeyType"]
        entries = reply.get("auth") or {}
        auth = {str(key): Credentials(str(one["username"]), str(one["password"])) for key, one in entries.items()}
        given = reply.get("cacheDuration")
        life = provider.cache_seconds if given is None else durations.seconds(str(given))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise PluginError("its answer is not a CredentialProviderResponse") from None
    if kind != "CredentialProviderResponse" or version != provider.api_version:
        raise PluginError(f"it answers in {version!r}, asked was {provider.api_version}")
    key = {"Image": question.image, "Registry": question.reference.host, "Global": ""}.get(key_kind)
    if key is None:
        raise PluginError(f"cacheKeyType {key_kind!r} is none of Image, Registry, Global")
    return _Reply(
        auth, (key_kind, key), started[0] + life * RENEW_SHARE, started[0] + life, started[1] + life * RENEW_SHARE
    )
