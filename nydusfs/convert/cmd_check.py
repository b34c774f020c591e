"""`nydusify check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydusfs.convert.options import backend_flags, client_options, flag


@click.command(
    "check",
    short_help="Check a Nydus image, and compare it with its source entry by entry.",
    epilog="Exit codes: 0 good; 1 differences, or the check could not be made (stderr says which); 2 wrong usage.",
)
@flag("--target", help="Nydus image to check.")
@flag("--source", help="Image it was made from; without it only manifest and bootstrap are checked.")
@flag("--target-insecure", is_flag=True, help="Target registry: accept any certificate, and plain HTTP.")
@flag("--source-insecure", is_flag=True, help="Source registry: accept any certificate, and plain HTTP.")
@flag("--plain-http", is_flag=True, help="Talk plain HTTP to both registries (never to Docker Hub).")
@flag("--hosts-dir", default="", help="Folder of certs.d form (hosts.toml, certificates) for both registries.")
@flag("--platform", env=None, help="Platform to choose from an index. Default: this machine's.")
@flag("--multi-platform", is_flag=True, help="The target must be an index with a plain and a Nydus image.")
@flag("--work-dir", default="./output", type=click.Path(file_okay=False), help="Folder for what was fetched; kept.")
@flag("--nydusd", help="Program that mounts Nydus images. Default: nydusd, beside this program or in PATH.")
@flag("--mount/--no-mount", "mount", env=None, default=None, show_default=False,
      help="Mount both images, or read them without nydusd, FUSE and root. Default: mount if possible.")  # fmt: skip
@flag("--nydus-image", default="nydus-image", help="Accepted for compatibility; bootstraps are checked in process.")
@backend_flags("source-", "the source's blobs are, if not in layers")
@backend_flags("target-", "the target's blobs are, if not in layers")
def command(**given: Any) -> None:
    """Check a Nydus image: manifest rules, bootstrap, and with --source every entry of the file system.

    Type, mode, owner, size, time, device, link target, extended attributes, hard links and the SHA-256 of each file's
    content are compared. Nydus images are mounted with nydusd and plain ones with overlayfs; without a mount, our
    reader and a model of the plain layers take their place. Everything that is wrong is printed, one a line. Manifests,
    configs and bootstraps stay in --work-dir.

    The source may also be a Nydus image, and with such a source the target a plain one.
    """
    if not given["target"]:
        raise click.UsageError("--target is required")
    from nydusfs.convert.backends import chosen_backend
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
        given["nydusd"] or "nydusd",
        True if given["mount"] is None and given["nydusd"] and source else given["mount"],
        chosen_backend(given, "target-"),
        chosen_backend(given, "source-"),
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
        unread = found and result.mounted and any(" be read in the target" in text for text in found.differences)
        why = f"; nydusd's reasons: {Path(given['work_dir']) / 'target' / 'nydusd.log'}" if unread else ""
        click.echo(f"nydusify: {target}: {count} {what}{'s' if count != 1 else ''}{why}", err=True)
        raise click.exceptions.Exit(1)
    click.echo(f"verified image {target}" + (f" against {source}" if source else ""), err=True)
