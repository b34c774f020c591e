"""Every input that ever found something, and a short run of the fuzzer. `python -m tests.fuzz.run` runs for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fuzz.run import REGRESSIONS
from tests.fuzz.targets import TARGETS

FOUND = sorted(path for path in REGRESSIONS.glob("*/*") if path.is_file())
_REPLAY = """
import logging, sys
from pathlib import Path
from tests.fuzz.run import prepare, run_one
from tests.fuzz.targets import TARGETS
logging.disable(logging.CRITICAL)
prepare()
bad = 0
for name in sys.argv[1:]:
    path = Path(name)
    why = run_one(TARGETS[path.parent.name], path.read_bytes())
    if why:
        bad += 1
        print(path.parent.name, path.name, why)
sys.exit(bad > 0)
"""


def test_what_was_found_before_stays_mended() -> None:
    assert FOUND, "the regression inputs are gone"
    done = subprocess.run([sys.executable, "-c", _REPLAY, *FOUND], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_parser_takes_mutated_input(tmp_path: Path) -> None:
    """A fixed seed: what it does here it does everywhere."""
    program = (
        "import sys; from pathlib import Path; from tests.fuzz import run\n"
        "run.REGRESSIONS = Path(sys.argv.pop(1)); run.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "--seconds", "12", "--seed", "7"],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*/*")), done.stdout
    assert "inputs in the first job" in done.stdout


def test_targets_are_known() -> None:
    assert all(path.parent.name in TARGETS for path in FOUND)
