#!/usr/bin/env python3
"""A relocatable installation: this project, what it needs from PyPI, and launchers, as one directory that may be moved.

    packaging/bundle.py DIRECTORY [--python 3.11]... [--wheel FILE]

It is a virtual environment without an interpreter of its own: `bin/python3` is a link to the machine's
(/usr/bin/python3, or what `bin/use-python FILE` sets), and each program finds it by its own place. The machine needs
one of the versions given (compiled wheels are for one version each) and glibc 2.28 or newer; nothing else, pip and venv
neither. Programs may be linked to from anywhere.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from py_compile import PycInvalidationMode

REPO = Path(__file__).resolve().parents[1]
SECONDS = 900
MINIMUM = "3.11"

# sh runs the second line, which Python reads as a string
MOVABLE = """/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")/python3" -I "$0" "$@"
' '''"""
LAUNCHER = """#!{interpreter}
import sys

from {module} import {function}

sys.exit({function}())
"""

USE_PYTHON = """#!/bin/sh
# use-python FILE: has the programs beside this file run by that interpreter.
set -eu
here=$(dirname -- "$(realpath -- "$0")")
found=$(command -v -- "${1:?usage: use-python FILE}") || { echo "use-python: $1 is not there" >&2; exit 1; }
found=$(realpath -- "$found")
version=$("$found" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ ! -d "$here/../lib/python$version" ]; then
    has=$(cd "$here/../lib" && echo python*)
    echo "use-python: $found is Python $version, this bundle is for $has" >&2
    exit 1
fi
ln -sfn -- "$found" "$here/python3"
printf 'home = %s\\ninclude-system-site-packages = false\\n' "$(dirname -- "$found")" > "$here/../pyvenv.cfg"
"""


class BundleError(Exception):
    """One sentence for the user."""


def run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise BundleError(f"{' '.join(words[:6])} …: {(done.stderr or done.stdout).strip()[-800:]}")


def project() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return found


def build_wheel(directory: Path) -> Path:
    """Raises BundleError."""
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(directory), str(REPO)])
    (wheel,) = directory.glob("nydus_py-*.whl")
    return wheel


def make(out: Path, versions: list[str], wheel: Path | None = None, place: str = "") -> None:
    """Raises BundleError. `out` must not exist. `place`: where it will always be; it saves each start a shell."""
    if out.exists():
        raise BundleError(f"{out} is there already: remove it, or choose another directory")
    for version in versions:
        number = re.fullmatch(r"3\.(\d+)", version)
        if number is None or int(number[1]) < 11:
            raise BundleError(f"--python {version}: a version such as {MINIMUM}, which is the oldest that will do")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = wheel or build_wheel(Path(scratch))
        for version in versions:
            _packages(out / "lib" / f"python{version}" / "site-packages", version, wheel, compiled=not place)
    folder = out / "bin"
    folder.mkdir()
    interpreter = f"{place}/bin/python3 -I" if place else MOVABLE
    for name, target in project()["scripts"].items():
        module, function = target.split(":")
        _program(folder / name, LAUNCHER.format(interpreter=interpreter, module=module, function=function))
    _program(folder / "use-python", USE_PYTHON)
    (folder / "python3").symlink_to("/usr/bin/python3")
    (out / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (out / "BUILD").write_text(f"{project()['version']} {secrets.token_hex(8)}\n")  # tells one build from another
    _one_time(out)


def _packages(folder: Path, version: str, wheel: Path, *, compiled: bool) -> None:
    """Binary wheels alone: what a machine without a compiler can have, and what makes the outcome the same anywhere."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--only-binary=:all:",
        "--target",
        str(folder),
    ]
    words += ["--python-version", version, "--implementation", "cp", "--disable-pip-version-check", str(wheel)]
    run(words)
    shutil.rmtree(folder / "bin", ignore_errors=True)  # pip's scripts have this machine's interpreter in them
    for path in [*folder.glob("**/tests"), *folder.glob("**/__pycache__")]:
        shutil.rmtree(path)
    for path in folder.glob("*.dist-info/RECORD"):  # lists what was just removed
        path.unlink()
    for path in folder.glob("*.dist-info/direct_url.json"):  # where the wheel lay when this was built
        path.unlink()
    if compiled and version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        # the times of files do not count: the machine's clock and the way they are copied do not matter
        done = compileall.compile_dir(
            folder, quiet=2, stripdir=str(folder), prependdir="nydus-py",
            invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip
        if not done:
            raise BundleError(f"{folder} has a module that does not compile")


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _one_time(out: Path) -> None:
    """$SOURCE_DATE_EPOCH for all files, so that archives of the same sources are the same."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    for path in [out, *out.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent == out / "bin" else 0o644)
        if epoch:
            os.utime(path, (int(epoch), int(epoch)), follow_symlinks=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser.add_argument("--python", action="append", metavar="VERSION", help=f"repeatable [default: {here}]")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of this project [default: built now]")
    given = parser.parse_args()
    try:
        make(given.directory, given.python or [here], given.wheel)
    except BundleError as failure:
        sys.exit(f"bundle.py: {failure}")


if __name__ == "__main__":
    main()
