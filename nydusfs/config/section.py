"""Typed access to one table of a parsed document; remembers which keys were asked for and warns about the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nydusfs.errors import ConfigError
from nydusfs.redact import HIDDEN, public_url

log = logging.getLogger("nydusfs.config")

_said: set[str] = set()  # keys that were named as without effect: a configuration is read anew for each mount

_TYPE_NAMES = {dict: "table", list: "list", str: "string", bool: "boolean", int: "integer", float: "number"}
_SECRETS = {
    "auth", "registry_token", "access_key_id", "access_key_secret", "session_token", "encryption_key", "headers",
}  # fmt: skip


class Section:
    """A table at `path` of the document `where`. Every getter raises `ConfigError` when the value's type is wrong."""

    def __init__(self, value: Any, path: str, where: str) -> None:
        self.path = path
        self.where = where
        self._known: set[str] = set()
        if not isinstance(value, dict):
            raise self._wrong(path or "document", value, "table")
        self._values: Mapping[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def _key(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        found = _TYPE_NAMES.get(type(value), "null" if value is None else type(value).__name__)
        if key.rpartition(".")[2] in _SECRETS:
            shown = HIDDEN
        elif isinstance(value, str):
            shown = repr(public_url(value))
        else:
            shown = "" if isinstance(value, (dict, list)) else repr(value)  # which may hold anything
        return ConfigError(key, f"expected {expected}, found {found} {shown:.60}".rstrip(), self.where)

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(self._key(key), message, self.where)

    def take(self, key: str) -> Any:
        """The raw value, None when missing; a JSON null counts as missing, as serde's Option does."""
        self._known.add(key)
        return self._values.get(key)

    def text(self, key: str, default: str = "") -> str:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(self._key(key), value, "string")
        self._check_letters(key, value)
        return value

    def _check_letters(self, key: str, *values: str) -> None:
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for value in values for letter in value):
            raise self.error(key, "has a NUL or half a character (\\ud800 to \\udfff): no path or address can")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(self._key(key), value, "boolean (true or false)")
        return value

    def number(self, key: str, default: int, *, low: int = 0, high: int = 2**32 - 1) -> int:
        value = self.take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(self._key(key), value, "integer")
        if not low <= value <= high:
            raise self.error(key, f"{value} is outside {low}..{high}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(self._key(key), value, "list of strings")
        self._check_letters(key, *value)
        return tuple(value)

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self._wrong(self._key(key), value, "list of integers")
        return tuple(value)

    def text_map(self, key: str) -> dict[str, str]:
        value = self.take(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._wrong(self._key(key), value, "table of strings")
        return dict(value)

    def section(self, key: str) -> Section | None:
        value = self.take(key)
        return None if value is None else Section(value, self._key(key), self.where)

    def sections(self, key: str) -> list[Section]:
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(self._key(key), value, "list of tables")
        return [Section(item, f"{self._key(key)}[{number}]", self.where) for number, item in enumerate(value)]

    def raw_table(self, key: str) -> dict[str, Any]:
        value = self.take(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(self._key(key), value, "table")
        return dict(value)

    def values(self) -> dict[str, Any]:
        return dict(self._values)

    def known(self, *keys: str) -> None:
        """Names upstream knows in this place and that need no action here: no warning for them."""
        self._known.update(keys)

    def without_effect(self, key: str, why: str) -> bool:
        """A flag of upstream's that changes nothing here. If set, a process names it once, with the reason."""
        value, name = self.flag(key), self._key(key)
        if value and name not in _said:
            _said.add(name)
            log.warning("%s: %s has no effect: %s", self.where, name, why)
        return value

    def warn_unknown(self) -> None:
        for key in self._values:
            if key in self._known:
                continue
            import difflib

            near = difflib.get_close_matches(key, sorted(self._known), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            log.warning("%s: unknown key %s is ignored%s", self.where, self._key(key), hint)
