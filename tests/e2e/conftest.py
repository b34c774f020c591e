"""One stack per test module and containerd generation, with a small image in both forms in its registry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.drivers import driven_by
from tests.lab.erofs import marked_devices
from tests.lab.images import Image
from tests.lab.operated import Lab, operated
from tests.lab.paths import ref_bin
from tests.lab.process import LabError, mounts_below, run, wait_until
from tests.lab.registry import find_program
from tests.lab.sample import small_image
from tests.lab.stack import Stack, StackOptions

PAYLOAD = 24 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.root)


def require_programs() -> None:
    """Skips, loudly, where the layer cannot run; without root it fails in CI."""
    missing = [name for name in ("containerd", "ctr", "runc") if shutil.which(name) is None]
    if missing or find_program() is None:
        pytest.skip(f"end to end: not installed: {', '.join(missing) or 'docker-registry'}")
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("root: needs root and /dev/fuse")


# Each test runs for both drivers and both generations of containerd, not for all pairs of them.
NODES = [("1.6", "fuse"), ("2.x", "fuse"), ("2.x", "erofs")]


def nodes(*kinds: tuple[str, str]) -> pytest.MarkDecorator:
    """Where a test with a fixture that is made on a `node` runs, if not on all `NODES`."""
    return pytest.mark.parametrize("node", kinds, ids="-".join, indirect=True)


either = nodes(NODES[0], NODES[-1])  # both drivers; containerd has no part in it
fuse_nodes = nodes(*NODES[:2])  # both generations; what it is about is not reading


@pytest.fixture(scope="module", params=NODES, ids="-".join)
def node(request: pytest.FixtureRequest) -> Iterator[Path | None]:
    """The containerd to use; daemons made meanwhile have the driver. See `tests.lab.drivers`."""
    generation, driver = request.param
    require_programs()
    with driven_by(driver):
        yield containerd_of(generation)


def containerd_of(generation: str) -> Path | None:
    """None for Debian's; skips when a newer one is wanted and not here."""
    if generation == "1.6":
        return None
    newer = ref_bin("containerd")
    if newer is None or ref_bin("ctr") is None or ref_bin("containerd-shim-runc-v2") is None:
        pytest.skip("interop: no containerd 2.x here")
    return newer


@pytest.fixture(scope="session")
def nerdctl() -> Path:
    found = ref_bin("nerdctl") or (Path(which) if (which := shutil.which("nerdctl")) else None)
    if found is None:
        pytest.skip("interop: no nerdctl here")
    return found


def load_image(
    stack: Stack, name: str = "lab/small", marker: str = "hello", payload: int = PAYLOAD, **options: Any
) -> Image:
    """Pushes the small image as NAME:oci and its conversion as NAME:nydus."""
    image = small_image(stack.work / f"image-{marker}", marker, payload=payload, **options)
    image.push(stack.registry.host, name, "oci")
    stack.convert(f"{name}:oci", f"{name}:nydus")
    shutil.rmtree(image.directory)
    return image


@pytest.fixture(scope="module")
def stack(node: Path | None) -> Iterator[Stack]:
    """Mirror before the registry; no prefetch, so that requests can be counted."""
    with Stack(StackOptions(mirror=True, prefetch=False, containerd=node)) as made:
        load_image(made)
        yield made
    assert made.leftovers == []


def nothing_stays(stack: Stack) -> None:
    """Removes the images of all namespaces: no snapshot, mount or device of the kernel may be left of them."""
    for space in stack.containerd.ctr("namespaces", "ls", "-q").stdout.split():
        prefix = [str(stack.containerd.ctr_binary), "-a", str(stack.containerd.socket), "-n", space]
        for image in run([*prefix, "images", "ls", "-q"], timeout=30).stdout.split():
            run([*prefix, "images", "rm", "--sync", image], timeout=60)
    root = stack.snapshotter.root

    def left() -> list[str]:
        mounts = [point for point in mounts_below(root) if point != str(root / "mnt")]
        devices = marked_devices(root / "cache")
        return [*mounts, *map(str, [*devices, *(root / "snapshots").iterdir(), *(root / "mnt").glob("*")])]

    try:
        wait_until(lambda: not left(), 60, "removal of everything")
    except LabError:
        pytest.fail(f"left behind: {left()}")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_programs()
    with operated() as made:
        yield made
