"""Owners of an image's files as a user namespace has them: `id_mapping` of a configuration, as upstream's.

Ids from `inside` on, `length` of them, are shown as ids from `host` on; others as they are, which a user namespace
shows as nobody's. Two extended attributes hold ids too: ACLs, and file capabilities, which the kernel honours in a user
namespace only if they name its root (version 3 of the attribute; images have version 2).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from bootstrap.base import Attr

if TYPE_CHECKING:
    from nydusfs.drivers.volume import AttrLike

_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_CAPABILITY = b"security.capability"
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 2, 8
_CAPS_V2, _CAPS_V3, _CAPS_FLAGS = 0x02000000, 0x03000000, 0x00FFFFFF
_CAPS_V2_SIZE = 20


class IdMap(NamedTuple):
    inside: int
    host: int
    length: int

    @classmethod
    def of(cls, numbers: tuple[int, ...]) -> IdMap | None:
        """As a checked configuration has them; None for no numbers."""
        return cls(*numbers) if numbers else None

    def shown(self, owner: int) -> int:
        return owner - self.inside + self.host if self.inside <= owner < self.inside + self.length else owner

    def attr(self, attr: AttrLike) -> Attr:
        return Attr(
            attr.mode, self.shown(attr.uid), self.shown(attr.gid), attr.size, attr.nlink, attr.rdev, attr.mtime,
            attr.mtime_nsec, attr.blocks,
        )  # fmt: skip

    def xattrs(self, found: dict[bytes, bytes]) -> dict[bytes, bytes]:
        changed = {name: self._acl(found[name]) for name in _ACLS if name in found}
        if _CAPABILITY in found:
            changed[_CAPABILITY] = self._capability(found[_CAPABILITY])
        return {**found, **changed} if changed else found

    def _acl(self, value: bytes) -> bytes:
        if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size:
            return value  # not of the kernel's making: it will say so
        entries = [
            _ACL_ENTRY.pack(tag, rights, self.shown(owner) if tag in (_ACL_USER, _ACL_GROUP) else owner)
            for tag, rights, owner in _ACL_ENTRY.iter_unpack(value[4:])
        ]
        return value[:4] + b"".join(entries)

    def _capability(self, value: bytes) -> bytes:
        if len(value) != _CAPS_V2_SIZE or int.from_bytes(value[:4], "little") & ~_CAPS_FLAGS != _CAPS_V2:
            return value
        flags = int.from_bytes(value[:4], "little") & _CAPS_FLAGS
        return struct.pack("<I", _CAPS_V3 | flags) + value[4:] + struct.pack("<I", self.shown(0))
