"""The `nydusd` command. Everything heavy is imported only when a daemon really starts.

Exit status: 0 after a stop by signal, API or umount; 1 after any error, said in one line on stderr; 2 for wrong usage.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from nydusfs.daemon import flags


def start(settings: dict[str, Any]) -> int:
    """Serve until the end; the exit status. `settings`: of `flags`."""
    options = dict(settings)
    keeper = options.pop("keeper")
    about_log = ("log_level", "log_file", "log_rotation_size", "log_format")
    spec: dict[str, Any] = {name: options.pop(name) for name in about_log}
    spec["options"] = options
    os.umask(os.umask(0o077) | 0o027)  # whoever started this: nothing is made for others, nothing for a group to write
    if keeper:
        from nydusfs.keeper import keeper as keeping

        return keeping.run(spec)
    from nydusfs.daemon import worker

    return worker.run(spec, None)


def main() -> None:
    if sys.argv[1:] in (["-V"], ["--version"]):
        from nydusfs.daemon.version import version_text

        print(version_text())
        return
    settings = flags.read(sys.argv[1:])
    if settings is not None:
        sys.exit(start(settings))
    from nydusfs.daemon.commands import cli

    cli(prog_name="nydusd")


if __name__ == "__main__":
    main()
