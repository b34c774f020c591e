"""A private docker-registry on loopback, and its access log as the measuring instrument."""

from __future__ import annotations

import re
import secrets
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.lab.process import Child, LabError, can_connect, free_port, wait_until

# "GET /v2/lab/py/blobs/sha256:… HTTP/1.1" 206 1048576
_ACCESS = re.compile(rb'"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[0-9.]+" (?P<status>\d{3}) (?P<bytes>\d+|-)')
PROBE = "/v2/?probe="


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the access log; `size` is the length of the answer's body in bytes."""

    method: str
    path: str
    status: int
    size: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a registry answered during a stretch of time."""

    requests: list[Request] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def bytes(self) -> int:
        return sum(request.size for request in self.requests)

    def blobs(self) -> Traffic:
        return Traffic([request for request in self.requests if "/blobs/" in request.path and request.method == "GET"])


def find_program() -> str | None:
    return shutil.which("docker-registry") or shutil.which("registry")


class Registry:
    """docker-registry (Debian's package of that name) with its storage in `work`.

    `token_realm` switches bearer authentication on: (realm URL, service, issuer, certificate bundle file). `tls`:
    (certificate, key, authority that clients' certificates must come from or None).
    """

    def __init__(
        self,
        work: Path,
        port: int | None = None,
        token_realm: tuple[str, str, str, Path] | None = None,
        tls: tuple[Path, Path, Path | None] | None = None,
    ) -> None:
        self.work, self.port, self.token_realm, self.tls = work, port or free_port(), token_realm, tls
        self.log = work / "registry.log"
        self._child: Child | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.host}"

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def start(self) -> Registry:
        program = find_program()
        if program is None:
            raise LabError("docker-registry is not installed: apt-get install docker-registry")
        self.work.mkdir(parents=True, exist_ok=True)
        config = self.work / "registry.yml"
        lines = [
            "version: 0.1",
            "log: {level: warn, accesslog: {disabled: false}}",
            f"storage: {{filesystem: {{rootdirectory: {self.work}/data}}, delete: {{enabled: true}}}}",
            f'http: {{addr: "{self.host}", secret: x{self._tls()}}}',
        ]
        if self.token_realm is not None:
            realm, service, issuer, bundle = self.token_realm
            lines += [
                "auth:",
                "  token:",
                f"    realm: {realm}",
                f"    service: {service}",
                f"    issuer: {issuer}",
                f"    rootcertbundle: {bundle}",
            ]
        config.write_text("\n".join(lines) + "\n")
        self._child = Child("docker-registry", [program, "serve", config], self.log)
        self._child.wait_ready(self._answers)
        return self

    def _tls(self) -> str:
        if self.tls is None:
            return ""
        certificate, key, clients = self.tls
        asked = f", clientcas: [{clients}]" if clients else ""
        return f", tls: {{certificate: {certificate}, key: {key}{asked}}}"

    def _answers(self) -> bool:
        if self.tls is not None:
            return can_connect(("127.0.0.1", self.port))
        try:
            with urllib.request.urlopen(f"{self.url}/v2/", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False

    def _written(self) -> None:
        """Returns when the log has what was answered before: lines come behind their answers (on a busy machine one in
        three was not there yet for who had the answer), and a slow disk keeps them longer. The line of a request from
        here comes behind those that are being written, and at second sight also behind those that were not yet."""
        if self.tls is not None or self._child is None or not self._child.alive():
            return
        for pause in (0.1, 0.0):
            path = f"{PROBE}{secrets.token_hex(8)}"
            try:
                urllib.request.urlopen(f"{self.url}{path}", timeout=20).close()
            except urllib.error.HTTPError:
                pass  # it wants a token
            except OSError:
                return
            wait_until(lambda path=path: path.encode() in self._end(), 20, "the registry's log")  # type: ignore[misc]
            time.sleep(pause)

    def _end(self) -> bytes:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - (64 << 10)))
            return log.read()

    def mark(self) -> int:
        """A place in the access log; give it to `since`."""
        self._written()
        return self.log.stat().st_size if self.log.exists() else 0

    def since(self, mark: int = 0) -> Traffic:
        """What was asked since `mark`, without the bare `/v2/` probes of readiness checks."""
        self._written()
        with self.log.open("rb") as log:
            log.seek(mark)
            text = log.read()
        requests = []
        for match in _ACCESS.finditer(text):
            if match["path"].startswith(PROBE.encode()):
                continue
            size = 0 if match["bytes"] == b"-" else int(match["bytes"])
            requests.append(Request(match["method"].decode(), match["path"].decode(), int(match["status"]), size))
        return Traffic(requests)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> Registry:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
