"""The `nydusctl` command: a thin client of the daemon's API.

Exit status: 0 done; 1 the daemon cannot be reached or refused, said in one line on stderr; 2 wrong usage.
"""

from __future__ import annotations

import importlib
import json
import sys
from http.client import HTTPException
from typing import Any, ClassVar

import click

from nydusfs.unixhttp import UnixConnection

TIMEOUT = 60.0  # seconds; a mount may have to index a large image


class Client:
    """Requests to one daemon. Raises `click.ClickException` with the daemon's own words."""

    def __init__(self, sock: str) -> None:
        self.sock = sock

    def call(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        from urllib.parse import urlencode

        target = f"/api/v1/{path}" + (f"?{urlencode(query, errors='surrogateescape')}" if query else "")
        connection = UnixConnection(self.sock, TIMEOUT)
        try:
            connection.request(method, target, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise click.ClickException(f"no nydusd answers at {self.sock}: {reason}") from None
        finally:
            connection.close()
        try:
            value = json.loads(data) if data else None
        except ValueError:
            raise click.ClickException(f"{self.sock}: the answer to {method} {target} is not JSON") from None
        if answer.status >= 300:
            message = value.get("message") if isinstance(value, dict) else data.decode(errors="replace")
            raise click.ClickException(f"nydusd refused ({answer.status}): {message}")
        return value


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, separators=(",", ":"), sort_keys=True))


