"""Ends, unmounts and deletes what is left of the lab directories listed in a file: `python -m tests.lab.sweep FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.lab.process import LabError, end_processes, processes_mentioning, remove_tree, unmount_below


def sweep(record: Path) -> list[str]:
    """What had to be cleaned up; directories carry random names, so whatever mentions one belongs to it."""
    cleaned = []
    for line in record.read_text().splitlines():
        work = Path(line)
        pids = processes_mentioning(line)
        end_processes(pids)
        points = unmount_below(work)
        if pids or points or work.exists():
            cleaned.append(f"{work}: {len(pids)} processes, {len(points)} mounts")
        try:
            remove_tree(work)
        except LabError as error:
            cleaned.append(str(error))
    return cleaned


if __name__ == "__main__":
    for line in sweep(Path(sys.argv[1])):
        print(f"cleaned up: {line}", file=sys.stderr)
