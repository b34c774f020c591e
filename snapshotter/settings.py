"""Settings of the snapshotter: three generations of flags and the TOML file (snapshotter.md 4), flags winning."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from snapshotter.auth import durations
from snapshotter.auth.settings import AuthSettings
from snapshotter.cgroup import parse_limit
from snapshotter.database import NAME
from snapshotter.errors import SettingsError
from snapshotter.lazy.blockdisk import MODES
from snapshotter.lazy.settings import LazySettings
from snapshotter.signature import DEFAULT_KEY
from snapshotter.volumes import VolumeSettings

log = logging.getLogger(__name__)

OLD_ROOT = "/var/lib/containerd-nydus"
NEW_ROOT = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus"
ADDRESS = "/run/containerd-nydus/containerd-nydus-grpc.sock"
OLD_TEMPLATE = "/etc/nydus/config.json"
NEW_TEMPLATE = "/etc/nydus/nydusd-config.json"
MAX_ROOT = 70  # bytes: sockets below it must stay under the kernel's 108
MAX_CONFIG = 1 << 20
LEVELS = ("trace", "debug", "info", "warn", "warning", "error", "fatal", "panic")
_MODES = {
    "multiple": "dedicated", "dedicated": "dedicated", "shared": "shared", "none": "none", "prefetch": "dedicated"
}  # fmt: skip


class Key(NamedTuple):
    """One key of the TOML file. `inert`: why a value other than the default changes nothing; it is then a warning."""

    kind: type
    default: Any
    inert: str = ""


KEYS: dict[str, Key] = {
    "version": Key(int, 1),
    "root": Key(str, ""),
    "address": Key(str, ADDRESS),
    "uid": Key(int, 0),
    "gid": Key(int, 0),
    "daemon_mode": Key(str, "shared"),
    "cleanup_on_close": Key(bool, False),
    "system.enable": Key(bool, False),
    "system.address": Key(str, "/run/containerd-nydus/system.sock"),
    "system.uid": Key(int, 0),
    "system.gid": Key(int, 0),
    "system.debug.daemon_cpu_profile_duration_secs": Key(int, 0),
    "system.debug.pprof_address": Key(str, ""),
    "metrics.address": Key(str, ""),
    "metrics.hung_io_interval": Key(str, "10s"),
    "metrics.collect_interval": Key(str, "1m"),
    "daemon.nydusd_path": Key(str, ""),
    "daemon.nydusimage_path": Key(str, "", "nothing here calls nydus-image"),
    "daemon.nydusd_config": Key(str, ""),
    "daemon.fs_driver": Key(str, "fusedev"),
    "daemon.recover_policy": Key(str, "restart"),
    "daemon.threads_number": Key(int, 0),
    "daemon.log_rotation_size": Key(int, 100),
    "daemon.failover_policy": Key(str, "resend"),
    "snapshot.enable_nydus_overlayfs": Key(bool, False),
    "snapshot.nydus_overlayfs_path": Key(str, ""),
    "snapshot.enable_kata_volume": Key(bool, False),
    "snapshot.sync_remove": Key(bool, False),
    "snapshot.enable_overlayfs_volatile": Key(bool, False),
    "remote.convert_vpc_registry": Key(bool, False, "upstream gave it up with 0.6"),
    "remote.skip_ssl_verify": Key(bool, False, "skip_verify of the nydusd template decides"),
    "remote.mirrors_config.dir": Key(str, ""),
    "remote.auth.enable_kubeconfig_keychain": Key(bool, False),
    "remote.auth.kubeconfig_path": Key(str, ""),
    "remote.auth.enable_cri_keychain": Key(bool, False),
    "remote.auth.image_service_address": Key(str, "/run/containerd/containerd.sock"),
    "remote.auth.enable_kubelet_credential_providers": Key(bool, False),
    "remote.auth.credential_provider_config": Key(str, ""),
    "remote.auth.credential_provider_bin_dir": Key(str, ""),
    "remote.auth.credential_renewal_interval": Key(str, "0s"),
    "image.public_key_file": Key(str, ""),
    "image.validate_signature": Key(bool, False),
    "cache_manager.cache_dir": Key(str, ""),
    "cache_manager.disable": Key(bool, False),
    "cache_manager.gc_period": Key(str, "24h"),
    "log.log_to_stdout": Key(bool, False),
    "log.level": Key(str, "info"),
    "log.format": Key(str, "text"),  # ours: text or json
    "log.dir": Key(str, ""),
    "log.log_rotation_max_size": Key(int, 200),
    "log.log_rotation_max_backups": Key(int, 5),
    "log.log_rotation_max_age": Key(int, 0),
    "log.log_rotation_local_time": Key(bool, True),
    "log.log_rotation_compress": Key(bool, True),
    "cgroup.enable": Key(bool, False),
    "cgroup.memory_limit": Key(str, ""),
    "experimental.enable_stargz": Key(bool, False),
    "experimental.enable_referrer_detect": Key(bool, False),
    "experimental.enable_index_detect": Key(bool, False),
    "experimental.enable_backend_source": Key(
        bool, False, "nydusd does not ask this program for its backend: its credentials lie in files of root's alone"
    ),
    "experimental.tarfs.enable_tarfs": Key(bool, False),
    "experimental.tarfs.mount_tarfs_on_host": Key(bool, False, "tarfs images are always mounted on the host"),
    "experimental.tarfs.tarfs_hint": Key(bool, False),
    "experimental.tarfs.max_concurrent_proc": Key(int, 0),
    "experimental.tarfs.export_mode": Key(str, ""),
}


@dataclass(frozen=True)
class SystemSettings:
    enable: bool
    address: Path
    uid: int
    gid: int
    cpu_seconds: int  # length of the start-up window in which a nydusd's CPU time is measured; 0: not
    pprof_address: str


@dataclass(frozen=True)
class MetricsSettings:
    address: str  # HOST:PORT, "": no listener
    hung_io: float  # seconds
    interval: float  # seconds between collections


@dataclass(frozen=True)
class Settings:
    """What the program runs with. Paths are absolute."""

    root: Path
    address: Path
    uid: int
    gid: int
    shared: bool
    serve: bool  # False: no nydusd is started, virtual machines mount images themselves
    proxy: bool  # nothing of an image is here, virtual machines pull it
    volumes: VolumeSettings
    cleanup_on_close: bool
    nydusd: str
    template: Path
    cache_dir: Path
    restart_nydusd: bool
    failover: bool
    threads: int
    nydusd_log_rotation: int  # MB
    sync_remove: bool
    volatile: bool
    failover_policy: str
    hosts_dir: str  # certs.d for nydusd; "": its own default
    collect_cache: bool
    collect_period: float  # seconds, 0: only when images are removed
    cgroup: bool
    memory_limit: int  # bytes of all nydusd together, 0: none
    system: SystemSettings
    metrics: MetricsSettings
    log_to_stdout: bool
    log_level: str
    log_dir: Path
    log_rotation_size: int  # MB
    log_rotation_backups: int  # 0: all
    log_rotation_age: int  # days, 0: for ever
    log_rotation_local_time: bool
    log_rotation_compress: bool
    log_format: str
    auth: AuthSettings
    lazy: LazySettings
    public_key: Path
    validate_signature: bool


def load(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags: TOML key -> value, and the three file flags `config`, `config-path`, `nydusd-config`.

    `config` is told apart by content: nydusd JSON (generation 0.3) or snapshotter TOML. Raises SettingsError.
    """
    values = dict(flags)
    template = values.pop("nydusd-config", "") or ""
    old_template = values.pop("config-path", "") or ""
    toml: dict[str, Any] = {}
    if config := values.pop("config", ""):
        text = _read(Path(config))
        if text.lstrip().startswith("{"):
            old_template = old_template or config
        else:
            toml = parse_toml(text, config)
    for name, value in values.items():
        _check(name, value, f"--{name}")
    chosen = {**toml, **values}

    def get(name: str) -> Any:
        value = chosen.get(name, "")
        return KEYS[name].default if value == "" else value  # as upstream: what is left empty is not said

    for name in chosen:
        if (inert := KEYS[name].inert) and chosen[name] != KEYS[name].default:
            log.warning("setting %s changes nothing here: %s", name, inert)
    template = template or old_template or get("daemon.nydusd_config") or _default_template()
    root = Path(get("root") or _default_root(bool(old_template)))
    _check_root(root)
    mode, driver = get("daemon_mode"), get("daemon.fs_driver")
    if mode not in _MODES:
        raise SettingsError(f"daemon_mode {mode!r} is not supported: use one of {', '.join(_MODES)}")
    if driver == "blockdev" and not get("experimental.tarfs.enable_tarfs"):
        raise SettingsError("fs_driver blockdev needs experimental.tarfs.enable_tarfs: it is for tarfs images")
    if driver == "fscache":
        raise SettingsError(
            "fs_driver 'fscache' needs the kernel's fscache daemon mode, which Linux gives up: use fusedev, with "
            '"fs_driver": "auto" in the nydusd configuration where the kernel is to serve images itself'
        )
    if driver not in ("fusedev", "blockdev", "proxy"):
        raise SettingsError(f"daemon.fs_driver {driver!r} is not supported: use fusedev, blockdev (tarfs) or proxy")
    policy = get("daemon.recover_policy")
    if policy not in ("none", "restart", "failover"):
        raise SettingsError(f"daemon.recover_policy {policy!r}: use none, restart or failover")
    if get("daemon.failover_policy") not in ("none", "resend", "flush"):
        raise SettingsError(f"daemon.failover_policy {get('daemon.failover_policy')!r}: use none, resend or flush")
    if (export := get("experimental.tarfs.export_mode")) and export not in MODES:
        raise SettingsError(f"experimental.tarfs.export_mode {export!r}: use one of {', '.join(MODES)}")
    public_key = Path(get("image.public_key_file") or DEFAULT_KEY).absolute()
    if get("image.validate_signature") and not public_key.is_file():
        raise SettingsError(f"image.validate_signature: there is no public key {public_key} (image.public_key_file)")
    hosts_dir = get("remote.mirrors_config.dir")
    if hosts_dir and not Path(hosts_dir).is_dir():
        raise SettingsError(f"remote.mirrors_config.dir {hosts_dir} is not a directory")
    if get("log.format") not in ("text", "json"):
        raise SettingsError(f"log.format {get('log.format')!r}: use text or json")
    if not 0 <= get("daemon.threads_number") <= 1024:
        raise SettingsError(f"daemon.threads_number {get('daemon.threads_number')} is outside 0..1024")
    level = get("log.level").lower()  # upstream takes INFO too
    if level not in LEVELS:
        raise SettingsError(f"log level {get('log.level')!r}: use one of {', '.join(LEVELS)}")
    return Settings(
        root=root,
        address=Path(get("address")).absolute(),
        uid=get("uid"),
        gid=get("gid"),
        shared=_MODES[mode] == "shared",
        serve=_MODES[mode] != "none" and driver != "proxy",
        proxy=driver == "proxy",
        volumes=VolumeSettings(
            extra=get("snapshot.enable_nydus_overlayfs") or _MODES[mode] == "none",
            kata=get("snapshot.enable_kata_volume"),
            helper=get("snapshot.nydus_overlayfs_path"),
        ),
        cleanup_on_close=get("cleanup_on_close"),
        nydusd=find_nydusd(get("daemon.nydusd_path")),
        template=Path(template).absolute(),
        cache_dir=Path(get("cache_manager.cache_dir") or root / "cache").absolute(),
        restart_nydusd=policy != "none",
        failover=policy == "failover",
        threads=get("daemon.threads_number"),
        nydusd_log_rotation=get("daemon.log_rotation_size"),
        sync_remove=get("snapshot.sync_remove"),
        volatile=get("snapshot.enable_overlayfs_volatile"),
        failover_policy=get("daemon.failover_policy"),
        hosts_dir=hosts_dir,
        collect_cache=not get("cache_manager.disable"),
        collect_period=duration("cache_manager.gc_period", get("cache_manager.gc_period")),
        cgroup=get("cgroup.enable"),
        memory_limit=parse_limit(get("cgroup.memory_limit")),
        system=SystemSettings(
            enable=get("system.enable"),
            address=Path(get("system.address")).absolute(),
            uid=get("system.uid"),
            gid=get("system.gid"),
            cpu_seconds=get("system.debug.daemon_cpu_profile_duration_secs"),
            pprof_address=get("system.debug.pprof_address"),
        ),
        metrics=MetricsSettings(
            address=get("metrics.address"),
            hung_io=duration("metrics.hung_io_interval", get("metrics.hung_io_interval")),
            interval=max(1.0, duration("metrics.collect_interval", get("metrics.collect_interval"))),
        ),
        log_to_stdout=get("log.log_to_stdout"),
        log_level=level,
        log_dir=Path(get("log.dir") or root / "logs").absolute(),
        log_rotation_size=get("log.log_rotation_max_size"),
        log_rotation_backups=get("log.log_rotation_max_backups"),
        log_rotation_age=get("log.log_rotation_max_age"),
        log_rotation_local_time=get("log.log_rotation_local_time"),
        log_rotation_compress=get("log.log_rotation_compress"),
        log_format=get("log.format"),
        auth=_auth(get),
        lazy=LazySettings(
            index=get("experimental.enable_index_detect"),
            referrers=get("experimental.enable_referrer_detect"),
            estargz=get("experimental.enable_stargz"),
            tarfs=get("experimental.tarfs.enable_tarfs"),
            tarfs_hint=get("experimental.tarfs.tarfs_hint"),
            tarfs_jobs=get("experimental.tarfs.max_concurrent_proc"),
            export=MODES.get(get("experimental.tarfs.export_mode")),
            signed=get("image.validate_signature"),
        ),
        public_key=public_key,
        validate_signature=get("image.validate_signature"),
    )


