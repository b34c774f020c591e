"""`nydusify mount` (alias `view`)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import backend_flags, client_options, flag


@click.command(
    "mount",
    short_help="Mount a Nydus image as a folder until Ctrl-C.",
    epilog="Example: nydusify mount --target registry.example/app:nydus --mount-path /mnt/app",
)
@flag("--target", help="Nydus image to mount: a reference, or file:///PATH of an archive or OCI layout.")
@flag("--target-insecure", is_flag=True, help="Accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to the registry (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for the registry.")
@flag("--mount-path", default="./image-fs", type=click.Path(file_okay=False), help="Where the image appears.")
@flag("--platform", env=None, help="Platform to choose from an index. Default: this machine's.")
@flag("--prefetch", is_flag=True, help="Fetch all data in the background.")
@flag("--work-dir", default="./tmp", type=click.Path(file_okay=False), help="Folder for bootstrap and cache; emptied.")
@flag("--nydusd", default="nydusd", help="Program that mounts.")
@backend_flags("", "the image's blobs are, if not in layers")
def command(**given: Any) -> None:
    """Mount a Nydus image as a folder; Ctrl-C or SIGTERM unmounts it. Data is fetched when it is read. Needs root."""
    if not given["target"]:
        raise click.UsageError("--target is required")
    from nydusfs.convert.backends import chosen_backend
    from nydusfs.convert.endpoints import Connections, parse_location
    from nydusfs.convert.images import load_images
    from nydusfs.convert.nydusd import daemon_config, find_nydusd, mounted, require_root
    from nydusfs.convert.nydusimage import pick_nydus, unpack_image
    from nydusfs.convert.platforms import Platform, host_platform
    from nydusfs.convert.progress import make_progress
    from nydusfs.convert.workdir import work_folder

    backend = chosen_backend(given)
    require_root()
    target = parse_location(given["target"], client_options(given, given["target_insecure"]))
    program = find_nydusd(given["nydusd"])
    platform = Platform.parse(given["platform"]) if given["platform"] else host_platform()
    mountpoint = Path(given["mount_path"]).absolute()
    with work_folder(Path(given["work_dir"])) as work:
        folder = work.resolve()
        with (
            make_progress() as progress,
            Connections() as connections,
            target.prepare(folder / "image").open(connections) as endpoint,
        ):
            image, _ = pick_nydus(load_images(endpoint, [platform]))
            nydus = unpack_image(image, folder)
            config = daemon_config(nydus, folder, backend=backend, prefetch=given["prefetch"], progress=progress)
        created = not mountpoint.exists()
        try:
            with mounted(program, nydus.bootstrap, config, mountpoint, folder) as daemon:
                _block(daemon, f"{target} is mounted at {mountpoint}; Ctrl-C unmounts it")
        finally:
            if created:
                try:
                    mountpoint.rmdir()
                except OSError:
                    pass


def _block(daemon: subprocess.Popen[bytes], announcement: str) -> None:
    from nydusfs.errors import ConvertError

    try:
        click.echo(announcement, err=True)  # from now on Ctrl-C is the way to end
        status = daemon.wait()
    except KeyboardInterrupt:
        return
    raise ConvertError(f"nydusd ended by itself with status {status}")
