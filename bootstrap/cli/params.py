"""Types of values on command lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

__all__ = ["Number", "ParamType"]

if TYPE_CHECKING:
    from click import ParamType
else:

    class ParamType(click.ParamType):
        """click's, which older releases of click do not have as a generic."""

        def __class_getitem__(cls, _: object) -> type:
            return cls


class Number(ParamType[int]):
    """A number as upstream takes it: decimal or 0x..."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number (decimal, or hexadecimal with 0x)", param, ctx)