def _auth(get: Callable[[str], Any]) -> AuthSettings:
    section = "remote.auth."
    kubelet = get(section + "enable_kubelet_credential_providers")
    config, bin_dir = (get(section + "credential_provider_" + name) for name in ("config", "bin_dir"))
    if kubelet and not (config and bin_dir):
        raise SettingsError(
            "remote.auth.enable_kubelet_credential_providers needs credential_provider_config and "
            "credential_provider_bin_dir, the values of kubelet's --image-credential-provider-config and -bin-dir"
        )
    return AuthSettings(
        kubernetes=get(section + "enable_kubeconfig_keychain"),
        kubeconfig=get(section + "kubeconfig_path"),
        cri=get(section + "enable_cri_keychain"),
        image_service=Path(get(section + "image_service_address").removeprefix("unix://")),
        kubelet=kubelet,
        provider_config=config,
        provider_bin_dir=bin_dir,
        renewal_seconds=duration(section + "credential_renewal_interval", get(section + "credential_renewal_interval")),
    )


def duration(name: str, text: str) -> float:
    """Seconds of a Go duration such as `10s`, `1h30m` or `0`. Raises SettingsError naming the key."""
    try:
        return durations.seconds(text)
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Dotted key -> value of a snapshotter TOML file. Unknown keys are warnings; wrong types raise SettingsError."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: is neither a JSON object nor valid TOML: {error}") from None
    found: dict[str, Any] = {}
    _flatten(document, "", where, found)
    if found.get("version", 1) != 1:
        raise SettingsError(f"{where}: version {found['version']} is not supported, expected 1")
    return found


