"""Credentials of docker's config.json: `auths`, `credHelpers`, `credsStore`.

Secrets stay in memory: they are never part of a repr, a log line or an error message.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nydusfs.registry.reference import DOCKER_HUB_HOSTS

log = logging.getLogger(__name__)

HELPER_TIMEOUT = 30.0
MAX_CONFIG = 4 << 20
_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Credentials:
    """User name and password; or an identity (refresh) token that a token server turns into access tokens; or an access
    token that is sent to the registry as it is."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """Value of an `Authorization: Basic` header behind the scheme."""
        return base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def docker_credentials(host: str) -> Credentials | None:
    """What docker's configuration says about this host[:port]; None if nothing. Unreadable files are a warning.

    Looks into $DOCKER_CONFIG (a folder), else ~/.docker. A helper named for the host comes first, then `credsStore`,
    then `auths`; docker.io, index.docker.io and registry-1.docker.io are one registry. Blocks up to HELPER_TIMEOUT.
    """
    path = config_path()
    config = _load(path)
    if config is None:
        return None
    keys = _aliases(host)
    helpers = config.get("credHelpers")
    if isinstance(helpers, dict):
        for key in keys:
            if isinstance(name := helpers.get(key), str) and name:
                return _ask_helper(name, keys)
    store = config.get("credsStore")
    if isinstance(store, str) and store and (found := _ask_helper(store, keys)):
        return found
    auths = config.get("auths")
    return _from_auths(auths, keys, path) if isinstance(auths, dict) else None


def config_path() -> Path:
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path(os.path.expanduser("~")) / ".docker") / "config.json"


def decode_auth(text: str) -> Credentials | None:
    """`auth` of config.json: base64 of `user:password` (a password may hold colons); None if it is not that."""
    try:
        user, colon, password = base64.b64decode(text, validate=False).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return Credentials(user, password.rstrip("\0")) if colon and user else None


def _load(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
        config = json.loads(data) if len(data) <= MAX_CONFIG else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): going on without registry credentials", path, error.strerror)
        return None
    except (ValueError, RecursionError):
        log.warning("%s is not JSON: going on without registry credentials", path)
        return None
    if not isinstance(config, dict):
        log.warning("%s is not a JSON object: going on without registry credentials", path)
        return None
    return config


def _aliases(host: str) -> list[str]:
    if host in DOCKER_HUB_HOSTS or host == _HUB_KEY:
        return [_HUB_KEY, *sorted(DOCKER_HUB_HOSTS)]
    return [host]


def _plain(key: str) -> str:
    """`https://host/v1/` and `host` mean the same; a path (`host/project`) is kept out: it is not the whole host."""
    key = re.sub(r"^https?://", "", key)
    return re.sub(r"/(v1|v2)?/?$", "", key)


def _from_auths(auths: dict[str, Any], keys: list[str], path: Path) -> Credentials | None:
    wanted = {_plain(key) for key in keys}
    for key in [*(key for key in keys if key in auths), *(key for key in auths if _plain(key) in wanted)]:
        entry = auths[key]
        if not isinstance(entry, dict):
            continue
        text = {name: value for name, value in entry.items() if isinstance(value, str)}
        if text.get("identitytoken"):
            return Credentials(text.get("username", ""), "", text["identitytoken"])
        if text.get("auth"):
            if found := decode_auth(text["auth"]):
                return found
            log.warning("%s: auths[%r].auth is not base64 of user:password: ignored", path, key)
        if text.get("username"):
            return Credentials(text["username"], text.get("password", ""))
    return None


def _ask_helper(name: str, keys: list[str]) -> Credentials | None:
    if not _HELPER_NAME.fullmatch(name):
        log.warning("credential helper name %r refused", name)
        return None
    program = f"docker-credential-{name}"
    for key in keys:
        try:
            done = subprocess.run(
                [program, "get"], input=key.encode(), capture_output=True, timeout=HELPER_TIMEOUT, check=False
            )
        except FileNotFoundError:
            log.warning("%s is not in PATH: going on without its credentials", program)
            return None
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("%s failed (%s): going on without its credentials", program, type(error).__name__)
            return None
        if done.returncode != 0:
            continue  # "credentials not found" is said this way
        try:
            reply = json.loads(done.stdout)
            user, secret = reply["Username"], reply["Secret"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s gave an answer that is no credential", program)
            continue
        if isinstance(user, str) and isinstance(secret, str):
            return Credentials("", "", secret) if user == "<token>" else Credentials(user, secret)
    return None
