"""Ids of a user namespace and those of the machine: owners of files, and two extended attributes that hold ids too.

These are ACLs, and file capabilities, which the kernel honours in a user namespace only if they name its root (version
3 of the attribute; images have version 2, whose root is 0).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_CAPABILITY = b"security.capability"
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 2, 8
_CAPS_V2, _CAPS_V3, _CAPS_FLAGS = 0x02000000, 0x03000000, 0x00FFFFFF
_CAPS_V2_SIZE, _CAPS_V3_SIZE = 20, 24

Ids = Callable[[int], int]


class Range(NamedTuple):
    """Ids from `inside` on, `length` of them, are those from `host` on of the machine."""

    inside: int
    host: int
    length: int


class UserNamespace(NamedTuple):
    """Without ranges: that of the machine. Ids of the machine that are in none stay as they are."""

    users: tuple[Range, ...] = ()
    groups: tuple[Range, ...] = ()

    def user(self, host: int) -> int:
        return _inside(self.users, host)

    def group(self, host: int) -> int:
        return _inside(self.groups, host)


def _inside(ranges: tuple[Range, ...], host: int) -> int:
    for one in ranges:
        if one.host <= host < one.host + one.length:
            return host - one.host + one.inside
    return host


def renumbered(found: dict[bytes, bytes], user: Ids, group: Ids) -> dict[bytes, bytes]:
    """Extended attributes with the ids that `user` and `group` give for theirs."""
    changed = {name: _acl(found[name], user, group) for name in _ACLS if name in found}
    if _CAPABILITY in found:
        changed[_CAPABILITY] = _capability(found[_CAPABILITY], user)
    return {**found, **changed} if changed else found


def _acl(value: bytes, user: Ids, group: Ids) -> bytes:
    if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size:
        return value  # not of the kernel's making: it will say so
    ids = {_ACL_USER: user, _ACL_GROUP: group}
    entries = [
        _ACL_ENTRY.pack(tag, rights, ids[tag](owner) if tag in ids else owner)
        for tag, rights, owner in _ACL_ENTRY.iter_unpack(value[4:])
    ]
    return value[:4] + b"".join(entries)


def _capability(value: bytes, user: Ids) -> bytes:
    magic = int.from_bytes(value[:4], "little")
    form = magic & ~_CAPS_FLAGS, len(value)
    if form == (_CAPS_V2, _CAPS_V2_SIZE):
        root = user(0)
    elif form == (_CAPS_V3, _CAPS_V3_SIZE):
        root = user(int.from_bytes(value[_CAPS_V2_SIZE:], "little"))
    else:
        return value
    flags, rights = magic & _CAPS_FLAGS, value[4:_CAPS_V2_SIZE]
    if root == 0:
        return struct.pack("<I", _CAPS_V2 | flags) + rights
    return struct.pack("<I", _CAPS_V3 | flags) + rights + struct.pack("<I", root)
