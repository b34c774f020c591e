#!/usr/bin/env python3
"""The RPM package: what the Debian package has, for Fedora, RHEL and SUSE.

    packaging/rpm.py DIRECTORY [--python 3.12] [--wheel FILE]      # DIRECTORY/nydus-py-VERSION-1.ARCH.rpm

Needs rpmbuild, on any distribution. It fits one version of Python, /usr/bin/pythonVERSION [default: that of the
interpreter that runs this]. Installing follows the machine's presets, which mostly leave the service off:
`nydusctl node install` is the next step. An upgrade restarts the snapshotter where it runs and has every nydusd go over
to the new code under its mounts. Removing takes containerd's lines away again, and is refused while containers use it;
images and cache stay. $RPM_PACKAGER names the packager; with $SOURCE_DATE_EPOCH the same sources make the same package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bundle import BundleError, project, run
from tree import CONFIG, DESCRIPTION, LIBRARY, NAME, SUMMARY, UNIT, UNIT_FILE, fill, licences, write

CLEAN = f"find /{LIBRARY} -name __pycache__ -prune -exec rm -rf {{}} + 2>/dev/null || :"
POST = f"""{CLEAN}
/usr/bin/python@PYTHON@ -I -m compileall -q --invalidation-mode unchecked-hash /{LIBRARY}/lib >/dev/null || :
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload >/dev/null 2>&1 || :
    if [ "$1" -eq 1 ]; then
        systemctl preset {UNIT} >/dev/null 2>&1 || :
    fi
fi
"""
# KillMode=process: neither stop nor restart of the service ends a nydusd or its mounts.
POSTTRANS = f"""if [ -d /run/systemd/system ] && systemctl is-active --quiet {UNIT}; then
    systemctl restart {UNIT} >/dev/null 2>&1 || :
    # the nydusd that serve running containers go over to the new code, one after the other
    timeout 120 nydusctl snapshotter upgrade --wait 30 >/dev/null 2>&1 || :
fi
"""
# containerd's CRI plugin does not load without a snapshotter that its configuration names
PREUN = f"""if [ "$1" -eq 0 ]; then
    if [ -e /etc/nydus/node-install.json ]; then
        nydusctl node uninstall || exit 1
    fi
    if [ -d /run/systemd/system ]; then
        systemctl disable --now {UNIT} >/dev/null 2>&1 || :
    fi
    {CLEAN}
fi
"""
POSTUN = """if [ "$1" -eq 0 ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload >/dev/null 2>&1 || :
fi
"""
SPEC = """Name: {name}
Version: {version}
Release: 1
Summary: {summary}
License: Apache-2.0
URL: https://github.com/dragonflyoss/nydus
Requires: /usr/bin/python{python}
Requires: systemd
Recommends: containerd
AutoReqProv: no
%global debug_package %{{nil}}
%global _build_id_links none
%global __os_install_post %{{nil}}
%global use_source_date_epoch_as_buildtime 1
%global clamp_mtime_to_source_date_epoch 1
%global _buildhost localhost

%description
{description}

Installing it changes nothing of containerd. The command
"nydusctl node install" starts the service and has containerd use it.

%install
cp -a {tree}/. %{{buildroot}}/

%post
{post}
%posttrans
{posttrans}
%preun
{preun}
%postun
{postun}
%files
%defattr(-,root,root,-)
{files}
"""


def build(out: Path, python: str, wheel: Path | None = None) -> Path:
    """The package's file. Raises BundleError."""
    if shutil.which("rpmbuild") is None:
        raise BundleError("rpmbuild is not here: install rpm-build (Fedora, SUSE) or rpm (Debian)")
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(time.time())))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        fill(tree, python, f"python{python}", wheel)
        write(tree / f"usr/share/doc/{NAME}/LICENCES", _licences(tree))
        spec = Path(scratch, f"{NAME}.spec")
        spec.write_text(
            SPEC.format(
                name=NAME, version=project()["version"], summary=SUMMARY, description=DESCRIPTION, python=python,
                tree=tree, post=POST.replace("@PYTHON@", python), posttrans=POSTTRANS, preun=PREUN, postun=POSTUN,
                files="\n".join(_owned(tree)),
            )
        )  # fmt: skip
        packager = os.environ.get("RPM_PACKAGER")
        defines = {"_topdir": f"{scratch}/top", "_rpmdir": f"{scratch}/rpms", "packager": packager}
        words = [word for name, value in defines.items() if value for word in ("--define", f"{name} {value}")]
        run(["rpmbuild", "-bb", "--quiet", *words, str(spec)])
        (made,) = Path(scratch, "rpms").rglob("*.rpm")
        return Path(shutil.move(made, out / made.name))


def _owned(tree: Path) -> list[str]:
    """Lines of %files. Directories of others (/usr/bin, /usr/share/man) are not ours."""
    lines = [f"/{LIBRARY}", f"/{UNIT_FILE}", f"%dir /{Path(CONFIG).parent}", f"%config(noreplace) /{CONFIG}"]
    lines.append(f"%doc /usr/share/doc/{NAME}")
    lines += [f"/usr/bin/{path.name}" for path in sorted((tree / "usr/bin").iterdir())]
    lines += [f"%doc /{path.relative_to(tree)}" for path in sorted((tree / "usr/share/man").rglob("*.gz"))]
    return lines


def _licences(tree: Path) -> str:
    head = f"{NAME}: Apache-2.0\n\n/{LIBRARY}/lib holds these distributions of others, unchanged; the licence of each\n"
    return f"{head}is in its directory NAME-VERSION.dist-info:\n\n" + "\n".join(licences(tree)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser.add_argument("--python", default=here, metavar="VERSION", help=f"[default: {here}]")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of this project [default: built now]")
    given = parser.parse_args()
    try:
        print(build(given.directory, given.python, given.wheel))
    except BundleError as failure:
        sys.exit(f"rpm.py: {failure}")


if __name__ == "__main__":
    main()
