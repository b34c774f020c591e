"""The audit of dependencies: what fails it, and that silence is not taken for a good answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests import audit

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


def test_silence_is_said_loudly_and_costs_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, SKIPPED)
    status, lines = audit.audit({"h11": "0.14.0", "trio": "1"})
    assert status == 0 and any(line.startswith("NOT AUDITED") for line in lines) and asked == [{"h11": "0.14.0"}]

    def fail(packages: Mapping[str, str]) -> dict[str, Any]:
        raise audit.NotAudited("Connection refused")

    monkeypatch.setattr(audit, "ask", fail)
    status, lines = audit.audit({"h11": "0.14.0"})
    assert status == 0 and "Connection refused" in lines


def test_all_is_asked_where_somebody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, CLEAN)
    assert audit.audit({"h11": "0.16.0", "trio": "1"}) == (0, ["2 packages, no known vulnerability"])
    assert asked[-1] == {"h11": "0.16.0", "trio": "1"}
