"""Every key of the configuration, logs and their rotation, metrics as text, the operators' HTTP server."""

from __future__ import annotations

import errno
import gzip
import http.client
import json
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from nydusfs import stacks
from nydusfs.drivers.kernel import MountEntry
from snapshotter import cgroup, httpd, logs, metrics, operate, settings
from snapshotter.controller import SOCKET
from snapshotter.database import NAME, Database
from snapshotter.doctor import remote, storage
from snapshotter.errors import NotFound, SettingsError, StartError
from snapshotter.exposition import Family, render
from snapshotter.labels import TARFS, UID_MAPPING
from snapshotter.node import Choices, Node
from snapshotter.nydusd_api import NydusdApi
from snapshotter.rotation import RotatingFile
from snapshotter.store import Kind, Store
from snapshotter.tally import Tally

# The reference's table of TOML keys: name -> a value other than the default.
REFERENCE: dict[str, str] = {
    "root": '"/elsewhere/nydus"',
    "address": '"{tmp}/g.sock"',
    "uid": "1",
    "gid": "1",
    "daemon_mode": '"multiple"',
    "cleanup_on_close": "true",
    "system.enable": "true",
    "system.address": '"{tmp}/system.sock"',
    "system.uid": "1",
    "system.gid": "1",
    "system.debug.daemon_cpu_profile_duration_secs": "5",
    "system.debug.pprof_address": '"127.0.0.1:1"',
    "metrics.address": '":9110"',
    "metrics.hung_io_interval": '"20s"',
    "metrics.collect_interval": '"2m"',
    "daemon.nydusd_path": '"/usr/bin/nydusd"',
    "daemon.nydusimage_path": '"/usr/bin/nydus-image"',
    "daemon.nydusd_config": '"{tmp}/template.json"',
    "daemon.fs_driver": '"fusedev"',
    "daemon.recover_policy": '"failover"',
    "daemon.threads_number": "4",
    "daemon.log_rotation_size": "7",
    "daemon.failover_policy": '"flush"',
    "snapshot.enable_nydus_overlayfs": "true",
    "snapshot.nydus_overlayfs_path": '"nydus-overlayfs"',
    "snapshot.enable_kata_volume": "true",
    "snapshot.sync_remove": "true",
    "snapshot.enable_overlayfs_volatile": "true",
    "remote.convert_vpc_registry": "true",
    "remote.skip_ssl_verify": "true",
    "remote.mirrors_config.dir": '"{tmp}"',
    "remote.auth.enable_kubeconfig_keychain": "true",
    "remote.auth.kubeconfig_path": '"{tmp}/kube"',
    "remote.auth.enable_cri_keychain": "true",
    "remote.auth.image_service_address": '"/run/other.sock"',
    "remote.auth.enable_kubelet_credential_providers": "true",
    "remote.auth.credential_provider_config": '"{tmp}/providers"',
    "remote.auth.credential_provider_bin_dir": '"{tmp}"',
    "remote.auth.credential_renewal_interval": '"1h"',
    "image.public_key_file": '"{tmp}/key"',
    "image.validate_signature": "true",
    "cache_manager.cache_dir": '"{tmp}/c"',
    "cache_manager.disable": "true",
    "cache_manager.gc_period": '"1h30m"',
    "log.log_to_stdout": "true",
    "log.level": '"debug"',
    "log.dir": '"{tmp}/logs"',
    "log.log_rotation_max_size": "1",
    "log.log_rotation_max_backups": "0",
    "log.log_rotation_max_age": "3",
    "log.log_rotation_local_time": "false",
    "log.log_rotation_compress": "false",
    "cgroup.enable": "true",
    "cgroup.memory_limit": '"200MiB"',
    "experimental.enable_stargz": "true",
    "experimental.enable_referrer_detect": "true",
    "experimental.enable_index_detect": "true",
    "experimental.enable_backend_source": "true",
    "experimental.tarfs.enable_tarfs": "true",
    "experimental.tarfs.mount_tarfs_on_host": "true",
    "experimental.tarfs.tarfs_hint": "true",
    "experimental.tarfs.max_concurrent_proc": "2",
    "experimental.tarfs.export_mode": '"layer_block"',
}
# Checked elsewhere against the machine, or meaningful only together with others of their group.
TOGETHER = {
    "remote.auth.enable_kubelet_credential_providers": ("credential_provider_config", "credential_provider_bin_dir"),
    "image.validate_signature": ("public_key_file",),
}


