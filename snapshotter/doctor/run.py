"""All checks of a node, in order; one that fails itself is a finding too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nydusfs.errors import NydusError
from snapshotter.doctor import above, installed, machine, remote, services, storage
from snapshotter.doctor.finding import Check, Finding, Level
from snapshotter.errors import SnapshotterError
from snapshotter.node import Node, Unreadable


def findings(node: Node, images: tuple[str, ...] = ()) -> Iterator[Finding]:
    """`images`: references whose registries are tried although none of them is mounted."""
    tried: list[Check] = [partial(check, extra=images) for check in remote.CHECKS]
    for check in (*machine.CHECKS, *services.CHECKS, *installed.CHECKS, *above.CHECKS, *storage.CHECKS, *tried):
        try:
            yield from check(node)
        except Unreadable:
            continue  # said by the check of the database
        except SnapshotterError as failure:
            if node.settings is not None:  # else said by the check of the settings
                yield Finding(_name(check), Level.ERROR, str(failure), "")
        except (NydusError, OSError) as failure:
            yield Finding(_name(check), Level.WARNING, f"this could not be looked at: {failure}", "run it as root")


def _name(check: Check) -> str:
    function = check.func if isinstance(check, partial) else check
    return f"doctor.{getattr(function, '__name__', 'check')}"