class Group(click.Group):
    """`later`: commands of other packages by name, `module:attribute` and one line of help, imported when they run.

    They ask the whole node and not one daemon, so `--sock` is not theirs.
    """

    later: ClassVar[dict[str, tuple[str, str]]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(self.later)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.later:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.later[cmd_name][0].partition(":")
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [(name, self.commands[name].get_short_help_str(70)) for name in super().list_commands(ctx)]
        with formatter.section("Commands for one daemon, named by --sock"):
            formatter.write_dl(own)
        if self.later:
            with formatter.section("Commands for the whole node"):
                formatter.write_dl([(name, text) for name, (_, text) in sorted(self.later.items())])


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("-S", "--sock", metavar="PATH", help="The daemon's API socket.")
@click.option("-r", "--raw", is_flag=True, help="Print the daemon's JSON.")
@click.version_option("v0.1.0", "-V", "--version", message="nydusctl %(version)s")
@click.pass_context
def cli(ctx: click.Context, sock: str | None, raw: bool) -> None:
    """Ask a running nydusd, or change it; or look at all of a node.

    \b
      nydusctl --sock /run/nydusd.sock info
      nydusctl --sock /run/nydusd.sock set log_level debug
      nydusctl --sock /run/nydusd.sock metrics fsstats
      nydusctl --sock /run/nydusd.sock mount -s image.boot -c nydusd.json -m /img -t rafs
      nydusctl --sock /run/nydusd.sock umount /img
      nydusctl --sock /run/nydusd.sock upgrade
    """
    if ctx.invoked_subcommand in Group.later:
        return
    if sock is None:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    ctx.obj = (Client(sock), raw)


_raw = click.option("-r", "--raw", "raw_too", is_flag=True, help="Print the daemon's JSON.")


@cli.command()
@_raw
@click.pass_obj
def info(obj: tuple[Client, bool], raw_too: bool) -> None:
    """Version, state and mounted images."""
    client, raw = obj
    value = client.call("GET", "daemon")
    if raw or raw_too:
        _echo_json(value)
        return
    version = value["version"]
    lines = [
        "",
        f"Version:                {json.dumps(version['package_ver'])}",
        f"Status:                 {json.dumps(value['state'])}",
        f"Profile:                {json.dumps(version['profile'])}",
        f"Commit:                 {json.dumps(version['git_commit'])}",
        "Instances:",
    ]
    for path, mounted in sorted((value.get("backend_collection") or {}).items()):
        lines += [
            f"\tInstance Mountpoint:  {path}",
            f"\tType:  {mounted['backend_type']}",
            f"\tMounted Time:  {mounted['mounted_time']}",
        ]
        rafs = (mounted.get("config") or {}).get("rafs")
        if rafs:
            lines += [
                f"\tMode:  {rafs['mode']}",
                f"\tPrefetch:  {json.dumps(rafs['prefetch']['enable'])}",
                f"\tPrefetch Merging Size:  {rafs['prefetch']['batch_size']}",
            ]
        lines.append("")
    click.echo("\n".join(lines))


@cli.command("set")
@click.argument("kind", metavar="KIND", type=click.Choice(["log_level", "log-level"]))
@click.argument("value", metavar="VALUE")
@click.pass_obj
def set_value(obj: tuple[Client, bool], kind: str, value: str) -> None:
    """Change a setting: KIND log_level, VALUE trace, debug, info, warn, error or off."""
    obj[0].call("PUT", "daemon", {"log_level": value})


@cli.command()
@click.argument("category", type=click.Choice(["backend", "cache", "blobcache", "fsstats", "sources", "slow"]))
@click.option("-I", "--interval", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="Print again and again, this many seconds apart.")  # fmt: skip
@click.option("--id", "instance", metavar="ID", help="Mountpoint (for cache: id of the configuration) of the image.")
@_raw
@click.pass_obj
def metrics(
    obj: tuple[Client, bool], category: str, interval: float | None, instance: str | None, raw_too: bool
) -> None:
    """Counters of the storage backend, the cache or the file system; what is known of each mirror and registry; the
    files that readers waited for longest."""
    import time

    client, raw = obj
    paths = {"backend": "metrics/backend", "fsstats": "metrics", "sources": "metrics/sources", "slow": "metrics/slow"}
    path = paths.get(category, "metrics/blobcache")
    query = {} if instance is None else {"id": instance}
    while True:
        value = client.call("GET", path, **query)
        if raw or raw_too:
            _echo_json(value)
        elif isinstance(value, list):
            _print_sources(value)
        elif category == "slow":
            _print_slow(value)
        else:
            _print_metrics(value)
        if interval is None:
            return
        time.sleep(interval)


_FOPS = (
    *("Getattr", "Readlink", "Open", "Release", "Read", "Statfs", "Getxattr", "Listxattr"),
    *("Opendir", "Lookup", "Readdir", "Readdirplus", "Access", "Forget", "BatchForget"),
)
_SIZES = ["<1K", "1K~", "4K~", "16K~", "64K~", "128K~", "512K~", "1M~"]
_LATENCIES = ["<200us", "~1ms", "~20ms", "~50ms", "~500ms", "~1s", "~2s", "2s~"]


def _row(title: str, cells: list[Any]) -> str:
    return f"{title:<25}" + "".join(f"{cell!s:<8}" for cell in cells)


def _print_metrics(value: dict[str, Any]) -> None:
    if "fop_hits" in value:
        hits = [f"{name}({count})" for name, count in zip(_FOPS, value["fop_hits"], strict=False)]
        click.echo("\n".join([
            "", _row("Read Latency:", _LATENCIES), _row("Reads Count:", value["read_latency_dist"]), "",
            f"Read Errors: {value['fop_errors'][4]}", f"Read Data: {value['data_read']}Bytes", "",
            "FOP Counters:", " ".join(hits[:8]), " ".join(hits[8:]),
        ]))  # fmt: skip
    elif "read_count" in value:
        click.echo("\n".join([
            "", f"Backend Type:       {json.dumps(value['backend_type'])}",
            f"Read Amount:        {value['read_amount_total']} Bytes", f"Read Count:         {value['read_count']}",
            f"Read Errors:        {value['read_errors']}", "",
            _row("Block Sizes:", _SIZES), _row("Request Count:", value["read_count_block_size_dist"]),
            _row("Total millis:", value["read_cumulative_latency_millis_dist"]),
        ]))  # fmt: skip
    else:
        width = max(len(key) for key in value)
        for key, item in value.items():
            click.echo(f"{key:<{width}}  {', '.join(map(str, item)) if isinstance(item, list) else item}")


def _print_slow(value: dict[str, Any]) -> None:
    for entry in value["files"]:
        click.echo(
            f"{entry['waited_micros'] / 1e6:9.3f} s in {entry['reads']} reads, the longest "
            f"{entry['longest_micros'] / 1e6:.3f} s  {entry['path']}"
        )
    for entry in value["failed"]:
        click.echo(f"{entry['reads']} reads failed  {entry['path']}")


def _print_sources(sources: list[dict[str, Any]]) -> None:
    for source in sources:
        wait = source["first_byte_millis"]
        speed = "not used yet" if wait is None else f"{wait} ms, {source['bytes_per_second'] / 1e6:.1f} MB/s"
        failure = f", last failure: {source['last_failure']}" if source["last_failure"] else ""
        click.echo(
            f"{source['address']}  {source['state']}, {speed}, {source['in_flight']} in flight, "
            f"{100 * source['error_rate']:.1f} % errors{failure}"
        )


@cli.command()
@click.option("-s", "--source", required=True, metavar="FILE", help="Bootstrap of the image.")
@click.option("-c", "--config", required=True, type=click.File(encoding="utf-8"), help="Its daemon configuration.")
@click.option("-m", "--mountpoint", required=True, metavar="PATH", help="Where inside the daemon's mount.")
@click.option("-t", "--type", "kind", required=True, type=click.Choice(["rafs", "passthrough_fs"]))
@_raw
@click.pass_obj
def mount(obj: tuple[Client, bool], source: str, config: Any, mountpoint: str, kind: str, raw_too: bool) -> None:
    """Mount one more image."""
    try:
        text = config.read()
    except UnicodeDecodeError:
        raise click.ClickException(f"configuration {config.name} is not UTF-8 text") from None
    body = {"source": source, "fs_type": kind, "config": text}
    obj[0].call("POST", "mount", body, mountpoint=mountpoint)


@cli.command()
@click.argument("path", metavar="[MOUNTPOINT]", required=False)
@click.option("-m", "--mountpoint", metavar="PATH", help="The same as an option, as upstream's nydusctl wants it.")
@_raw
@click.pass_obj
def umount(obj: tuple[Client, bool], path: str | None, mountpoint: str | None, raw_too: bool) -> None:
    """Unmount the image at MOUNTPOINT."""
    if (path is None) == (mountpoint is None):
        raise click.UsageError("name the mountpoint once: `nydusctl umount /img` or `nydusctl umount -m /img`")
    obj[0].call("DELETE", "mount", mountpoint=path or mountpoint or "")


@cli.command()
@click.option("-m", "--mountpoint", metavar="PATH", help="Of the image, when there are several.")
@click.option("--files", is_flag=True, help="Only the paths of the files read, one per line: a prefetch list.")
@click.option("--import", "source", type=click.File("rb"), metavar="FILE", help="Take the profile of another node.")
@click.pass_obj
def profile(obj: tuple[Client, bool], mountpoint: str | None, files: bool, source: Any) -> None:
    """Show or replace what starts of an image read first, which its next cold start is given ahead.

    \b
      nydusctl --sock S profile -m /4 > python.profile       to carry it to other nodes
      nydusctl --sock S profile -m /4 --import python.profile
      nydusctl --sock S profile -m /4 --files | nydusify convert --prefetch-patterns ...
    """
    query = {"id": mountpoint} if mountpoint else {}
    if source is not None:
        try:
            value = json.loads(source.read())
        except ValueError as error:
            raise click.ClickException(f"{source.name} is not a profile: {error}") from None
        obj[0].call("PUT", "profile", value, **query)
        return
    value = obj[0].call("GET", "profile", **query)
    if files:
        for path in value["files"]:
            click.echo(path.encode("utf-8", "surrogateescape"))
    else:
        _echo_json(value)


@cli.command()
@_raw
@click.pass_obj
def stacks(obj: tuple[Client, bool], raw_too: bool) -> None:
    """Where every thread and task is: what a daemon that hangs is waiting for."""
    client, raw = obj
    value = client.call("GET", "daemon/stacks")
    if raw or raw_too:
        _echo_json(value)
        return
    from nydusfs.stacks import as_text

    click.echo(as_text({"threads": value["threads"], "tasks": value["tasks"]}))


@cli.command()
@_raw
@click.pass_obj
def upgrade(obj: tuple[Client, bool], raw_too: bool) -> None:
    """Have the installed code serve in place of the running one; mounts and open files go on."""
    obj[0].call("PUT", "daemon/upgrade")


def main() -> None:
    """Of this package alone; the console script is `snapshotter.nydusctl:main`, which adds the node's commands."""
    try:
        cli(prog_name="nydusctl")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk below standard output
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {where}{error.strerror or error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
