"""Flags that the commands share, and the small languages of their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bootstrap.cli.params import ParamType

if TYPE_CHECKING:
    from nydusfs.registry.hosts import ClientOptions

F = TypeVar("F", bound=Callable[..., Any])

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(?:([kmgt])(i?)b?|b|)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
# each shared by several flags, as upstream has it
_SHARED_NAMES = ("backend-type", "backend-config", "backend-config-file")


def flag(*names: str, env: str | list[str] | None = "", **attributes: Any) -> Callable[[F], F]:
    """A click option with upstream's environment variable: the flag's name in capitals ("": derive it; None: none)."""
    first = names[0].lstrip("-")
    if env == "":
        shared = next((name for name in _SHARED_NAMES if first.endswith(name)), first)
        env = shared.replace("-", "_").upper()
    attributes.setdefault("show_default", "default" in attributes and not attributes.get("is_flag"))
    return click.option(*names, envvar=env, show_envvar=env is not None, **attributes)


def backend_flags(prefix: str, what: str, default: str | None = None) -> Callable[[F], F]:
    """--{prefix}backend-type, -config and -config-file; `what` lies there. See `backends.chosen_backend`."""

    def add(command: F) -> F:
        name = f"--{prefix}backend-"
        command = flag(f"{name}config-file", type=click.Path(dir_okay=False), help="File with that configuration.")(
            command
        )
        command = flag(f"{name}config", help="Its configuration: JSON, as nydusd has it.")(command)
        extra = {"default": default} if default else {}
        return flag(f"{name}type", help=f"Where {what}: oss, s3 or localfs.", **extra)(command)

    return add


class Size(ParamType[int]):
    """Bytes from text such as 0MB, 16MiB, 500k or 4096: units with an i are powers of 1024, others of 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip().lower().replace(",", ""))
        if match is None:
            self.fail(f"{value!r} is not a size such as 16MiB or 16MB", param, ctx)
        number, unit, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** ("bkmgt".index(unit or "b")))


class CommaList(ParamType[list[str]]):
    """Items with commas between them; with `multiple` a flag may also be repeated. See `flattened`."""

    name = "list"
    envvar_list_splitter = "\0"  # one value in an environment variable: it is split here

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return value if isinstance(value, list) else [part.strip() for part in value.split(",") if part.strip()]


def flattened(values: Iterable[list[str]]) -> list[str]:
    return [item for value in values for item in value]


class Duration(ParamType[float]):
    """Seconds from text such as 5s, 1m30s, 500ms."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = _DURATION.findall(value)
        if value == "0":
            return 0.0
        if not parts or "".join(number + unit for number, unit in parts) != value:
            self.fail(f"{value!r} is not a duration such as 5s, 1m30s or 500ms", param, ctx)
        return float(sum(float(number) * _UNITS[unit] for number, unit in parts))


def client_options(given: Mapping[str, Any], insecure: bool) -> ClientOptions:
    """How to reach a registry, from the flags --plain-http and --hosts-dir and the command's --*-insecure."""
    from nydusfs.registry.hosts import ClientOptions

    return ClientOptions(
        insecure=insecure, plain_http=bool(given.get("plain_http")), hosts_dir=given.get("hosts_dir") or ""
    )
