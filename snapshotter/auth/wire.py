"""Protobuf messages read without their schema: the few fields that are needed of messages that pass through."""

from __future__ import annotations

Fields = dict[int, bytes | int]  # number -> the last value of that number


class WireError(ValueError):
    """Not a protobuf message, or a field of another type."""


def fields(data: bytes) -> Fields:
    """Top-level fields of a message. Raises WireError."""
    found: Fields = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            found[number], at = _varint(data, at)
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise WireError(f"field {number} has wire type {kind}")
        if at + size > len(data):
            raise WireError(f"field {number} ends behind the message")
        found[number] = data[at : at + size]
        at += size
    return found


def message(found: Fields, number: int) -> bytes:
    """A nested message, empty if it is not there."""
    value = found.get(number, b"")
    if isinstance(value, int):
        raise WireError(f"field {number} is a number")
    return value


def text(found: Fields, number: int) -> str:
    try:
        return message(found, number).decode()
    except UnicodeDecodeError:
        raise WireError(f"field {number} is not UTF-8") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise WireError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise WireError("a number is too long")
