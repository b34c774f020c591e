"""The API of a living daemon: metrics that follow what readers do, both nydusctl programs, memory, log lines."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootstrap.build import build_layer
from bootstrap.options import BuildOptions
from snapshotter.system import cpu_seconds
from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, reader, wait_until
from tests.lab.mounted import load_manifest
from tests.lab.paths import ref_bin
from tests.lab.process import processes_mentioning

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]


def ours(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nydusfs.daemon.ctl", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def daemon(fs_driver: str) -> Iterator[Nydusd]:
    with Nydusd("--id", "d1", "--thread-num", "8") as running:
        yield running


def test_metrics_follow_one_read(daemon: Nydusd) -> None:
    case = image_case("v6-zstd-blake3-1m")
    config = localfs_config(case, config_id="/7", work_dir=daemon.dir / "c7", iostats_files=True, access_pattern=True,
                            latest_read_files=True)  # fmt: skip
    assert daemon.mount("/7", case / "image.boot", config).status == 204
    entry = next(e for e in load_manifest(case)["entries"] if e["type"] == "file" and 1000 < e["size"] < 4096)
    before = daemon.get("metrics?id=/7").body
    code = "import os,sys; fd=os.open(sys.argv[1],os.O_RDONLY); print(len(os.pread(fd,1<<20,0)))"
    assert int(reader(code, daemon.mnt / "7" / entry["path"][1:]).stdout) == entry["size"]
    # who waits for data has it a moment before it is counted
    wait_until(lambda: daemon.get("metrics").body["data_read"] > before["data_read"], 60, "the count")
    by_file = "metrics/files?id=/7"
    wait_until(lambda: any(one["data_read"] for one in daemon.get(by_file).body.values()), 60, "the count by file")
    after = daemon.get("metrics").body  # the only image: no id needed
    assert after["data_read"] - before["data_read"] == entry["size"]
    assert after["fop_hits"][4] - before["fop_hits"][4] == 1
    assert sum(after["read_latency_dist"]) == 1
    (ino,) = [int(key) for key, value in daemon.get(by_file).body.items() if value["data_read"]]
    (pattern,) = daemon.get("metrics/pattern").body
    assert pattern["ino"] == ino
    assert abs(pattern["first_access_time_secs"] - time.time()) < 60
    assert daemon.get("metrics/files?latest=true").body == [[ino]]
    assert daemon.get("metrics/files?latest=true").body == []
    wait_until(lambda: daemon.get("metrics/backend?id=/7").body["read_count"] >= 1, 60, "the count")
    backend = daemon.get("metrics/backend?id=/7").body
    assert backend["backend_type"] == "localfs"
    cache = daemon.get("metrics/blobcache?id=/7").body
    assert cache["total"] == 1
    assert cache["store_path"].endswith("c7")
    missing = daemon.get("metrics/pattern?id=/unknown")
    assert missing.status == 404
    assert "Pattern(Metrics(Stats(NoCounter)))" in missing.message
    assert daemon.umount("/7").status == 204
    assert daemon.get("metrics?id=/7").status == 404


def test_prefetch_by_mount_request(daemon: Nydusd) -> None:
    case = image_case("v6-zstd-blake3-1m")
    config = localfs_config(case, work_dir=daemon.dir / "cp", fs_prefetch={"enable": True, "threads_count": 2})
    assert daemon.mount("/p", case / "image.boot", config, prefetch_files=["relative"]).status == 500
    assert daemon.mount("/p", case / "image.boot", config, prefetch_files=["/"]).status == 204
    wait_until(lambda: daemon.get("metrics/blobcache").body["prefetch_data_amount"] > 0, 60, "prefetch")
    assert daemon.umount("/p").status == 204


@pytest.mark.interop
@pytest.mark.skipif(ref_bin("nydusctl") is None, reason="interop: no reference nydusctl here")
def test_upstreams_nydusctl_drives_our_daemon(daemon: Nydusd, tmp_path: Path) -> None:
    case = image_case("v6-merged3")
    config = tmp_path / "c.json"
    config.write_text(localfs_config(case, config_id="x", work_dir=daemon.dir / "cx"))

    def ctl(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = str(ref_bin("nydusctl"))
        return subprocess.run(
            [program, "--sock", str(daemon.sock), *arguments], capture_output=True, text=True, timeout=30
        )

    mounted = ctl("mount", "-s", str(case / "image.boot"), "-c", str(config), "-m", "/x", "-t", "rafs")
    assert mounted.returncode == 0, mounted
    info = ctl("info")
    assert info.returncode == 0, info
    assert '"RUNNING"' in info.stdout
    assert "Instance Mountpoint:  /x" in info.stdout
    assert json.loads(ctl("--raw", "info").stdout)["id"] == "d1"
    for category in ("backend", "cache", "fsstats"):
        shown = ctl("metrics", category)
        assert shown.returncode == 0, shown
        assert shown.stdout.strip()
    assert ctl("set", "log-level", "debug").returncode == 0
    assert ctl("set", "log-level", "info").returncode == 0
    assert ctl("umount", "-m", "/x").returncode == 0
    assert daemon.get("daemon").body["backend_collection"] == {}


def test_our_nydusctl(daemon: Nydusd, tmp_path: Path) -> None:
    case = image_case("v6-merged3")
    sock = str(daemon.sock)
    config = tmp_path / "c.json"
    config.write_text(localfs_config(case, config_id="x", work_dir=daemon.dir / "cx"))
    boot = str(case / "image.boot")
    mount = ("mount", "-s", boot, "-c", str(config), "-m", "/y", "-t", "rafs")
    assert ours("--sock", sock, *mount).returncode == 0
    again = ours("--sock", sock, *mount)
    assert again.returncode == 1
    assert "already exists" in again.stderr
    assert len(again.stderr.splitlines()) == 1
    assert "Instance Mountpoint:  /y" in ours("--sock", sock, "info").stdout
    assert json.loads(ours("--sock", sock, "--raw", "metrics", "fsstats").stdout)["id"] == "/y"
    for category in ("backend", "cache", "fsstats"):
        assert ours("--sock", sock, "metrics", category).returncode == 0
    assert ours("--sock", sock, "set", "log_level", "nonsense").returncode == 1
    assert ours("--sock", sock, "umount", "/y").returncode == 0
    assert ours("--sock", sock, *mount).returncode == 0
    assert ours("--sock", sock, "umount", "-m", "/y").returncode == 0
    nobody = ours("--sock", str(tmp_path / "none"), "info")
    assert nobody.returncode == 1
    assert "no nydusd answers" in nobody.stderr


def test_the_line_people_grep_and_no_secret_anywhere(daemon: Nydusd) -> None:
    secret, token = "bWU6c2VjcmV0LXdvcmQ=", "tok-3n-s3cret"
    config = {
        "device": {
            "id": "/s",
            "backend": {
                "type": "registry",
                "config": {
                    "host": "127.0.0.1:1", "repo": "a/b", "auth": secret, "registry_token": token,
                    "mirrors": [{"host": "http://127.0.0.1:65001", "auth_through": False,
                                 "headers": {"X-Dragonfly-Registry": "https://index.docker.io"}}],
                    "proxy": {"fallback": False}, "scheme": "https", "skip_verify": False, "timeout": 10,
                    "connect_timeout": 10, "retry_limit": 2,
                },
            },
            "cache": {"type": "blobcache", "config": {"work_dir": str(daemon.dir / "cs")}},
        },
        "mode": "direct",
    }  # fmt: skip
    case = image_case("v6-no-data")
    assert daemon.mount("/s", case / "image.boot", json.dumps(config)).status == 204
    line = next(line for line in daemon.log_text().splitlines() if "mirrors" in line)
    assert re.fullmatch(
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} [+-]\d\d:\d\d\] INFO backend config: ConnectionConfig \{ "
        r'proxy: ProxyConfig \{ url: "", ping_url: "", fallback: false, check_interval: 5, use_http: false \}, '
        r'mirrors: \[MirrorConfig \{ host: "http://127\.0\.0\.1:65001", '
        r'headers: \{"X-Dragonfly-Registry": "https://index\.docker\.io"\}, auth_through: false \}\], '
        r"skip_verify: false, timeout: 10, connect_timeout: 10, retry_limit: 2 \}",
        line,
    )
    assert daemon.call("PUT", "config?id=/s", {"registry_auth": secret}).status == 204
    shown = json.dumps([daemon.get(path).body for path in ("daemon", "config?id=/s", "metrics", "daemon/events")])
    for word in (secret, token, "secret-word"):
        assert word not in shown
        assert word not in daemon.log_text()
    assert daemon.call("PUT", "config?id=/later", {"registry_auth": secret}).status == 204
    assert daemon.get("config?id=/s").body == {"registry_auth": "(hidden)"}
    assert daemon.umount("/s").status == 204
    assert daemon.get("config?id=/s").body == {}, "nobody will ask for the password of what is gone"
    assert daemon.get("config?id=/later").body == {"registry_auth": "(hidden)"}


def hundred_thousand_files(directory: Path) -> Path:
    """The bootstrap of a tree of 1,000 directories and 99,000 empty files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(1000):
            entry = tarfile.TarInfo(f"d{number:04d}")
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
            for name in range(99):
                archive.addfile(tarfile.TarInfo(f"d{number:04d}/file-{name:03d}.txt"), io.BytesIO())
    tar.seek(0)
    boot = directory / "big.boot"
    boot.write_bytes(build_layer(tar, io.BytesIO(), BuildOptions()).bootstrap)
    (directory / "blobs").mkdir()
    return boot


