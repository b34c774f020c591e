"""The experiment with a small image: every scenario is set up as it says, judged by what the registry was asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.lab.experiment import report, scenarios
from tests.lab.experiment.__main__ import main

absent = scenarios.missing(list(scenarios.SCENARIOS), upstream=False)
pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts"),
    pytest.mark.skipif(bool(absent), reason=f"interop: {', '.join(absent)} not here"),
]


@pytest.mark.timeout(300)
def test_every_scenario_is_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--quick", "--out", str(out)]) == 0
    found = {(result.side, result.scenario): result for result in report.load(out / "results.jsonl")}
    assert set(found) == {("oci", name) for name in scenarios.PLAIN} | {
        ("ours", name) for name in (*scenarios.ALONE, *scenarios.SHARED)
    }
    cold, seen = found["ours", "cold"], found["ours", "learned"]
    assert 0 < cold.data_bytes < found["oci", "oci"].bytes
    assert seen.data_bytes >= 0.95 * cold.data_bytes
    # of a busy machine's cold start more readers wait together, for fewer requests
    assert seen.data_requests <= cold.data_requests + 2
    assert found["ours", "dragonfly"].data_bytes >= 0.95 * cold.data_bytes
    # A peer has it: the registry is asked for manifests and metadata, and for what a busy machine's peer was late with.
    for name in ("remote", "local", "local-image", "cache"):
        assert found["ours", name].data_bytes < 0.5 * cold.data_bytes, name
    assert found["ours", "remote"].requests > 0 and found["oci", "overlayfs"].requests == 0
    figures = json.loads((out / "table.json").read_text())
    assert set(figures["200 Mbit/s, 20 ms"]["small"]) == {" ".join(key) for key in found}
    table = (out / "table.md").read_text()
    assert all(report.BARS[key] in table for key in found)
    # What was measured is not measured again.
    before = (out / "results.jsonl").read_text()
    assert main(["--quick", "--out", str(out)]) == 0
    assert (out / "results.jsonl").read_text() == before
