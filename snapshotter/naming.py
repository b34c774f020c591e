"""Which image a meta layer is of: its labels say, or containerd does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from snapshotter.labels import chain_of, image_label, image_ref, namespace_of
from snapshotter.origins import Origins
from snapshotter.store import Snapshot, Store

log = logging.getLogger(__name__)


class Named(NamedTuple):
    """`labels`: of the layer, with the image that the client did not name. `why`: it is not known."""

    labels: Mapping[str, str]
    why: str
    sure: bool

    def image(self, snapshot: int) -> str:
        """Raises NotFound with the reason."""
        return image_ref(self.labels, str(snapshot), self.why)


def find_name(meta: Snapshot, store: Store, origins: Origins | None) -> Named:
    """What is sure is written down. The rest is asked for again: while a pull is under way, and after one that was
    ended, containerd knows the registry's host and not its port."""
    labels = meta.labels
    chain = chain_of(meta.key, labels)
    if image_label(labels) or origins is None or not chain:
        return Named(labels, "", True)
    origin, why = origins.find(chain, namespace_of(meta.key))
    if origin is None:
        return Named(labels, why, False)
    more = {key: value for key, value in origin.labels.items() if key not in labels}
    if origin.sure:
        log.info("snapshot %d is of image %s, as containerd says: the pull did not name it", meta.id, origin.image)
        store.update(meta.key, more, [f"labels.{key}" for key in more])
    return Named({**labels, **more}, "", origin.sure)
