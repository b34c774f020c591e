"""A mirror such as a node's dfdaemon: plain HTTP, forwards to the registry named by a header, may keep what passed.

    python -m tests.lab.mirror --listen 127.0.0.1:65001 --registry http://127.0.0.1:5000 [--cache] [--fault KIND]

GET requests go to the registry of `X-Dragonfly-Registry` (else `--registry`) with path, Range and Authorization kept;
with `--cache` an answer to a blob range is kept in memory under (path, range). Faults, for tests: `wrong-bytes`,
`short`, `status-500`, `status-404`, `full-200` (ignores Range), `hang`.
"""

from __future__ import annotations

import argparse
import http.client
import http.server
import json
import signal
import sys
import threading
import urllib.parse
from pathlib import Path
from types import TracebackType

from tests.lab.process import Child, can_connect, free_port

FAULTS = ("none", "wrong-bytes", "short", "status-500", "status-404", "full-200", "hang")
_KEPT = ("range", "authorization", "accept", "accept-encoding", "user-agent")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 256 * 1024
    server: _Server

    def do_GET(self) -> None:
        server = self.server
        registry = self.headers.get("X-Dragonfly-Registry") or server.registry
        key = (registry + self.path, self.headers.get("Range") or "")
        hit = server.kept.get(key)
        if hit is None:
            try:
                hit = self._forward(registry)
            except OSError as error:
                hit = (502, {"content-type": "text/plain"}, str(error).encode())
            if server.keep and "/blobs/" in self.path and hit[0] in (200, 206):
                server.kept[key] = hit
        else:
            server.count("hits")
        server.count("requests")
        status, headers, body = hit
        fault = server.fault if "/blobs/" in self.path else "none"
        if fault == "hang":
            server.stopping.wait(60)
            self.close_connection = True
            return
        if fault.startswith("status-"):
            status, headers, body = int(fault[7:]), {}, b"no"
        elif fault == "wrong-bytes":
            body = bytes(byte ^ 0xA5 for byte in body)
        self.send_response(status)
        for name in ("content-type", "content-range", "docker-content-digest", "www-authenticate", "location"):
            if name in headers:
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "short":
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)
            server.count("bytes", len(body))

    do_HEAD = do_GET

    def _forward(self, registry: str) -> tuple[int, dict[str, str], bytes]:
        url = urllib.parse.urlsplit(registry)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        pool = self.server.idle
        try:
            link = pool.setdefault(registry, []).pop()
        except IndexError:
            link = kind(url.netloc, timeout=30)
        headers = {name: self.headers[name] for name in _KEPT if name in self.headers}
        headers.setdefault("Accept-Encoding", "identity")
        if self.server.fault == "full-200":
            headers.pop("range", None)
        for attempt in (0, 1):
            try:
                link.request(self.command, self.path, headers=headers)
                answer = link.getresponse()
                break
            except (http.client.HTTPException, OSError):
                link.close()  # a kept connection the other side had closed; once more on a new one
                if attempt:
                    raise
        body = answer.read()
        pool[registry].append(link)
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body

    def log_message(self, format: str, *args: object) -> None:
        if self.server.verbose:
            sys.stderr.write(f"{self.command} {self.path} {self.headers.get('Range', '-')} {format % args}\n")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, listen: tuple[str, int], registry: str, keep: bool, fault: str, stats: str, verbose: bool
    ) -> None:
        self.registry, self.keep, self.fault, self.stats, self.verbose = registry, keep, fault, stats, verbose
        self.kept: dict[tuple[str, str], tuple[int, dict[str, str], bytes]] = {}
        self.idle: dict[str, list[http.client.HTTPConnection]] = {}
        self.stopping = threading.Event()
        self.counts = {"requests": 0, "hits": 0, "bytes": 0}
        self.lock = threading.Lock()
        super().__init__(listen, _Handler)

    def count(self, name: str, by: int = 1) -> None:
        with self.lock:
            self.counts[name] += by

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away is no event here

    def save(self) -> None:
        if self.stats:
            Path(self.stats).write_text(json.dumps(self.counts))


class Mirror:
    """The mirror above as a process of its own, as a context manager."""

    def __init__(
        self, work: Path, registry: str, *, keep: bool = False, fault: str = "none", port: int | None = None
    ) -> None:
        self.work, self.registry, self.keep, self.fault = work, registry, keep, fault
        self.port = port or free_port()
        self.log = work / f"mirror-{self.port}.log"
        self._child: Child | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Mirror:
        argv = [
            sys.executable,
            "-m",
            "tests.lab.mirror",
            "--listen",
            f"127.0.0.1:{self.port}",
            "--registry",
            self.registry,
            "--fault",
            self.fault,
            "--verbose",
            # Its path also names the work directory on the command line, by which leftovers are found.
            "--stats",
            str(self.work / f"mirror-{self.port}.stats"),
            *(["--cache"] if self.keep else []),
        ]
        self._child = Child("mirror", argv, self.log, cwd=Path(__file__).resolve().parents[2])
        self._child.wait_ready(lambda: can_connect(("127.0.0.1", self.port)))
        return self

    def requests(self) -> list[str]:
        """Lines `GET /v2/… bytes=… "…" 206 -` of what it answered."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(("GET", "HEAD"))]

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> Mirror:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.mirror", description="A forwarding mirror of a registry."
    )
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--registry", required=True, metavar="URL", help="origin when no X-Dragonfly-Registry header comes"
    )
    parser.add_argument("--cache", action="store_true", help="answer repeated blob ranges from memory")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--stats", default="", metavar="FILE", help="write counters there at the end")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    server = _Server((host, int(port)), options.registry, options.cache, options.fault, options.stats, options.verbose)

    def stop(*_: object) -> None:
        server.stopping.set()
        threading.Thread(target=server.shutdown, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.serve_forever(poll_interval=0.1)
    server.save()


if __name__ == "__main__":
    main()
