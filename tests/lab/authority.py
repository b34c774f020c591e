"""A certificate authority of the lab and what it signs."""

from __future__ import annotations

import ssl
from pathlib import Path

from tests.lab.process import run

_NEW = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


class Authority:
    """`certificate` is its own; `issue` makes (certificate, key) files for 127.0.0.1 or for a client."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.certificate, self._key = work / "ca.crt", work / "ca.pem"
        run([*_NEW, "-subj", "/CN=lab authority", "-keyout", self._key, "-out", self.certificate])

    def issue(self, name: str) -> tuple[Path, Path]:
        certificate, key = self.work / f"{name}.cert", self.work / f"{name}.key"
        run([
            *_NEW, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-addext",
            "basicConstraints=critical,CA:FALSE", "-CA", self.certificate, "-CAkey", self._key,
            "-keyout", key, "-out", certificate,
        ])  # fmt: skip
        return certificate, key

    def server_context(self, name: str = "server") -> ssl.SSLContext:
        certificate, key = self.issue(name)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context
