"""A command as root of a user namespace: `python -m tests.lab.userns HOST[+mount] COMMAND...`.

Ids from 0 on are those from HOST on of this machine, 65536 of them. unshare(1) would need newuidmap for that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
COUNT = 65536


def main() -> None:
    host, _, more = sys.argv[1].partition("+")
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | (CLONE_NEWNS if more else 0)):
            os._exit(99)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os.setresgid(0, 0, 0)
        os.setgroups([])
        os.setresuid(0, 0, 0)
        os.execvp(sys.argv[2], sys.argv[2:])
    os.close(ready[1])
    if os.read(ready[0], 1):
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 {host} {COUNT}")
        os.write(go[1], b"x")
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
