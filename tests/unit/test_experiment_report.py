"""Rows of the experiment that were measured at different times make one table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.experiment import report
from tests.lab.experiment.__main__ import main
from tests.lab.experiment.scenarios import LINKS, Result

LINK = LINKS["slow"].name
PLAIN = Result("node", LINK, "oci", "oci", 0, 90.0, 383_000_000, 9, 0, 0, 6.0, "2026-01-01 10:00", "aaaa")
COLD = replace(PLAIN, side="ours", scenario="cold", seconds=6.0, bytes=20_000_000, requests=45, load=0.5)


def kept(path: Path, *results: Result) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(result.as_json()) + "\n" for result in results))
    return path


def test_rows_of_several_runs_are_merged_and_the_last_of_each_start_counts(tmp_path: Path) -> None:
    again = replace(COLD, seconds=5.0, when="2026-01-02 08:30", commit="bbbb")
    others = [replace(again, repeat=1, seconds=4.0), replace(again, repeat=2, seconds=4.5)]
    out = kept(tmp_path / "out" / "results.jsonl", PLAIN, again, *others).parent
    old = kept(tmp_path / "old.jsonl", COLD)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.md").write_text(f"before\n{report.BEGIN}\nold table\n{report.END}\nbehind\n")
    assert main(["--report", "--out", str(out), "--merge", str(old), "--into", str(docs)]) == 0
    page = (docs / "performance.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nbehind\n") and "old table" not in page
    assert "| Nydus, cold | 4.50 s (20.0x), 20.0 MB in 45 |" in page
    assert "| Nydus, cold, 40 Mbit/s | 3 | 0.5 | 2026-01-02 08:30 | bbbb |" in page
    assert "| OCI image, overlayfs, 40 Mbit/s | 1 | 6.0 | 2026-01-01 10:00 | aaaa |" in page
    assert {one.key for one in report.load(docs / "experiment.jsonl")} == {
        one.key for one in report.load(out / "results.jsonl", old)
    }


def test_what_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = kept(tmp_path / "bad.jsonl", PLAIN)
    bad.write_text(bad.read_text() + '{"case": "node"}\n')
    assert main(["--report", "--out", str(tmp_path / "out"), "--merge", str(bad)]) == 1
    assert f"{bad}, line 2: no result of the experiment" in capsys.readouterr().err
