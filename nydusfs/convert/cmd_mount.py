"""`nydusify mount` (alias `view`)."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import client_options, flag, refuse_unsupported

_LATER: dict[str, Any] = {"backend_type": None, "backend_config": None, "backend_config_file": None}
_LATER_HELP = "Not supported yet."


@click.command("mount", short_help="Mount a Nydus image as a folder until Ctrl-C.")
@flag("--target", help="Nydus image to mount.")
@flag("--target-insecure", is_flag=True, help="Accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to the registry (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for the registry.")
@flag("--mount-path", default="./image-fs", type=click.Path(file_okay=False), help="Where the image appears.")
@flag("--platform", env=None, help="Platform to choose from an index. Default: this machine's.")
@flag("--prefetch", is_flag=True, help="Fetch all data in the background.")
@flag("--work-dir", default="./tmp", type=click.Path(file_okay=False), help="Folder for bootstrap and cache; emptied.")
@flag("--nydusd", default="nydusd", help="Program that mounts.")
@flag("--backend-type", help=_LATER_HELP)
@flag("--backend-config", help=_LATER_HELP)
@flag("--backend-config-file", help=_LATER_HELP)
def command(**given: Any) -> None:
    """Mount a Nydus image as a folder; Ctrl-C or SIGTERM unmounts it. Data is fetched when it is read. Needs root."""
    refuse_unsupported({name: given[name] for name in _LATER}, _LATER)
    if not given["target"]:
        raise click.UsageError("--target is required")
    from nydusfs.convert.endpoints import Connections, parse_location
    from nydusfs.convert.images import load_images
    from nydusfs.convert.nydusd import daemon_config, find_nydusd, mounted, require_root
    from nydusfs.convert.nydusimage import fetch_bootstrap, pick_nydus
    from nydusfs.convert.platforms import Platform, host_platform
    from nydusfs.errors import ConvertError

    require_root()
    target = parse_location(given["target"], client_options(given, given["target_insecure"]))
    program = find_nydusd(given["nydusd"])
    platform = Platform.parse(given["platform"]) if given["platform"] else host_platform()
    work, mountpoint = Path(given["work_dir"]), Path(given["mount_path"]).absolute()
    existed = work.exists()
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="nydusify-", dir=work)).resolve()
    try:
        with Connections() as connections, target.open(connections) as endpoint:
            image, _ = pick_nydus(load_images(endpoint, [platform]))
            if not image.is_nydus:
                raise ConvertError(f"{target} is not a Nydus image")
            boot, wrong = fetch_bootstrap(image, folder)
            if wrong:
                raise ConvertError(f"{target}: {wrong[0]}")
            (folder / "cache").mkdir()
            config = daemon_config(endpoint, folder / "cache", prefetch=given["prefetch"])
        created = not mountpoint.exists()
        try:
            with mounted(program, boot, config, mountpoint, folder) as daemon:
                click.echo(f"{target} is mounted at {mountpoint}; Ctrl-C unmounts it", err=True)
                _block(daemon)
        finally:
            if created:
                try:
                    mountpoint.rmdir()
                except OSError:
                    pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            shutil.rmtree(work, ignore_errors=True)


def _block(daemon: subprocess.Popen[bytes]) -> None:
    from nydusfs.errors import ConvertError

    try:
        status = daemon.wait()
    except KeyboardInterrupt:
        return
    raise ConvertError(f"nydusd ended by itself with status {status}")
