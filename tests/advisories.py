"""Advisories about what the programs need, kept beside this file for where PyPI's own answers cannot be had.

    git clone https://github.com/pypa/advisory-database DIR && python -m tests.advisories DIR

writes `advisories.json` anew from that database (PyPA's, CC BY 4.0). A copy knows nothing of what came after its date,
so the audit says the date, and asks PyPI first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

COPY = Path(__file__).with_suffix(".json")


def copied() -> dict[str, Any]:
    """`as_of` (a date), and `advisories`: by package, each with id, aliases, fixed and ranges [introduced, fixed)."""
    copy: dict[str, Any] = json.loads(COPY.read_text())
    return copy


def report(packages: Mapping[str, str], copy: Mapping[str, Any]) -> dict[str, Any]:
    """What the copy says of `packages`, in the form of pip-audit's report."""
    found = []
    for name, version in packages.items():
        vulns = [
            {"id": one["id"], "aliases": one["aliases"], "fix_versions": [end for _, end in one["ranges"] if end]}
            for one in copy["advisories"].get(name, ())
            if concerns(version, one["ranges"])
        ]
        found.append({"name": name, "version": version, "vulns": vulns})
    return {"dependencies": found}


def concerns(version: str, ranges: Iterable[tuple[str, str | None]]) -> bool:
    one = Version(version)
    return any((begin == "0" or Version(begin) <= one) and (end is None or one < Version(end)) for begin, end in ranges)


def spans(advisory: Mapping[str, Any], name: str) -> list[tuple[str, str | None]]:
    """The version ranges of OSV's events: from an `introduced` to the next `fixed`, or to no end."""
    found: list[tuple[str, str | None]] = []
    for affected in advisory.get("affected", ()):
        if canonicalize_name(affected["package"]["name"]) != name:
            continue
        for part in affected.get("ranges", ()):
            if part["type"] != "ECOSYSTEM":
                continue
            begin = None
            for event in part["events"]:
                if "introduced" in event:
                    begin = str(event["introduced"])
                elif "fixed" in event and begin is not None:
                    found.append((begin, str(event["fixed"])))
                    begin = None
            if begin is not None:
                found.append((begin, None))
    return found


def read(database: Path, names: Iterable[str]) -> dict[str, Any]:
    """A copy for `names` from a git checkout of PyPA's database."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(database), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    advisories = {}
    for name in sorted(names):
        paths = git("ls-tree", "--name-only", "HEAD", f"vulns/{name}/").split()
        known = [yaml.safe_load(git("show", f"HEAD:{path}")) for path in paths]
        entries = [
            {"id": one["id"], "aliases": sorted(one.get("aliases", ())), "ranges": spans(one, name)}
            for one in known
            if not one.get("withdrawn")
        ]
        if entries:
            advisories[name] = entries
    return {
        "source": "PyPA advisory database, CC BY 4.0",
        "as_of": git("log", "-1", "--format=%cs").strip(),
        "advisories": advisories,
    }


def main() -> None:
    from tests.audit import runtime

    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    copy = read(Path(sys.argv[1]), runtime())
    COPY.write_text(json.dumps(copy, indent=1) + "\n")
    count = sum(map(len, copy["advisories"].values()))
    print(f"{COPY.name}: {count} advisories as of {copy['as_of']}", file=sys.stderr)


if __name__ == "__main__":
    main()
