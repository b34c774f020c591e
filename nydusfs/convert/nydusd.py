"""Mounts one image with a nydusd of its own, for `check` and `mount`. Works with upstream's nydusd, too."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nydusfs.convert.backends import BackendChoice
from nydusfs.convert.endpoints import RegistryEndpoint
from nydusfs.convert.images import Image
from nydusfs.convert.nydusimage import NydusImage
from nydusfs.convert.progress import Progress, Quiet
from nydusfs.errors import ConvertError
from nydusfs.registry.credentials import docker_credentials
from nydusfs.registry.mediatypes import ANNOTATION_REF
from nydusfs.unixhttp import UnixConnection

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0


def find_nydusd(name: str) -> str:
    """The program for `--nydusd`: a path, or a name looked up beside this program and in PATH. Raises ConvertError."""
    if "/" in name:
        if not os.access(name, os.X_OK):
            raise ConvertError(f"nydusd {name} does not exist or is not executable (choose with --nydusd)")
        return name
    for folder in (Path(sys.argv[0]).parent, Path(sys.executable).parent):
        if os.access(folder / name, os.X_OK):
            return str((folder / name).resolve())
    found = shutil.which(name)
    if found is None:
        raise ConvertError(f"{name} is not in PATH (choose with --nydusd)")
    return found


def require_root(otherwise: str = "") -> None:
    """Before anything is fetched: only root may mount. Raises ConvertError."""
    if os.geteuid() != 0:
        raise ConvertError(f"must run as root to mount the image{otherwise}")


def daemon_config(
    nydus: NydusImage,
    folder: Path,
    *,
    backend: BackendChoice | None = None,
    prefetch: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Configuration (v1) that reads this image's blobs: from `backend`, else from where its manifest is. `folder` takes
    the cache, and the blobs of images in archives. Raises NydusError, OSError."""
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        where: dict[str, Any] = {"type": backend.kind, "config": backend.table}
    elif isinstance(nydus.image.endpoint, RegistryEndpoint):
        where = {"type": "registry", "config": _registry(nydus.image.endpoint)}
    else:
        blobs = nydus.image.endpoint.blob_folder() or _unpacked(nydus.image, folder / "blobs", progress or Quiet())
        where = {"type": "localfs", "config": {"dir": str(blobs.absolute())}}
    return {
        "device": {"backend": where, "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}}},
        "mode": "direct",
        "digest_validate": False,
        "iostats_files": False,
        "enable_xattr": True,
        "fs_prefetch": {"enable": prefetch, "threads_count": 4, "prefetch_all": prefetch},
    }


def _registry(endpoint: RegistryEndpoint) -> dict[str, Any]:
    """With docker's credentials for it."""
    transport, reference = endpoint.client.transport, endpoint.reference
    server, hosts_dir = transport.server, transport.options.hosts_dir
    backend: dict[str, Any] = {
        "scheme": server.url.partition("://")[0],
        "host": server.host,
        "repo": reference.repository,
        "skip_verify": not server.verify,
        "timeout": 30,
        "connect_timeout": 10,
        "retry_limit": 2,
    }
    if hosts_dir:  # upstream's has the certificates of authorities alone
        backend["hosts_dir"] = os.path.abspath(hosts_dir)
        backend["ca_cert_files"] = [os.path.abspath(name) for name in server.ca_files]
    credentials = docker_credentials(reference.host)
    if credentials is not None and credentials.username:
        backend["auth"] = base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()
    return backend


def _unpacked(image: Image, folder: Path, progress: Progress) -> Path:
    """Data layers of an image in an archive, and the plain layers behind reference layers, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in image.layers[:-1]:
        for digest in filter(None, (layer.digest, layer.annotations.get(ANNOTATION_REF, ""))):
            path = folder / digest.removeprefix("sha256:")
            if path.exists():
                continue
            progress.start(digest, f"layer {path.name[:12]}", layer.size)
            with image.endpoint.open_blob(digest) as stored, path.open("wb") as out:
                shutil.copyfileobj(stored, out, 1 << 20)
            progress.finish(digest)
    return folder


@contextmanager
def mounted(
    program: str, bootstrap: Path, config: dict[str, Any], mountpoint: Path, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The image is served at `mountpoint` inside the block; `folder` takes configuration and log. Raises ConvertError
    when the daemon does not get there in time; leaves no mount and no process behind."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    config_path = folder / "nydusd.json"
    with os.fdopen(os.open(config_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(config, file)
    sockets = tempfile.mkdtemp(prefix="nydusify-")
    sock = Path(sockets) / "api.sock"
    log_path = folder / "nydusd.log"
    arguments = [program, "--config", str(config_path), "--mountpoint", str(mountpoint), "--bootstrap", str(bootstrap)]
    arguments += ["--apisock", str(sock), "--log-level", "warn"]
    try:
        with log_path.open("wb") as output:
            try:
                daemon = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                raise ConvertError(f"{program} cannot be started: {error.strerror}") from error
        try:
            _wait_running(daemon, sock, mountpoint, log_path)
            yield daemon
        finally:
            _stop(daemon, mountpoint)
    finally:
        config_path.unlink(missing_ok=True)  # it may hold a password
        shutil.rmtree(sockets, ignore_errors=True)


def _wait_running(daemon: subprocess.Popen[bytes], sock: Path, mountpoint: Path, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            raise ConvertError(
                f"nydusd ended with status {daemon.returncode} instead of mounting: {_last_line(log_path)}"
            )
        if _state(sock) == "RUNNING" and os.path.ismount(mountpoint):
            return
        time.sleep(0.05)
    raise ConvertError(f"nydusd did not mount within {START_TIMEOUT:.0f} s: {_last_line(log_path)}")


def _state(sock: Path) -> str:
    connection = UnixConnection(sock, 2)
    try:
        connection.request("GET", "/api/v1/daemon")
        return str(json.loads(connection.getresponse().read(1 << 20)).get("state", ""))
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1][:500] if lines else "it said nothing"


def _stop(daemon: subprocess.Popen[bytes], mountpoint: Path) -> None:
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.warning("nydusd (pid %d) does not end: killed", daemon.pid)
            daemon.kill()
            daemon.wait(STOP_TIMEOUT)
    if _is_mounted(mountpoint):
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, capture_output=True, timeout=30)


def _is_mounted(mountpoint: Path) -> bool:
    """From the kernel's table: asking the mount itself would fail or hang once its daemon is gone."""
    wanted = os.path.realpath(mountpoint)
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        field = line.split(" ")[4].replace("\\040", " ")
        if field == wanted:
            return True
    return False
