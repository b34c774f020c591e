"""A place of images that must not be asked anything but what a test gives it."""

from __future__ import annotations

from typing import Any

from nydusfs.convert.endpoints import Endpoint


class Nowhere(Endpoint):
    name = image = "localhost:5000/app:oci"

    def _asked(self, *arguments: object, **options: object) -> Any:
        raise AssertionError("the place was asked")

    manifest = open_blob = open_blob_ranges = has_blob = blob_size = _asked
