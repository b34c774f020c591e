"""The two signatures, as pure functions of a request.

AWS Signature Version 4 (S3's variant: paths are encoded once) and Aliyun OSS's header signature, version 1 (reference
4.9). Only what must be signed is: a `Range` header is left out, so that a cache between may split or widen ranges.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_UNRESERVED = "-_.~"
# Query parameters that name a part of the object: OSS signs these and no others of those we send.
_OSS_SUBRESOURCES = frozenset({"partNumber", "uploadId", "uploads"})

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """`session_token` is "" for keys that do not expire."""

    key_id: str
    secret: str = field(repr=False)
    session_token: str = field(default="", repr=False)


def encode_path(path: str) -> str:
    """Percent-encode a path as both services sign it: all but unreserved characters and "/"."""
    return quote(path, safe="/" + _UNRESERVED)


def encode_query(query: Pairs) -> str:
    """Sorted and encoded; a parameter without value keeps its "="."""
    pairs = sorted((quote(name, safe=_UNRESERVED), quote(value, safe=_UNRESERVED)) for name, value in query)
    return "&".join(f"{name}={value}" for name, value in pairs)


@lru_cache(maxsize=64)
def _signing_key(secret: str, day: str, region: str, service: str) -> bytes:
    key = ("AWS4" + secret).encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def sign_v4(
    keys: ObjectKeys,
    region: str,
    method: str,
    host: str,
    path: str,
    query: Pairs,
    payload_sha256: str,
    now: datetime,
    headers: Iterable[tuple[str, str]] = (),
) -> list[tuple[str, str]]:
    """Headers to add to a request: x-amz-date, x-amz-content-sha256, the token if there is one, Authorization.

    `host` is the value of the Host header, with the port where that has one; `path` is encoded already; `headers` are
    further headers to sign. `now` is in UTC.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    added = [("x-amz-content-sha256", payload_sha256), ("x-amz-date", stamp)]
    if keys.session_token:
        added.append(("x-amz-security-token", keys.session_token))
    signed = sorted((name.lower(), " ".join(value.split())) for name, value in [("host", host), *headers, *added])
    names = ";".join(name for name, _ in signed)
    lines = "".join(f"{name}:{value}\n" for name, value in signed)
    request = f"{method}\n{path}\n{encode_query(query)}\n{lines}\n{names}\n{payload_sha256}"
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(_signing_key(keys.secret, stamp[:8], region, "s3"), text.encode(), "sha256").hex()
    value = f"AWS4-HMAC-SHA256 Credential={keys.key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    return [*added, ("Authorization", value)]


def sign_oss(
    keys: ObjectKeys,
    method: str,
    bucket: str,
    key: str,
    query: Pairs,
    now: datetime,
    headers: Iterable[tuple[str, str]] = (),
) -> list[tuple[str, str]]:
    """Headers to add to a request: Date, the token if there is one, Authorization. `key` is the plain object name."""
    date = format_datetime(now.astimezone(UTC), usegmt=True)
    added = [("Date", date)]
    if keys.session_token:
        added.append(("x-oss-security-token", keys.session_token))
    given = {name.lower(): value.strip() for name, value in [*headers, *added]}
    vendor = "".join(f"{name}:{value}\n" for name, value in sorted(given.items()) if name.startswith("x-oss-"))
    resource = f"/{bucket}/{key}"
    sub = sorted((name, value) for name, value in query if name in _OSS_SUBRESOURCES)
    if sub:
        resource += "?" + "&".join(f"{name}={value}" if value else name for name, value in sub)
    text = "\n".join([method, given.get("content-md5", ""), given.get("content-type", ""), date, vendor + resource])
    signature = b64encode(hmac.digest(keys.secret.encode(), text.encode(), "sha1")).decode()
    return [*added, ("Authorization", f"OSS {keys.key_id}:{signature}")]
