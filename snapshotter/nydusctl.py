"""The `nydusctl` program: upstream's commands for one nydusd, and ours for the whole node.

A command of the snapshotter's side is one line in COMMANDS; its module is imported when the command runs.
"""

from __future__ import annotations

from nydusfs.daemon import ctl

# name -> (module:click command, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("snapshotter.doctor.ctl:command", "What is wrong on this node, and what to do about it."),
    "auth": ("snapshotter.auth.ctl:command", "Which source has the registry credentials of an image."),
}


def main() -> None:
    """Console script."""
    ctl.Group.later = COMMANDS
    ctl.main()


if __name__ == "__main__":
    main()
