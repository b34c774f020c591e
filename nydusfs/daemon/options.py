"""What the command line of `nydusd fuse` says, and the image it names."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from nydusfs.config import Config, FsDriver, RegistryBackend, bad_auth, load_config
from nydusfs.daemon.mounted import MountRequest
from nydusfs.errors import ConfigError, NydusError

log = logging.getLogger("nydusfs.daemon")


@dataclass(frozen=True, slots=True)
class Options:
    mountpoint: str
    apisock: str | None = None
    bootstrap: str | None = None
    config: str | None = None
    localfs_dir: str | None = None
    prefetch_files: str | None = None
    virtual_mountpoint: str = "/"
    daemon_id: str | None = None
    supervisor: str | None = None
    upgrade: bool = False
    failover_policy: str = "resend"
    threads: int = 4
    fs_driver: FsDriver = "fuse"
    rlimit_nofile: int = 1_000_000


def first_mount(options: Options) -> MountRequest | None:
    """The image given on the command line, None for an empty daemon. Raises `NydusError`."""
    text = None
    if options.config is not None:
        try:
            text = Path(options.config).read_text(encoding="utf-8")
        except OSError as error:
            raise NydusError(f"configuration {options.config} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise NydusError(f"configuration {options.config} is not UTF-8 text") from None
        # Without a bootstrap the file is a template for nobody: each mount brings its own configuration.
        config = load_config(text, options.config, template=options.bootstrap is None)
    if options.bootstrap is None:
        return None
    if text is None:
        if options.localfs_dir is None:
            raise NydusError("both --config and --localfs-dir are missing: one must say where the image's blobs are")
        if not os.path.isdir(options.localfs_dir):
            raise NydusError(f"--localfs-dir {options.localfs_dir} is not a directory: give the one with the blobs")
        text = _local_config(options.localfs_dir)
        config = load_config(text, "--localfs-dir")
    files = _prefetch_list(options.prefetch_files)
    return MountRequest(options.virtual_mountpoint, options.bootstrap, pull_auth(config), files, text)


def pull_auth(config: Config) -> Config:
    """The command line's image with the credentials of $IMAGE_PULL_AUTH, if it is set (reference 1.8): no file holds
    them. Raises `ConfigError`."""
    auth = os.environ.get("IMAGE_PULL_AUTH", "")
    if not auth or not isinstance(config.backend, RegistryBackend):
        return config
    if reason := bad_auth(auth):
        raise ConfigError("IMAGE_PULL_AUTH", reason, "environment")
    return replace(config, backend=replace(config.backend, auth=auth))


def _local_config(directory: str) -> str:
    """Blobs in a directory, and the cache beside them, as upstream keeps it, but in a folder: the cache of a blob has
    the blob's own name."""
    directory = os.path.abspath(directory)
    device: dict[str, object] = {"backend": {"type": "localfs", "config": {"dir": directory}}}
    path = os.path.join(directory, ".nydusd-cache")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        device["cache"] = {"type": "blobcache", "config": {"work_dir": path}}
    except OSError as error:
        log.warning(
            "no cache directory can be made at %s (%s): data is decoded again when needed", path, error.strerror
        )
    return json.dumps({"device": device, "mode": "direct"})


def _prefetch_list(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        raise NydusError(f"the prefetch-files arg is not a file path: {path}") from None
    files = tuple(line.strip() for line in lines if line.strip())
    for name in files:
        if not name.startswith("/"):
            raise NydusError(f"invalid prefetch file list: {path}: {name!r} is not an absolute path")
    return files