@pytest.mark.timeout(300)
def test_a_tree_of_100000_files_costs_less_than_100_kb_per_mount(tmp_path: Path) -> None:
    boot = hundred_thousand_files(tmp_path)
    with Nydusd() as daemon:
        config = localfs_config(tmp_path / "blobs")
        for number in range(4):  # code, arenas and thread stacks of first use are not the mounts'
            assert daemon.mount(f"/warm{number}", boot, config).status == 204
        done = subprocess.run(["find", daemon.mnt / "warm0", "-ls"], stdout=subprocess.PIPE, timeout=100)
        assert done.stdout.count(b"\n") == 100_001
        before = daemon.memory()
        for number in range(16):
            assert daemon.mount(f"/{number}", boot, config).status == 204
        for number in range(2):
            subprocess.run(
                ["find", daemon.mnt / str(number), "-ls"], stdout=subprocess.DEVNULL, timeout=100, check=True
            )
        per_mount = (daemon.memory() - before) / 16
        assert per_mount < 100, f"{per_mount:.0f} kB of anonymous memory per mount"


def test_ready_in_time_and_small_when_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 0.5 s on a machine that has nothing else to do, which is 0.25 s of processor time for all three processes; on
    one where others are at work it is up to twice that, so the least of some starts counts. 60 MiB resident."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))  # compiled by the first one, as an installation is
    used = []
    for _ in range(4):
        with Nydusd() as daemon:
            used.append(sum(cpu_seconds(pid) for pid in processes_mentioning(str(daemon.sock))))
            assert daemon.memory("VmRSS") < 60 * 1024
            assert os.path.exists(daemon.sock)
    assert min(used[1:]) <= 0.6, used
