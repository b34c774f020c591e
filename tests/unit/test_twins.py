"""The look for a Nydus image beside a plain one, in registries that answer with something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from nydusfs.registry import mediatypes as mt
from nydusfs.registry.reference import Reference
from snapshotter.lazy.twins import TwinFinder

PLAIN, OTHER = ("sha256:" + digit * 64 for digit in "12")
BOOTSTRAP = {"digest": OTHER, "size": 1, "annotations": {mt.ANNOTATION_BOOTSTRAP: "true"}}
MARKED = {"digest": OTHER, "artifactType": mt.NYDUS_MANIFEST_ARTIFACT}


class Registries:
    """One document under every digest and tag."""

    def __init__(self, document: object) -> None:
        self._body = document if isinstance(document, bytes) else json.dumps(document).encode()

    @contextmanager
    def open(self, *_: object) -> Iterator[Any]:
        answer = SimpleNamespace(body=self._body, media_type=mt.OCI_MANIFEST)
        yield SimpleNamespace(referrers=lambda *_: [MARKED], manifest=lambda *_: answer)


def find(document: object, *, index: bool) -> bool:
    registries: Any = Registries(document)
    finder = TwinFinder(registries, index=index, referrers=not index)
    return finder.find(Reference.parse("r.example/a:b"), PLAIN, {}) is not None


def test_a_referrer_that_is_a_nydus_image_is_found() -> None:
    assert find({"subject": {"digest": PLAIN}, "layers": [BOOTSTRAP]}, index=False)


@pytest.mark.parametrize(
    "document",
    [{"subject": "x"}, {"subject": [1]}, {"subject": {"digest": PLAIN}, "layers": 5}, [1], b"<html>", b"[" * 100_000],
)
def test_a_referrer_of_another_form_is_none(document: object) -> None:
    """The pull goes on: the plain image is unpacked."""
    assert not find(document, index=False)


@pytest.mark.parametrize("document", [[1], {"manifests": 5}, {"manifests": [{"digest": PLAIN}, 7]}, b"<html>"])
def test_an_index_of_another_form_has_none(document: object) -> None:
    assert not find(document, index=True)
