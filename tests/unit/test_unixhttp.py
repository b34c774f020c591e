"""Requests to nydusd's socket."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from nydusfs.unixhttp import UnixConnection


def test_a_request_arrives_in_one_piece(tmp_path: Path) -> None:
    """nydusd 2.4.4 answers with an error to a head whose body comes later."""
    pieces: list[bytes] = []

    def serve() -> None:
        for _ in range(2):
            pieces.append(client.recv(65536))
            client.sendall(b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(10)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        connection = UnixConnection(tmp_path / "s", 10)
        connection.connect()
        client, _ = listener.accept()
        with client:
            thread = threading.Thread(target=serve)
            thread.start()
            for body in ("first", "second"):
                connection.request("POST", "/x", body=body)
                assert connection.getresponse().read() == b"ok"
            thread.join(10)
        connection.close()
    assert [piece.partition(b"\r\n\r\n")[2] for piece in pieces] == [b"first", b"second"]
