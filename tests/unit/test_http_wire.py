"""HTTP messages from a peer that may send anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.http import ProtocolViolation, parse_url
from nydusfs.http.wire import (
    find_head_end,
    format_request,
    parse_chunk_size,
    parse_content_range,
    parse_head,
)


@given(st.binary(max_size=400))
def test_garbage_gives_a_head_or_a_violation(raw: bytes) -> None:
    for data in (raw, b"HTTP/1.1 206 X\r\n" + raw):
        try:
            end = find_head_end(data)
            head = parse_head(data[:end] if end > 0 else data)
            _ = (head.length, head.chunked, head.keep_alive, parse_content_range(head.get("content-range")))
        except ProtocolViolation:
            continue
        assert 100 <= head.status <= 999
        assert all(name == name.lower() for name in head.headers)


@given(
    st.integers(200, 599),
    st.dictionaries(
        st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True),
        st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30),
        max_size=8,
    ),
)
def test_what_a_server_means_is_read(status: int, headers: dict[str, str]) -> None:
    lines = "".join(f"{name}:  {value} \r\n" for name, value in headers.items())
    raw = f"HTTP/1.1 {status} Some Reason\r\n{lines}\r\n".encode() + b"BODY"
    end = find_head_end(raw)
    assert raw[end:] == b"BODY"
    head = parse_head(raw[:end])
    assert head.status == status
    for name, value in headers.items():
        assert value in head.get(name.lower())


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x10\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Bad Name: x\r\n",
        ": nothing\r\n",
        "No colon here\r\n",
        "X: a\0b\r\n",
        "X: y\r\n" * 300,
    ],
)
def test_dangerous_heads_are_refused(lines: str) -> None:
    with pytest.raises(ProtocolViolation):
        head = parse_head(f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode())
        _ = (head.length, head.chunked)


def test_heads_without_end_are_refused() -> None:
    assert find_head_end(b"HTTP/1.1 200 OK\r\nX: y\r\n") == -1
    with pytest.raises(ProtocolViolation):
        find_head_end(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes 0-99/100", (0, 99)),
        ("bytes 65536-131071/131072", (65536, 131071)),  # Dragonfly classic invents this total
        ("Bytes 5-5/*", (5, 5)),
        ("bytes 9-5/100", None),
        ("bytes */100", None),
        ("items 0-1/2", None),
        ("", None),
    ],
)
def test_content_range(text: str, expected: tuple[int, int] | None) -> None:
    assert parse_content_range(text) == expected


def test_chunk_sizes() -> None:
    assert parse_chunk_size(b"1aF;name=value") == 0x1AF
    for bad in (b"", b"-1", b"g", b"0x10", b"1" * 16, b" "):
        with pytest.raises(ProtocolViolation):
            parse_chunk_size(bad)


@given(st.text(max_size=60))
def test_no_url_breaks_out_of_the_request_line(text: str) -> None:
    for candidate in (text, f"http://host/{text}", f"http://host/?{text}", f"http://{text}/"):
        try:
            url = parse_url(candidate)
        except ProtocolViolation:
            continue
        request = format_request("GET", url.target, url.origin.netloc, [("Range", "bytes=0-1")])
        lines = request.decode("latin-1").split("\r\n")
        assert len(lines) == 5
        assert lines[0].count(" ") == 2
        assert not any(char in request for char in (b"\n\n", b"\0"))


def test_urls() -> None:
    url = parse_url("HTTPS://Example.COM:443/a%2Fb?x=y&sig=%2B")
    assert (str(url.origin), url.target) == ("https://example.com", "/a%2Fb?x=y&sig=%2B")
    assert parse_url("http://[::1]:5000").origin.netloc == "[::1]:5000"
    assert str(parse_url("http://h/p?secret=1")) == "http://h/p"  # what gets logged
