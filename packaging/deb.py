#!/usr/bin/env python3
"""The Debian package: a bundle in /usr/lib/nydus-py, programs, service, configuration, man pages.

    packaging/deb.py DIRECTORY [--wheel FILE]      # DIRECTORY/nydus-py_VERSION_ARCH.deb

Needs dpkg-deb. It fits one version of Python (the interpreter that runs this: build it on the release it is for).
Installing starts the service and leaves containerd alone: `nydusctl node install` is the next step. An upgrade restarts
the snapshotter and has every nydusd go over to the new code under its mounts. Removing takes containerd's lines away
again, and is refused while containers use it. $DEBFULLNAME and $DEBEMAIL name the maintainer; with $SOURCE_DATE_EPOCH
the same sources make the same package.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from bundle import BundleError, project, run
from tree import DESCRIPTION, LIBRARY, NAME, SUMMARY, UNIT, fill, licences, write

# KillMode=process: neither stop nor restart of the service ends a nydusd or its mounts.
POSTINST = f"""#!/bin/sh
set -e
if [ "$1" = configure ]; then
    py3compile -p {NAME} /{LIBRARY}
    if deb-systemd-helper --quiet was-enabled {UNIT}; then
        deb-systemd-helper enable {UNIT} >/dev/null || true
    else
        deb-systemd-helper update-state {UNIT} >/dev/null || true
    fi
    if [ -d /run/systemd/system ]; then
        systemctl --system daemon-reload >/dev/null || true
        if [ -n "$2" ]; then
            deb-systemd-invoke restart {UNIT} >/dev/null || true
            # the nydusd that serve running containers go over to the new code, one after the other
            timeout 120 nydusctl snapshotter upgrade --wait 30 >/dev/null 2>&1 || true
        else
            deb-systemd-invoke start {UNIT} >/dev/null || true
        fi
    fi
fi
"""
PRERM = f"""#!/bin/sh
set -e
if [ "$1" = remove ]; then
    # containerd's CRI plugin does not load without a snapshotter that its configuration names
    if [ -e /etc/nydus/node-install.json ]; then
        nydusctl node uninstall
    fi
    if [ -d /run/systemd/system ]; then
        deb-systemd-invoke stop {UNIT} >/dev/null || true
    fi
fi
py3clean -p {NAME} /{LIBRARY}
"""
POSTRM = f"""#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload >/dev/null || true
fi
if [ "$1" = purge ]; then
    if command -v deb-systemd-helper >/dev/null; then
        deb-systemd-helper purge {UNIT} >/dev/null || true
    fi
    if grep -q " /var/lib/containerd-nydus/" /proc/mounts; then
        echo "{NAME}: /var/lib/containerd-nydus has mounts and stays" >&2
    else
        # the directory itself may be a disk of its own
        rm -rf /var/lib/containerd-nydus 2>/dev/null || find /var/lib/containerd-nydus -mindepth 1 -delete
    fi
fi
"""
NEWLINE = "\n"
OVERRIDES = f"""# Binary wheels as PyPI has them: those files were tested, and patched libraries do not survive strip.
{NAME}: embedded-library
{NAME}: unstripped-binary-or-object
{NAME}: shared-library-lacks-prerequisites
{NAME}: library-not-linked-against-libc
# The programs run in a virtual environment of their own.
{NAME}: wrong-path-for-interpreter
"""


def build(out: Path, wheel: Path | None = None) -> Path:
    """The package's file. Raises BundleError."""
    if shutil.which("dpkg-deb") is None:
        raise BundleError("dpkg-deb is not here: apt-get install dpkg-dev")
    arch = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(time.time())))
    version = str(project()["version"])
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{NAME}_{version}_{arch}.deb"
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        fill(tree, f"3.{sys.version_info[1]}", "python3", wheel)
        _documents(tree, version)
        _control(tree, version, arch)
        run(["dpkg-deb", "--root-owner-group", "-Zxz", "-z3", "--build", str(tree), str(target)])
    return target


def _documents(tree: Path, version: str) -> None:
    folder = tree / f"usr/share/doc/{NAME}"
    when = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    stamp = format_datetime(when)
    write(
        folder / "changelog.gz",
        f"{NAME} ({version}) stable; urgency=medium\n\n  * Built from its sources.\n\n -- {maintainer()}  {stamp}\n",
    )
    write(folder / "copyright", _copyright(tree, when))
    write(tree / f"usr/share/lintian/overrides/{NAME}", OVERRIDES)


def _copyright(tree: Path, when: datetime) -> str:
    """Ours, and what each distribution that is bundled says of itself; its own text lies in its dist-info."""
    lines = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/",
        f"Upstream-Name: {NAME}",
        "",
        "Files: *",
        f"Copyright: {when.year} the nydus-py developers",
        "License: Apache-2.0",
        " /usr/share/common-licenses/Apache-2.0 has the text.",
        " .",
        f" /{LIBRARY}/lib holds these distributions of others, unchanged; the licence of each is in its",
        " directory NAME-VERSION.dist-info:",
    ]
    lines += [f" {line}" for line in licences(tree)]
    return "\n".join(lines) + "\n"


def _control(tree: Path, version: str, arch: str) -> None:
    folder = tree / "DEBIAN"
    here, next_one = f"3.{sys.version_info[1]}", f"3.{sys.version_info[1] + 1}"
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink()) // 1024
    depends = "init-system-helpers (>= 1.54), libc6 (>= 2.28), libgcc-s1, libstdc++6, zlib1g"
    depends += f", python3 (>= {here}~), python3 (<< {next_one}~)"
    write(
        folder / "control",
        f"""Package: {NAME}
Version: {version}
Architecture: {arch}
Maintainer: {maintainer()}
Installed-Size: {size}
Depends: {depends}
Recommends: containerd (>= 1.5~) | containerd.io
Section: admin
Priority: optional
Description: {SUMMARY}
 {DESCRIPTION.replace(NEWLINE, NEWLINE + " ")}
 .
 Installing it starts the service and changes nothing of containerd. The
 command "nydusctl node install" has containerd use it.
""",
    )
    write(folder / "conffiles", "/etc/nydus/config.json\n")
    for name, text in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        write(folder / name, text)
        (folder / name).chmod(0o755)
    sums = []
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not path.is_symlink() and folder not in path.parents:
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            sums.append(f"{digest}  {path.relative_to(tree)}\n")
    write(folder / "md5sums", "".join(sums))


def maintainer() -> str:
    name, address = os.environ.get("DEBFULLNAME"), os.environ.get("DEBEMAIL")
    return f"{name or 'nydus-py developers'} <{address or 'nydus-py@localhost.localdomain'}>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of this project [default: built now]")
    given = parser.parse_args()
    try:
        print(build(given.directory, given.wheel))
    except BundleError as failure:
        sys.exit(f"deb.py: {failure}")


if __name__ == "__main__":
    main()
