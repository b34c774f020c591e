"""Whether a layer that containerd did not unpack is the one its image's config says: nobody else looks."""

from __future__ import annotations

from collections.abc import Mapping

from nydusfs.containerd.chain import chain_ids
from nydusfs.registry.reference import Reference
from snapshotter.errors import FailedPrecondition
from snapshotter.labels import DIFF_ID, LAYER_DIGEST, SNAPSHOT_REF


def check(image: Reference, labels: Mapping[str, str], below: str | None, diff_id: str) -> None:
    """`below`: chain id of the layers under it, "" for the lowest, None where nobody said; `diff_id`: of the tar here.

    Raises FailedPrecondition: every image of the node that has this chain id would get this one's files.
    """
    claimed = labels.get(SNAPSHOT_REF)
    wanted = claimed if below is None else chain_ids([below, diff_id] if below else [diff_id])[-1]
    if labels.get(DIFF_ID, diff_id) != diff_id or (claimed and claimed != wanted):
        raise FailedPrecondition(
            f"image {image}: layer {labels.get(LAYER_DIGEST)} unpacks to {diff_id}, which is not what the image's "
            f"config says of it (chain id {claimed}): not used, remove the image"
        )
