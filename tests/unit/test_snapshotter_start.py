"""The snapshotter's socket is open soon after its start: what only some calls need is imported by them."""

from __future__ import annotations

import subprocess
import sys

# Measured: all of them took as long as everything else before the socket, and 10 MB
FOR_LATER = (
    "trio", "httpx", "numpy", "attr", "rich", "bootstrap.reader", "nydusfs.cache", "nydusfs.containerd.client",
    "http.server", "tarfile", "difflib", "logging.handlers",
)  # fmt: skip


def test_what_only_some_calls_need_is_not_imported_at_the_start() -> None:
    code = "import sys, snapshotter.cli, snapshotter.recovery; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert "snapshotter.service" in loaded
    assert not loaded & set(FOR_LATER)
