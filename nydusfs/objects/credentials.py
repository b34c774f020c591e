"""Whose keys sign: the configuration's, a credentials file's, or the environment's. Read anew when a file changes."""

from __future__ import annotations

import configparser
import logging
import os
import time
from collections.abc import Sequence

from nydusfs.config import ObjectBackend
from nydusfs.config.backends import bad_header
from nydusfs.errors import ObjectStoreError, os_reason
from nydusfs.objects.signing import ObjectKeys

log = logging.getLogger("nydusfs.objects")

_LOOK = 1.0  # seconds between looks at a credentials file
_ENVIRONMENT = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "oss": ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"),
}
_FILE = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


class CredentialChain:
    """`keys()` gives those to sign with now, None for unsigned requests (public buckets)."""

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend = backend
        self._stamp: tuple[int, int, int] | None = None
        self._looked = float("-inf")
        self._from_file: ObjectKeys | None = None

    def keys(self) -> ObjectKeys | None:
        """Raises `ObjectStoreError` for a credentials file that never could be used."""
        backend = self._backend
        if backend.access_key_id:
            return ObjectKeys(backend.access_key_id, backend.access_key_secret, backend.session_token)
        if backend.credentials_file:
            self._look()
            return self._from_file
        names = _ENVIRONMENT[backend.type]
        found = [os.environ.get(name, "") for name in names]
        return _keys("the environment", names, found) if found[0] and found[1] else None

    def others_than(self, refused: ObjectKeys | None) -> bool:
        """Look at the file at once: whether there are other keys now than those that were refused."""
        self._looked = float("-inf")
        return self.keys() != refused

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK and self._from_file is not None:
            return
        self._looked = now
        path = self._backend.credentials_file
        try:
            state = os.stat(path)
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            if stamp == self._stamp:
                return
            with open(path, encoding="utf-8") as file:
                self._from_file = parse_credentials(file.read(1 << 20), path)
            self._stamp = stamp
        except (OSError, UnicodeDecodeError, ObjectStoreError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else str(error)
            if self._from_file is None:
                raise ObjectStoreError(f"credentials_file {path}: {reason}") from None
            log.warning("credentials_file %s: %s; going on with the keys it held before", path, reason)


def _keys(where: str, names: Sequence[str], values: Sequence[str]) -> ObjectKeys:
    """Raises `ObjectStoreError` for what no header can carry."""
    for name, value in zip(names, values, strict=True):
        if reason := bad_header("x", value):
            raise ObjectStoreError(f"{where}: {name} {reason}")
    return ObjectKeys(*values)


def parse_credentials(text: str, where: str, profile: str = "default") -> ObjectKeys:
    """AWS's shared credentials file. Raises `ObjectStoreError` that shows no value."""
    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        parser.read_string(text)
        section = parser[profile]
        values = [section[_FILE[0]], section[_FILE[1]], section.get(_FILE[2], "")]
    except configparser.Error:
        raise ObjectStoreError(f"{where} is not in the form of an AWS credentials file") from None
    except KeyError as error:
        raise ObjectStoreError(f"{where} has no {error.args[0]} for profile {profile}") from None
    return _keys(where, _FILE, [value.strip() for value in values])
