"""The audit of dependencies: what fails it, and that silence is not taken for a good answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests import advisories, audit

CLEAN = {"name": "h11", "version": "0.16.0", "vulns": []}
BAD = {
    "name": "h11",
    "version": "0.14.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2025-43859"], "fix_versions": ["0.16.0"], "description": "smuggling"}],
}
SKIPPED = {"name": "h11", "skip_reason": "Dependency not found on PyPI and could not be audited: h11 (0.14.0)"}


def answers(monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]) -> list[Mapping[str, str]]:
    asked: list[Mapping[str, str]] = []

    def ask(packages: Mapping[str, str]) -> dict[str, Any]:
        asked.append(packages)
        return {"dependencies": [entry], "fixes": []}

    monkeypatch.setattr(audit, "ask", ask)
    return asked


def test_what_runs_is_found_with_what_it_needs() -> None:
    found = audit.runtime()
    assert {"trio", "grpcio", "cryptography", "cffi", "httpx", "anyio", "certifi", "sniffio"} <= found.keys()
    assert not {"pytest", "mypy", "hypothesis", "pip-audit", "nydus-py"} & found.keys()


def test_a_known_vulnerability_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, BAD)
    status, lines = audit.audit({"h11": "0.14.0"})
    assert status == 1 and "h11 0.14.0: CVE-2025-43859, PYSEC-1; mended in 0.16.0" in lines
    monkeypatch.setitem(audit.ACCEPTED, "CVE-2025-43859", "only a client here")
    assert audit.audit({"h11": "0.14.0"})[0] == 0


def test_silence_is_said_loudly_costs_one_question_and_leaves_a_copy_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, SKIPPED)
    status, lines = audit.audit({"h11": "0.14.0", "trio": "1"})
    assert status == 0 and asked == [{"h11": "0.14.0"}]
    assert any("PyPI did not say" in line and "as of 20" in line for line in lines)

    def fail(packages: Mapping[str, str]) -> dict[str, Any]:
        raise audit.NotAudited("Connection refused")

    monkeypatch.setattr(audit, "ask", fail)
    status, lines = audit.audit({"httpx": "0.23.0"})
    assert status == 0 and "Connection refused" in lines
    status, lines = audit.audit({"certifi": "2023.5.7", "httpx": "0.19.0"})
    assert status == 1
    assert any(line.startswith("certifi 2023.5.7: CVE-2023-37920") and "2023.7.22" in line for line in lines)
    assert any(line.startswith("httpx 0.19.0: ") for line in lines)


def test_ranges_begin_with_their_first_version_and_end_before_the_mended_one() -> None:
    events = [{"introduced": "1.0"}, {"fixed": "1.4"}, {"introduced": "2.0rc1"}, {"fixed": "2.1"}, {"introduced": "3"}]
    package = {"name": "Some_Thing"}
    advisory = {"affected": [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}]}
    ranges = advisories.spans(advisory, "some-thing")
    assert ranges == [("1.0", "1.4"), ("2.0rc1", "2.1"), ("3", None)] and advisories.spans(advisory, "other") == []
    bad = {"1.0", "1.3.9", "2.0rc1", "2.0.9", "3", "9"}
    every = bad | {"0.9", "1.4", "1.9", "2.0b1", "2.1"}
    assert {one for one in every if advisories.concerns(one, ranges)} == bad
    assert advisories.concerns("0.1", [("0", "2")])


def test_all_is_asked_where_somebody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, CLEAN)
    assert audit.audit({"h11": "0.16.0", "trio": "1"}) == (0, ["2 packages, no known vulnerability"])
    assert asked[-1] == {"h11": "0.16.0", "trio": "1"}
