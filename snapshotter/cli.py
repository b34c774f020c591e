"""`containerd-nydus-grpc`: flags of three generations (snapshotter.md 4.1 to 4.3), Go's way of writing them.

Exit codes: 0 ended by SIGTERM or SIGINT; 1 the machine or another instance is in the way; 2 wrong flags or
configuration.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from bootstrap.cli.params import ParamType

_SHORT = {"-c": "--config-path", "-R": "--root", "-l": "--log-level", "-C": "--cache-dir", "-L": "--log-dir"}
_SHORT["-M"] = "--daemon-mode"
_UNIT_TUNABLES = "glibc.malloc.tcache_count=0"  # as systemd/containerd-nydus-grpc.service has it
_TRUE, _FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False")

# flag -> (aliases, setting). Settings are keys of the TOML file.
_TEXT: dict[str, tuple[tuple[str, ...], str]] = {
    "--root": ((), "root"),
    "--address": ((), "address"),
    "--nydusd": (("--nydusd-path",), "daemon.nydusd_path"),
    "--nydus-image": (("--nydusimg-path",), "daemon.nydusimage_path"),
    "--daemon-mode": ((), "daemon_mode"),
    "--fs-driver": (("--daemon-backend",), "daemon.fs_driver"),
    "--log-level": ((), "log.level"),
    "--cache-dir": ((), "cache_manager.cache_dir"),
    "--log-dir": ((), "log.dir"),
    "--log-format": ((), "log.format"),
    "--recover-policy": ((), "daemon.recover_policy"),
    "--nydus-overlayfs-path": ((), "snapshot.nydus_overlayfs_path"),
    "--gc-period": ((), "cache_manager.gc_period"),
    "--metrics-address": ((), "metrics.address"),
    "--publickey-file": ((), "image.public_key_file"),
    "--kubeconfig-path": ((), "remote.auth.kubeconfig_path"),
    "--image-service-address": ((), "remote.auth.image_service_address"),
    "--api-socket": ((), "system.address"),
    # upstream has these in the TOML file alone; with --config-path there is none
    "--credential-provider-config": ((), "remote.auth.credential_provider_config"),
    "--credential-provider-bin-dir": ((), "remote.auth.credential_provider_bin_dir"),
    "--credential-renewal-interval": ((), "remote.auth.credential_renewal_interval"),
    "--mirrors-config-dir": ((), "remote.mirrors_config.dir"),
}
_BOOLEAN: dict[str, str] = {
    "--log-to-stdout": "log.log_to_stdout",
    "--cleanup-on-close": "cleanup_on_close",
    "--sync-remove": "snapshot.sync_remove",
    "--convert-vpc-registry": "remote.convert_vpc_registry",
    "--disable-cache-manager": "cache_manager.disable",
    "--enable-nydus-overlayfs": "snapshot.enable_nydus_overlayfs",
    "--enable-stargz": "experimental.enable_stargz",
    "--validate-signature": "image.validate_signature",
    "--enable-kubeconfig-keychain": "remote.auth.enable_kubeconfig_keychain",
    "--enable-cri-keychain": "remote.auth.enable_cri_keychain",
    "--enable-system-controller": "system.enable",
    "--enable-tarfs": "experimental.tarfs.enable_tarfs",
    "--enable-index-detect": "experimental.enable_index_detect",
    "--enable-referrer-detect": "experimental.enable_referrer_detect",
    "--enable-kubelet-credential-providers": "remote.auth.enable_kubelet_credential_providers",
}
_SPECIAL_BOOLEAN = ("--shared-daemon", "--async-remove", "--enable-metrics", "--version", "--help")
_SHOWN = {
    "--root": "State, snapshots, logs.",
    "--address": "Unix socket that containerd's proxy plugin dials.",
    "--nydusd": "nydusd program [default: beside this program, else in PATH].",
    "--daemon-mode": "shared (one nydusd for all images, default) or dedicated (one for each).",
    "--log-level": "trace, debug, info, warn, error.",
    "--log-format": "text (as upstream's) or json.",
    "--log-to-stdout": "Log to stdout instead of ROOT/logs/nydus-snapshotter.log.",
    "--cache-dir": "Blob cache, instead of the work_dir of the nydusd JSON [default: ROOT/cache].",
}

_EPILOG = """\b
Examples:
  containerd-nydus-grpc --config-path /etc/nydus/config.json
  containerd-nydus-grpc --config /etc/nydus/config.toml
  containerd-nydus-grpc --nydusd-config /etc/nydus/nydusd-config.json --log-to-stdout

\b
containerd finds it with:
  [proxy_plugins.nydus]
    type = "snapshot"
    address = "/run/containerd-nydus/containerd-nydus-grpc.sock"

