"""Regenerates the Python code of the .proto files beside it; `--check` only tells whether it is fresh.

    python -m protos.generate [--check]

Needs grpcio-tools (development only). Exit 0: written, or fresh; 1: stale or missing files, listed on stderr.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
# Generator versions are stamped into the output; a check must not fail because a newer grpcio-tools is installed.
_STAMP = re.compile(
    r"^(# Protobuf Python Version:.*|GRPC_GENERATED_VERSION = .*|\s+\d+,|\s+'',|.*ValidateProtobufRuntimeVersion.*)$",
    re.M,
)


def generate(into: Path) -> None:
    """Writes the generated modules below `into`, in the same tree as the sources.

    Raises SystemExit with protoc's status if it refuses a file.
    """
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path.relative_to(HERE.parent)) for path in HERE.rglob("*.proto"))
    options = [f"-I{HERE.parent}", f"-I{well_known}", *(f"--{kind}={into}" for kind in OUTPUTS)]
    status = protoc.main(["protoc", *options, *sources])
    if status:
        raise SystemExit(status)


OUTPUTS = ("python_out", "pyi_out", "grpc_python_out")


def _comparable(path: Path) -> str:
    return _STAMP.sub("", path.read_text())


def stale() -> list[str]:
    """Paths (relative to the repository) whose committed text differs from what the sources give."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {p.relative_to(scratch): p for p in Path(scratch).rglob("*") if p.name.endswith(SUFFIXES)}
        kept = {p.relative_to(HERE.parent): p for p in HERE.rglob("*") if p.name.endswith(SUFFIXES)}
        different = set(fresh) ^ set(kept)
        different |= {name for name in set(fresh) & set(kept) if _comparable(fresh[name]) != _comparable(kept[name])}
    return sorted(str(name) for name in different)


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        names = stale()
        for name in names:
            print(f"stale: {name} (run python -m protos.generate)", file=sys.stderr)
        return 1 if names else 0
    if arguments:
        print("usage: python -m protos.generate [--check]", file=sys.stderr)
        return 2
    generate(HERE.parent)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
