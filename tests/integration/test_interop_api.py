"""The same requests to our nydusd and to upstream's, side by side: status, headers, error texts, shape of bodies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from nydusfs.unixhttp import UnixConnection
from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, wait_until
from tests.lab.paths import ref_bin

pytestmark = [
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
    pytest.mark.skipif(ref_bin("nydusd") is None, reason="interop: no reference nydusd here"),
]

V1, V2 = "/api/v1", "/api/v2"
ROUTES = (
    "daemon", "daemon/start", "daemon/exit", "daemon/events", "daemon/backend", "daemon/fuse/sendfd",
    "daemon/fuse/takeover", "mount", "metrics", "metrics/files", "metrics/pattern", "metrics/backend",
    "metrics/blobcache", "metrics/inflight", "config",
)  # fmt: skip
METRICS = ("metrics", "metrics/files", "metrics/pattern", "metrics/backend", "metrics/blobcache")
OURS_ALONE = {
    "keeper_pid", "worker_pid", "mirrors", "sources", "prefetch_segments", "prefetch_used",
}  # fmt: skip
# Where the words differ on purpose: ours say what is wrong and with what, and hold no text that was sent.
OWN_WORDS = (
    "Failed to load config", "Failed to fill superBlock", "PathWalk", "struct DaemonConf", "invalid type: string",
)  # fmt: skip
BLOB = {"type": "bootstrap", "id": "x", "domain_id": "d"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def ask(daemon: Nydusd, method: str, target: str, body: Any = None) -> Answer:
    connection = UnixConnection(daemon.sock, 20)
    try:
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        connection.request(method, target, body=data)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, headers, answer.read().decode())
    except (OSError, HTTPException) as error:
        return Answer(0, {}, repr(error))
    finally:
        connection.close()


Step = tuple[str, str, Any]


def mount_at(path: str) -> str:
    return f"{V1}/mount?mountpoint={quote(path, safe='')}"


def refused() -> Iterator[Step]:
    """Requests to a daemon without images that change nothing."""
    for route in ROUTES:
        for method in ("GET", "PUT", "POST", "DELETE", "PATCH", "HEAD"):
            for body in (None, "{}"):
                risky = method == "PUT" and body is None and route in ("daemon/exit", "daemon/fuse/sendfd")
                if not risky and not (method == "HEAD" and body):
                    yield method, f"{V1}/{route}", body
    for target in ("/", V1, f"{V1}/", f"{V1}/daemon/", f"{V1}/nope", f"{V2}/nope", f"{V1}/metrics/nope"):
        yield "GET", target, None
    for version in (V1, V2):
        for body in ("{", "[]", '"x"', "null", "5", b"\xff", '{"log_level":"info"} x', '{"log_level":5}',
                     '{"log_level":true}', '{"log_level":null}', '{"log_level":["info"]}', '{"log_level":{}}',
                     '{"log_level":"nope"}', '{"log_level":"WARN"}', '{"log_level":"off"}', '{"log_level":"trace"}',
                     '{"log_level":"info","more":1}'):  # fmt: skip
            yield "PUT", f"{version}/daemon", body
        yield "GET", f"{version}/daemon", None
    for route in METRICS:
        yield "GET", f"{V1}/{route}?id=/x", None
        yield "GET", f"{V1}/{route}?id=&other=1", None
    for target in ("?mountpoint=/x", "?mountpoint=", "?other=1"):
        yield "GET", f"{V1}/daemon/backend{target}", None
    for values in ({}, {"nope": "x"}, {"registry_auth": 5}, {"proxy_url": "http://h:1"}, {"registry_auth": "nob64"},
                   {"dragonfly_scheduler_endpoint": "x"}, {"registry_auth": "YTpi", "nope": "x"}):  # fmt: skip
        yield "PUT", f"{V1}/config?id=q", values
    yield "GET", f"{V1}/config?id=other", None
    for values in ({}, BLOB, {**BLOB, "config": {"id": "a"}}, {"id": "x"}):
        yield "PUT", f"{V2}/blobs", values
    for query in ("", "?domain_id=d", "?domain_id=d&blob_id=q", "?blob_id=q"):
        yield "DELETE", f"{V2}/blobs{query}", None
    yield "POST", f"{V2}/blobs", "{}"
    good = {"source": "/nope", "fs_type": "rafs", "config": "{}"}
    for body in ({}, {"source": "/x"}, {"source": "/x", "fs_type": "rafs"}, {"source": 5, **good}, good,
                 {**good, "source": 5}, {**good, "config": 5}, {**good, "config": {}}, {**good, "prefetch_files": [5]},
                 {**good, "prefetch_files": {}}, {**good, "fs_type": "zz"}, {**good, "fs_type": 5},
                 {**good, "config": ""}, {**good, "prefetch_files": ["rel"]}):  # fmt: skip
        yield "POST", mount_at("/x"), body
    for method in ("PUT", "DELETE"):
        yield method, mount_at("/nope"), good if method == "PUT" else None


def living(daemon: Nydusd) -> Iterator[Step]:
    """A life with images: every answer with data in it."""
    one, v5 = image_case("v6-zstd-blake3-1m"), image_case("v5-merged3")

    def body(case: Path, name: str, **more: Any) -> dict[str, Any]:
        config = localfs_config(case, config_id=name, work_dir=daemon.dir / name, iostats_files=True,
                                access_pattern=True, latest_read_files=True)  # fmt: skip
        return {"source": str(case / "image.boot"), "fs_type": "rafs", "config": config, **more}

    yield "POST", mount_at("/a"), body(one, "a", prefetch_files=["rel"])
    yield "POST", mount_at("/a"), body(one, "a")
    yield "POST", mount_at("/a"), body(one, "a")
    yield "POST", mount_at("/n/e/s"), body(v5, "n")
    for path in ("a", "n/e/s"):
        command = "find . -type f -size -3000k -exec cat {} + >/dev/null; ls -R . >/dev/null"
        subprocess.run(["sh", "-c", command], cwd=daemon.mnt / path, timeout=30, check=True)
    yield "GET", f"{V1}/daemon", None
    yield "GET", f"{V2}/daemon", None
    for path in ("/a", "/n/e/s", "/n", "/a/", "a"):
        yield "GET", f"{V1}/daemon/backend?mountpoint={path}", None
    for route in METRICS:
        for query in ("?id=/a", "?id=/n/e/s", "?id=a", "?id=n", ""):
            yield "GET", f"{V1}/{route}{query}", None
    for latest in ("true", "true", "1", "false", ""):
        yield "GET", f"{V1}/metrics/files?id=/a&latest={latest}", None
    yield "GET", f"{V1}/metrics/inflight", None
    yield "PUT", mount_at("/a"), body(one, "a")
    yield "PUT", f"{V1}/daemon/start", None
    yield "PUT", f"{V1}/daemon/fuse/takeover", None
    for path in ("/n", "/n/e", "/a", "/a", "/n/e/s", "/n/e/s"):
        yield "DELETE", mount_at(path), None
    yield "GET", f"{V1}/daemon", None
    yield "GET", f"{V1}/daemon/events", None


def alike(ours: Any, theirs: Any) -> bool:
    """Keys and types; of lists the first elements, of objects keyed by numbers or paths one of their values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours and theirs and all(re.fullmatch(r"\d+|/.*", key) for key in (*ours, *theirs)):
            return alike(next(iter(ours.values())), next(iter(theirs.values())))
        names = ours.keys() - OURS_ALONE
        return names == theirs.keys() and all(alike(ours[name], theirs[name]) for name in names)
    if isinstance(ours, list) and isinstance(theirs, list):
        return not ours or not theirs or alike(ours[0], theirs[0])
    return type(ours) is type(theirs)


