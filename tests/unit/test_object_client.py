"""The client of object stores against a server that checks signatures by itself."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusfs.config import load_backend
from nydusfs.config.model import ObjectBackend
from nydusfs.errors import ObjectStoreError
from nydusfs.objects import client as client_module
from nydusfs.objects.client import ObjectClient
from tests.lab.objects import ObjectServer, object_server
from tests.lab.tiny import noise

BLOB = noise(11 << 20)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_PAUSE", 0.0)


@pytest.fixture(params=["s3", "oss"])
def store(request: pytest.FixtureRequest) -> Iterator[ObjectServer]:
    with object_server(request.param) as server:
        yield server


def connect(store: ObjectServer, **more: object) -> ObjectClient:
    config = store.config(object_prefix="nydus/x y+", part_size=5 << 20, **more)
    if store.kind == "oss":
        del config["region"]
    backend = load_backend(store.kind, json.dumps(config), "backend.json")
    assert isinstance(backend, ObjectBackend)
    return ObjectClient(backend)


def test_blobs_go_there_and_come_back(store: ObjectServer, tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(BLOB)
    sent: list[int] = []
    store.fail += [("PUT", 503), ("PUT", 500), ("POST", 503), ("GET", 503), ("HEAD", 503)]
    with connect(store) as client:
        assert client.size("aa") is None
        client.put_file("aa", file, sent.append)
        assert client.size("aa") == len(BLOB)
        assert client.read("aa", 7, 70000) == BLOB[7:70007]
        out = io.BytesIO()
        assert client.download("aa", out) == len(BLOB)
        assert out.getvalue() == BLOB
        client.put("small", b"hello")
        assert client.read("small", 0, 5) == b"hello"
        client.put("empty", b"")
        assert client.size("empty") == 0
        client.delete("small")
        assert client.size("small") is None
    assert store.fail == []
    assert sum(sent) == len(BLOB)
    assert store.objects["nydus/x y+aa"] == BLOB
    assert store.uploads == {}
    parts = {request.query["partNumber"] for request in store.requests if "partNumber" in request.query}
    assert parts == {"1", "2", "3"}


def test_an_upload_that_fails_is_taken_back(store: ObjectServer, tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(BLOB)
    with connect(store) as client:
        store.fail += [("PUT", 403)]
        with pytest.raises(ObjectStoreError, match="status 403"):
            client.put_file("aa", file)
        assert store.uploads == {} and store.objects == {}
        store.late_error = True
        with pytest.raises(ObjectStoreError, match=r"cannot be completed.*InternalError"):
            client.put_file("aa", file)
        assert store.uploads == {} and store.objects == {}


def test_what_is_wrong_is_said(store: ObjectServer) -> None:
    store.objects["nydus/x y+aa"] = b"data"
    with connect(store, access_key_id="LABKEY", access_key_secret="wrong") as client:
        with pytest.raises(ObjectStoreError, match=r"SignatureDoesNotMatch.*check access_key_id") as caught:
            client.read("aa", 0, 4)
        assert caught.value.status == 403 and "wrong" not in str(caught.value)
    with connect(store, bucket_name="other") as client, pytest.raises(ObjectStoreError, match=r"NoSuchBucket.*'other'"):
        client.read("aa", 0, 4)
    with connect(store) as client, pytest.raises(ObjectStoreError, match="NoSuchKey"):
        client.read("bb", 0, 4)
    if store.kind == "s3":
        with connect(store, region="mars") as client, pytest.raises(ObjectStoreError, match="expecting 'lab-1'"):
            client.read("aa", 0, 4)


def test_session_tokens(store: ObjectServer) -> None:
    store.objects["nydus/x y+aa"] = b"data"
    store.tokens["LABKEY"] = "session/token=="
    with connect(store, session_token="session/token==") as client:
        assert client.read("aa", 1, 2) == b"at"
    with connect(store) as client, pytest.raises(ObjectStoreError, match="InvalidToken"):
        client.read("aa", 1, 2)


def test_public_buckets_need_no_keys(store: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    store.public = True
    store.objects["nydus/x y+aa"] = b"data"
    with connect(store, access_key_id="", access_key_secret="") as client:
        assert client.read("aa", 0, 4) == b"data"


def test_nobody_there_is_one_sentence() -> None:
    backend = ObjectBackend("s3", "127.0.0.1:9", "b", "r", "i", "s")
    with ObjectClient(backend) as client, pytest.raises(ObjectStoreError, match=r"HEAD https://127\.0\.0\.1:9/b/aa: "):
        client.size("aa")
