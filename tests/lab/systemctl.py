"""A stand-in for `systemctl` where no systemd runs: enough of start, stop and enable for two simple services.

    python -m tests.lab.systemctl COMMAND [--now] [UNIT]

State lies in /run/standin; services outlive the command. `Type=notify` is waited for as systemd does, and only the
main process is stopped (`KillMode=process`, which both units have).
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STATE = Path("/run/standin")
UNITS = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"))
WANTS = UNITS[0] / "multi-user.target.wants"
SECONDS = 90.0


def unit_file(unit: str) -> Path:
    found = next((folder / unit for folder in UNITS if (folder / unit).is_file()), None)
    if found is None:
        sys.exit(f"Unit {unit} could not be found.")
    return found


def values(unit: str) -> dict[str, str]:
    lines = [line.partition("=") for line in unit_file(unit).read_text().splitlines() if "=" in line]
    return {key.strip(): value.strip() for key, _, value in lines if not key.startswith("#")}


def main_pid(unit: str) -> int:
    """0 when it does not run."""
    try:
        pid = int((STATE / unit).read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return 0
    return 0 if state == "Z" else pid


def start(unit: str) -> None:
    if main_pid(unit):
        return
    found = values(unit)
    STATE.mkdir(exist_ok=True)
    place = str(STATE / f"{unit}.notify")
    Path(place).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (STATE / f"{unit}.log").open("ab") as log:
        notify.bind(place)
        notify.settimeout(0.1)
        waits = found.get("Type") == "notify"
        env = {**os.environ, **({"NOTIFY_SOCKET": place} if waits else {})}
        process = subprocess.Popen(
            shlex.split(found["ExecStart"]), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            start_new_session=True,
        )  # fmt: skip
        (STATE / unit).write_text(str(process.pid))
        deadline = time.monotonic() + SECONDS
        while waits:
            try:
                if b"READY=1" in notify.recv(4096):
                    break
            except TimeoutError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"Job for {unit} failed because the control process exited with error code.")


def stop(unit: str) -> None:
    if pid := main_pid(unit):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        while main_pid(unit) and time.monotonic() < deadline:
            time.sleep(0.02)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    now = "--now" in sys.argv
    with (STATE.parent / "standin.log").open("a") as log:
        log.write(" ".join(words) + "\n")
    command, units = words[0], words[1:]
    for unit in units:
        link = WANTS / unit
        if command == "is-active":
            sys.exit(0 if main_pid(unit) else 3)
        elif command == "is-enabled":
            print("enabled" if link.is_symlink() else "disabled")
            sys.exit(0 if link.is_symlink() else 1)
        elif command in ("enable", "preset"):
            target = unit_file(unit)
            WANTS.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(target)
        elif command == "disable":
            link.unlink(missing_ok=True)
        elif command not in ("start", "stop", "restart"):
            sys.exit(f"Unknown command verb {command}.")
        if command in ("stop", "restart") or (command == "disable" and now):
            stop(unit)
        if command in ("start", "restart") or (command == "enable" and now):
            start(unit)
    if not units and command != "daemon-reload":
        sys.exit(f"Unknown command verb {command}.")


if __name__ == "__main__":
    main()
