"""nydusify as people run it: ours by its console script, upstream's where its programs are."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.lab.paths import ref_bin
from tests.lab.stack import program

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def start_nydusify(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Ours, with no login of the developer's."""
    script = program("nydusify")
    clean = {
        "PATH": f"{script.parent}:{_PATH}",
        "HOME": "/nonexistent",
        "DOCKER_CONFIG": "/nonexistent",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    return subprocess.Popen(
        [str(script), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, **(env or {})},
    )


def nydusify(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 90, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs ours to its end; a traceback is always a failure, an exit code other than 0 one unless `check` is false."""
    process = start_nydusify(*arguments, env=env)
    try:
        said, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
        said, errors = process.communicate(timeout=20)
        pytest.fail(f"{' '.join(map(str, arguments))} hangs\n{said}\n{errors}")
    assert "Traceback" not in errors, errors
    assert not check or process.returncode == 0, said + errors
    return subprocess.CompletedProcess(list(map(str, arguments)), process.returncode, said, errors)


def failed(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """It ended with 1 and one line that says these."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("nydusify: error:")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    for text in said:
        assert text in lines[0]


def upstream_nydusify(work: Path, *arguments: str | Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Upstream's, with its nydusd and nydus-image; skips where they are not."""
    command = upstream_command(work)
    if command is None:
        pytest.skip("interop: no reference programs here")
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={"PATH": f"{work / 'upstream-bin'}:{_PATH}", "HOME": str(work), "DOCKER_CONFIG": str(work)},
    )


def upstream_command(work: Path) -> list[str] | None:
    """How to start upstream's, given `work`/upstream-bin in PATH, which is made here; None where it is not."""
    programs = {name: ref_bin(name) for name in ("nydusify", "nydusd", "nydus-image")}
    if not all(programs.values()):
        return None
    folder = work / "upstream-bin"
    folder.mkdir(exist_ok=True)
    wrapper = folder / "nydusd"
    # it dies where RLIMIT_NOFILE cannot be raised
    wrapper.write_text(f'#!/bin/sh\nexec {programs["nydusd"]} --rlimit-nofile 0 "$@"\n')
    wrapper.chmod(0o755)
    (folder / "nydus-image").unlink(missing_ok=True)
    (folder / "nydus-image").symlink_to(str(programs["nydus-image"]))
    return [str(programs["nydusify"])]
