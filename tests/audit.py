"""Known vulnerabilities of what the programs need at run time, in the versions installed here: `python -m tests.audit`.

Asks PyPI through pip-audit. Exit status 1 for a known vulnerability. Where PyPI's answers cannot be had (a network
without it, a mirror that serves packages only; pip-audit alone would say "No known vulnerabilities found") a copy of
advisories judges (advisories.py), and how old it is is said loudly.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import advisories

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
SECONDS = 120
# id of a vulnerability -> why it does not concern these programs
ACCEPTED: dict[str, str] = {}


class NotAudited(Exception):
    """Nothing is known; the text says why."""


def runtime() -> dict[str, str]:
    """Installed versions of all that `dependencies` of pyproject.toml lead to."""
    wanted = [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        package = metadata.distribution(one.name)
        found[name] = package.version
        for text in package.requires or ():
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in one.extras or {""}):
                wanted.append(needed)
    return dict(sorted(found.items()))


def ask(packages: Mapping[str, str]) -> dict[str, Any]:
    """pip-audit's report. Raises NotAudited."""
    if importlib.util.find_spec("pip_audit") is None:
        raise SystemExit("pip-audit is not installed: pip install -e .[dev]")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in packages.items()))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "-r", file.name, "--no-deps", "--disable-pip", "-f", "json"]
        command += ["--progress-spinner", "off", "--timeout", "15"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise NotAudited(f"no answer within {SECONDS} s") from None
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise NotAudited((done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]) from None
    return report


def judge(report: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lines about known vulnerabilities, and about packages of which nothing is known."""
    known, unknown = [], []
    for one in report["dependencies"]:
        if "skip_reason" in one:
            unknown.append(f"{one['name']}: {one['skip_reason']}")
        for vuln in one.get("vulns", ()):
            names = {vuln["id"], *vuln.get("aliases", ())}
            if names & ACCEPTED.keys():
                continue
            fixed = ", ".join(vuln.get("fix_versions") or ()) or "no version yet"
            known.append(f"{one['name']} {one['version']}: {', '.join(sorted(names))}; mended in {fixed}")
    return known, unknown


def audit(packages: Mapping[str, str]) -> tuple[int, Iterable[str]]:
    """Exit status and what to say."""
    first = dict([next(iter(packages.items()))])
    try:
        # one first: where it is not answered, thirty more questions would not be either
        known, unknown = judge(ask(first))
        if not unknown:
            known, unknown = judge(ask(packages))
    except NotAudited as error:
        known, unknown = [], [str(error)]
    if known:
        return 1, ["KNOWN VULNERABILITIES:", *known, *unknown]
    if unknown:
        copy = advisories.copied()
        known, _ = judge(advisories.report(packages, copy))
        rule = "!" * 100
        head = f"PyPI did not say what is known of {len(packages)} packages. Judged by a copy as of {copy['as_of']}:"
        verdict = known or ["no vulnerability known then; run this again where PyPI answers."]
        return int(bool(known)), [rule, *unknown[:5], head, *verdict, rule]
    return 0, [f"{len(packages)} packages, no known vulnerability"]


def main() -> None:
    status, lines = audit(runtime())
    print("\n".join(lines), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
