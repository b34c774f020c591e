"""What operators ask of a node at work: doctor with planted faults, the system controller, metrics."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from snapshotter import cgroup
from snapshotter.doctor import remote, services
from snapshotter.doctor.finding import Level
from snapshotter.doctor.run import findings
from snapshotter.node import Choices, Node
from tests.e2e.conftest import require_programs
from tests.lab.daemon import Nydusd
from tests.lab.process import free_port, remove_tree, run, unmount_below, wait_until, work_dir
from tests.lab.registry import Registry
from tests.lab.sample import small_image
from tests.lab.stack import REPO, Stack, StackOptions, program
from tests.lab.tokens import TokenServer

pytestmark = pytest.mark.timeout(240)
REPOSITORY = "team/app"
CTL = [sys.executable, "-m", "snapshotter.nydusctl"]


class Lab:
    """A stack whose registry wants a login, with a mirror before it, and the operators' sockets."""

    def __init__(self, stack: Stack, work: Path, toml: Path, metrics: int, debug: int) -> None:
        self.stack, self.work, self.toml, self.metrics, self.debug = stack, work, toml, metrics, debug
        self.ref = f"{stack.host}/{REPOSITORY}:nydus"
        self.root = stack.snapshotter.root
        self.system = work / "system.sock"
        self.unit = work / "good.service"
        text = (REPO / "systemd" / "containerd-nydus-grpc.service").read_text()
        installed = str(program("containerd-nydus-grpc"))
        self.unit.write_text(text.replace("/usr/local/bin/containerd-nydus-grpc", installed))

    def choices(self, **more: Any) -> Choices:
        arguments = ("--config", str(self.toml), "--config-path", str(self.stack.snapshotter.work / "nydusd.json"),
                     "--address", str(self.stack.snapshotter.socket))  # fmt: skip
        return Choices(
            root=str(self.root),
            arguments=arguments,
            containerd=str(self.stack.containerd.socket),
            **{"unit": str(self.unit), **more},
        )

    def doctor(self, **more: Any) -> dict[str, Level]:
        """The worst level of each check, but for what is well and what this machine's kernel and disk are like."""
        found: dict[str, Level] = {}
        self.texts: dict[str, str] = {}
        for one in findings(Node(self.choices(**more))):
            if one.level > Level.OK and one.check != "machine.kernel":
                assert one.remedy, one
                found[one.check] = max(one.level, found.get(one.check, Level.OK))
                self.texts[one.check] = one.text
        return found

    def config_file(self) -> Path:
        """Of nydusd for the one image."""
        (path,) = self.root.glob("config/*/*/config.json")
        return path

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.system))
        with contextlib.closing(connection):
            connection.request(method, path, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def fetch(self, port: int, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text

    def mountpoint(self) -> Path:
        (mount,) = [path for path in (self.root / "mnt").iterdir() if path.name.isdecimal()]
        return mount


def group() -> Path:
    second = (cgroup.ROOT / "cgroup.controllers").exists()
    return cgroup.ROOT / cgroup.NAME if second else cgroup.ROOT / "memory" / cgroup.NAME


def remove_group() -> None:
    for path in (group(), group().parent):
        with contextlib.suppress(OSError):  # not empty: somebody else's as well
            path.rmdir()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_programs()
    with contextlib.ExitStack() as exits:
        work = work_dir()
        exits.callback(remove_tree, work)
        exits.callback(unmount_below, work)
        exits.callback(remove_group)
        tokens = exits.enter_context(TokenServer(work / "tokens"))
        with Registry(work / "reg") as open_door:
            small_image(work / "image", payload=8 << 20).push(open_door.host, REPOSITORY, "oci")
        registry = exits.enter_context(Registry(work / "reg", token_realm=tokens.realm))
        environment = {"DOCKER_CONFIG": str(tokens.docker_config(work / "login", registry.host))}
        metrics, debug = free_port(), free_port()
        toml = work / "snapshotter.toml"
        toml.write_text(
            f'version = 1\n[system]\nenable = true\naddress = "{work}/system.sock"\n'
            f'[system.debug]\npprof_address = "127.0.0.1:{debug}"\ndaemon_cpu_profile_duration_secs = 1\n'
            f'[metrics]\naddress = "127.0.0.1:{metrics}"\ncollect_interval = "1s"\n[log]\nformat = "json"\n'
            '[cgroup]\nenable = true\nmemory_limit = "1GiB"\n'
        )
        options = StackOptions(
            registry=registry, mirror=True, prefetch=False, env=environment,
            snapshotter_arguments=("--config", str(toml)))  # fmt: skip
        stack = exits.enter_context(Stack(options))
        stack.convert(f"{REPOSITORY}:oci", f"{REPOSITORY}:nydus", env={**os.environ, **environment})
        made = Lab(stack, work, toml, metrics, debug)
        stack.rpull(made.ref, env={**os.environ, **environment})
        assert stack.ctr_run(made.ref, "cat", "/marker").startswith("hello")
        yield made
    assert stack.leftovers == []


# ---- doctor

Fault = Callable[[Lab], "contextlib.AbstractContextManager[dict[str, Any]]"]


@contextlib.contextmanager
def edited(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    before, times = path.read_text(), path.stat()
    after = change(before)
    assert after != before
    path.write_text(after)
    os.utime(path, (time.time() + 5, time.time() + 5))  # certainly after the start of who reads it
    try:
        yield
    finally:
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def containerd_stopped(lab: Lab) -> Iterator[dict[str, Any]]:
    containerd = lab.stack.containerd
    os.kill(containerd.pid, signal.SIGTERM)
    assert containerd._child is not None
    containerd._child.stop()
    try:
        yield {"containerd_config": str(containerd.work / "config.toml")}
    finally:
        containerd.start()


@contextlib.contextmanager
def annotations_missing(lab: Lab) -> Iterator[dict[str, Any]]:
    line = "disable_snapshot_annotations = false\n"
    with edited(lab.stack.containerd.work / "config.toml", lambda text: text.replace(line, "")):
        yield {}


@contextlib.contextmanager
def plugin_missing(lab: Lab) -> Iterator[dict[str, Any]]:
    file = lab.stack.containerd.work / "config.toml"
    with edited(file, lambda text: text.replace("[proxy_plugins.nydus]", "[proxy_plugins.other]").replace(
        str(lab.stack.snapshotter.socket), "/run/other.sock")):  # fmt: skip
        yield {}


@contextlib.contextmanager
def plugin_elsewhere(lab: Lab) -> Iterator[dict[str, Any]]:
    file = lab.stack.containerd.work / "config.toml"
    with edited(file, lambda text: text.replace(str(lab.stack.snapshotter.socket), "/run/other.sock")):
        yield {}


@contextlib.contextmanager
def plugin_not_loaded(lab: Lab) -> Iterator[dict[str, Any]]:
    """containerd started before the plugin was put into its configuration."""
    containerd = lab.stack.containerd
    file = containerd.work / "config.toml"
    whole = file.read_text()
    assert containerd._child is not None
    containerd._child.stop()
    snapshotter_socket, containerd.snapshotter_socket = containerd.snapshotter_socket, None
    containerd.start()
    containerd.snapshotter_socket = snapshotter_socket
    file.write_text(whole)
    try:
        yield {}
    finally:
        containerd._child.stop()
        containerd.start()


@contextlib.contextmanager
def mirror_gone(lab: Lab) -> Iterator[dict[str, Any]]:
    assert lab.stack.mirror is not None
    lab.stack.mirror.stop()
    try:
        yield {}
    finally:
        lab.stack.mirror.start()


@contextlib.contextmanager
def registry_gone(lab: Lab) -> Iterator[dict[str, Any]]:
    lab.stack.registry.stop()
    try:
        yield {}
    finally:
        lab.stack.registry.start()


@contextlib.contextmanager
def wrong_password(lab: Lab) -> Iterator[dict[str, Any]]:
    def change(text: str) -> str:
        value = json.loads(text)
        value["device"]["backend"]["config"]["auth"] = base64.b64encode(b"robot:wrong").decode()
        return json.dumps(value)

    with edited(lab.config_file(), change):
        yield {}


@contextlib.contextmanager
def image_gone(lab: Lab) -> Iterator[dict[str, Any]]:
    link = lab.work / f"reg/data/docker/registry/v2/repositories/{REPOSITORY}/_manifests/tags/nydus"
    os.rename(link, lab.work / "tag")
    try:
        yield {}
    finally:
        os.rename(lab.work / "tag", link)


@contextlib.contextmanager
def disk_full(lab: Lab) -> Iterator[dict[str, Any]]:
    cache = lab.root / "cache"
    run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", cache])
    try:
        with contextlib.suppress(OSError), (cache / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        yield {}
    finally:
        run(["umount", "-l", cache])


@contextlib.contextmanager
def dead_mount(lab: Lab) -> Iterator[dict[str, Any]]:
    folder = lab.root / "crashed"
    folder.mkdir()
    daemon = Nydusd(directory=folder)
    with daemon:
        daemon.kill_all()
        yield {}


@contextlib.contextmanager
def orphan_process(lab: Lab) -> Iterator[dict[str, Any]]:
    """A nydusd that works for this root and is in no record."""
    folder = lab.root / "socket" / "orphan"
    folder.mkdir()
    daemon = Nydusd(directory=folder)
    daemon.mnt = lab.work / "orphan"
    with daemon:
        yield {}
    unmount_below(lab.work / "orphan")


@contextlib.contextmanager
def dead_socket(lab: Lab) -> Iterator[dict[str, Any]]:
    folder = lab.root / "socket" / "dead"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "api.sock"))
    try:
        yield {}
    finally:
        remove_tree(folder)


@contextlib.contextmanager
def directory_lost(lab: Lab) -> Iterator[dict[str, Any]]:
    """Of a data layer, which nobody uses at this moment."""
    lost = min((lab.root / "snapshots").iterdir(), key=lambda path: int(path.name))
    os.rename(lost, lab.root / "lost")
    try:
        yield {}
    finally:
        os.rename(lab.root / "lost", lost)


@contextlib.contextmanager
def snapshotter_stopped(lab: Lab) -> Iterator[dict[str, Any]]:
    lab.stack.snapshotter.kill()
    try:
        yield {}
    finally:
        lab.stack.snapshotter.start()


@contextlib.contextmanager
def everything_killed(lab: Lab) -> Iterator[dict[str, Any]]:
    lab.stack.snapshotter.kill()
    lab.stack.snapshotter.end_daemons()
    run(["umount", "-l", lab.root / "mnt"], check=False)
    try:
        yield {}
    finally:
        lab.stack.snapshotter.start()
        wait_until(lambda: any(lab.root.glob("mnt/*/marker")), 30, "the image mounted again")


@contextlib.contextmanager
def unit_ends_the_daemons(lab: Lab) -> Iterator[dict[str, Any]]:
    text = lab.unit.read_text()
    file = lab.work / "bad.service"
    file.write_text(text.replace("KillMode=process", "").replace("Before=", "#Before=").replace("Restart=always", ""))
    yield {"unit": str(file)}


@contextlib.contextmanager
def wrong_template(lab: Lab) -> Iterator[dict[str, Any]]:
    with edited(lab.stack.snapshotter.work / "nydusd.json", lambda text: text.replace('"device"', '"devise"')):
        yield {}


@contextlib.contextmanager
def reads_hang(lab: Lab) -> Iterator[dict[str, Any]]:
    """Registry and mirror take connections and say nothing, and somebody reads what is not cached."""
    assert lab.stack.mirror is not None
    pids = [one._child.pid for one in (lab.stack.registry, lab.stack.mirror) if one._child is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    reader = subprocess.Popen(
        [sys.executable, "-c", f"open({str(lab.mountpoint() / 'payload')!r}, 'rb').read(10)"], stderr=subprocess.DEVNULL
    )
    before = services.HUNG_SECONDS, remote.SECONDS
    services.HUNG_SECONDS, remote.SECONDS = 0.5, 1.0
    try:
        time.sleep(1.6)  # inflight says when by whole seconds
        yield {}
    finally:
        services.HUNG_SECONDS, remote.SECONDS = before
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        reader.wait(60)


FAULTS: list[tuple[Fault, dict[str, Level]]] = [
    (containerd_stopped, {"containerd.running": Level.ERROR}),
    (annotations_missing, {"containerd.annotations": Level.WARNING, "containerd.stale": Level.WARNING}),
    (plugin_missing, {"containerd.proxy": Level.ERROR}),
    (plugin_elsewhere, {"containerd.proxy": Level.ERROR}),
    (plugin_not_loaded, {"containerd.loaded": Level.ERROR}),
    (mirror_gone, {"mirror.reach": Level.WARNING}),
    (registry_gone, {"registry.reach": Level.ERROR}),
    (wrong_password, {"registry.credentials": Level.ERROR}),
    (image_gone, {"registry.image": Level.WARNING}),
    (disk_full, {"disk.space": Level.ERROR}),
    (dead_mount, {"leftover.mount": Level.ERROR}),
    (orphan_process, {"leftover.process": Level.WARNING}),
    (dead_socket, {"leftover.socket": Level.NOTE}),
    (directory_lost, {"root.directories": Level.ERROR}),
    (unit_ends_the_daemons, {"snapshotter.killmode": Level.ERROR, "snapshotter.order": Level.WARNING,
                             "snapshotter.restart": Level.WARNING}),
    (wrong_template, {"snapshotter.template": Level.ERROR}),
    (snapshotter_stopped, {"snapshotter.running": Level.ERROR}),
    (everything_killed, {"snapshotter.running": Level.ERROR, "nydusd.running": Level.ERROR}),
    (reads_hang, {"nydusd.hung": Level.ERROR, "registry.reach": Level.ERROR, "mirror.reach": Level.WARNING}),
]  # fmt: skip


def test_a_healthy_node(lab: Lab) -> None:
    assert lab.doctor() == {}, lab.texts


@pytest.mark.parametrize(("fault", "expected"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_is_found_and_nothing_else(lab: Lab, fault: Fault, expected: dict[str, Level]) -> None:
    with fault(lab) as options:
        found = lab.doctor(**options)
    assert found == expected, lab.texts


def test_no_fuse_device_and_the_program_itself(lab: Lab) -> None:
    """In a mount namespace of its own; exit status and JSON as scripts see them."""
    stack = lab.stack
    command = [*CTL, "doctor", "--json", "--root", lab.root, "-a", stack.containerd.socket,
               "--unit", lab.unit]  # fmt: skip
    healthy = run(command, timeout=60, check=False)
    assert healthy.returncode == 0, healthy.stdout
    assert all({"check", "level", "text", "remedy"} == set(one) for one in json.loads(healthy.stdout))
    hidden = ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh", *command]
    broken = run(hidden, timeout=60, check=False)
    assert broken.returncode == 1
    (finding,) = [one for one in json.loads(broken.stdout) if one["level"] == "error"]
    assert finding["check"] == "machine.fuse"
    told = run([*CTL, "doctor", "--root", lab.root, "-a", stack.containerd.socket], timeout=60, check=False).stdout
    assert re.search(r"^ok +registry\.credentials +\S+ can be read with credentials$", told, re.M), told
    assert re.search(r"^ok +mirror\.reach +mirror http://127\.0\.0\.1:\d+ answers within \d+ ms$", told, re.M), told
    assert run([*CTL, "doctor", "--nonsense"], timeout=60, check=False).returncode == 2


# ---- the system controller


def test_daemons_records_and_backend(lab: Lab) -> None:
    status, daemons = lab.call("GET", "/api/v1/daemons")
    assert status == 200
    (daemon,) = daemons
    assert set(daemon) == {"id", "pid", "api_socket", "supervisor_path", "reference", "mountpoint",
                           "startup_cpu_utilization", "memory_rss_kb", "read_data_kb", "instances"}  # fmt: skip
    assert (daemon["reference"], daemon["mountpoint"]) == (2, str(lab.root / "mnt"))
    assert daemon["memory_rss_kb"] > 1000
    ((number, instance),) = daemon["instances"].items()
    assert instance["image_id"] == lab.ref
    assert instance["snapshot_dir"] == str(lab.root / "snapshots" / number)
    assert (Path(instance["mountpoint"]) / "marker").exists()
    status, records = lab.call("GET", "/api/v1/daemons/records")
    assert (status, records["instances"][0]["daemon_id"]) == (200, daemon["id"])
    status, backend = lab.call("GET", f"/api/v1/daemons/{daemon['id']}/backend")
    assert (status, backend["type"]) == (200, "registry")
    assert lab.call("GET", "/api/v1/daemons/nobody/backend")[0] == 404
    assert lab.call("POST", "/api/v1/daemons")[0] == 405
    assert lab.system.stat().st_mode & 0o777 == 0o600


def test_upgrade_under_a_mount(lab: Lab) -> None:
    assert lab.call("PUT", "/api/v1/daemons/upgrade", "no object")[0] == 400
    status, told = lab.call("PUT", "/api/v1/daemons/upgrade", {"nydusd_path": "/bin/true"})
    assert (status, "another installation" in told["message"]) == (500, True)
    (daemon,) = lab.call("GET", "/api/v1/daemons")[1]
    status, before = lab.call("GET", f"/api/v1/daemons/{daemon['id']}/stacks")
    marker = (lab.mountpoint() / "marker").open()
    with marker:
        assert lab.call("PUT", "/api/v1/nydusd/upgrade", {"policy": "rolling"}) == (200, "")
        assert marker.read() == "hello"
    assert lab.call("GET", f"/api/v1/daemons/{daemon['id']}/stacks")[1]["pid"] != before["pid"]


def test_stacks_profile_and_levels(lab: Lab) -> None:
    told = lab.call("GET", "/api/v1/stacks")[1]
    assert any("serve_forever" in line for thread in told["threads"] for line in thread["stack"])
    assert "MainThread" in lab.fetch(lab.debug, "/debug/pprof/goroutine?debug=2")
    folded = lab.fetch(lab.debug, "/debug/pprof/profile?seconds=0.3")
    assert re.match(r"(\S+;)+\S+ \d+$", folded.splitlines()[0])
    (daemon,) = lab.call("GET", "/api/v1/daemons")[1]
    assert "_watch_signals" in lab.fetch(lab.debug, f"/debug/pprof/daemons/{daemon['id']}")
    log = lab.root / "logs" / "nydus-snapshotter.log"
    assert lab.call("PUT", "/api/v1/log", {"level": "debug", "daemons": True})[0] == 200
    assert lab.call("GET", "/api/v1/log") == (200, {"level": "debug"})
    assert lab.call("PUT", "/api/v1/log", {"level": "loud"})[0] == 500
    lab.call("GET", "/api/v1/daemons")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line["level"] == "debug" for line in lines)
    daemon_log = (lab.root / "logs" / daemon["id"] / "nydusd.log").read_text()
    assert all(json.loads(line)["level"] for line in daemon_log.splitlines())
    assert lab.call("PUT", "/api/v1/log", {"level": "info", "daemons": True})[0] == 200


def test_prefetch_list_is_for_the_next_mount(lab: Lab) -> None:
    assert lab.call("PUT", "/api/v1/prefetch", "nonsense") == (200, "")
    wanted = [{"image": lab.ref, "prefetch": "/marker\n/payload"}]
    assert lab.call("PUT", "/api/v1/prefetch", wanted) == (200, "")
    log = (lab.root / "logs" / "nydus-snapshotter.log").read_text()
    assert f"2 paths are fetched first at the next mount of {lab.ref}" in log


def test_all_processes_of_nydusd_share_a_memory_limit(lab: Lab) -> None:
    log = (lab.root / "logs" / "nydus-snapshotter.log").read_text()
    if "nydusd runs without a memory limit" in log:
        pytest.skip("root: this machine lets nobody make a control group for memory")
    limit = group() / ("memory.max" if (group() / "memory.max").exists() else "memory.limit_in_bytes")
    assert int(limit.read_text()) == 1 << 30
    (daemon,) = lab.call("GET", "/api/v1/daemons")[1]
    inside = {int(line) for line in (group() / "cgroup.procs").read_text().split()}
    assert daemon["pid"] in inside
    assert lab.call("GET", f"/api/v1/daemons/{daemon['id']}/stacks")[1]["pid"] in inside
    assert lab.stack.snapshotter.pid not in inside


def test_stacks_of_the_snapshotter_by_signal(lab: Lab) -> None:
    os.kill(lab.stack.snapshotter.pid, signal.SIGUSR1)
    wait_until(lambda: "most recent call first" in lab.stack.snapshotter.log.read_text(), 10, "stacks on stderr")
    assert lab.call("GET", "/api/v1/log")[0] == 200


# ---- metrics

UPSTREAM = [
    "nydusd_total_read_bytes",
    "nydusd_read_hits",
    "nydusd_read_errors",
    "nydusd_cumulative_read_block_bytes",
    "nydusd_read_latency_microseconds",
    "nydusd_hung_io_counts",
    "nydusd_lifetime_event_counts",
    "nydusd_counts",
    "nydusd_rss_kilobytes",
    "nydusd_image_info",
    "nydusd_cache_partial_hits",
    "nydusd_cache_whole_hits",
    "nydusd_cache_total_requests",
    "nydusd_cache_entries_count",
    "nydusd_cache_prefetch_data_bytes",
    "nydusd_cache_prefetch_requests_count",
    "nydusd_cache_prefetch_workers",
    "nydusd_cache_prefetch_unmerged_chunks",
    "nydusd_cache_prefetch_cumulative_time_millis",
    "nydusd_cache_prefetch_duration_millis",
    "nydusd_cache_buffered_backend_size",
    "snapshotter_snapshot_operation_elapsed_milliseconds",
    "snapshotter_cache_usage_kilobytes",
    "snapshotter_cpu_usage_percentage",
    "snapshotter_memory_usage_kilobytes",
    "snapshotter_cpu_system_time_seconds",
    "snapshotter_cpu_user_time_seconds",
    "snapshotter_fd_counts",
    "snapshotter_run_time_seconds",
    "snapshotter_thread_counts",
    "snapshotter_cache_blobs_deleted_total",
    "snapshotter_cache_blob_deletion_errors_total",
    "snapshotter_cache_blobs_in_use",
]


def test_metrics_have_upstreams_names_and_true_values(lab: Lab) -> None:
    lab.stack.ctr_run(lab.ref, "sh", "-c", "cat /payload > /dev/null")
    time.sleep(2.5)
    text = lab.fetch(lab.metrics, "/v1/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    # the parser of today takes `_total` off the names of counters
    missing = [name for name in UPSTREAM if name not in families and name.removesuffix("_total") not in families]
    assert missing == []

    def value(name: str, **labels: str) -> float:
        (sample,) = [one for one in families[name].samples if one.name == name and labels.items() <= one.labels.items()]
        return sample.value

    assert value("nydusd_total_read_bytes", image_ref=lab.ref) >= 8 << 20
    assert value("nydusd_up") == 1
    assert value("snapshotter_cache_usage_kilobytes") > 8 << 10
    (mirror,) = [one for one in families["nydusd_source_read_bytes"].samples if one.value > 1 << 20]
    assert lab.stack.mirror is not None
    assert mirror.labels["source"].startswith(lab.stack.mirror.url)
    calls = families["snapshotter_snapshot_operation_elapsed_milliseconds"].samples
    assert {one.labels["snapshot_operation"] for one in calls} >= {"PREPARE", "MOUNTS", "REMOVE", "STAT"}
    assert lab.fetch(lab.metrics, "/metrics").count("# TYPE") == text.count("# TYPE")


# ---- explain, top, dashboard


def explained(lab: Lab, name: str) -> dict[str, Any]:
    command = [*CTL, "explain", name, "--json", "--root", lab.root, "-a", lab.stack.containerd.socket]
    return dict(json.loads(run(command, timeout=60).stdout))


def test_explain_a_lazy_container(lab: Lab) -> None:
    stack = lab.stack
    stack.containerd.ctr("run", "-d", "--net-host", "--snapshotter", "nydus", lab.ref, "explained",
                         "sh", "-c", "sha256sum < /payload; sleep 100")  # fmt: skip
    try:
        wait_until(lambda: explained(lab, "expl")["reads"]["bytes"] >= 8 << 20, 60, "the payload read")
        found = explained(lab, "explained")
    finally:
        stack.containerd.ctr("tasks", "kill", "-s", "KILL", "explained")
        wait_until(lambda: "STOPPED" in stack.containerd.ctr("tasks", "ls").stdout, 20, "the container to end")
        stack.containerd.ctr("tasks", "rm", "explained")
        stack.containerd.ctr("containers", "rm", "explained")
    assert (found["kind"], found["image"], found["lazy"], found["driver"]) == ("container", lab.ref, True, "FUSE")
    assert [layer["state"] for layer in found["layers"]] == ["lazy", "lazy", "lazy", "bootstrap"]
    assert sum(layer["cached"] for layer in found["layers"]) >= 8 << 20
    assert found["reads"]["errors"] == 0
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert {"pull", "prepare", "first read"} <= set(phases)
    assert 0 < phases["prepare"]["seconds"] < 60
    assert phases["pull"]["at"] < phases["prepare"]["at"]
    assert stack.mirror is not None
    by_source = {one["address"].split("?")[0].rstrip("/"): one["bytes"] for one in found["sources"]}
    assert sum(by_source.values()) > 0
    assert stack.mirror.url in by_source
    shown = run([*CTL, "explain", lab.ref, "--root", lab.root, "-a", stack.containerd.socket], timeout=60).stdout
    assert "lazy: mounted by FUSE at" in shown
    assert "Bytes by source" in shown
    assert len(shown.splitlines()) < 60


def test_explain_says_why_not(lab: Lab) -> None:
    stack = lab.stack
    plain = f"{stack.host}/{REPOSITORY}:oci"
    environment = {**os.environ, **stack.options.env}
    stack.rpull(plain, env=environment)
    found = explained(lab, plain)
    assert (found["lazy"], {layer["state"] for layer in found["layers"]}) == (False, {"unpacked"})
    assert any("plain OCI image" in reason for reason in found["why"])
    stack.rpull(plain, snapshotter="overlayfs", env=environment)
    stack.containerd.ctr("containers", "create", "--snapshotter", "overlayfs", plain, "elsewhere", "true")
    try:
        found = explained(lab, "elsewhere")
    finally:
        stack.containerd.ctr("containers", "rm", "elsewhere")
    assert not found["lazy"]
    assert any("snapshotter overlayfs" in reason for reason in found["why"])
    command = [*CTL, "explain", "nobody", "--root", lab.root, "-a", stack.containerd.socket]
    missing = run(command, timeout=60, check=False)
    assert (missing.returncode, "no container and no image nobody" in missing.stderr) == (1, True)


def test_top_once(lab: Lab) -> None:
    where = ["--root", lab.root, "-a", lab.stack.containerd.socket, "--interval", "0.5", "--once"]
    now = json.loads(run([*CTL, "top", "--json", *where], timeout=60).stdout)
    (image,) = now["images"]
    assert image["image"] == lab.ref
    assert image["per_second"]["reads"] >= 0
    assert now["daemons"][0]["state"] == "RUNNING"
    assert any(one["bytes"] > 0 for one in now["sources"])
    shown = run([*CTL, "top", *where], timeout=60).stdout
    assert lab.ref[:20] in shown
    assert "RUNNING" in shown


def test_the_snapshotter_itself(lab: Lab) -> None:
    assert "MainThread" in run([*CTL, "snapshotter", "stacks", "--root", lab.root], timeout=60).stdout
    run([*CTL, "snapshotter", "log-level", "debug", "--daemons", "--root", lab.root], timeout=60)
    assert lab.call("GET", "/api/v1/log")[1] == {"level": "debug"}
    run([*CTL, "snapshotter", "log-level", "info", "--daemons", "--root", lab.root], timeout=60)
    assert json.loads(run([*CTL, "snapshotter", "daemons", "--root", lab.root], timeout=60).stdout)[0]["instances"]
    gone = run([*CTL, "snapshotter", "stacks", "--root", lab.work / "nowhere"], timeout=60, check=False)
    assert (gone.returncode, "no snapshotter answers" in gone.stderr) == (1, True)


def test_every_metric_of_the_dashboard_exists(lab: Lab) -> None:
    lab.doctor()
    text = lab.fetch(lab.metrics, "/v1/metrics")
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and line[0] != "#"}
    dashboard = json.loads((REPO / "examples" / "grafana" / "nydus.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    expressions += [one["query"]["query"] for one in dashboard["templating"]["list"] if isinstance(one["query"], dict)]
    used = {name for text in expressions for name in re.findall(r"\b(?:nydusd|snapshotter)_[a-z_]+", text)}
    labels = {"nydusd_event", "snapshot_operation"}
    assert len(used) > 30
    assert used - labels - names == set(), text
