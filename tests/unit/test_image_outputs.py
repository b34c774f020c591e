"""Where nydus-image writes: names of open files, links, full disks, and what a signal leaves."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.lab.process import wait_until
from tests.lab.tiny import TinyImage, noise, tiny_image
from tests.unit.test_build_tar import member, pack

PROGRAM = [sys.executable, "-c", "from bootstrap.cli import main; main(prog_name='nydus-image')", "-l", "warn"]


@pytest.fixture
def image(tmp_path: Path) -> TinyImage:
    found = tiny_image(tmp_path, {"a": noise(70_000)})
    (tmp_path / found.blob_id).write_bytes(found.blob)
    return found


def test_standard_output_that_is_a_file_is_written_and_not_replaced(image: TinyImage, tmp_path: Path) -> None:
    stdout = tmp_path / "stdout"  # as /dev/stdout is; that one is this machine's only one
    stdout.symlink_to("/proc/self/fd/1")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/f").write_bytes(b"x")
    blobs = str(tmp_path)
    for name, arguments in {
        "unpack": ["unpack", "-D", blobs, "--output", str(stdout), str(image.bootstrap)],
        "create": ["create", "-D", blobs, "-B", str(stdout), str(tmp_path / "src")],
        "create-json": ["create", "-D", blobs, "-B", str(tmp_path / "b"), "-J", str(stdout), str(tmp_path / "src")],
    }.items():
        with open(tmp_path / name, "wb") as out:
            subprocess.run([*PROGRAM, *arguments], stdout=out, check=True, timeout=60)
        assert (name, stdout.is_symlink()) == (name, True)
        assert (tmp_path / name).stat().st_size
    with open(tmp_path / "disk", "wb") as out:
        command = ["export", "--block", "-D", blobs, "-B", str(image.bootstrap), "-O", str(stdout)]
        done = subprocess.run([*PROGRAM, *command], stdout=out, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, b"no regular file" in done.stderr, stdout.is_symlink()) == (1, True, True)


def test_a_failed_build_leaves_the_name_of_standard_output(tmp_path: Path) -> None:
    stdout = tmp_path / "stdout"
    stdout.symlink_to("/proc/self/fd/1")
    (tmp_path / "layer.tar").write_bytes(b"no tar" * 1000)
    command = ["create", "-t", "tar-rafs", "-b", str(stdout), "-B", str(tmp_path / "b"), str(tmp_path / "layer.tar")]
    with open(tmp_path / "blob", "wb") as out:
        done = subprocess.run([*PROGRAM, *command], stdout=out, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, stdout.is_symlink()) == (1, True)


def test_a_link_stays_a_link(image: TinyImage, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to("elsewhere/tar")
    command = ["unpack", "-D", str(tmp_path), "--output", str(link), str(image.bootstrap)]
    for _ in range(2):  # the file is not there yet, and it is
        subprocess.run([*PROGRAM, *command], check=True, timeout=60)
        assert link.is_symlink()
        assert [path.name for path in folder.iterdir()] == ["tar"]


@pytest.mark.parametrize("command", ["create", "check", "stat"])
def test_a_result_on_a_full_disk_names_its_file(command: str, image: TinyImage, tmp_path: Path) -> None:
    arguments = {
        "create": ["-D", str(tmp_path), "-B", str(tmp_path / "b"), str(tmp_path)],
        "check": [str(image.bootstrap)],
        "stat": ["-B", str(image.bootstrap)],
    }[command]
    done = subprocess.run([*PROGRAM, command, "-J", "/dev/full", *arguments], capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.decode().endswith(" /dev/full: No space left on device\n")


def at_rest(pid: int) -> str:
    """How often it gave up the processor, where it sleeps: one that is kept from running does not. "" otherwise."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    asleep = any(line.startswith("State:\tS") for line in lines)
    return " ".join(line for line in lines if "ctxt_switches" in line) if asleep else ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(tmp_path / "layer")
    command = ["create", "-t", "tar-rafs", "-b", str(out / "blob"), "-B", str(out / "boot"), str(tmp_path / "layer")]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as it is below nohup, and would be in the child
    build = subprocess.Popen([*PROGRAM, *command], stderr=subprocess.PIPE)
    signal.signal(signal.SIGHUP, ignored)
    try:
        with open(tmp_path / "layer", "wb", buffering=0) as layer:
            layer.write(pack(member("f", noise(6_000_000)))[:5_000_000])
            left, before = array.array("i", [1]), ""

            def waits() -> bool:
                """A signal between two reads would wait for the end of the second."""
                nonlocal before
                fcntl.ioctl(layer, termios.FIONREAD, left)
                last, before = before, at_rest(build.pid) if not left[0] else ""
                return bool(before) and before == last

            wait_until(waits, 60, "a build that waits for more", lambda: build.poll() is None, longest_pause=0.5)
            assert (out / "blob").exists()
            build.send_signal(number)
            text = build.communicate(timeout=60)[1].decode()
    finally:
        build.kill()
        build.wait()
    assert (build.returncode, text.strip()) == (1, "Aborted!")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["-V"], ["create", "--help"]])
def test_help_that_finds_no_room_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_a_log_file_takes_any_name_and_its_full_disk_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    boot = os.fsencode(tmp_path) + b"/\xff.boot"
    command = ["create", "-l", "info", "-D", str(tmp_path), "-B", os.fsdecode(boot), str(tmp_path / "src"), "-L"]
    done = subprocess.run([*PROGRAM, *command, str(tmp_path / "log")], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "udcff.boot" in (tmp_path / "log").read_text()
    done = subprocess.run([*PROGRAM, *command, "/dev/full"], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"log file /dev/full: No space left on device; lines are lost\n")


def test_nydusify_has_such_a_log_file(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from nydusfs.convert.cli import main; main()"]
    command = ["build", "--source-dir", str(tmp_path), "--name", "a", "-o", str(tmp_path / "out")]
    for log in ("/dev/full", str(tmp_path / "log")):
        options = ["-D", "--log-file", log]
        done = subprocess.run([*program, *options, *command], capture_output=True, text=True, timeout=60)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "log").stat().st_size
