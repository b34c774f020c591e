"""An object store that speaks S3 and OSS and checks each signature by its own reading of the two specifications.

Nothing here comes from `nydusfs.objects`: what the client signs is verified from the bytes that arrived. A request
whose signature, date, payload digest, token or host is wrong gets the services' own error documents.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, quote, unquote


@dataclass
class Seen:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    size: int


@dataclass
class Upload:
    key: str
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass
class ObjectServer:
    """`keys`: secrets by key id; `tokens`: the session token that a key id needs, if any."""

    kind: str  # "s3" or "oss"
    bucket: str = "blobs"
    region: str = "lab-1"
    keys: dict[str, str] = field(default_factory=lambda: {"LABKEY": "lab+secret/42"})
    tokens: dict[str, str] = field(default_factory=dict)
    public: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    requests: list[Seen] = field(default_factory=list)
    fail: list[tuple[str, int]] = field(default_factory=list)  # (method, status) for the next such requests, once each
    late_error: bool = False  # complete answers 200 with an error document
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.store = self
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def config(self, **more: object) -> dict[str, object]:
        key_id, secret = next(iter(self.keys.items()))
        return {
            "scheme": "http", "endpoint": self.endpoint, "bucket_name": self.bucket, "region": self.region,
            "access_key_id": key_id, "access_key_secret": secret, **more,
        }  # fmt: skip

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    store: ObjectServer


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(code)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        store = self.server.store
        path, _, query_text = self.path.partition("?")
        query = dict(parse_qsl(query_text, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        with store.lock:
            store.requests.append(Seen(self.command, unquote(path), query, headers, len(body)))
            planned = next((one for one in store.fail if one[0] == self.command), None)
            if planned:
                store.fail.remove(planned)
        try:
            if planned:
                raise _Refused(planned[1], "SlowDown", "told to")
            key = self._key(path, headers)
            if "authorization" not in headers:
                if not (store.public and self.command in ("GET", "HEAD")):
                    raise _Refused(403, "AccessDenied", "anonymous")
            elif store.kind == "s3":
                _check_v4(store, self.command, path, query_text, headers, body)
            else:
                _check_oss(store, self.command, key, query, headers, body)
            self._serve(store, key, query, headers, body)
        except _Refused as error:
            text = f"<?xml version='1.0'?><Error><Code>{error.code}</Code><Message>{error.message}</Message></Error>"
            self._send(error.status, text.encode(), {"Content-Type": "application/xml"})

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _key(self, path: str, headers: dict[str, str]) -> str:
        store = self.server.store
        if store.kind == "s3" or headers["host"].startswith("127."):
            bucket, _, key = unquote(path).removeprefix("/").partition("/")
        else:
            bucket = headers["host"].partition(".")[0]
            key = unquote(path).removeprefix("/")
        if bucket != store.bucket:
            raise _Refused(404, "NoSuchBucket", bucket)
        return key

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(
        self, store: ObjectServer, key: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> None:
        method = self.command
        if method in ("GET", "HEAD"):
            data = store.objects.get(key)
            if data is None:
                raise _Refused(404, "NoSuchKey", key)
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
            if match is None:
                return self._send(200, data, {"ETag": _tag(data)})
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            if first >= len(data):
                raise _Refused(416, "InvalidRange")
            return self._send(
                206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}", "ETag": _tag(data)}
            )
        if method == "PUT" and "partNumber" in query:
            upload = self._upload(store, key, query)
            upload.parts[int(query["partNumber"])] = body
            return self._send(200, b"", {"ETag": _tag(body)})
        if method == "PUT":
            store.objects[key] = body
            return self._send(200, b"", {"ETag": _tag(body)})
        if method == "POST" and "uploads" in query:
            upload_id = f"upload&{len(store.uploads) + 1}"
            store.uploads[upload_id] = Upload(key)
            shown = upload_id.replace("&", "&amp;")
            return self._send(200, f"<R><Key>{key}</Key><UploadId>{shown}</UploadId></R>".encode(), {})
        if method == "POST" and "uploadId" in query:
            upload = self._upload(store, key, query)
            listed = re.findall(rb"<PartNumber>(\d+)</PartNumber><ETag>([^<]+)</ETag>", body)
            if store.late_error:
                return self._send(200, b"<Error><Code>InternalError</Code></Error>", {})
            data = b""
            for number, tag in listed:
                part = upload.parts.get(int(number), b"")
                if tag.replace(b"&quot;", b'"').decode() != _tag(part):
                    raise _Refused(400, "InvalidPart", number.decode())
                data += part
            store.objects[key] = data
            del store.uploads[query["uploadId"]]
            return self._send(200, b"<CompleteMultipartUploadResult/>", {})
        if method == "DELETE" and "uploadId" in query:
            self._upload(store, key, query)
            del store.uploads[query["uploadId"]]
            return self._send(204, b"", {})
        if method == "DELETE":
            store.objects.pop(key, None)
            return self._send(204, b"", {})
        raise _Refused(400, "NotImplemented", method)

    def _upload(self, store: ObjectServer, key: str, query: dict[str, str]) -> Upload:
        upload = store.uploads.get(query["uploadId"])
        if upload is None or upload.key != key:
            raise _Refused(404, "NoSuchUpload", query["uploadId"])
        return upload


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _secret(store: ObjectServer, key_id: str, token: str | None) -> bytes:
    if key_id not in store.keys:
        raise _Refused(403, "InvalidAccessKeyId", key_id)
    if (token or None) != store.tokens.get(key_id):
        raise _Refused(403, "InvalidToken", "the session token is missing or wrong")
    return store.keys[key_id].encode()


def _check_md5(headers: dict[str, str], body: bytes) -> None:
    stated = headers.get("content-md5")
    if stated is not None and base64.b64decode(stated) != hashlib.md5(body).digest():
        raise _Refused(400, "BadDigest")


def _check_v4(
    store: ObjectServer, method: str, path: str, query_text: str, headers: dict[str, str], body: bytes
) -> None:
    """AWS: "Authenticating Requests: Using the Authorization Header (AWS Signature Version 4)"."""
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, ?"
        r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})",
        headers["authorization"],
    )
    if match is None:
        raise _Refused(400, "AuthorizationHeaderMalformed")
    key_id, day, region, names, signature = match.groups()
    secret = _secret(store, key_id, headers.get("x-amz-security-token"))
    if region != store.region:
        raise _Refused(400, "AuthorizationHeaderMalformed", f"expecting {store.region!r}")
    signed = names.split(";")
    must = {"host"} | {name for name in headers if name.startswith("x-amz-")}
    if not must <= set(signed) or signed != sorted(signed):
        raise _Refused(403, "AccessDenied", "headers are not signed")
    when = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if abs(datetime.now(UTC) - when) > timedelta(minutes=15) or not headers["x-amz-date"].startswith(day):
        raise _Refused(403, "RequestTimeTooSkewed")
    if headers["x-amz-content-sha256"] not in (hashlib.sha256(body).hexdigest(), "UNSIGNED-PAYLOAD"):
        raise _Refused(400, "XAmzContentSHA256Mismatch")
    _check_md5(headers, body)
    pairs = sorted(
        (quote(name, safe="-_.~"), quote(value, safe="-_.~"))
        for name, value in parse_qsl(query_text, keep_blank_values=True)
    )
    request = "\n".join(
        [
            method,
            quote(unquote(path), safe="/-_.~"),
            "&".join(f"{name}={value}" for name, value in pairs),
            *(f"{name}:{' '.join(headers[name].split())}" for name in signed),
            "",
            names,
            headers["x-amz-content-sha256"],
        ]
    )
    text = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            headers["x-amz-date"],
            f"{day}/{region}/s3/aws4_request",
            hashlib.sha256(request.encode()).hexdigest(),
        ]
    )
    key = b"AWS4" + secret
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    if not hmac.compare_digest(hmac.new(key, text.encode(), hashlib.sha256).hexdigest(), signature):
        raise _Refused(403, "SignatureDoesNotMatch")


def _check_oss(
    store: ObjectServer, method: str, key: str, query: dict[str, str], headers: dict[str, str], body: bytes
) -> None:
    """Aliyun: "Include signatures in the Authorization header" (version 1)."""
    match = re.fullmatch(r"OSS ([^:]+):(\S+)", headers["authorization"])
    if match is None:
        raise _Refused(400, "InvalidArgument")
    key_id, signature = match.groups()
    secret = _secret(store, key_id, headers.get("x-oss-security-token"))
    when = parsedate_to_datetime(headers["date"])
    if not headers["date"].endswith("GMT") or abs(time.time() - when.timestamp()) > 900:
        raise _Refused(403, "RequestTimeTooSkewed")
    _check_md5(headers, body)
    resource = f"/{store.bucket}/{key}"
    shown = [name if not query[name] else f"{name}={query[name]}" for name in sorted(query)]
    if shown:
        resource += "?" + "&".join(shown)
    lines = [method, headers.get("content-md5", ""), headers.get("content-type", ""), headers["date"]]
    lines += [f"{name}:{headers[name].strip()}" for name in sorted(headers) if name.startswith("x-oss-")]
    text = "\n".join([*lines, resource])
    expected = base64.b64encode(hmac.new(secret, text.encode(), hashlib.sha1).digest()).decode()
    if not hmac.compare_digest(expected, signature):
        raise _Refused(403, "SignatureDoesNotMatch", text)


@contextmanager
def object_server(kind: str, **settings: object) -> Iterator[ObjectServer]:
    server = ObjectServer(kind, **settings)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()