def difference(ours: Answer, theirs: Answer) -> str:
    """ "" when a client cannot tell them apart, as far as it should be able to."""
    if ours.status != theirs.status:
        return f"status {ours.status} {ours.body[:300]}, upstream {theirs.status} {theirs.body[:300]}"
    for name in ("server", "content-type", "connection"):
        if ours.headers.get(name) != theirs.headers.get(name):
            return f"header {name}: {ours.headers.get(name)!r}, upstream {theirs.headers.get(name)!r}"
    if bool(ours.body) != bool(theirs.body):
        return f"body {ours.body[:300]!r}, upstream {theirs.body[:300]!r}"
    if not ours.body:
        return ""
    mine, other = json.loads(ours.body), json.loads(theirs.body)
    if ours.status >= 400:
        if any(words in theirs.body for words in OWN_WORDS):
            return "" if mine.keys() == other.keys() and mine["code"] == other["code"] else str(mine)
        texts = [re.sub(r"column: \d+", "column: N", str(value["message"])) for value in (mine, other)]
        return "" if texts[0] == texts[1] else f"{texts[0]}, upstream {texts[1]}"
    return "" if alike(mine, other) else f"{json.dumps(mine)[:900]}, upstream {json.dumps(other)[:900]}"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nydusd, Nydusd]]:
    supervisor = tmp_path_factory.mktemp("s") / "none.sock"
    arguments = ("--id", "d1", "--supervisor", supervisor)
    with Nydusd(*arguments) as ours, Nydusd(*arguments, binary=ref_bin("nydusd")) as theirs:
        yield ours, theirs


