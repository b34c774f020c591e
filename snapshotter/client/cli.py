"""`ctr-remote`: pulls images for a lazy snapshotter where only containerd and its `ctr` are at hand."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Aliases(click.Group):
    """`image` and `i` for `images`, as ctr has them."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, {"image": "images", "i": "images"}.get(cmd_name, cmd_name))


def _connection_options(command: Any) -> Any:
    command = click.option(
        "-n", "--namespace", metavar="NAME", help="containerd namespace [$CONTAINERD_NAMESPACE, else default]"
    )(command)
    return click.option(
        "-a", "--address", metavar="SOCKET", help=f"containerd's socket [$CONTAINERD_ADDRESS, else {DEFAULT_ADDRESS}]"
    )(command)


@click.group(cls=_Aliases, context_settings=_SETTINGS)
@_connection_options
@click.pass_context
def cli(ctx: click.Context, address: str | None, namespace: str | None) -> None:
    """Pull images with the labels that a lazy snapshotter needs, then use plain ctr:

    \b
      ctr-remote images rpull --plain-http 127.0.0.1:5000/app:nydus
      ctr run --rm --snapshotter nydus 127.0.0.1:5000/app:nydus c1 python3 -V

    Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
    """
    ctx.obj = {"address": address, "namespace": namespace}


@cli.group(context_settings=_SETTINGS)
def images() -> None:
    """Work with images (also: image, i)."""


@images.command("rpull", context_settings=_SETTINGS)
@_connection_options
@click.option("--snapshotter", default="nydus", show_default=True, metavar="NAME", help="a snapshotter of containerd")
@click.option("--plain-http", is_flag=True, help="speak HTTP, not HTTPS (loopback registries need no flag)")
@click.option("-k", "--skip-verify", is_flag=True, help="accept any certificate")
@click.option(
    "-u",
    "--user",
    metavar="NAME[:PASSWORD]",
    help="registry login for this pull (the snapshotter needs its own for what is read later); asks for the password "
    "when it is left out. Without this the logins of docker's config.json are used",
)
@click.option("--hosts-dir", metavar="DIR", default="", help="directory of per-registry hosts.toml files (certs.d)")
@click.option(
    "--platform",
    "platform_name",
    metavar="OS/ARCH",
    default="",
    help="platform of a multi-platform image [this machine's]",
)
@click.option("--use-containerd-labels", is_flag=True, hidden=True)  # what we always do; stargz' tool needs the flag
@click.argument("ref")
@click.pass_obj
def rpull(
    outer: dict[str, str | None],
    address: str | None,
    namespace: str | None,
    snapshotter: str,
    plain_http: bool,
    skip_verify: bool,
    user: str | None,
    hosts_dir: str,
    platform_name: str,
    use_containerd_labels: bool,
    ref: str,
) -> None:
    """Pull REF without downloading what the snapshotter can fetch later.

    Layers that the snapshotter takes over (those of a Nydus image) are not downloaded; ordinary images are pulled and
    unpacked as usual.

    \b
    Examples:
      ctr-remote images rpull docker.io/library/app:nydus
      ctr-remote -n k8s.io image rpull --user robot --hosts-dir /etc/containerd/certs.d reg.example.com/team/app:nydus
      ctr-remote images rpull --snapshotter overlayfs 127.0.0.1:5000/app:plain
    """
    from nydusfs.containerd.client import Containerd
    from nydusfs.registry.client import RegistryClient
    from nydusfs.registry.credentials import Credentials
    from nydusfs.registry.hosts import ClientOptions
    from nydusfs.registry.reference import Reference
    from snapshotter.client.plan import Platform
    from snapshotter.client.progress import make_progress
    from snapshotter.client.pull import Puller

    credentials = None
    if user:
        name, colon, password = user.partition(":")
        if not colon:
            password = click.prompt(f"Password of {name}", hide_input=True, err=True)
        login = Credentials(name, password)
        credentials = lambda: login  # noqa: E731
    reference = Reference.parse(ref)
    platform = Platform.parse(platform_name)
    options = ClientOptions(insecure=skip_verify, plain_http=plain_http, hosts_dir=hosts_dir)
    socket = address or outer["address"] or os.environ.get("CONTAINERD_ADDRESS") or DEFAULT_ADDRESS
    space = namespace or outer["namespace"] or os.environ.get("CONTAINERD_NAMESPACE") or "default"
    with (
        Containerd(socket, space) as containerd,
        RegistryClient(reference.host, options, credentials) as registry,
        make_progress(sys.stderr) as progress,
    ):
        done = Puller(containerd, registry, snapshotter, platform, progress).pull(reference)
    parts = []
    if done.lazy:
        parts.append(f"{done.lazy} left to {snapshotter}")
    if done.present:
        parts.append(f"{done.present} already here")
    if done.downloaded:
        parts.append(f"{done.downloaded} downloaded ({done.bytes / 1e6:.1f} MB)")
    click.echo(f"{done.name} {done.digest}: {done.layers} layers, {', '.join(parts) or 'none new'}")
    if user and done.lazy:
        rest = f"what is left {snapshotter} reads with credentials of its own (nydusctl auth explain {done.name})"
        click.echo(f"ctr-remote: the login of --user was for this pull alone; {rest}", err=True)


def main() -> None:
    """Entry point; one line on stderr for every failure that has a name."""
    from nydusfs.errors import NydusError, os_reason

    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        status = 130
    except KeyboardInterrupt:
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except NydusError as error:
        click.echo(f"ctr-remote: {error}", err=True)
        status = error.exit_code
    except OSError as error:
        click.echo(f"ctr-remote: {os_reason(error)}", err=True)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)
