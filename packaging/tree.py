"""What packages of every kind have in common: the tree below / that they install."""

from __future__ import annotations

import email.parser
import gzip
import sys
from pathlib import Path

import manpages
from bundle import REPO, make, project

NAME = "nydus-py"
UNIT = "containerd-nydus-grpc.service"
UNIT_FILE = f"usr/lib/systemd/system/{UNIT}"
LIBRARY = f"usr/lib/{NAME}"
CONFIG = "etc/nydus/config.json"
SUMMARY = "start containers before their images are downloaded"
DESCRIPTION = """A Nydus stack in Python: a snapshotter for containerd, the daemon that serves
images while their data is still on the way, and the tools that make, check
and convert such images."""


def fill(tree: Path, python: str, interpreter: str, wheel: Path | None) -> None:
    """Programs, service, configuration, man pages, examples. `interpreter`: below /usr/bin. Raises BundleError."""
    make(tree / LIBRARY, [python], wheel, place=f"/{LIBRARY}")
    folder = tree / "usr/bin"
    folder.mkdir(parents=True)
    for name in project()["scripts"]:
        (folder / name).symlink_to(f"../lib/{NAME}/bin/{name}")
    (tree / LIBRARY / "bin/use-python").unlink()  # the package depends on the one it is for
    (tree / LIBRARY / "bin/python3").unlink()
    (tree / LIBRARY / "bin/python3").symlink_to(f"../../../bin/{interpreter}")

    sys.path.insert(0, str(REPO))
    from snapshotter.install.parts import default_config, unit_text

    write(tree / UNIT_FILE, unit_text("/usr/bin/containerd-nydus-grpc"))
    write(tree / CONFIG, default_config())
    for place, text in manpages.pages():
        write(tree / f"usr/share/man/{place}.gz", text)
    for name in ("config.json", "containerd", "dragonfly", "grafana", "kubernetes"):
        source = REPO / "examples" / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file():
                write(tree / f"usr/share/doc/{NAME}/examples" / path.relative_to(REPO / "examples"), path.read_text())


def licences(tree: Path) -> list[str]:
    """A line for each distribution of others that is bundled: what it says of itself."""
    lines = []
    for path in sorted((tree / LIBRARY).glob("lib/*/site-packages/*.dist-info/METADATA")):
        found = email.parser.HeaderParser().parsestr(path.read_text())
        if found["Name"] == NAME:
            continue
        licence = found["License-Expression"] or (found["License"] or "").splitlines()[:1]
        said = licence if isinstance(licence, str) else "".join(licence)
        classes = [one.rpartition(" :: ")[2] for one in found.get_all("Classifier", []) if one.startswith("License")]
        lines.append(f"{found['Name']} {found['Version']}: {said or ', '.join(classes) or 'see there'}"[:109])
    return lines


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
