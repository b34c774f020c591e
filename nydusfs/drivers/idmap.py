"""Owners of an image's files as a user namespace has them: `id_mapping` of a configuration, as upstream's.

Ids from `inside` on, `length` of them, are shown as ids from `host` on; others as they are, which a user namespace
shows as nobody's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bootstrap.base import Attr
from nydusfs.owners import renumbered

if TYPE_CHECKING:
    from nydusfs.drivers.volume import AttrLike


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
        return renumbered(found, self.shown, self.shown)
