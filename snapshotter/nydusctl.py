"""The `nydusctl` program: upstream's commands for one nydusd, and ours for the whole node.

A command of the snapshotter's side is one line in COMMANDS; its module is imported when the command runs.
"""

from __future__ import annotations

import logging

from nydusfs.daemon import ctl

# name -> (module:click command, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "cache": ("snapshotter.cachectl.ctl:command", "The cache: list, verify, clean up, fill from files."),
    "doctor": ("snapshotter.doctor.ctl:command", "What is wrong on this node, and what to do about it."),
    "explain": ("snapshotter.explain.ctl:command", "Was a container or image lazy, and what did it wait for?"),
    "node": ("snapshotter.install.ctl:command", "Make this machine a node with this snapshotter, or take it away."),
    "snapshotter": ("snapshotter.operate:command", "The snapshotter itself: stacks, log level, upgrade of all nydusd."),
    "top": ("snapshotter.top:command", "Images, mirrors and daemons at work, live."),
    "auth": ("snapshotter.auth.ctl:command", "Which source has the registry credentials of an image."),
}


def main() -> None:
    """Console script."""
    # what is wrong is a finding or an error; the log lines of what is read on the way are for its own program
    logging.getLogger().addHandler(logging.NullHandler())
    ctl.Group.later = COMMANDS
    ctl.main()


if __name__ == "__main__":
    main()
