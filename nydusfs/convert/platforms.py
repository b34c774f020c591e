"""Platforms as image indexes name them: `os/architecture[/variant]`."""

from __future__ import annotations

import platform as host
import re
from dataclasses import dataclass
from typing import Any

from nydusfs.errors import ConvertError

_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm",
    "armel": "arm",
    "i386": "386",
}
_PART = re.compile(r"[A-Za-z0-9_.-]+")
# what an absent variant stands for
_DEFAULT_VARIANT = {"arm64": "v8", "arm": "v7"}


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Raises ConvertError. `amd64` alone means linux/amd64."""
        parts = text.strip().split("/")
        if len(parts) == 1:
            parts = ["linux", *parts]
        if len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
            raise ConvertError(f"platform {text!r} is not os/architecture[/variant], for example linux/amd64")
        system, architecture, variant = [*parts, ""][:3]
        architecture = _ARCHITECTURES.get(architecture.lower(), architecture.lower())
        return cls(system.lower(), architecture, variant)

    @classmethod
    def parse_list(cls, text: str) -> list[Platform]:
        return list(dict.fromkeys(cls.parse(part) for part in text.split(",") if part.strip()))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Platform:
        """From a descriptor's `platform` object or an image config."""
        return cls(*(str(fields.get(name) or "") for name in ("os", "architecture", "variant")))

    def matches(self, other: Platform) -> bool:
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        default = _DEFAULT_VARIANT.get(self.architecture, "")
        return (self.variant or default) == (other.variant or default)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def host_platform() -> Platform:
    return Platform("linux", _ARCHITECTURES.get(host.machine().lower(), host.machine().lower()))