def _flatten(table: Mapping[str, Any], prefix: str, where: str, found: dict[str, Any]) -> None:
    for key, value in table.items():
        name = prefix + key
        if name in KEYS:
            _check(name, value, where)
            found[name] = value
        elif isinstance(value, dict) and any(known.startswith(name + ".") for known in KEYS):
            _flatten(value, name + ".", where, found)
        elif any(known.startswith(name + ".") for known in KEYS):
            raise SettingsError(f"{where}: {name}: expected a table, got {value!r}")
        else:
            import difflib

            nearest = difflib.get_close_matches(name, KEYS, 1, 0.6)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            log.warning("%s: unknown key %s is ignored%s", where, name, hint)


_NAMES = {str: "text", int: "a number", bool: "true or false"}


def _check(name: str, value: Any, where: str) -> None:
    kind = KEYS[name].kind
    if type(value) is not kind:
        raise SettingsError(f"{where}: {name}: expected {_NAMES[kind]}, got {value!r}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise SettingsError(f"{path}: the configuration cannot be read: {error.strerror}") from None
    if len(data) > MAX_CONFIG:
        raise SettingsError(f"{path}: is larger than {MAX_CONFIG} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not UTF-8 text") from None


def _default_template() -> str:
    return OLD_TEMPLATE if not Path(NEW_TEMPLATE).exists() and Path(OLD_TEMPLATE).exists() else NEW_TEMPLATE


def _default_root(old_generation: bool) -> str:
    in_use = any((Path(OLD_ROOT) / name).exists() for name in (NAME, "metadata.db"))
    return OLD_ROOT if old_generation or in_use else NEW_ROOT


def _check_root(root: Path) -> None:
    text = str(root.absolute())
    if len(text.encode(errors="surrogateescape")) > MAX_ROOT:
        raise SettingsError(f"root {text} is longer than {MAX_ROOT} bytes: socket paths below it would not fit")
    if re.search(r"[:,\\\s]", text):
        raise SettingsError(f"root {text!r} holds a character that separates overlay options (colon, comma, ...)")


def find_nydusd(given: str) -> str:
    """The configured program; else the one installed beside this one, else the first in PATH, else the bare name."""
    if given:
        return given
    beside = Path(sys.argv[0]).absolute().with_name("nydusd")
    return str(beside) if beside.is_file() else shutil.which("nydusd") or "nydusd"
