"""Sources of credentials one by one and in their order: what is used, what is said of the others, what is kept."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.registry.credentials import Credentials
from nydusfs.registry.reference import Reference
from snapshotter.auth import durations, kubelet, renewal
from snapshotter.auth.base import Answer, Off, Question
from snapshotter.auth.chain import Chain
from snapshotter.auth.cri import CriImageService, pull_request
from snapshotter.auth.explain import lines
from snapshotter.auth.kubelet import KubeletSource
from snapshotter.auth.local import CriSource, DockerSource, LabelSource, StaticSource
from snapshotter.auth.patterns import matches
from snapshotter.auth.renewal import Renewal, Renewer, Result
from snapshotter.auth.vault import CRI, LABELS, Vault
from snapshotter.errors import InvalidArgument, SettingsError
from snapshotter.imageconfig import ImageConfigs
from snapshotter.labels import PULL_SECRET, PULL_USER
from snapshotter.nydusd_api import ApiError, ApiUnreachable
from snapshotter.nydusd_config import NO_TEMPLATE, credentials_of
from snapshotter.records import InstanceRecord
from snapshotter.tally import tally
from tests.lab.process import wait_until


def question(image: str, labels: Mapping[str, str] | None = None) -> Question:
    return Question(Reference.parse(image), labels or {})


# ---- patterns, durations, messages


@pytest.mark.parametrize(
    ("pattern", "image", "expected"),
    [
        ("r.example", "r.example/a", True),
        ("r.example", "r.example:5000/a", False),
        ("r.example:5000", "r.example:5000/a", True),
        ("*.example", "r.example/a", True),
        ("*.example", "a.r.example/a", False),
        ("*.*.example", "a.r.example/a", True),
        ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com/a", True),
        ("r.example/team", "r.example/team/app", True),
        ("r.example/team", "r.example/other", False),
        ("https://r.example/v2/", "r.example/a", True),
        ("https://index.docker.io/v1/", "nginx", True),
        ("docker.io", "nginx", True),
        ("registry-1.docker.io/library", "nginx", True),
        ("docker.io/library", "someone/nginx", False),
        ("[::1]:5000", "[::1]:5000/a", True),
        ("", "nginx", False),
    ],
)
def test_patterns_are_kubelets(pattern: str, image: str, expected: bool) -> None:
    assert matches(pattern, Reference.parse(image)) is expected


def test_durations_are_gos() -> None:
    assert [durations.seconds(text) for text in ("0", "90s", "1h30m", "1.5h", "250ms")] == [0, 90, 5400, 5400, 0.25]
    for bad in ("", "5", "5 m", "m", "-5m", "5x", "1h5"):
        with pytest.raises(ValueError, match="duration"):
            durations.seconds(bad)


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def test_pull_requests_are_read_without_their_schema() -> None:
    image = _field(1, _field(1, b"r.example/a:1") + _field(2, b"\x0a\x00"))
    auth = _field(1, b"me") + _field(2, b"secret") + bytes([9 << 3, 150, 1]) + _field(4, b"r.example")
    reference = Reference.parse("r.example/a:1")
    assert pull_request(image + _field(2, auth)) == (reference, Credentials("me", "secret"))
    basic = base64.b64encode(b"me:pass")
    assert pull_request(image + _field(2, _field(3, basic))) == (reference, Credentials("me", "pass"))
    assert pull_request(image + _field(2, _field(6, b"bearer"))) == (reference, Credentials(registry_token="bearer"))
    assert pull_request(image) == (reference, None)
    assert pull_request(b"") is None


@given(st.binary(max_size=64))
def test_any_bytes_are_passed_on_unread_at_worst(data: bytes) -> None:
    pull_request(data)


# ---- what came with pulls


def test_what_came_with_a_pull_survives_in_private_files(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "auth")
    image = Reference.parse("r.example/team/app:1")
    learned: list[str] = []
    vault.on_change = learned.append
    assert vault.remember(CRI, image, Credentials("me", "one")) is None
    before = vault.remember(CRI, image, Credentials("me", "wrong"))
    vault.restore(CRI, image, before)  # the pull failed
    assert learned == ["r.example/team/app:1"] * 3
    assert oct(os.stat(tmp_path / "auth").st_mode)[-3:] == "700"
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "auth").iterdir()} == {"600"}
    (tmp_path / "auth" / "broken.json").write_text("{")
    again = Vault(tmp_path / "auth")
    answer = CriSource(again).ask(question("r.example/team/app:1"))
    assert answer.credentials == Credentials("me", "one")
    same_repository = CriSource(again).ask(question("r.example/team/app:2"))
    assert same_repository.credentials == Credentials("me", "one")
    assert "same repository" in same_repository.reason
    assert CriSource(again).ask(question("r.example/team/app2:1")).credentials is None
    assert LabelSource(again).ask(question("r.example/team/app:1")).credentials is None
    again.sweep(list)  # too young: its snapshot may still come
    assert again.find(CRI, image)
    again.forget(CRI, image)
    assert [path.name for path in (tmp_path / "auth").iterdir()] == ["broken.json"]


def test_a_sweep_takes_what_is_of_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.auth.vault.FRESH_SECONDS", -1.0)
    vault = Vault(tmp_path)
    for name in ("r.example/a:1", "r.example/b:1"):
        vault.remember(LABELS, Reference.parse(name), Credentials("me", "x"))
    vault.sweep(lambda: ["r.example/a:1", "No Image"])
    assert vault.find(LABELS, Reference.parse("r.example/a:1"))
    assert vault.find(LABELS, Reference.parse("r.example/b:1")) is None
    assert len(list(tmp_path.iterdir())) == 1


# ---- the chain


class Fixed:
    def __init__(self, name: str, answer: Answer) -> None:
        self.name, self.answer, self.asked = name, answer, 0

    def ask(self, question: Question) -> Answer:
        self.asked += 1
        return self.answer


def test_the_first_that_can_be_used_wins_and_each_says_why_not() -> None:
    late = Fixed("late", Answer("x", Credentials("x", "y")))
    chain = Chain(
        [
            Off("off", "remote.auth.enable_off"),
            Fixed("broken", Answer("it is down", failed=True)),
            Fixed("identity", Answer("config.json", Credentials("", "", "refresh"))),
            Fixed("good", Answer("here", Credentials("me", "s3cret"), expires=1e9)),
            late,
        ]
    )
    told = chain.explain("r.example/a:1")
    assert (told["source"], told["username"], told["expires"]) == ("good", "me", 1e9)
    steps: Any = told["steps"]
    assert [step["outcome"] for step in steps] == ["nothing", "failed", "nothing", "used", "not asked"]
    assert "remote.auth.enable_off is not set" in steps[0]["reason"]
    assert "identity token" in steps[2]["reason"]
    assert late.asked == 0
    shown = json.dumps(told) + "\n".join(lines(told))
    assert "s3cret" not in shown
    assert "refresh" not in shown
    found = chain.find(Reference.parse("r.example/a"))
    assert (found.failed, found.source) == (True, "good")
    with pytest.raises(InvalidArgument):
        chain.explain("Not An Image")


def test_labels_docker_and_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "docker").mkdir()
    vault = Vault(tmp_path / "auth")
    auth = base64.b64encode(b"me:from-template").decode()
    chain = Chain([LabelSource(vault), DockerSource(), StaticSource("t.json", {"auth": auth, "host": "only.example"})])

    def source(image: str, labels: Mapping[str, str] | None = None) -> tuple[str, str]:
        found = chain.find(Reference.parse(image), labels)
        return found.source, found.credentials.password if found.credentials else ""

    assert source("only.example/a") == ("static", "from-template")
    assert source("index.docker.io/a/b") == ("", "")  # never to a registry it is not for
    config = {"auths": {"https://index.docker.io/v1/": {"auth": base64.b64encode(b"me:hub").decode()}}}
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
    assert source("nginx") == ("docker", "hub")  # read anew
    helper = tmp_path / "docker-credential-lab"
    helper.write_text('#!/bin/sh\nread host; echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"for-$host\\"}"\n')
    helper.chmod(0o755)
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"credHelpers": {"h.example": "lab"}}))
    assert source("h.example/a") == ("docker", "for-h.example")
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"credsStore": "lab"}))
    assert source("s.example/a") == ("docker", "for-s.example")
    assert source("s.example/a", {PULL_USER: "u", PULL_SECRET: "label"}) == ("labels", "label")
    assert source("s.example/a", {PULL_USER: "u"}) == ("docker", "for-s.example")  # both or none
    vault.remember(LABELS, Reference.parse("s.example/a"), Credentials("u", "kept"))
    assert source("s.example/a") == ("labels", "kept")


# ---- kubelet's plugins

PLUGIN = """#!/bin/sh
request=$(cat)
echo "$request" >>"$RECORD"
case "$request" in *"$1"*) ;; *) echo "wrong version: $request" >&2; exit 3;; esac
test -n "$ANSWER" || exit 0
cat "$ANSWER"
"""


class Plugin:
    """A plugin program with its configuration file; `asked` are the requests it got."""

    def __init__(self, tmp_path: Path, version: str = "v1", **more: Any) -> None:
        self.version = f"credentialprovider.kubelet.k8s.io/{version}"
        self.record, self.answer_file = tmp_path / "record", tmp_path / "answer"
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        (bin_dir / "lab-provider").write_text(PLUGIN)
        (bin_dir / "lab-provider").chmod(0o755)
        entry = {
            "name": "lab-provider",
            "matchImages": ["*.example", "r.example:5000/team"],
            "defaultCacheDuration": "1h",
            "apiVersion": self.version,
            "args": [self.version],
            "env": [{"name": "RECORD", "value": str(self.record)}, {"name": "ANSWER", "value": str(self.answer_file)}],
            **more,
        }
        config = tmp_path / "providers.yaml"
        lines = [f"apiVersion: kubelet.config.k8s.io/{version}", "kind: CredentialProviderConfig", "providers:"]
        config.write_text("\n".join([*lines, f"- {json.dumps(entry)}"]))
        self.source = KubeletSource(config, bin_dir)

    def answers(self, auth: Mapping[str, str], key: str = "Image", duration: str | None = None) -> None:
        body: dict[str, Any] = {
            "kind": "CredentialProviderResponse",
            "apiVersion": self.version,
            "cacheKeyType": key,
            "auth": {pattern: {"username": "u", "password": secret} for pattern, secret in auth.items()},
        }
        if duration is not None:
            body["cacheDuration"] = duration
        self.answer_file.write_text(json.dumps(body))

    @property
    def asked(self) -> list[str]:
        if not self.record.exists():
            return []
        return [json.loads(line)["image"] for line in self.record.read_text().splitlines()]

    def password(self, image: str) -> str:
        found = self.source.ask(question(image)).credentials
        return found.password if found else ""


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha1"])
def test_plugins_speak_each_version(tmp_path: Path, version: str) -> None:
    plugin = Plugin(tmp_path, version)
    plugin.answers({"*.example": "wide", "r.example/team": "narrow"})
    assert plugin.password("r.example/team/app:1") == "narrow"
    assert plugin.password("r.example/other") == "wide"
    assert plugin.password("elsewhere.org/a") == ""
    assert plugin.asked == ["r.example/team/app:1", "r.example/other:latest"]


@pytest.mark.parametrize(
    ("key", "asked"), [("Image", 3), ("Registry", 2), ("Global", 1)], ids=["image", "registry", "global"]
)
def test_answers_are_kept_as_the_plugin_says(tmp_path: Path, key: str, asked: int) -> None:
    plugin = Plugin(tmp_path)
    plugin.answers({"*.example": "x"}, key)
    for image in ("a.example/one", "a.example/two", "b.example/one", "a.example/one"):
        assert plugin.password(image) == "x"
    assert len(plugin.asked) == asked


def test_life_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin(tmp_path)
    plugin.answers({"*.example": "once"}, duration="0s")
    assert plugin.source.ask(question("a.example/a")).expires is None
    plugin.password("a.example/a")
    assert len(plugin.asked) == 2  # 0 is not the default
    plugin.answers({"*.example": "old"}, duration="1000s")
    expires = plugin.source.ask(question("a.example/a")).expires
    assert expires is not None
    assert 500 < expires - time.time() <= 900.0  # before the end
    now, real = 950.0, time.monotonic
    monkeypatch.setattr(kubelet.time, "monotonic", lambda: real() + now)
    plugin.answer_file.write_text("nonsense")  # renewal fails: what is there holds to its end
    configs = ImageConfigs(tmp_path / "c", NO_TEMPLATE, tmp_path, Chain([plugin.source]), lambda _: True)
    record = InstanceRecord(1, "d", "a.example/a:latest", tmp_path)
    assert '"auth"' in configs.write(record, {})
    nobody: Any = None
    assert configs.renew(record, dict, nobody).result is Result.FAILED  # asked again after a pause, not each second
    assert plugin.password("a.example/a") == "old"
    now = 1050.0
    answer = plugin.source.ask(question("a.example/a"))
    assert (answer.credentials, answer.failed) == (None, True)
    assert "not a CredentialProviderResponse" in answer.reason
    plugin.answers({"*.example": "new"})
    assert plugin.password("a.example/a") == "new"


def test_one_process_for_many_who_ask_at_once(tmp_path: Path) -> None:
    plugin = Plugin(tmp_path)
    plugin.answers({"*.example": "x"})
    threads = [threading.Thread(target=plugin.password, args=("a.example/a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(plugin.asked) == 1


def test_plugins_that_fail_and_those_that_need_a_pod(tmp_path: Path) -> None:
    plugin = Plugin(tmp_path, args=["something else"])
    answer = plugin.source.ask(question("a.example/a"))
    assert answer.failed
    assert "exit status 3: wrong version" in answer.reason
    token = {"tokenAttributes": {"serviceAccountTokenAudience": "x", "requireServiceAccount": True}}
    (tmp_path / "second").mkdir()
    answer = Plugin(tmp_path / "second", **token).source.ask(question("a.example/a"))
    assert "service account token" in answer.reason
    assert not answer.failed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"apiVersion": "v1"}, r"providers\[0\].apiVersion"),
        ({"matchImages": []}, "matchImages"),
        ({"defaultCacheDuration": "soon"}, "defaultCacheDuration"),
        ({"name": "../sh"}, "not the name of a program"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Plugin(tmp_path, **change)


# ---- renewal


def test_renewal_before_the_end_after_failures_and_on_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(renewal, "MIN_PAUSE", 0.2)
    outcomes: dict[int, list[Renewal]] = {
        1: [Renewal("a", Result.RENEWED, None)],
        2: [Renewal("b", Result.FAILED, None), Renewal("b", Result.SAME, None)],
    }
    asked: list[int] = []

    def renew(instance: int) -> Renewal | None:
        asked.append(instance)
        left = outcomes[instance]
        return left.pop(0) if len(left) > 1 else left[0]

    renewer = Renewer(lambda: outcomes, renew, 0.0)
    renewer.start()
    try:
        renewer.learned(1, time.time() + 0.01)  # held back to MIN_PAUSE
        wait_until(lambda: asked == [1], 10, "renewal of one")
        renewer.kick()
        wait_until(lambda: asked[1:3] == [1, 2], 10, "renewal of all")
        wait_until(lambda: asked[3:] == [2], 20, "the second try")
        counted = tally.counted(renewal.RENEWALS)
        assert (counted["a", "success"], counted["b", "failure"]) == (2, 1)
    finally:
        renewer.close()


def test_credentials_that_nydusd_did_not_take_are_said_again(tmp_path: Path) -> None:
    """It is written down that it has them when it does. One that cannot take them has them at its next start."""
    labels = {PULL_USER: "u", PULL_SECRET: "old"}
    failures: list[Exception] = [ApiUnreachable("no answer"), ApiUnreachable("no answer")]
    told: list[str] = []

    class Nydusd:
        def set_registry_auth(self, config_id: str, auth: str) -> None:
            if failures:
                raise failures.pop()
            told.append(base64.b64decode(auth).decode())

    chain = Chain([LabelSource(Vault(tmp_path / "auth"))])
    configs = ImageConfigs(tmp_path / "config", NO_TEMPLATE, tmp_path / "cache", chain, lambda _: True)
    record = InstanceRecord(1, "d", "r.example/a:1", tmp_path / "boot")
    nydusd: Any = Nydusd()
    configs.write(record, labels)

    def renew() -> Result:
        return configs.renew(record, lambda: labels, nydusd).result

    assert (renew(), told) == (Result.SAME, [])
    labels[PULL_SECRET] = "new"
    assert [renew() for _ in range(4)] == [Result.FAILED, Result.FAILED, Result.RENEWED, Result.SAME]
    assert told == ["u:new"]
    labels[PULL_SECRET] = "newer"
    failures.append(ApiError("PUT /api/v1/config", 404, "no such thing"))
    assert [renew() for _ in range(2)] == [Result.FAILED, Result.SAME]
    assert credentials_of(configs.path(record).read_text()) == Credentials("u", "newer")


def test_an_image_that_is_unmounted_while_its_credentials_are_renewed_leaves_none_behind(tmp_path: Path) -> None:
    class Nydusd:
        def set_registry_auth(self, config_id: str, auth: str) -> None:
            shutil.rmtree(configs.path(record).parent)

    labels = {PULL_USER: "u", PULL_SECRET: "old"}
    chain = Chain([LabelSource(Vault(tmp_path / "auth"))])
    configs = ImageConfigs(tmp_path / "config", NO_TEMPLATE, tmp_path / "cache", chain, lambda _: True)
    record = InstanceRecord(1, "d", "r.example/a:1", tmp_path / "boot")
    nydusd: Any = Nydusd()
    configs.write(record, labels)
    configs.renew(record, lambda: {**labels, PULL_SECRET: "new"}, nydusd)
    assert not list((tmp_path / "config").rglob("*.json"))


# ---- the CRI image service


def test_pulls_of_a_whole_node_hold_up_no_other_call(tmp_path: Path) -> None:
    """A kubelet without a limit pulls for each of its pods at once, and lists its images meanwhile."""
    pulls, seen, end = 100, threading.Semaphore(0), threading.Event()

    def runtime(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        seen.release()
        end.wait(60)
        yield b"pulled"

    class Runtime(grpc.GenericRpcHandler):  # type: ignore[type-arg]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
            if details.method.endswith("/PullImage"):
                return grpc.stream_stream_rpc_method_handler(runtime)
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"list")

    def serving(handler: Any, name: str) -> grpc.Server:
        server = grpc.server(ThreadPoolExecutor(2 * pulls), handlers=(handler,))
        server.add_insecure_port(f"unix:{tmp_path / name}")
        server.start()
        return server

    service = CriImageService(tmp_path / "runtime", Vault(tmp_path / "auth"))
    servers = [serving(Runtime(), "runtime"), serving(service, "ours")]
    try:
        with grpc.insecure_channel(f"unix:{tmp_path / 'ours'}") as channel:
            pull = channel.unary_unary("/runtime.v1.ImageService/PullImage", None, None)
            calls = [pull.future(b"", timeout=90) for _ in range(pulls)]
            assert all(seen.acquire(timeout=20) for _ in range(64))
            assert channel.unary_unary("/runtime.v1.ImageService/ListImages", None, None)(b"", timeout=20) == b"list"
            end.set()
            assert all(call.result(60) == b"pulled" for call in calls)
    finally:
        end.set()
        for server in servers:
            server.stop(None).wait(20)
        service.close()
