"""A registry that wants bearer tokens: conversion, pull and lazy reads with docker's login, and clear refusals."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import require_programs
from tests.lab.process import remove_tree, work_dir
from tests.lab.registry import Registry
from tests.lab.sample import small_image
from tests.lab.stack import Stack, StackOptions
from tests.lab.tokens import TokenServer

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def private() -> Iterator[tuple[Stack, TokenServer, Path]]:
    """The stack with the login for the snapshotter, the token server, and the docker configuration directory."""
    require_programs()
    with contextlib.ExitStack() as exits:
        work = work_dir()  # not the stack's own, which ends every process that mentions its directory
        exits.callback(remove_tree, work)
        tokens = exits.enter_context(TokenServer(work / "tokens"))
        # Stored while the door stands open: how an image gets there is not the point here.
        with Registry(work / "reg") as open_door:
            small_image(work / "image", payload=8 << 20).push(open_door.host, "team/app", "oci")
        registry = exits.enter_context(Registry(work / "reg", token_realm=tokens.realm))
        login = tokens.docker_config(work / "login", registry.host)
        environment = {"DOCKER_CONFIG": str(login)}
        stack = exits.enter_context(Stack(StackOptions(registry=registry, prefetch=False, env=environment)))
        stack.convert("team/app:oci", "team/app:nydus", env={**os.environ, **environment})
        yield stack, tokens, login
    assert stack.leftovers == []


def test_lazy_container_with_dockers_login(private: tuple[Stack, TokenServer, Path]) -> None:
    stack, tokens, login = private
    ref = f"{stack.host}/team/app:nydus"
    stack.rpull(ref, env={**os.environ, "DOCKER_CONFIG": str(login)})
    mark = stack.registry.mark()
    sums = stack.ctr_run(ref, "sh", "-c", "sha256sum < /payload; cat /payload.sha256").split()
    assert sums[0] == sums[2]
    served = [request for request in stack.registry.since(mark).blobs().requests if request.status == 206]
    assert sum(request.size for request in served) >= 8 << 20
    assert any(scope == "repository:team/app:pull" and known for scope, known in tokens.granted)


def test_pull_with_user(private: tuple[Stack, TokenServer, Path], tmp_path: Path) -> None:
    stack, tokens, _ = private
    nobody = {**os.environ, "DOCKER_CONFIG": str(tmp_path)}
    ref = f"{stack.host}/team/app:oci"
    said = stack.rpull(ref, check=False, env=nobody)
    assert "ctr-remote:" in said
    assert "Traceback" not in said
    said = stack.rpull(ref, "--user", f"{tokens.user}:no-such-secret", check=False, env=nobody)
    assert "Traceback" not in said
    assert "wrong credentials" in said
    assert "no-such-secret" not in said
    said = stack.rpull(ref, "--user", f"{tokens.user}:{tokens.password}", env=nobody)
    assert "3 downloaded" in said
    assert "auth explain" not in said  # all of it is here
    lazy = f"{stack.host}/team/app:nydus"
    stack.containerd.ctr("images", "rm", "--sync", lazy, check=False)
    said = stack.rpull(lazy, "--user", f"{tokens.user}:{tokens.password}", env=nobody)
    assert "3 left to nydus" in said
    assert f"what is left nydus reads with credentials of its own (nydusctl auth explain {lazy})" in said


def test_nerdctl_with_dockers_login(private: tuple[Stack, TokenServer, Path], nerdctl: Path) -> None:
    stack, _, _ = private
    ref = f"{stack.host}/team/app:nydus"
    done = stack.containerd.nerdctl(nerdctl, "run", "--rm", "-q", "--net", "host", ref, "cat", "/marker")
    assert done.stdout.strip() == "hello"


def test_secrets_are_not_in_logs_or_argv(private: tuple[Stack, TokenServer, Path]) -> None:
    stack, tokens, _ = private
    logs = [stack.snapshotter.log, *(path for path in (stack.snapshotter.root / "logs").rglob("*") if path.is_file())]
    basic = tokens.docker_config(stack.work / "again", stack.host)
    auth = json.loads((basic / "config.json").read_text())["auths"][stack.host]["auth"]
    for path in logs:
        text = path.read_text(errors="replace")
        assert tokens.password not in text, path
        assert auth not in text, path
    for pid in (stack.snapshotter.pid, *stack.snapshotter.daemons()):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        assert tokens.password not in line
        assert auth not in line
