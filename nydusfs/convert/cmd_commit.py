"""`nydusify commit`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import CommaList, client_options, flag, flattened


@click.command(
    "commit",
    short_help="Make a new image of what a container changed.",
    epilog="Example: nydusify commit --container web --target registry.example/web:changed --with-path /data",
)
@flag("--container", help="Container: its id, the beginning of it, or nerdctl's name.")
@flag("--target", help="Where the new image goes.")
@flag("--with-path", "--with-mount-path", "with_path", multiple=True, type=CommaList(),
      help="Also take this folder, with what is mounted there; !PATH leaves a path out. Repeatable.")  # fmt: skip
@flag(
    "-n",
    "--namespace",
    "namespace",
    env="NAMESPACE",
    default="default",
    help="containerd's namespace of the container.",
)
@flag("--containerd-address", env=["CONTAINERD_ADDR", "CONTAINERD_ADDRESS"],
      default="/run/containerd/containerd.sock", help="containerd's socket, with or without unix://.")  # fmt: skip
@flag("--maximum-times", default=400, type=click.IntRange(0), help="Layers that commits may already have added.")
@flag(
    "--source-insecure", is_flag=True, help="Registry of the container's image: accept any certificate, and plain HTTP."
)
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to both registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for both registries.")
@flag("--work-dir", default="./tmp", type=click.Path(file_okay=False), help="Folder for intermediate files.")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; layers are built in process.")
def command(**given: Any) -> None:
    """Make a new image of what a container changed, on top of its Nydus image.

    The container stands still while its files are read and runs on afterwards, whatever happens. A container that does
    not run can be committed as well. Needs root, on the machine of containerd.
    """
    for name in ("container", "target"):
        if not given[name]:
            raise click.UsageError(f"--{name} is required")
    from nydusfs.convert.commit import CommitOptions, commit
    from nydusfs.convert.endpoints import parse_location
    from nydusfs.convert.progress import make_progress

    taken: list[bytes] = []
    left_out: list[bytes] = []
    for text in flattened(given["with_path"]):
        path = text.removeprefix("!")
        if not path.startswith("/") or any(part in (".", "..") for part in path.split("/")):
            raise click.UsageError(f"--with-path {text!r}: give an absolute path without . and ..")
        plain = b"/" + b"/".join(part for part in os.fsencode(path).split(b"/") if part)
        (left_out if text.startswith("!") else taken).append(plain)
    options = CommitOptions(
        container=given["container"],
        target=parse_location(given["target"], client_options(given, given["target_insecure"]), create=True),
        address=given["containerd_address"],
        namespace=given["namespace"],
        source_client=client_options(given, given["source_insecure"]),
        work_dir=Path(given["work_dir"]),
        maximum_times=given["maximum_times"],
        with_paths=tuple(dict.fromkeys(taken)),
        without_paths=tuple(dict.fromkeys(left_out)),
    )
    with make_progress() as progress:
        result = commit(options, progress)
    click.echo(result.digest)
