"""What the documentation points to exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([*(REPO / "docs").glob("*.md"), REPO / "README.md"])


@cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_named_in_the_comparison_exists() -> None:
    text = (REPO / "docs" / "comparison.md").read_text()
    named = re.findall(r"`((?:unit|integration|e2e|conformance)/test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 80
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (REPO / "tests" / file).is_file() or name not in functions(REPO / "tests" / file)
    ]
    assert not missing, f"renamed or gone; name the test that shows it now, or say that nothing does: {missing}"
    assert text.count(".py::") == len(named), "a test is named in another form than `layer/file.py::test`"


def test_the_comparison_has_every_item() -> None:
    lines = (REPO / "docs" / "comparison.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ \|", line)]
    assert [int(number) for number, *_ in rows] == [*range(1, 21), *range(1, 31)]
    for number, _, here, shown in rows:
        assert re.match(r"\*\*(Solved|Out of reach)", here), number
        assert shown or not here.startswith("**Solved"), f"item {number} is solved and no test shows it"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
