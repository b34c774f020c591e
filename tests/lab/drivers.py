"""For which driver a test of the reading side runs: for both, if nothing but FUSE's own nature is against it.

A module or a test that asks for `both` (the fixture `fs_driver`, which every fixture that starts a daemon for several
tests must ask for as well) runs once for each; `fuse_only(why)` takes a test of such a module out.
`NYDUS_TEST_FS_DRIVER` names one driver for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab import daemon
from tests.lab.erofs import cannot_mount_erofs

DEFAULT = daemon.DRIVER
DRIVERS = [DEFAULT] if DEFAULT else ["fuse", "erofs"]

both = pytest.mark.usefixtures("fs_driver")


def fuse_only(why: str) -> pytest.MarkDecorator:
    """`why`: what of the test EROFS mounts cannot have by their nature, or what it is about if not reading."""
    assert why
    return pytest.mark.parametrize("fs_driver", ["fuse"], indirect=True)


@contextmanager
def driven_by(name: str) -> Iterator[None]:
    """Daemons made meanwhile have this driver, unless they choose one. Skips where this kernel cannot."""
    if name not in ("", "fuse") and (reason := cannot_mount_erofs()):
        pytest.skip(reason)
    before, daemon.DRIVER = daemon.DRIVER, name
    try:
        yield
    finally:
        daemon.DRIVER = before
