"""What operators ask of a node at work: the system controller, metrics, explain, top."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from snapshotter.nydusd_api import NydusdApi
from tests.lab.operated import CTL, REPOSITORY, Lab, group
from tests.lab.process import run, wait_until
from tests.lab.stack import REPO

pytestmark = pytest.mark.timeout(240)


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


def test_a_prefetch_list_that_is_not_used_is_said(lab: Lab) -> None:
    assert lab.call("PUT", "/api/v1/prefetch", "nonsense") == (200, "")
    wanted = [{"image": lab.ref, "prefetch": "/marker\n/payload"}]
    assert lab.call("PUT", "/api/v1/prefetch", wanted) == (200, "")
    log = (lab.root / "logs" / "nydus-snapshotter.log").read_text()
    assert f"fs_prefetch.enable is off in nydusd's template: 2 paths of {lab.ref} will not be fetched ahead" in log


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
    wait_until(lambda: "most recent call first" in lab.stack.snapshotter.log.read_text(), 60, "stacks on stderr")
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


def total(family: Metric | None) -> float:
    return sum(one.value for one in family.samples) if family else 0.0


def hung(lab: Lab) -> int:
    (count,) = re.findall(r"^nydusd_hung_io_counts (\S+)$", lab.fetch(lab.metrics, "/v1/metrics"), re.M)
    return int(float(count))


def test_reads_that_hang_are_counted_as_long_as_they_do(lab: Lab) -> None:
    """Registry and mirror keep their connections and say nothing; one reader is killed, the other served at last."""
    assert lab.stack.mirror is not None
    api = NydusdApi(Path(lab.call("GET", "/api/v1/daemons")[1][0]["api_socket"]))
    assert (hung(lab), api.metrics("inflight")) == (0, None)
    servers = [one._child.pid for one in (lab.stack.registry, lab.stack.mirror) if one._child is not None]
    code = "import os,sys; print(len(os.pread(os.open(sys.argv[1], 0), 4096, int(sys.argv[2]))))"
    began = time.time()
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    try:
        readers = [
            subprocess.Popen([sys.executable, "-c", code, lab.mountpoint() / "payload", str(at << 20)],
                             stdout=subprocess.PIPE, text=True)
            for at in (3, 6)
        ]  # fmt: skip
        wait_until(lambda: hung(lab) >= 2, 60, "the metric to count two reads")
        reported: list[dict[str, Any]] = []

        def all_hang() -> bool:
            """One of the readers, or what the kernel reads ahead, may have come later."""
            reported[:] = api.metrics("inflight")
            return all(time.time() - one["timestamp_secs"] >= 1 for one in reported)

        wait_until(all_hang, 30, "reads that hang for a second")
        assert len({one["unique"] for one in reported}) == len(reported) >= 2
        assert {one["opcode"] for one in reported} == {15}
        assert all(began < one["timestamp_secs"] + 1 for one in reported)
        readers[0].kill()  # what the kernel reads ahead for it goes on waiting
        readers[0].communicate(timeout=30)
    finally:
        for pid in servers:
            os.kill(pid, signal.SIGCONT)
    assert readers[1].communicate(timeout=60)[0] == "4096\n"
    wait_until(lambda: (hung(lab), api.metrics("inflight")) == (0, None), 60, "nothing that hangs")


def test_metrics_have_upstreams_names_and_true_values(lab: Lab) -> None:
    lab.stack.ctr_run(lab.ref, "sh", "-c", "cat /payload > /dev/null")
    text, families = "", dict[str, Metric]()

    def collected() -> bool:
        """All has been read and counted."""
        nonlocal text, families
        text = lab.fetch(lab.metrics, "/v1/metrics")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        # maybe less than all: the kernel itself reads what came before its mount (auto: once nobody waited)
        return (
            total(families.get("nydusd_total_read_bytes")) > 4 << 20
            and total(families.get("snapshotter_cache_usage_kilobytes")) > 8 << 10
        )

    wait_until(collected, 60, "the figures of what was read")
    # the parser of today takes `_total` off the names of counters
    missing = [name for name in UPSTREAM if name not in families and name.removesuffix("_total") not in families]
    assert missing == []

    def value(name: str, **labels: str) -> float:
        (sample,) = [one for one in families[name].samples if one.name == name and labels.items() <= one.labels.items()]
        return sample.value

    assert value("nydusd_total_read_bytes", image_ref=lab.ref) > 4 << 20
    assert value("nydusd_up") == 1
    assert value("snapshotter_cache_usage_kilobytes") > 8 << 10
    assert lab.stack.mirror is not None
    sources = {one.labels["source"]: one.value for one in families["nydusd_source_read_bytes"].samples}
    # others were asked too where it was late, and right after another worker's begin
    assert sum(count for source, count in sources.items() if source.startswith(lab.stack.mirror.url)) > 0
    assert sum(sources.values()) > 1 << 20
    calls = families["snapshotter_snapshot_operation_elapsed_milliseconds"].samples
    assert {one.labels["snapshot_operation"] for one in calls} >= {"PREPARE", "MOUNTS", "REMOVE", "STAT"}
    assert lab.fetch(lab.metrics, "/metrics").count("# TYPE") == text.count("# TYPE")


# ---- explain, top, dashboard


def explained(lab: Lab, name: str) -> dict[str, Any]:
    command = [*CTL, "explain", name, "--json", "--root", lab.root, "-a", lab.stack.containerd.socket]
    return dict(json.loads(run(command, timeout=60).stdout))


def cached(found: dict[str, Any]) -> int:
    return sum(layer["cached"] for layer in found["layers"])


def test_explain_a_lazy_container(lab: Lab) -> None:
    stack = lab.stack
    stack.containerd.ctr("run", "-d", "--net-host", "--snapshotter", "nydus", lab.ref, "explained",
                         "sh", "-c", "sha256sum < /payload; sleep 100")  # fmt: skip
    try:
        wait_until(lambda: cached(explained(lab, "expl")) >= 8 << 20, 60, "the payload read")
        found = explained(lab, "explained")
    finally:
        stack.containerd.ctr("tasks", "kill", "-s", "KILL", "explained")
        wait_until(lambda: "STOPPED" in stack.containerd.ctr("tasks", "ls").stdout, 60, "the container to end")
        stack.containerd.ctr("tasks", "rm", "explained")
        stack.containerd.ctr("containers", "rm", "explained")
    assert (found["kind"], found["image"], found["lazy"]) == ("container", lab.ref, True)
    assert found["driver"] in ("FUSE", "EROFS, by the kernel")  # auto: by whether somebody rested already
    assert [layer["state"] for layer in found["layers"]] == ["lazy", "lazy", "lazy", "bootstrap"]
    assert found["reads"]["bytes"] > 4 << 20
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
    assert re.search("lazy: mounted by (FUSE|EROFS, by the kernel) at", shown)
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


def test_top_goes_on_until_it_is_interrupted(lab: Lab) -> None:
    where = ["--root", lab.root, "-a", lab.stack.containerd.socket, "--interval", "0.2"]
    top = subprocess.Popen([*CTL, "top", "--json", *where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert top.stdout is not None
    for _ in range(2):
        assert json.loads(top.stdout.readline())["images"]
    top.send_signal(signal.SIGINT)
    _, errors = top.communicate(timeout=30)
    assert (top.returncode, errors) == (0, "")


def test_the_snapshotter_itself(lab: Lab) -> None:
    assert "MainThread" in run([*CTL, "snapshotter", "stacks", "--root", lab.root], timeout=60).stdout
    run([*CTL, "snapshotter", "log-level", "debug", "--daemons", "--root", lab.root], timeout=60)
    assert lab.call("GET", "/api/v1/log")[1] == {"level": "debug"}
    run([*CTL, "snapshotter", "log-level", "info", "--daemons", "--root", lab.root], timeout=60)
    assert json.loads(run([*CTL, "snapshotter", "daemons", "--root", lab.root], timeout=60).stdout)[0]["instances"]
    assert "static" in run([*CTL, "auth", "explain", lab.ref, "--root", lab.root], timeout=60).stdout
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
