"""All layers at once: the same bytes for any number of workers and threads, and one clear end for what goes wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bootstrap import parallel
from bootstrap.errors import BuildError
from bootstrap.layers import LayerFile, build_layers
from bootstrap.layout.common import Compressor
from bootstrap.options import BuildOptions
from bootstrap.parallel import WorkerDied, plan, run_jobs
from tests.unit.test_build_tar import member, pack

if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}


def layer(seed: int, files: int) -> bytes:
    """Small and large files, some of them equal, of words that compress."""
    rng = random.Random(seed)
    words = [rng.randbytes(6) for _ in range(200)]
    members = [member("d", **DIRECTORY)]
    for number in range(files):
        size = rng.choice([0, 1, 700, 5000, 20_000, 300_000])
        data = b"".join(rng.choices(words, k=size // 6 + 1))[:size] if number % 7 else b"equal" * 1000
        members.append(member(f"d/{number}", data, mtime=number))
    return pack(*members)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("layers")
    found = []
    for number, files in enumerate((60, 12, 30)):
        path = folder / f"{number}.tar"
        path.write_bytes(layer(number, files))
        found.append(path)
    return found


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(chunk_size=0x10000, inline_meta=True, blob_toc=True),
        BuildOptions(chunk_size=0x10000, batch_size=0x8000, inline_meta=True, compressor=Compressor.LZ4_BLOCK),
        BuildOptions(fs_version=5, chunk_size=0x1000, inline_meta=True),
    ],
    ids=["toc", "batch", "v5"],
)
def test_workers_and_threads_change_no_byte(
    options: BuildOptions, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SMALL", 1)
    seen = []
    for workers, cpus in ((1, 1), (2, 2), (4, 4), (1, 4)):
        monkeypatch.setattr(parallel, "cpu_count", lambda cpus=cpus: cpus)
        folder = tmp_path / f"{workers}-{cpus}"
        folder.mkdir()
        counted = [0] * len(sources)

        def report(job: LayerFile, count: int, counted: list[int] = counted) -> None:
            counted[job.number] += count

        jobs = [LayerFile(number, path, folder / str(number), options) for number, path in enumerate(sources)]
        results = {job.number: result for job, result in build_layers(jobs, workers, report)}
        blobs = [(folder / str(number)).read_bytes() for number in range(len(sources))]
        seen.append((blobs, [(results[n].blob_sha256, results[n].bootstrap) for n in range(len(sources))]))
        assert all(counted)
    assert all(one == seen[0] for one in seen[1:])


def test_a_bad_layer_ends_all_and_leaves_no_half_blob(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SMALL", 1)
    bad = tmp_path / "bad.tar"
    bad.write_bytes(sources[0].read_bytes()[:1_000_000])
    options = BuildOptions(inline_meta=True)
    for workers in (1, 2):
        jobs = [LayerFile(n, path, tmp_path / f"blob{n}", options) for n, path in enumerate([bad, *sources])]
        with pytest.raises(BuildError, match=r"bad\.tar: the tar ends in the middle of 'd/\d+'"):
            list(build_layers(jobs, workers))
        assert not (tmp_path / "blob0").exists()


@dataclass(frozen=True)
class Suicide:
    number: int
    size: int = 1
    threads: int = 1

    def run(self, report: Callable[[int], None]) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_a_killed_worker_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SMALL", 1)
    with pytest.raises(WorkerDied):
        list(run_jobs([Suicide(0), Suicide(1)], 2, lambda job, count: None, domain=BuildError, failed=BuildError))


@dataclass(frozen=True)
class FailsWhileAnotherAnswers:
    """The first fails at once; the second's answer is on its way, its length said and its bytes not."""

    number: int
    size: int = parallel.SMALL
    threads: int = 1

    def run(self, report: Callable[[int], None]) -> bytes:
        if self.number == 0:
            raise BuildError("bad")
        send = Connection._send  # type: ignore[attr-defined]

        def slowly(connection: object, data: bytes) -> None:
            send(connection, data)
            time.sleep(20)

        Connection._send = slowly  # type: ignore[attr-defined]
        time.sleep(0.2)
        return bytes(100_000)


def test_the_end_does_not_wait_for_half_an_answer() -> None:
    def failed(text: str) -> BuildError:
        time.sleep(1)  # until the other answers
        return BuildError(text)

    jobs = [FailsWhileAnotherAnswers(number) for number in range(2)]
    with pytest.raises(BuildError, match="bad"):
        list(run_jobs(jobs, 2, lambda job, count: None, domain=BuildError, failed=failed))


@dataclass(frozen=True)
class Short:
    number: int
    size: int = parallel.SMALL
    threads: int = 1

    def run(self, report: Callable[[int], None]) -> int:
        return os.getpid()


def _work_and_wait() -> None:
    """Run as a program: workers are idle when it says so."""
    for _ in run_jobs([Short(0), Short(1)], 2, lambda job, count: None, domain=BuildError, failed=BuildError):
        pass
    jobs = run_jobs([Short(0), Short(1), Short(2)], 2, lambda job, count: None, domain=BuildError, failed=BuildError)
    print(next(jobs)[1], flush=True)
    time.sleep(60)


def test_workers_end_when_their_client_is_killed() -> None:
    code = "from tests.unit.test_build_parallel import _work_and_wait; _work_and_wait()"
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline().strip().isdigit()
    client.kill()
    client.communicate(timeout=30)  # not before the last of them has closed its end


def test_the_largest_first_and_idle_cpus_for_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cpu_count", lambda: 2)
    sizes = [5 << 20, 90 << 20, 20 << 20]
    ordered, workers = plan([Suicide(number, size) for number, size in enumerate(sizes)], 2)
    assert [(job.number, job.threads) for job in ordered] == [(1, 2), (2, 1), (0, 1)] and workers == 2
    assert plan([Suicide(0, 100), Suicide(1, 100)], 2)[1] == 1
