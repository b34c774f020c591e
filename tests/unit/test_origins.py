"""Which of the images in containerd's store a layer without labels is taken to be of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nydusfs.containerd.chain import chain_ids
from nydusfs.registry.reference import Reference
from snapshotter import origins
from snapshotter.labels import DATA_LAYER, IMAGE_REF, META_LAYER, PULL_SECRET, namespace_of, unpacked_chain

BLOB, META, MANIFEST, CONFIG = (f"sha256:{letter * 64}" for letter in "abcd")
CHAIN = chain_ids([BLOB, META])


class Store:
    """As much of containerd as is asked: one manifest with its config, image records by target."""

    def __init__(self, sources: dict[str, str], names: dict[str, list[str]], diff_ids: tuple[str, str]) -> None:
        layers = [
            {"digest": BLOB, "annotations": {DATA_LAYER: "true", PULL_SECRET: "x"}},
            {"digest": "sha256:" + "e" * 64, "annotations": {META_LAYER: "true"}},
        ]
        self.content = {MANIFEST: {"layers": layers}, CONFIG: {"rootfs": {"diff_ids": list(diff_ids)}}}
        labels = {"containerd.io/gc.ref.content.config": CONFIG}
        labels |= {f"containerd.io/distribution.source.{host}": value for host, value in sources.items()}
        self.info = SimpleNamespace(digest=MANIFEST, labels=labels, updated_at=SimpleNamespace(seconds=1, nanos=0))
        self.names, self.namespace = names, "default"

    def stub(self, factory: Any) -> Any:
        return SimpleNamespace(List="list")

    def stream(self, what: str, call: Any, request: Any, timeout: float) -> Iterator[Any]:
        manifests = any("gc.ref.content.config" in one for one in request.filters)
        yield SimpleNamespace(info=[self.info] if manifests else [])

    def read_content(self, digest: str, limit: int) -> bytes:
        return json.dumps(self.content[digest]).encode()

    def image_names(self, digest: str = "") -> list[str]:
        return self.names.get(digest or MANIFEST, [])

    def namespaces(self) -> list[str]:
        return ["default"]

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("sources", "names", "wanted", "sure"),
    [
        # labels know no ports; a tag that was only given here is not in the registry of its name
        (
            {"r.example": "a/b"}, ["else.example/x:1", "r.example:5/a/b:v1", "sha256:" + "d" * 64],
            "r.example:5/a/b:v1", True,
        ),
        ({"r.example": "z,a/b"}, [f"r.example/a/b@{MANIFEST}", "r.example/a/b:v1"], "r.example/a/b:v1", True),
        ({"docker.io": "library/x"}, [], f"docker.io/library/x@{MANIFEST}", False),
        ({"r.example": "a/b"}, ["r.example:5/else:1"], f"r.example:5/a/b@{MANIFEST}", False),
        ({}, ["r.example/a/b:v1"], "r.example/a/b:v1", True),
        ({}, ["sha256:" + "d" * 64], None, False),
    ],
)  # fmt: skip
def test_the_name_it_was_pulled_by(
    monkeypatch: pytest.MonkeyPatch, sources: dict[str, str], names: list[str], wanted: str | None, sure: bool
) -> None:
    store = Store(sources, {MANIFEST: names}, (BLOB, META))
    monkeypatch.setattr("nydusfs.containerd.client.Containerd", lambda *_: store)
    found = origins.Origins(origins.Path("/g.sock"), origins.Path("/c.sock"))
    monkeypatch.setattr(found, "_addresses", lambda: ["/c.sock"])
    origin, why = found.find(CHAIN[1])
    if wanted is None:
        assert origin is None
        assert why == "containerd at /c.sock has no image with this layer"
        return
    assert origin is not None
    assert (origin.image, origin.labels[IMAGE_REF], META_LAYER in origin.labels) == (wanted, wanted, True)
    assert origin.sure is sure
    assert Reference.parse(origin.image)
    lowest, _ = found.find(CHAIN[0])
    assert lowest is not None
    assert DATA_LAYER in lowest.labels
    assert PULL_SECRET not in lowest.labels


def test_an_image_that_claims_anothers_chain_ids_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "sha256:" + "f" * 64
    store = Store({"evil.example": "x"}, {MANIFEST: ["evil.example/x:1"]}, (other, META))
    monkeypatch.setattr("nydusfs.containerd.client.Containerd", lambda *_: store)
    found = origins.Origins(origins.Path("/g.sock"), origins.Path("/c.sock"))
    monkeypatch.setattr(found, "_addresses", lambda: ["/c.sock"])
    assert found.find(chain_ids([other, META])[1])[0] is None


def test_keys() -> None:
    key = f"k8s.io/12/extract-123-aB_- {CHAIN[1]}"
    assert (namespace_of(key), unpacked_chain(key)) == ("k8s.io", CHAIN[1])
    assert unpacked_chain(f"extract-1-x {CHAIN[0]}") == CHAIN[0]
    for other in ("k8s.io/3/db043b", "my-extract-1-x", f"extract-1-x {CHAIN[0]}x"):
        assert unpacked_chain(other) == ""
    assert namespace_of("a/b/c") == ""
