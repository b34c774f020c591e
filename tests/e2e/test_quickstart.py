"""`examples/quickstart` as a newcomer runs it: its figures, and that nothing of it stays, also after Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import require_programs
from tests.lab.paths import REPO
from tests.lab.process import can_connect, mounts_below, processes_mentioning, run

pytestmark = pytest.mark.timeout(400)

QUICKSTART = REPO / "examples" / "quickstart"


def environment() -> dict[str, str]:
    return {**os.environ, "NYDUS_VENV": sys.prefix}


def check_nothing_left(work: str) -> None:
    assert not Path(work).exists()
    assert processes_mentioning(work) == []
    assert mounts_below(Path(work)) == []


def work_of(text: str) -> str:
    found = re.search(r" in (/\S+/ny-[0-9a-f]+)", text)
    assert found, text
    return found[1]


def test_figures(tmp_path: Path) -> None:
    require_programs()
    figures = tmp_path / "figures.json"
    done = run([QUICKSTART, "--json", figures], timeout=380, env=environment())
    result = json.loads(figures.read_text())
    for name in ("oci", "nydus_cold", "nydus_cached"):
        assert set(result[name]) == {"seconds", "bytes", "requests"}
        assert name.split("_")[0] in done.stdout.lower()
    oci, cold, cached = result["oci"], result["nydus_cold"], result["nydus_cached"]
    assert result["image_bytes"] > 50e6
    assert oci["bytes"] >= result["image_bytes"]
    assert cold["bytes"] < 0.4 * result["image_bytes"]
    # The bound on a quiet machine is 1/5 (tests/bench); this one may be busy.
    assert cold["seconds"] < oci["seconds"] / 3
    assert cached["seconds"] < cold["seconds"]
    check_nothing_left(work_of(done.stderr))


@pytest.mark.parametrize("moment", ["starting registry", "converting", "starting containers"])
def test_interrupted(moment: str, tmp_path: Path) -> None:
    require_programs()
    log = tmp_path / "log"
    with log.open("wb") as out:
        child = subprocess.Popen([QUICKSTART], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment())
        try:
            deadline = time.monotonic() + 240
            while moment not in log.read_text():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            time.sleep(0.7)
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130
        finally:
            child.kill()
            child.wait(10)
    said = log.read_text()
    assert "Traceback" not in said
    check_nothing_left(work_of(said))


def test_keep_and_stop(tmp_path: Path) -> None:
    require_programs()
    done = run([QUICKSTART, "--keep", "--rtt-ms", "1", "--mbit", "1000"], timeout=380, env=environment())
    work = work_of(done.stderr)
    try:
        command = next(line for line in done.stdout.splitlines() if " run --rm -t" in line)
        command = command.replace(" -t ", f" --log-uri file://{tmp_path}/said ")  # see `Containerd.ctr_run`
        run(["sh", "-c", re.sub(r"play bash$", "play cat /app/serve.py", command.strip())], timeout=60)
        assert "sqlite3" in (tmp_path / "said").read_text()
        config = next(Path(work).rglob("nydusd.json")).read_text()
        mirror = json.loads(config)["device"]["backend"]["config"]["mirrors"][0]["host"].removeprefix("http://")
    finally:
        run([QUICKSTART, "--stop", work], timeout=60, env=environment())
    check_nothing_left(work)
    host, _, port = mirror.partition(":")
    assert not can_connect((host, int(port))), "the mirror lives on"