def test_every_route_refuses_like_upstreams(both: tuple[Nydusd, Nydusd]) -> None:
    found = []
    for step in refused():
        if text := difference(ask(both[0], *step), ask(both[1], *step)):
            found.append(f"{step}: {text}")
    assert not found, "\n".join(found)


# (code, path below the image, number of the operation or None, bytes read)
OPERATIONS = (
    ("os.readlink(path)", "symlink", 1, 0), ("os.stat(path + '/none')", "dir", 9, 0),
    ("os.listdir(path)", "dir", 11, 0), ("os.getxattr(path, 'user.none')", "file", 6, 0),
    ("os.getxattr(path, sys.argv[2])", "marked", 6, 0), ("os.statvfs(path)", "dir", None, 0),
    ("os.listxattr(path)", "file", 7, 0),
    ("os.pread(os.open(path, 0), 4096, 0)", "file", 4, 4096),
)  # fmt: skip


def when_counted(daemon: Nydusd, before: Any, number: int | None) -> dict[str, Any]:
    """The figures once the operation is in them, which may be behind its answer."""
    found: dict[str, Any] = {}

    def counted() -> bool:
        found.update(daemon.get("metrics?id=/ops").body)
        return number is None or bool(found["fop_hits"][number] > before["fop_hits"][number])

    wait_until(counted, 20, f"the count of operation {number}")
    return found


def test_each_operation_is_counted_where_upstream_counts_it(both: tuple[Nydusd, Nydusd]) -> None:
    case = image_case("v6-zstd-blake3-1m")
    entries = json.loads((case / "manifest.json").read_text())["entries"]
    chosen = {kind: next(e["path"] for e in entries if e["type"] == kind and (kind != "file" or e["size"] > 1 << 20))
              for kind in ("dir", "symlink", "file")}  # fmt: skip
    marked = next(e for e in entries if e.get("xattrs"))
    chosen["marked"] = marked["path"]
    for daemon in both:
        config = localfs_config(case, work_dir=daemon.dir / "ops", enable_xattr=True)
        assert daemon.mount("/ops", case / "image.boot", config).status == 204
        for code, kind, number, size in OPERATIONS:
            before = daemon.get("metrics?id=/ops").body
            program = f"import os, sys\npath = sys.argv[1]\ntry: {code}\nexcept OSError: pass"
            path = daemon.mnt / "ops" / chosen[kind].lstrip("/")
            command = [sys.executable, "-c", program, path, next(iter(marked["xattrs"]))]
            subprocess.run(command, timeout=30, check=True)
            after = when_counted(daemon, before, number)
            hits, errors = (
                [new - old for new, old in zip(after[key], before[key], strict=True)]
                for key in ("fop_hits", "fop_errors")
            )
            counted = {index for index, count in enumerate(hits) if count}
            # names are looked up, READDIR is either
            assert counted - {9, 10} == {number} - {None, 9, 10} and number in {None, *counted}, (daemon, code, hits)
            assert not any(errors), (daemon, code, errors)
            assert after["data_read"] - before["data_read"] >= size
            blocks, reads = (sum(after[key]) - sum(before[key]) for key in ("block_count_read", "read_latency_dist"))
            assert blocks == reads == hits[4]
        assert daemon.umount("/ops").status == 204


def test_every_answer_with_data_has_upstreams_shape(both: tuple[Nydusd, Nydusd]) -> None:
    found = []
    for mine, other in zip(*map(living, both), strict=True):
        if text := difference(ask(both[0], *mine), ask(both[1], *other)):
            found.append(f"{mine[:2]}: {text}")
    assert not found, "\n".join(found)
