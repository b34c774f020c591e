"""The index of a chunk map: both ways to build it agree with a plain model, and contradictions are found by both."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap import chunkindex, reader_v5
from bootstrap.errors import FormatError
from bootstrap.layout.common import CHUNK_RECORD
from bootstrap.reader import open_bootstrap
from tests.lab.handmade import contents, make
from tests.lab.paths import reference_cases, shared_dir

Record = tuple[int, int, int, int]  # blob, offset, size, digest

RECORDS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12).map(lambda n: n * 4096), st.integers(1, 4096), st.integers(0, 3)),
    max_size=30,
)


def image_of(records: list[Record], blobs: int = 3) -> SimpleNamespace:
    """What the builder of an index looks at."""
    data = bytearray(b"x" * 8)
    for number, (blob, offset, size, digest) in enumerate(records):
        data += CHUNK_RECORD.pack(bytes([digest]) * 32, blob, 0, size, size, offset, offset, number, 0, 0)
    held = mmap.mmap(-1, len(data))
    held.write(data)
    places = range(1, 1 + 10 * len(records), 10)
    return SimpleNamespace(
        data=held, blobs=[SimpleNamespace(id=f"blob-{n}") for n in range(blobs)], record_places=lambda: places
    )


def build(image: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, vector: bool) -> tuple[bytes, int] | str:
    for name in ("VECTOR_ROWS", "LOADED_ROWS"):
        monkeypatch.setattr(chunkindex, name, 0 if vector else 1 << 30)
    try:
        return chunkindex._build(image)  # type: ignore[arg-type]
    except FormatError as error:
        return f"{error.structure} {error.message.split(' at ')[0]}"


def model(records: list[Record]) -> list[tuple[int, int]] | None:
    """Places of the chunks, None when they contradict each other."""
    known: dict[tuple[int, int], Record] = {}
    for record in records:
        if known.setdefault(record[:2], record) != record:
            return None
    ends: dict[int, int] = {}
    for blob, offset in sorted(known):
        if offset < ends.get(blob, 0):
            return None
        ends[blob] = offset + known[blob, offset][2]
    return sorted(known)


@given(records=RECORDS)
@settings(max_examples=300, deadline=None)
def test_both_builders_agree_with_a_model(records: list[Record]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        image = image_of(records)
        small, big = build(image, patch, False), build(image, patch, True)
        want = model(records)
        if want is None:
            assert isinstance(small, str) and isinstance(big, str)
            return
        assert not isinstance(small, str) and not isinstance(big, str)
        # Of equal records either may be taken: compare what they are, not where.
        assert small[1] == big[1] == len(want)
        for body, rows in (small, big):
            words = memoryview(body)
            starts = words[:32].cast("Q").tolist()
            offsets = words[32 : 32 + 8 * rows].cast("Q").tolist()
            places = words[32 + 8 * rows :].cast("I").tolist()
            assert starts == [sum(blob < n for blob, _ in want) for n in range(4)]
            assert offsets == [offset for _, offset in want]
            for place, (blob, offset) in zip(places, want, strict=True):
                record = CHUNK_RECORD.unpack_from(image.data, 8 * place)
                assert (record[1], record[6]) == (blob, offset)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([(0, 0, 10, 1), (3, 0, 10, 1)], "10 bytes"),
        ([(0, 1 << 44, 10, 1)], "10 bytes"),
        ([(0, 0, 0, 1)], "0 bytes"),
        ([(0, 0, (16 << 20) + 1, 1)], "16777217 bytes"),
        ([(0, 0, 10, 1), (0, 0, 10, 2)], "two different chunks"),
        ([(0, 0, 10, 1), (0, 9, 10, 1)], "chunks overlap"),
    ],
)
def test_contradictions(records: list[Record], message: str, vector: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(image_of(records), monkeypatch, vector) == f"chunk record {message}"


def test_places_of_v5_records_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = shared_dir()
    images = [make("v5-gzip", tmp_path, contents(200)).boot]
    if shared is not None:
        folder = shared / "fixtures" / "reference"
        images += [folder / case / "image.boot" for case in reference_cases() if case.startswith("v5-")]
    checked = 0
    for path in images:
        if not path.exists():
            continue
        with open_bootstrap(path) as image:
            one_by_one = list(image.record_places())
            monkeypatch.setattr(reader_v5, "_VECTOR_INODES", 0)
            assert list(image.record_places()) == one_by_one
            monkeypatch.undo()
            checked += len(one_by_one)
    assert checked > 200
