"""`nydusify check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import client_options, flag, refuse_unsupported

_LATER: dict[str, Any] = {
    "source_backend_type": None,
    "source_backend_config": None,
    "source_backend_config_file": None,
    "target_backend_type": None,
    "target_backend_config": None,
    "target_backend_config_file": None,
}
_LATER_HELP = "Not supported yet."


@click.command(
    "check",
    short_help="Check a Nydus image, and compare it with its source entry by entry.",
    epilog="Exit codes: 0 good; 1 differences, or the check could not be made (stderr says which); 2 wrong usage.",
)
@flag("--target", help="Nydus image to check.")
@flag("--source", help="Plain image it was made from; without it only manifest and bootstrap are checked.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--source-insecure", is_flag=True, help="Source registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to both registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for both registries.")
@flag("--platform", env=None, help="Platform to choose from an index. Default: this machine's.")
@flag("--multi-platform", is_flag=True, help="The target must be an index with a plain and a Nydus image.")
@flag("--work-dir", default="./output", type=click.Path(file_okay=False), help="Folder for what was fetched; kept.")
@flag("--nydusd", default="nydusd", help="Program that mounts the target.")
@flag("--no-mount", is_flag=True, help="Read the target without nydusd: needs no root and no FUSE.")
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; bootstraps are checked in process.")
@flag("--source-backend-type", help=_LATER_HELP)
@flag("--source-backend-config", help=_LATER_HELP)
@flag("--source-backend-config-file", help=_LATER_HELP)
@flag("--target-backend-type", help=_LATER_HELP)
@flag("--target-backend-config", help=_LATER_HELP)
@flag("--target-backend-config-file", help=_LATER_HELP)
def command(**given: Any) -> None:
    """Check a Nydus image: manifest rules, bootstrap, and with --source every entry of the file system.

    The target is mounted with nydusd (root needed) and compared with the source's layers: type, mode, owner, size,
    time, device, link target, extended attributes, hard links and the SHA-256 of each file's content. Differences are
    printed one a line.
    """
    refuse_unsupported({name: given[name] for name in _LATER}, _LATER)
    if not given["target"]:
        raise click.UsageError("--target is required")
    from nydusfs.convert.check import CheckOptions, check
    from nydusfs.convert.endpoints import parse_location
    from nydusfs.convert.platforms import Platform, host_platform
    from nydusfs.convert.progress import make_progress

    target = parse_location(given["target"], client_options(given, given["target_insecure"]))
    source = None
    if given["source"]:
        source = parse_location(given["source"], client_options(given, given["source_insecure"]))
    options = CheckOptions(
        target,
        source,
        Platform.parse(given["platform"]) if given["platform"] else host_platform(),
        given["multi_platform"],
        Path(given["work_dir"]),
        given["nydusd"],
        not given["no_mount"],
    )
    with make_progress() as progress:
        result = check(options, progress)
    for violation in result.violations:
        click.echo(violation)
    found = result.comparison
    if found is not None and found.count:
        for text in found.differences:
            click.echo(text)
        if found.count > len(found.differences):
            click.echo(f"… and {found.count - len(found.differences)} more")
    if not result.ok:
        count = len(result.violations) + (found.count if found else 0)
        what = "difference" if found else "violation"
        unread = found and options.use_mount and any(" be read in the target" in text for text in found.differences)
        why = f"; nydusd's reasons: {Path(given['work_dir']) / 'target' / 'nydusd.log'}" if unread else ""
        click.echo(f"nydusify: {target}: {count} {what}{'s' if count != 1 else ''}{why}", err=True)
        raise click.exceptions.Exit(1)
    click.echo(f"verified image {target}" + (f" against {source}" if source else ""), err=True)
