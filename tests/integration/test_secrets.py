"""Secrets go in by every door the daemon has; none comes out: logs at trace level, API, argv, files, error lines."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import Nydusd, can_mount_fuse, reader, wait_until
from tests.lab.faulty import dead_port, faulty_server
from tests.lab.objects import object_server
from tests.lab.process import processes_mentioning, unmount_below
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]

PASSWORD, WRONG, REFRESHED = "pass-Zq1word", "wrong-Zq2word", "fresh-Zq3word"
AUTH, WRONG_AUTH, NEW_AUTH = (
    base64.b64encode(f"robot:{word}".encode()).decode() for word in (PASSWORD, WRONG, REFRESHED)
)
SECRETS = {
    "password": PASSWORD, "basic": AUTH, "wrong password": WRONG, "wrong basic": WRONG_AUTH, "new": REFRESHED,
    "new basic": NEW_AUTH, "registry token": "regtok-Zq4", "bearer token": "bearer-Zq5", "proxy": "proxypw-Zq6",
    "mirror user": "mirrorpw-Zq7", "mirror header": "mirrorhdr-Zq8", "signature": "sig-Zq9", "s3 id": "AKIDZq10",
    "s3 secret": "s3secret-Zq11", "session": "session-Zq12", "oss id": "OSSIDZq13", "oss secret": "osssecret-Zq14",
    "http-proxy": "addrpw-Zq15", "hosts.toml": "hostsuser-Zq16", "hosts.toml header": "hostshdr-Zq17",
    "ping": "pingkey-Zq18", "runtime proxy": "runpw-Zq19", "environment": "envhdr-Zq20",
}  # fmt: skip
ROUTES = (
    "daemon", "daemon/events", "daemon/backend", "metrics", "metrics/files", "metrics/pattern", "metrics/backend",
    "metrics/blobcache", "metrics/sources", "metrics/slow", "metrics/inflight", "config", "profile", "cache",
    "daemon/stacks", "/api/v2/daemon", "/api/v2/blobs?domain_id=x",
)  # fmt: skip


def leaks(where: str, text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [f"{name} in {where}" for name, secret in SECRETS.items() if secret.encode() in data]


def v1(kind: str, cache: Path, **backend: Any) -> str:
    settings = {"timeout": 2, "connect_timeout": 2, "retry_limit": 0, **backend}
    device = {
        "id": kind,
        "backend": {"type": kind, "config": settings},
        "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
    }
    return json.dumps({"device": device, "mode": "direct", "iostats_files": True, "access_pattern": True})


def configurations(image: TinyImage, dead: str, work: Path, stores: dict[str, str]) -> Iterator[tuple[str, str, bool]]:
    """Name, text, and whether its files can be read."""
    registry = {"scheme": "http", "repo": "a/b", "hosts_dir": ""}
    yield "bearer", v1("registry", work / "1", **registry, host=stores["bearer"], auth=AUTH, mirrors=[
        {"host": f"http://me:{SECRETS['mirror user']}@{dead}", "ping_url": f"http://{dead}/?k={SECRETS['ping']}",
         "headers": {"Authorization": f"Bearer {SECRETS['mirror header']}", "X-Dragonfly-Registry": "http://reg"}},
    ]), True  # fmt: skip
    yield "basic", v1("registry", work / "2", **registry, host=stores["basic"], auth=AUTH), True
    yield "refused", v1("registry", work / "3", **registry, host=stores["basic"], auth=WRONG_AUTH), False
    yield "no tokens", v1("registry", work / "4", **registry, host=stores["bearer"], auth=WRONG_AUTH), False
    token = SECRETS["registry token"]
    yield "token", v1("registry", work / "5", **registry, host=stores["bearer"], registry_token=token), False
    proxy = {"url": f"http://me:{SECRETS['proxy']}@{dead}", "ping_url": f"http://{dead}/?k={SECRETS['ping']}"}
    yield "proxy", v1("registry", work / "6", **registry, host=stores["basic"], auth=AUTH, proxy={
        **proxy, "fallback": True, "check_interval": 1}), True  # fmt: skip
    yield "dead proxy", v1("registry", work / "7", **registry, host=stores["basic"], auth=AUTH, proxy={
        **proxy, "fallback": False}), False  # fmt: skip
    listed = {**registry, "hosts_dir": str(work / "certs.d")}
    yield "hosts.toml", v1("registry", work / "8", **listed, host=stores["basic"], auth=AUTH), True
    keys = {"access_key_id": SECRETS["s3 id"], "access_key_secret": SECRETS["s3 secret"]}
    s3 = {"scheme": "http", "region": "lab-1", "bucket_name": "blobs"}
    session = SECRETS["session"]
    yield "s3", v1("s3", work / "9", **s3, endpoint=stores["s3"], **keys, session_token=session), True
    wrong = {**keys, "access_key_secret": SECRETS["s3 secret"] + "x"}
    yield "s3 refused", v1("s3", work / "10", **s3, endpoint=stores["s3"], **wrong, session_token=session), False
    keys = {"access_key_id": SECRETS["oss id"], "access_key_secret": SECRETS["oss secret"]}
    oss = {"scheme": "http", "bucket_name": "blobs"}
    yield "oss refused", v1("oss", work / "11", **oss, endpoint=stores["s3"], **keys), False
    yield "dead oss", v1("oss", work / "12", **oss, endpoint=dead, **keys), False
    yield (
        "http-proxy",
        (
            f'version = 2\nid = "hp"\n[backend]\ntype = "http-proxy"\n[backend.http-proxy]\n'
            f'addr = "http://me:{SECRETS["http-proxy"]}@{dead}"\npath = "/blobs"\ntimeout = 2\nconnect_timeout = 2\n'
            f'[cache]\ntype = "filecache"\n[cache.filecache]\nwork_dir = "{work}/13"\n'
        ),
        False,
    )


def refused_configurations() -> Iterator[tuple[str, str]]:
    """Texts with a mistake beside or in a secret, and a word of the answer that says where it is."""

    def changed(**settings: Any) -> str:
        backend = {"type": "registry", "config": {"host": "h", "repo": "r", "auth": AUTH, **settings}}
        return json.dumps({"device": {"backend": backend}, "mode": "direct"})

    secret = SECRETS["registry token"]
    yield changed(auth=["robot", PASSWORD]), "device.backend.config.auth"
    yield changed(auth=PASSWORD), "device.backend.config.auth: is not base64 of user:password"
    yield changed(registry_token={"token": secret}), "device.backend.config.registry_token"
    yield changed(mirrors=[{"host": "http://m", "headers": {"Authorization": [secret]}}]), "headers"
    yield changed(mirrors=[{"host": f"me:{secret}@m"}]), "device.backend.config.mirrors[0].host"
    yield changed(mirrors=f"http://me:{secret}@m"), "device.backend.config.mirrors"
    yield changed(mirrors=[{"host": "http://m", "headers": {"X": f"{secret}\r\n"}}]), "mirrors[0].headers.X"
    yield changed(proxy=f"http://me:{secret}@m"), "device.backend.config.proxy: expected table, found string"
    yield changed(proxy={"url": f"ftp://me:{secret}@m"}), "device.backend.config.proxy.url"
    yield changed(timeout=[{"auth": secret}]), "device.backend.config.timeout: expected integer, found list"
    yield json.dumps({"device": {"backend": [AUTH]}}), "device.backend: expected table, found list"
    yield changed()[:-5] + f', "x": "{secret}', "is not valid JSON"
    yield f'version = 2\n[backend]\ntype = "registry"\n[backend.registry]\nauth = "{AUTH}\n', "TOML"


@pytest.mark.timeout(300)
def test_no_secret_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tiny_image(tmp_path, {"f": noise(300_000), "g": noise(300_000, 2)})
    blobs = {image.blob_id: image.blob}
    monkeypatch.setenv("NYDUS_HEADER_X_Secret", SECRETS["environment"])
    found: list[str] = []
    texts: list[tuple[str, str]] = []
    with (
        faulty_server(blobs) as target,
        faulty_server(blobs, auth="bearer", login=f"robot:{PASSWORD}", token_word=SECRETS["bearer token"],
                      redirect=target.url, redirect_query=f"X-Amz-Signature={SECRETS['signature']}") as bearer,
        faulty_server(blobs, auth="basic", login=f"robot:{PASSWORD}") as basic,
        object_server("s3", keys={SECRETS["s3 id"]: SECRETS["s3 secret"]},
                      tokens={SECRETS["s3 id"]: SECRETS["session"]}) as s3,
        dead_port() as dead,
        Nydusd("-l", "trace", "--id", "d") as daemon,
    ):  # fmt: skip
        s3.objects[image.blob_id] = image.blob
        stores = {"bearer": bearer.netloc, "basic": basic.netloc, "s3": f"127.0.0.1:{s3.port}"}
        for host in (basic.netloc, basic.netloc.replace(":", "_") + "_"):
            (tmp_path / "certs.d" / host).mkdir(parents=True)
            (tmp_path / "certs.d" / host / "hosts.toml").write_text(
                f'[host."http://me:{SECRETS["hosts.toml"]}@{dead}"]\n'
                f'[host."http://me:{SECRETS["hosts.toml"]}@{dead}".header]\n'
                f'Authorization = "Bearer {SECRETS["hosts.toml header"]}"\n'
            )
        cases = list(configurations(image, dead, tmp_path, stores))
        for name, text, _ in cases:
            answer = daemon.mount(f"/{name}", image.bootstrap, text)
            assert answer.status == 204, (name, answer)
        _read_all(daemon, cases, "f")
        target.mode = "404"  # the signed addresses end
        _read_all(daemon, [], "g")
        done = reader("import sys; open(sys.argv[1], 'rb').read()", daemon.mnt / "bearer" / "g")
        assert "Input/output error" in done.stderr
        target.mode = "ok"
        for text, word in refused_configurations():
            answer = daemon.mount("/refused config", image.bootstrap, text)
            assert answer.status == 500
            assert word in answer.message, answer.message
            texts.append(("a refusal", str(answer.body)))
        for values in (
            {"registry_auth": NEW_AUTH}, {"registry_auth": REFRESHED}, {"auth": NEW_AUTH},
            {"registry_auth": [NEW_AUTH]}, {"registry_auth": ""},
            {"proxy_url": f"http://me:{SECRETS['runtime proxy']}@{dead}"},
        ):  # fmt: skip
            for query in ("", "?id=registry"):
                texts.append(("PUT config", str(daemon.call("PUT", f"config{query}", values).body)))
        first = daemon.worker_pid
        os.kill(first, signal.SIGUSR1)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: daemon.running() and daemon.worker_pid != first, 60, "the next worker")
        second = daemon.worker_pid
        assert daemon.call("PUT", "daemon/upgrade", timeout=60).status == 204
        wait_until(lambda: daemon.running() and daemon.worker_pid != second, 60, "the upgraded worker")
        _read_all(daemon, cases, "g")
        texts += _everything_said(daemon, [name for name, _, _ in cases])
        daemon.kill_all()
        unmount_below(daemon.dir)
        texts.append(("the log", daemon.log_text()))
        for folder in (tmp_path, daemon.dir):
            for file in folder.rglob("*"):
                if file.name != "hosts.toml" and file.is_file():
                    texts.append((str(file), file.read_bytes().decode("latin-1")))
    for where, text in texts:
        found += leaks(where, text)
    assert sorted(set(found)) == []
    assert len(texts) > 150, "that was little"
    log = next(text for where, text in texts if where == "the log")
    assert "Failed in reading backend" in log, "failures were logged"
    assert "(hidden)" in log


def _read_all(daemon: Nydusd, cases: list[tuple[str, str, bool]], name: str) -> None:
    for mount, _, readable in cases:
        done = reader("import sys; print(len(open(sys.argv[1], 'rb').read()))", daemon.mnt / mount / name, timeout=40)
        assert (done.returncode == 0) == readable, (mount, done.stderr, daemon.log_text()[-2000:])


def _everything_said(daemon: Nydusd, names: list[str]) -> list[tuple[str, str]]:
    """All answers of the API and of nydusctl, command lines and environments, with where they are from."""
    texts = []
    for route in ROUTES:
        joint = "&" if "?" in route else "?"
        keys = ("registry", "s3", "oss", "hp", *(f"/{name}" for name in names))
        targets = [route, *(f"{route}{joint}id={key}" for key in keys)]
        targets += [f"{route}{joint}mountpoint=/{name}" for name in names] if route == "daemon/backend" else []
        texts += [(target, str(daemon.get(target.replace(" ", "%20")).body)) for target in targets]
    for line in ("info", "--raw info", "metrics backend", "metrics sources", "metrics inflight"):
        command = [sys.executable, "-m", "nydusfs.daemon.ctl", "--sock", str(daemon.sock), *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        texts.append((f"nydusctl {line}", done.stdout + done.stderr))
    for pid in processes_mentioning(str(daemon.sock)):
        texts.append((f"cmdline of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes().decode("latin-1")))
        given = f"NYDUS_HEADER_X_Secret={SECRETS['environment']}"  # by us
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode("latin-1").replace(given, "")
        texts.append((f"environment of {pid}", environment))
    return texts


def test_credentials_of_the_environment_stay_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$IMAGE_PULL_AUTH of one image on the command line, whose registry refuses them."""
    image = tiny_image(tmp_path, {"f": noise(100_000)})
    monkeypatch.setenv("IMAGE_PULL_AUTH", WRONG_AUTH)
    with faulty_server({image.blob_id: image.blob}, auth="basic", login=f"robot:{PASSWORD}") as registry:
        config = tmp_path / "config.json"
        backend = {"scheme": "http", "repo": "a/b", "hosts_dir": "", "host": registry.netloc}
        config.write_text(v1("registry", tmp_path / "cache", **backend))
        with Nydusd("-l", "trace", "-B", image.bootstrap, "-C", config) as daemon:
            done = reader("import sys; open(sys.argv[1], 'rb').read()", daemon.mnt / "f")
            assert "Input/output error" in done.stderr
            before = daemon.worker_pid
            os.kill(before, signal.SIGKILL)
            wait_until(lambda: daemon.running() and daemon.worker_pid != before, 60, "the next worker")
            texts = [("the log", daemon.log_text()), ("daemon", str(daemon.get("daemon").body))]
            texts += [(f"cmdline {pid}", Path(f"/proc/{pid}/cmdline").read_text())
                      for pid in processes_mentioning(str(daemon.sock))]  # fmt: skip
        texts += [(str(file), file.read_bytes().decode("latin-1"))
                  for file in (tmp_path / "cache").rglob("*") if file.is_file()]  # fmt: skip
    assert [leak for where, text in texts for leak in leaks(where, text)] == []
