"""The files people copy: the unit as systemd reads it, the snippets as containerd reads them, the scenario's JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.lab.paths import REPO, ref_bin, shared_dir
from tests.lab.process import run

UNIT = REPO / "systemd" / "containerd-nydus-grpc.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    # The only thing systemd cannot find here is the installed program.
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/containerd-nydus-grpc", sys.executable))
    done = run(["systemd-analyze", "verify", copy], timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_unit_is_the_scenarios() -> None:
    lines = {line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")}
    assert lines >= {
        "Before=containerd.service",
        "Type=simple",
        "Environment=HOME=/root",
        "ExecStart=/usr/local/bin/containerd-nydus-grpc --config-path /etc/nydus/config.json",
        "Restart=always",
        "RestartSec=1",
        "KillMode=process",
        "OOMScoreAdjust=-999",
        "StandardOutput=journal",
    }


def test_config_is_the_scenarios() -> None:
    text = (REPO / "examples" / "config.json").read_text()
    mirror = json.loads(text)["device"]["backend"]["config"]["mirrors"][0]
    assert mirror["host"] == "http://127.0.0.1:65001"
    if shared := shared_dir():
        assert text == (shared / "reference" / "scenario-config.json").read_text()


@pytest.mark.parametrize(("name", "newer"), [("config-1.6.toml", False), ("config-2.x.toml", True)])
def test_containerd_reads_the_snippet(name: str, newer: bool) -> None:
    containerd = ref_bin("containerd") if newer else shutil.which("containerd")
    if containerd is None:
        pytest.skip(f"interop: no containerd for {name} here")
    dumped = run([containerd, "-c", REPO / "examples" / "containerd" / name, "config", "dump"], timeout=30).stdout
    for wanted in ("disable_snapshot_annotations = false", "containerd-nydus-grpc.sock"):
        assert wanted in dumped
    assert "snapshotter = 'nydus'" in dumped or 'snapshotter = "nydus"' in dumped
