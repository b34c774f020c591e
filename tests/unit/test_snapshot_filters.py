"""containerd's filter language, on the filters its clients send and on the corners of the grammar."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidArgument
from snapshotter.filters import parse

INFO = {
    ("name",): "default/12/sha256:abc",
    ("parent",): "",
    ("kind",): "active",
    ("labels", "containerd.io/snapshot.ref"): "sha256:abc",
    ("labels", "l"): "1",
    ("labels", "a.b"): 'say "hi"',
}


def adaptor(path: Sequence[str]) -> tuple[str, bool]:
    where = (path[0], ".".join(path[1:])) if path[0] == "labels" else tuple(path)
    return (INFO[where], True) if where in INFO else ("", False)


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        ([], True),
        ([""], True),
        (["name==nothing", ""], True),
        (['labels."containerd.io/snapshot.ref"==sha256:abc,parent==""'], True),
        (['labels."containerd.io/snapshot.ref"==sha256:abd,parent==""'], False),
        (["kind==view", "kind==active"], True),
        (["kind==active,labels.l==2"], False),
        (["labels.l"], True),
        (["labels.m"], False),
        (["labels.m!=1"], True),
        (["labels.l!=1"], False),
        (['parent!=""'], False),
        (["nosuchfield"], False),
        (["labels.a.b"], True),
        (['labels.a.b=="say \\"hi\\""'], True),
        (["labels.a.b~=/hi.$/"], True),
        (["name~=|12/sha|"], True),
        (["name~=^default"], True),
        (['name~="("'], False),
        (['name=="default\\x2f12/sha256:\\u0061bc"'], True),
        (["name==default/12/sha256:abc"], True),
    ],
)
def test_filters(filters: list[str], matches: bool) -> None:
    assert parse(filters)(adaptor) is matches


@pytest.mark.parametrize(
    "text",
    [
        "==x",
        "name==",
        "name=x",
        "name==,",
        "name==x,",
        "a b",
        'name=="x',
        "name~=/x",
        ".name",
        "name.",
        "name==/x",
        '"\\q"',
    ],
)
def test_bad_filters_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="at position"):
        parse([text])


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse([text])(adaptor)
    except InvalidArgument:
        pass
