"""containerd's own snapshotter checks, all 21, against our service on a fresh root."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.lab.paths import ref_bin
from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.stack import Snapshotter, daemon_config

pytestmark = [pytest.mark.root, pytest.mark.interop, pytest.mark.timeout(300)]


def test_containerds_suite_passes_21_of_21() -> None:
    suite = ref_bin("snapshot-suite")
    if suite is None:
        pytest.skip("interop: containerd's snapshot-suite is not here")
    work = work_dir()
    scratch = work / "tmp"
    scratch.mkdir()
    try:
        with Snapshotter(work / "s", daemon_config(prefetch=False)) as ours:
            done = subprocess.run(
                [suite, "-test.v", "-test.root", "-test.parallel", "1"],
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "TMPDIR": str(scratch),
                    "SNAPSHOT_SOCKET": str(ours.socket),
                    # other names ask for renames of lower directories: no overlayfs
                    "SNAPSHOT_SUITE_NAME": "overlayfs",
                },
                cwd=work,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=240,
            )
            root = ours.root
            leftovers = [path for path in Path(root / "snapshots").iterdir() if not path.name.isdecimal()]
        results = re.findall(r"^\s+--- (PASS|FAIL|SKIP): \S+/(\w+)", done.stdout, re.M)
        failed = [name for verdict, name in results if verdict != "PASS"]
        assert not failed, f"{failed}\n{done.stdout[-6000:]}"
        assert len(results) == 21, (done.stdout[-3000:], done.stderr[-2000:])
        assert done.returncode == 0
        assert leftovers == []
    finally:
        unmount_below(work)
        remove_tree(work)
