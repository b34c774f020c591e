"""Signatures against the services' published examples."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from nydusfs.config import load_backend
from nydusfs.config.model import ObjectBackend
from nydusfs.errors import ConfigError, ObjectStoreError
from nydusfs.objects import EMPTY_SHA256, Bucket, CredentialChain, ObjectKeys
from nydusfs.objects.signing import sign_oss, sign_v4

AWS_KEYS = ObjectKeys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
AWS_TIME = datetime(2013, 5, 24, tzinfo=UTC)
AWS_HOST = "examplebucket.s3.amazonaws.com"


def test_the_example_of_a_ranged_get_in_aws_documentation() -> None:
    headers = sign_v4(
        AWS_KEYS, "us-east-1", "GET", AWS_HOST, "/test.txt", (), EMPTY_SHA256, AWS_TIME, [("Range", "bytes=0-9")]
    )
    assert dict(headers)["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


def test_the_example_of_a_query_in_aws_documentation() -> None:
    query = (("max-keys", "2"), ("prefix", "J"))
    headers = sign_v4(AWS_KEYS, "us-east-1", "GET", AWS_HOST, "/", query, EMPTY_SHA256, AWS_TIME)
    signature = dict(headers)["Authorization"].rpartition("=")[2]
    assert signature == "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"


def test_the_example_in_oss_documentation() -> None:
    keys = ObjectKeys("44CF9590006BF252F707", "OtxrzxIsfpFjA7SwPzILwy8Bw21TLhquhboDYROV")
    given = [
        ("Content-MD5", "ODBGOERFMDMzQTczRUY3NUE3NzA5QzdFNUYzMDQxNEM="),
        ("Content-Type", "text/html"),
        ("X-OSS-Meta-Author", "foo@bar.com"),
        ("X-OSS-Magic", "abracadabra"),
    ]
    when = datetime(2005, 11, 17, 18, 49, 58, tzinfo=UTC)
    headers = dict(sign_oss(keys, "PUT", "oss-example", "nelson", (), when, given))
    assert headers["Date"] == "Thu, 17 Nov 2005 18:49:58 GMT"
    assert headers["Authorization"] == "OSS 44CF9590006BF252F707:26NBxoKdsyly4EDv6inkoDft/yA="


def test_the_port_is_signed_and_odd_names_are_encoded_once() -> None:
    bucket = Bucket(ObjectBackend("s3", "store.example:9000", "b", "r", "id", "secret", "tok", object_prefix="a b/ü+"))
    request = bucket.request("GET", "ff", now=AWS_TIME)
    assert request.url == "https://store.example:9000/b/a%20b/%C3%BC%2Bff"
    expected = sign_v4(
        ObjectKeys("id", "secret", "tok"), "r", "GET", "store.example:9000", "/b/a%20b/%C3%BC%2Bff", (), EMPTY_SHA256,
        AWS_TIME,
    )  # fmt: skip
    assert request.headers == expected
    assert "secret" not in repr(request) + repr(bucket.backend) and "tok" not in repr(request) + repr(bucket.backend)


def test_oss_puts_the_bucket_before_a_name_and_behind_an_address() -> None:
    named = Bucket(ObjectBackend("oss", "oss-cn.example", "b", "", "id", "secret"))
    assert named.request("GET", "ff").url == "https://b.oss-cn.example/ff"
    numbered = Bucket(ObjectBackend("oss", "10.1.2.3:80", "b", "", "id", "secret"))
    assert numbered.request("POST", "ff", (("uploads", ""),)).url == "https://10.1.2.3:80/b/ff?uploads"


def test_credentials_are_read_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    chain = CredentialChain(ObjectBackend(credentials_file=str(file)))
    for _ in range(2):  # whoever asks next, and soon, is not to send an unsigned request instead
        with pytest.raises(ObjectStoreError, match="No such file"):
            chain.keys()
    monkeypatch.setattr("nydusfs.objects.credentials._LOOK", 0.0)
    file.write_text("[default]\naws_access_key_id = one\naws_secret_access_key = s%1\n")
    assert chain.keys() == ObjectKeys("one", "s%1")
    file.write_text("[default]\naws_access_key_id=two\naws_secret_access_key=s\naws_session_token = t==\n")
    assert chain.keys() == ObjectKeys("two", "s", "t==")
    file.write_text("half written")
    assert chain.keys() == ObjectKeys("two", "s", "t==")
    assert chain.others_than(ObjectKeys("one", "s%1")) and not chain.others_than(ObjectKeys("two", "s", "t=="))


def test_keys_of_the_environment_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    backend = load_backend("s3", '{"bucket_name": "b", "region": "r", "endpoint": ""}', "x.json")
    assert isinstance(backend, ObjectBackend)
    assert CredentialChain(backend).keys() is None
    assert Bucket(backend).request("GET", "k").headers == []
    assert Bucket(backend).request("GET", "k").url == "https://s3.amazonaws.com/b/k"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert CredentialChain(backend).keys() == ObjectKeys("id", "s")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("s3", '{"bucket_name": "b"}', "region: is missing"),
        ("oss", '{"bucket_name": "b"}', "endpoint: is missing"),
        ("oss", '{"endpoint": "e"}', "bucket_name: is missing"),
        ("s3", '{"bucket_name": "b", "region": "r", "access_key_id": "i"}', "access_key_secret: is missing"),
        ("s3", '{"bucket_name": "b", "region": "r", "access_key_secret": 7}', r"string, found integer \(hidden"),
        ("s3", '{"bucket_name": "b", "region": "r", "part_size": 5}', "part_size: 5 is outside"),
        ("oss", '{"bucket_name": "b", "endpoint": "e", "access_key_id": "i\\n", "access_key_secret": "s"}', "a line b"),
        ("s3", '{"bucket_name": "b", "region": "\u201cr\u201d"}', "region: holds characters"),
        ("s4", "{}", "'s4' is not a backend type"),
        ("s3", "[]", "expected table"),
    ],
)
def test_wrong_settings_are_named(kind: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backend(kind, text, "backend.json")


def test_keys_that_cannot_be_sent_are_refused_by_the_place_they_are_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line break at the end of a secret's file would end the header in its middle."""
    file = tmp_path / "keys"
    file.write_text("[default]\naws_access_key_id = i\n  j\naws_secret_access_key = hush\n")
    with pytest.raises(ObjectStoreError, match=r"keys: aws_access_key_id holds a line break") as caught:
        CredentialChain(ObjectBackend(credentials_file=str(file))).keys()
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", "s")
    monkeypatch.setenv("OSS_SESSION_TOKEN", "\u201ct\u201d")
    with pytest.raises(ObjectStoreError, match="OSS_SESSION_TOKEN holds characters"):
        CredentialChain(ObjectBackend("oss")).keys()