Flags win over the TOML file. Flags of older releases (--shared-daemon, --nydusd-path, ...) are accepted."""


def go_arguments(arguments: Sequence[str]) -> list[str]:
    """Go's flag syntax in click's: `-flag` is `--flag`, a bare boolean is `--flag=true`."""
    booleans = {*_BOOLEAN, *_SPECIAL_BOOLEAN}
    out: list[str] = []
    for at, word in enumerate(arguments):
        if word == "--":
            return [*out, *arguments[at:]]
        name, equals, value = word.partition("=")
        if name.startswith("-") and len(name) > 1:
            name = _SHORT.get(name, name if name.startswith("--") or name == "-h" else f"-{name}")
        if name in ("--version", "--help", "--repair") and value not in _FALSE:
            out.append(name)
        elif name in booleans and not equals:
            out.append(f"{name}=true")
        else:
            out.append(name + equals + value)
    return out


class _GoBool(ParamType[bool]):
    name = "bool"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> bool:
        if value not in _TRUE and value not in _FALSE:
            self.fail(f"{value!r} is neither true nor false", param, context)
        return value in _TRUE


def _command() -> click.Command:
    def option(*names: str, **more: Any) -> click.Option:
        return click.Option([*names, names[0].strip("-").replace("-", "_")], **more)

    parameters: list[click.Parameter] = [
        option("--config", metavar="FILE", help="Snapshotter TOML; or nydusd JSON, told apart by content."),
        option("--config-path", metavar="FILE", help="nydusd JSON, the template for every image."),
        option("--nydusd-config", metavar="FILE", help="The same, in newer releases."),
    ]
    for name, (aliases, _) in _TEXT.items():
        parameters.append(option(name, *aliases, help=_SHOWN.get(name), hidden=name not in _SHOWN))
    parameters.append(option("--nydusd-thread-num", type=int, hidden=True))
    for name in (*_BOOLEAN, "--shared-daemon", "--async-remove", "--enable-metrics"):
        shown = _SHOWN.get(name)
        parameters.append(option(name, type=_GoBool(), metavar="[=BOOL]", help=shown, hidden=shown is None))
    parameters.append(option("--metrics-file", hidden=True))
    rebuilt = "Rebuild the snapshot database from the directories and daemons, and exit."
    parameters.append(option("--repair", is_flag=True, help=rebuilt))
    parameters.append(option("--version", is_flag=True, help="Print the version and exit."))
    return click.Command(
        "containerd-nydus-grpc",
        params=parameters,
        callback=_run,
        help="Snapshotter for containerd that starts containers before their Nydus images are downloaded.",
        epilog=_EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """Values of the flags given, under the names of the TOML keys and of the three file flags."""

    def given(flag: str) -> Any:
        return options.get(flag.strip("-").replace("-", "_"))

    values: dict[str, Any] = {name: given(name) for name in ("config", "config-path", "nydusd-config") if given(name)}
    for flag, (_, key) in _TEXT.items():
        if given(flag) is not None:
            values[key] = given(flag)
    for flag, key in _BOOLEAN.items():
        if given(flag) is not None:
            values[key] = given(flag)
    if given("--nydusd-thread-num") is not None:
        values["daemon.threads_number"] = given("--nydusd-thread-num")
    if given("--async-remove") is not None:
        values["snapshot.sync_remove"] = not given("--async-remove")
    if given("--shared-daemon"):
        values["daemon_mode"] = "shared"
    return values


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line gives. Raises click.ClickException for one that is wrong."""
    with _command().make_context("containerd-nydus-grpc", go_arguments(arguments)) as context:
        return settings_of(context.params)


def _run(**options: Any) -> None:
    if options["version"]:
        from importlib.metadata import version

        click.echo(f"Version:    v{version('nydus-py')}")
        click.echo(f"Python:     {sys.version.split()[0]}")
        return
    # the imports cost 0.2 s that --help does not need; nothing of them is garbage, and looking for it takes a tenth
    gc.disable()
    from nydusfs import stacks
    from snapshotter import lean

    lean.import_grpc()
    from snapshotter import logs, settings
    from snapshotter.errors import SettingsError, SnapshotterError
    from snapshotter.recovery import Program, repair

    if os.environ.get("GLIBC_TUNABLES") == _UNIT_TUNABLES:
        del os.environ["GLIBC_TUNABLES"]  # for this program, not for those it starts
    lean.share_heap()
    stacks.on_signal()
    buffered = logs.buffer_until_known()
    os.umask(os.umask(0o077) | 0o027)  # whoever started this: nothing is made for others, nothing for a group to write
    try:
        chosen = settings.load(settings_of(options))
        if os.geteuid() == 0:
            logs.configure(chosen, buffered)
        if options["repair"]:
            for line in repair(chosen):
                click.echo(line)
            return
        stopping = _Stop()
        program = Program(chosen, lean.Libraries())
    except (SnapshotterError, OSError) as error:
        from nydusfs.errors import os_reason

        said = os_reason(error) if isinstance(error, OSError) else str(error)
        click.echo(f"containerd-nydus-grpc: {said}", err=True)
        raise SystemExit(2 if isinstance(error, SettingsError) else 1) from None
    gc.freeze()
    gc.enable()
    stopping.wait()
    program.stop()
    logging.shutdown()
    # gRPC's threads may still wait for a call; nothing of ours is left to do
    os._exit(0)


class _Stop:
    """SIGTERM and SIGINT from now on: `wait` returns after the first, the second ends the process at once.

    What is waited for is a byte that the interpreter itself writes. A handler in Python runs in the main thread when
    that comes back from where it waits: a signal at the moment before it began to wait on a lock was heard never, and a
    program that was stopped right after its start went on.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._told = False
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        for number in self.NUMBERS:
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            os._exit(1)
        self._told = True

    def wait(self) -> None:
        while os.read(self._pipe, 1)[0] not in self.NUMBERS:
            pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Console script."""
    _command().main(go_arguments(sys.argv[1:] if arguments is None else arguments), prog_name="containerd-nydus-grpc")


if __name__ == "__main__":
    main()