def test_the_reference_knows_no_key_that_is_missing_here() -> None:
    assert set(REFERENCE) - set(settings.KEYS) == set()


@pytest.mark.parametrize("key", sorted(REFERENCE))
def test_every_key_works_or_says_once_that_it_does_not(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("kube", "providers", "key"):
        (tmp_path / name).write_text("")
    table, _, last = key.rpartition(".")
    lines = [f"{last} = {REFERENCE[key].replace('{tmp}', str(tmp_path))}"]
    for other in TOGETHER.get(key, ()):
        lines.append(f"{other} = {REFERENCE[f'{table}.{other}'].replace('{tmp}', str(tmp_path))}")
    file = tmp_path / "snapshotter.toml"
    head = "version = 1\n" + (f"[{table}]\n" if table else "")
    file.write_text(head + "\n".join(lines) + "\n")
    changed = settings.load({"config": str(file)})
    about = [record.getMessage() for record in caplog.records if f" {key} " in record.getMessage()]
    assert not [line for line in caplog.messages if "unknown key" in line]
    if settings.KEYS[key].inert:
        assert len(about) == 1
        assert "changes nothing" in about[0]
        return
    assert not [line for line in about if "changes nothing" in line]
    file.write_text("version = 1\n")
    same_by_default = {"daemon.fs_driver", "daemon.recover_policy"}
    assert key in same_by_default or settings.load({"config": str(file)}) != changed


def test_the_environment_of_zero_values(tmp_path: Path) -> None:
    """Upstream takes zero for absent; here it is what was written."""
    file = tmp_path / "s.toml"
    file.write_text("version = 1\n[log]\nlog_rotation_max_backups = 0\nlog_rotation_compress = false\n")
    found = settings.load({"config": str(file)})
    assert (found.log_rotation_backups, found.log_rotation_compress, found.log_rotation_local_time) == (0, False, True)


def test_what_is_left_empty_is_the_default_and_levels_may_be_capitals(tmp_path: Path) -> None:
    """As upstream has it: files are made of templates, and logrus takes INFO."""
    file = tmp_path / "s.toml"
    file.write_text("version = 1\n")
    default = settings.load({"config": str(file)})
    for key, known in settings.KEYS.items():
        if known.kind is str:
            table, _, last = key.rpartition(".")
            file.write_text("version = 1\n" + (f"[{table}]\n" if table else "") + f'{last} = ""\n')
            assert settings.load({"config": str(file)}) == default, key
    assert settings.load({"log.level": "WARN"}).log_level == "warn"


@pytest.mark.parametrize(
    ("text", "limit"),
    [("", 0), ("209715200", 200 << 20), ("200MiB", 200 << 20), ("200Mi", 200 << 20), ("200mb", 200_000_000),
     ("1.5Gi", 3 << 29), ("10 KB", 10_000)],
)  # fmt: skip
def test_memory_limits(text: str, limit: int) -> None:
    assert cgroup.parse_limit(text) == limit


def test_memory_limits_that_are_none() -> None:
    everything = cgroup.parse_limit("100%")
    assert abs(cgroup.parse_limit("10%") - everything / 10) < 2
    for text in ("0", "-1", "many", "0%", "101%", "x%", "200 MiBs"):
        with pytest.raises(SettingsError, match=r"cgroup\.memory_limit"):
            cgroup.parse_limit(text)


def test_a_group_that_was_removed_while_it_was_empty_is_made_again(tmp_path: Path) -> None:
    """By another snapshotter of this machine that ended, before this one has its first nydusd."""
    (tmp_path / "memory").mkdir()
    made = cgroup.MemoryGroup(200 << 20, tmp_path)
    assert made.path is not None
    shutil.rmtree(made.path.parent)
    made.add([7])
    files = {path.name: path.read_text() for path in made.path.iterdir()}
    assert files == {"memory.limit_in_bytes": str(200 << 20), "cgroup.procs": "7"}


@pytest.mark.parametrize(("text", "seconds"), [("10s", 10), ("24h", 86400), ("1h30m", 5400), ("500ms", 0.5), ("0", 0)])
def test_durations(text: str, seconds: float) -> None:
    assert settings.duration("key", text) == seconds


@pytest.mark.parametrize("text", ["", "10", "s", "10 s", "1d", "-5s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(SettingsError, match=r"metrics\.collect_interval"):
        settings.duration("metrics.collect_interval", text)


# ---- logs


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("snapshotter.x", logging.WARNING, __file__, 1, message, None, None)


def test_both_forms_of_a_line() -> None:
    nasty = 'two\nlines "quoted" \\ and umlauts: ü'
    text = logs.Formatter().format(record(nasty))
    assert "\n" not in text
    assert re.fullmatch(r'time="[^"]*Z" level=warning msg=(".*")', text)
    assert json.loads(text.partition(" msg=")[2]) == nasty
    value = json.loads(logs.Formatter("json").format(record(nasty)))
    assert (value["level"], value["msg"], value["logger"]) == ("warning", nasty, "snapshotter.x")


def settle(handler: RotatingFile, count: int) -> list[Path]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = handler.moved()
        if len(found) == count and all(path.suffix == ".gz" for path in found):
            break
        time.sleep(0.02)
    return handler.moved()


def test_rotation_by_size_keeps_the_newest_and_packs_them(tmp_path: Path) -> None:
    handler = RotatingFile(tmp_path / "nydus-snapshotter.log", limit=2000, backups=3)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for number in range(200):
        handler.emit(record(f"line {number:03d} " + "x" * 80))
        time.sleep(0.001)  # names carry milliseconds
    moved = settle(handler, 3)
    handler.close()
    assert len(moved) == 3
    assert all(re.fullmatch(r"nydus-snapshotter-[-0-9T.]{23}\.log\.gz", path.name) for path in moved)
    text = "".join(gzip.decompress(path.read_bytes()).decode() for path in reversed(moved))
    lines = [*text.splitlines(), *(tmp_path / "nydus-snapshotter.log").read_text().splitlines()]
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers == list(range(numbers[0], 200))


def test_rotation_by_age_and_without_packing(tmp_path: Path) -> None:
    path = tmp_path / "nydus-snapshotter.log"
    old = tmp_path / "nydus-snapshotter-2020-01-01T00-00-00.000.log.gz"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    other = tmp_path / "nydus-snapshotter-notes.log"
    other.write_text("not ours")
    handler = RotatingFile(path, limit=50, backups=0, days=3, compress=False, local_time=False)
    handler.emit(record("a" * 40))
    handler.emit(record("b" * 40))
    deadline = time.monotonic() + 60
    while old.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (moved,) = handler.moved()
    handler.close()
    assert moved.read_text() == "a" * 40 + "\n"
    stamp = time.strftime("%Y-%m-%dT%H", time.gmtime())
    assert moved.name.startswith(f"nydus-snapshotter-{stamp}") or time.gmtime().tm_min == 0
    assert other.exists()


def test_level_at_run_time() -> None:
    before = logging.getLogger().level
    try:
        logs.set_level("debug")
        assert (logs.level(), logging.getLogger().level) == ("debug", logging.DEBUG)
        logs.set_level("warn")
        assert logs.level() == "warning"
        with pytest.raises(SettingsError, match="loud"):
            logs.set_level("loud")
    finally:
        logging.getLogger().setLevel(before)


# ---- metrics


def test_exposition_is_what_prometheus_reads() -> None:
    counter = Family("nydusd_lifetime_event_counts", "counter", "by event", ("nydusd_event",))
    counter.add(2, "DIED")
    gauge = Family("g", "gauge", 'a "text"\nin \\ two lines', ("image_ref",))
    nasty = 'reg/"a"\\b\nc:1'
    gauge.add(0.25, nasty)
    gauge.add(1, nasty)  # the same image twice
    times = Family("h", "histogram", "times", ("op",))
    times.histogram((1, 5), (3, 4, 2), 40.5, "PREPARE")
    empty = Family("none", "gauge", "no samples")
    text = render([counter, gauge, times, empty]).decode()
    assert 'nydusd_lifetime_event_counts{nydusd_event="DIED"} 2\n' in text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(found) == {"nydusd_lifetime_event_counts", "g", "h"}
    assert [(sample.labels["image_ref"], sample.value) for sample in found["g"].samples] == [(nasty, 1.25)]
    buckets = {sample.labels.get("le"): sample.value for sample in found["h"].samples if sample.name == "h_bucket"}
    assert buckets == {"1": 3, "5": 7, "+Inf": 9}
    assert {sample.name: sample.value for sample in found["h"].samples if not sample.name.endswith("bucket")} == {
        "h_sum": 40.5,
        "h_count": 9,
    }


def test_tally_forgets_the_oldest_times_first() -> None:
    one = Tally()
    for number in range(2000):
        one.remember(f"snapshot {number}", prepare=0.001)
    assert one.remembered("snapshot 0") == {}
    assert one.remembered("snapshot 1999")["prepare"] == 0.001


# ---- HTTP and stacks


def test_http_server(tmp_path: Path) -> None:
    def missing(request: httpd.Request) -> httpd.Reply:
        raise NotFound(f"no {request.found['name']} here")

    def broken(request: httpd.Request) -> httpd.Reply:
        raise ValueError("secret detail")

    routes: httpd.Routes = {
        r"/echo": {"PUT": lambda request: httpd.Reply(200, request.body, "text/plain")},
        r"/things/(?P<name>[^/]+)": {"GET": missing},
        r"/broken": {"GET": broken},
    }
    server = httpd.Server("test", "127.0.0.1:0", routes)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)

        def ask(method: str, path: str, body: bytes = b"") -> tuple[int, str]:
            connection.request(method, path, body=body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        assert ask("PUT", "/echo", b"x" * 100_000) == (200, "x" * 100_000)
        assert ask("GET", "/echo")[0] == 405
        assert ask("GET", "/nothing")[0] == 404
        assert ask("GET", "/things/a%20b") == (404, '{"code": "Unknown", "message": "no a b here"}')
        status, text = ask("GET", "/broken")
        assert (status, "secret" in text) == (500, False)
    finally:
        server.close()
    unix = tmp_path / "s.sock"
    second = httpd.Server("test", unix, routes)
    assert unix.stat().st_mode & 0o777 == 0o600
    second.close()
    assert not unix.exists()


def test_a_mirror_before_two_registries_is_two_sources() -> None:
    """Told apart by their headers, whose values nydusd does not tell."""
    one = {"address": "http://127.0.0.1:65001", "first_byte_millis": 20.0, "bytes_per_second": 100, "in_flight": 1,
           "error_rate": 0.5, "requests": 2, "failures": 1, "bytes": 50}  # fmt: skip

    class Api:
        def info(self, timeout: float) -> dict[str, Any]:
            return {}

        def metrics(self, kind: str, identity: str | None = None) -> list[dict[str, Any]]:
            up, down = ({**one, "state": state, "headers": state} for state in ("up", "down"))
            return [up, down, {**one, "address": "https://registry.example", "state": "up"}]

    class Images:
        def instances(self, daemon: str) -> list[Any]:
            return []

    daemon: Any = SimpleNamespace(id="d", api=Api(), memory_kb=lambda: 1)
    images, store, table = cast(Any, Images()), cast(Any, None), metrics._Table()
    chosen = settings.MetricsSettings("", 10, 60)
    metrics.Metrics(chosen, images, store, Path("/"), Path("/"))._daemon(table, daemon)
    found = {
        (family.name, sample.labels["source"], sample.labels["headers"]): sample.value
        for family in text_string_to_metric_families(render(table.families.values()).decode())
        for sample in family.samples
        if family.name.startswith("nydusd_source_")
    }
    mirror = [value for key, value in found.items() if key[:2] == ("nydusd_source_up", one["address"])]
    assert sorted(mirror) == [0, 1]
    assert found["nydusd_source_up", "https://registry.example", ""] == 1
    milliseconds = {value for key, value in found.items() if key[0] == "nydusd_source_first_byte_milliseconds"}
    assert milliseconds == {20.0}


def test_all_addresses_are_listened_at_where_the_kernel_has_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Go does: ipv6.disable=1 must not keep a node's snapshotter from starting with upstream's sample."""

    class Without(socket.socket):
        def __init__(self, family: int = -1, *more: int, **named: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *more, **named)

    monkeypatch.setattr(socket, "socket", Without)
    server = httpd.Server("metrics", ":0", {r"/v1/metrics": {"GET": lambda request: httpd.Reply()}})
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/v1/metrics")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.close()


@pytest.mark.parametrize("address", [":99110", "127.0.0.1:65536", "127.0.0.1", "[::1]:http"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(StartError, match=re.escape(repr(address))):
        httpd.Server("metrics", address, {})


def test_stacks_of_threads_name_where_they_are() -> None:
    found = stacks.threads()
    mine = next(entry for entry in found if any("test_stacks_of_threads" in line for line in entry["stack"]))
    assert "test_operators.py" in mine["stack"][-2] + mine["stack"][-1]
    assert f"{len(found)} threads" in stacks.as_text({"threads": found, "tasks": []})


@pytest.mark.trio
async def test_stacks_of_tasks_show_who_waits_for_what() -> None:
    import trio.testing

    async def sleeper() -> None:
        await trio.sleep_forever()

    stacks.watch_tasks()
    async with trio.open_nursery() as inner:
        inner.start_soon(sleeper, name="a sleeper")
        await trio.testing.wait_all_tasks_blocked()
        (entry,) = [entry for entry in stacks.tasks() if entry["name"].strip() == "a sleeper"]
        inner.cancel_scope.cancel()
    assert any(line.endswith(" sleeper") for line in entry["stack"])
    assert any(line.endswith(" sleep_forever") for line in entry["stack"])


def test_an_upgrade_of_many_nydusd_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go one after the other, each as long as it takes."""
    monkeypatch.setattr(NydusdApi.call, "__defaults__", (None, 0.2))  # what other requests are given

    def slow(request: httpd.Request) -> httpd.Reply:
        time.sleep(1)
        return httpd.Reply()

    server = httpd.Server("system", tmp_path / SOCKET, {"/api/v1/daemons/upgrade": {"PUT": slow}, "/.*": {"GET": slow}})
    try:
        done = CliRunner().invoke(operate.command, ["upgrade", "--root", str(tmp_path)])
        assert (done.exit_code, done.output) == (0, "")
        done = CliRunner().invoke(operate.command, ["daemons", "--root", str(tmp_path)])
        assert (done.exit_code, "no snapshotter" in done.output) == (1, False)
        assert f"the snapshotter at {tmp_path / SOCKET} does not answer in time" in done.output
    finally:
        server.close()
    done = CliRunner().invoke(operate.command, ["upgrade", "--root", str(tmp_path)])
    assert (done.exit_code, "no snapshotter answers" in done.output) == (1, True)


def test_doctor_knows_mounts_that_no_nydusd_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says of a mount that it does not know how to take it away: containers may run on it."""
    database = Database(tmp_path / NAME)
    store = Store(tmp_path, database)
    store.create(Kind.ACTIVE, "odd", "", {UID_MAPPING: "an update made it so"})
    known, plain = (
        store.create(Kind.ACTIVE, key, "", labels).id for key, labels in (("t", {TARFS: "00"}), ("p", {}))
    )
    database.close()
    places = [str(store.path(identity) / "mnt") for identity in (known, plain)]
    monkeypatch.setattr(storage.kernel, "mounts", lambda: [MountEntry(one, "erofs", "none", 0, 1) for one in places])
    (found,) = storage.mounts(Node(Choices(root=str(tmp_path))))
    assert (found.check, found.remedy) == ("leftover.unknown", f"umount -l {places[1]}")
    assert places[0] not in found.text


@pytest.mark.parametrize("kind", ["proxy", "mirror"])
def test_doctor_shows_no_password_of_a_source(tmp_path: Path, kind: str) -> None:
    """Its output is what people put into reports."""
    server = httpd.Server("source", "127.0.0.1:0", {"/.*": {"GET": lambda request: httpd.Reply()}})
    template = tmp_path / "nydusd.json"

    def told(port: int) -> str:
        url = f"http://robot:geheim@127.0.0.1:{port}"
        source = {"proxy": {"url": url}} if kind == "proxy" else {"mirrors": [{"host": url}]}
        backend = {"type": "registry", "config": {"scheme": "http", **source}}
        template.write_text(json.dumps({"device": {"backend": backend, "cache": {"type": "blobcache"}}}))
        (found,) = remote.reachability(
            Node(Choices(root=str(tmp_path / "root"), arguments=("--config-path", str(template))))
        )
        return f"{found.level.name}: {found.text}"

    try:
        assert told(server.port).startswith(f"OK: {kind} http://(hidden)@127.0.0.1:{server.port} answers")
    finally:
        server.close()
    assert told(server.port).startswith(f"WARNING: {kind} http://(hidden)@127.0.0.1:{server.port} cannot be reached")
