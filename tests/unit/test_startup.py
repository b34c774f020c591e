"""What an image starts with, found in the bootstraps of its layers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bootstrap.build import build_layer
from bootstrap.options import BuildOptions
from nydusfs.convert.startup import startup_files
from tests.lab.images import entry


def layer(folder: Path, number: int, members: list[tuple[tarfile.TarInfo, bytes | None]]) -> Path:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body) if body is not None else None)
    tar.seek(0)
    path = folder / f"layer-{number}.boot"
    path.write_bytes(build_layer(tar, io.BytesIO(), BuildOptions()).bootstrap)
    return path


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    below = [
        entry("usr"), entry("usr/bin"), entry("bin", link="usr/bin"), entry("usr/bin/tool", "1", mode=0o755),
        entry("usr/bin/loop", link="loop"), entry("usr/bin/out", link="../../../../usr/bin/tool"),
        entry("usr/bin/folder"),
    ]  # fmt: skip
    above = [
        entry("usr"), entry("usr/local"), entry("usr/local/bin"), entry("usr/local/bin/start.sh", "x", mode=0o755),
        entry("usr/bin"), entry("usr/bin/python3", link="python3.11"), entry("usr/bin/python3.11", "2", mode=0o755),
    ]  # fmt: skip
    return [layer(tmp_path, 0, below), layer(tmp_path, 1, above)]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"Cmd": ["python3", "-V"]}, ["/usr/bin/python3.11"]),
        ({"Entrypoint": ["start.sh"], "Cmd": ["tool"]}, ["/usr/local/bin/start.sh", "/usr/bin/tool"]),
        ({"Cmd": ["/bin/tool"]}, ["/usr/bin/tool"]),
        ({"Cmd": ["./tool"], "WorkingDir": "/usr/bin"}, ["/usr/bin/tool"]),
        ({"Cmd": ["tool"], "Env": ["A=b", "PATH=/nowhere:/bin"]}, ["/usr/bin/tool"]),
        ({"Cmd": ["out"]}, ["/usr/bin/tool"]),
        ({"Cmd": ["loop"]}, []),
        ({"Cmd": ["folder"]}, []),
        ({"Cmd": ["absent"], "Entrypoint": None}, []),
        ({"Cmd": [7], "Env": [3]}, []),
        ({"Cmd": "tool"}, []),
        (None, []),
    ],
)
def test_programs_are_found_through_layers_and_links(
    layers: list[Path], settings: dict[str, Any] | None, found: list[str]
) -> None:
    assert startup_files({"config": settings}, layers) == found
