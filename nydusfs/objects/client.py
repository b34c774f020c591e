"""Blobs to and from a bucket, synchronously: what `nydusify --backend-type` needs. Thread-safe."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import logging
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import httpx

from nydusfs.config import ObjectBackend
from nydusfs.errors import ObjectStoreError, os_reason
from nydusfs.objects.bucket import Bucket, SignedRequest
from nydusfs.objects.signing import EMPTY_SHA256, Pairs

log = logging.getLogger("nydusfs.objects")

RETRIES = 4  # further tries after the first
RETRY_PAUSE = 0.5  # seconds, doubles
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PIECE = 1 << 20
_MAX_PARTS = 10_000
_MAX_ANSWER = 1 << 20
_CODE = re.compile(rb"<Code>\s*([^<]{1,100})")
_MESSAGE = re.compile(rb"<Message>\s*([^<]{1,300})")
_UPLOAD_ID = re.compile(rb"<UploadId>\s*([^<\s]{1,2000})\s*</UploadId>")

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of a file, read anew for each try; or bytes."""

    path: Path | None
    offset: int
    size: int
    data: bytes = b""

    def pieces(self) -> Iterator[bytes]:
        if self.path is None:
            yield self.data
            return
        left = self.size
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise ObjectStoreError(f"{self.path} became shorter while it was being sent")
                left -= len(piece)
                yield piece


class ObjectClient:
    """One bucket. Every method raises `ObjectStoreError`, and `OSError` only for the caller's own files. Objects are
    named by blob ids, to which the configured prefix is added."""

    def __init__(self, backend: ObjectBackend) -> None:
        self.bucket = Bucket(backend)
        self._backend = backend
        connection = backend.connection
        verify: ssl.SSLContext | bool = False
        if connection.scheme == "https":
            verify = _tls(connection.ca_cert_files, connection.skip_verify)
        # `timeout` of the configuration is meant for one chunk; a part of an upload is far larger: it limits stalls.
        timeout = httpx.Timeout(max(connection.timeout, 30), connect=connection.connect_timeout or 30)
        self._http = httpx.Client(verify=verify, timeout=timeout, follow_redirects=False, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- reading

    def size(self, blob_id: str) -> int | None:
        """Bytes of the blob's object, None if there is none."""
        with self._send("HEAD", blob_id, allow=(404,)) as response:
            if response.status_code == 404:
                return None
            try:
                return int(response.headers.get("content-length", ""))
            except ValueError:
                raise ObjectStoreError(f"{self._shown(blob_id)}: answer to HEAD has no Content-Length") from None

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        if not size:
            return b""
        headers = (("Range", f"bytes={offset}-{offset + size - 1}"),)
        with self._send("GET", blob_id, extra=headers) as response:
            if response.status_code != 206 and (offset or response.status_code != 200):
                raise ObjectStoreError(f"{self._shown(blob_id)}: status {response.status_code} to a range request")
            data = bytearray()
            for piece in response.iter_raw():
                data += piece
                if len(data) >= size:
                    break
        if len(data) != size:
            raise ObjectStoreError(f"{self._shown(blob_id)}: {len(data)} bytes for a range of {size} at {offset}")
        return bytes(data)

    def download(self, blob_id: str, out: BinaryIO, progress: Progress | None = None) -> int:
        """The whole object into `out`; its size in bytes. The caller compares the digest."""
        with self._send("GET", blob_id) as response:
            total = 0
            for piece in response.iter_raw(_PIECE):
                out.write(piece)
                total += len(piece)
                if progress is not None:
                    progress(len(piece))
            stated = response.headers.get("content-length")
            if stated is not None and stated != str(total):
                raise ObjectStoreError(f"{self._shown(blob_id)}: {total} of {stated} bytes came")
            return total

    # -- writing

    def put(self, blob_id: str, data: bytes) -> None:
        self._put(blob_id, _Span(None, 0, len(data), data), None)

    def put_file(self, blob_id: str, path: Path, progress: Progress | None = None) -> None:
        """Send a file: in one request, or in parts when it is larger than `part_size`. `progress` gets numbers of bytes
        sent, negative ones when a try is begun anew, from several threads.

        An upload in parts that fails is taken back: nothing is left in the bucket.
        """
        size = path.stat().st_size
        part = self._backend.part_size
        if size <= part:
            self._put(blob_id, _Span(path, 0, size), progress)
            return
        part = max(part, -(-size // _MAX_PARTS))
        spans = [_Span(path, offset, min(part, size - offset)) for offset in range(0, size, part)]
        self._put_parts(blob_id, spans, progress)
        stored = self.size(blob_id)
        if stored != size:
            raise ObjectStoreError(f"{self._shown(blob_id)} has {stored} bytes after {size} were sent")

    def delete(self, blob_id: str) -> None:
        with self._send("DELETE", blob_id, allow=(404,)):
            pass

    def _put(self, blob_id: str, span: _Span, progress: Progress | None, query: Pairs = ()) -> str:
        """The ETag. The service compares what arrives with the digests sent along (S3: SHA-256, OSS: MD5)."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        for piece in span.pieces():
            sha256.update(piece)
            md5.update(piece)
        headers = (("Content-MD5", base64.b64encode(md5.digest()).decode()),)
        sent = 0

        def body() -> Iterator[bytes]:
            nonlocal sent
            if progress is not None and sent:
                progress(-sent)  # a try that failed does not count
            sent = 0
            for piece in span.pieces():
                yield piece
                sent += len(piece)
                if progress is not None:
                    progress(len(piece))

        with self._send("PUT", blob_id, query, headers, sha256.hexdigest(), body, span.size) as response:
            return str(response.headers.get("etag", ""))

    def _put_parts(self, blob_id: str, spans: list[_Span], progress: Progress | None) -> None:
        with self._send("POST", blob_id, (("uploads", ""),)) as response:
            match = _UPLOAD_ID.search(_answer(response))
        if match is None:
            raise ObjectStoreError(f"{self._shown(blob_id)}: no UploadId in the answer to a new upload")
        upload = ("uploadId", html.unescape(match[1].decode("utf-8", "replace")))
        try:
            with ThreadPoolExecutor(min(self._backend.upload_threads, len(spans)), "upload") as pool:
                tasks = [
                    pool.submit(self._put, blob_id, span, progress, (("partNumber", str(number)), upload))
                    for number, span in enumerate(spans, 1)
                ]
                try:
                    tags = [task.result() for task in tasks]
                except BaseException:
                    for task in tasks:
                        task.cancel()
                    raise
            self._complete(blob_id, upload, tags)
        except BaseException:
            with contextlib.suppress(ObjectStoreError), self._send("DELETE", blob_id, (upload,), allow=(404,)):
                pass
            raise

    def _complete(self, blob_id: str, upload: tuple[str, str], tags: list[str]) -> None:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{_xml(tag)}</ETag></Part>"
            for number, tag in enumerate(tags, 1)
        )
        text = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        headers = (("Content-Type", "application/xml"),)
        digest = hashlib.sha256(text).hexdigest()
        with self._send("POST", blob_id, (upload,), headers, digest, lambda: iter([text]), len(text)) as response:
            answer = _answer(response)
        if b"<Error>" in answer:  # S3 begins its 200 before it knows
            raise ObjectStoreError(f"{self._shown(blob_id)}: the upload cannot be completed{_said(answer)}")

    # -- requests

    @contextlib.contextmanager
    def _send(
        self,
        method: str,
        blob_id: str,
        query: Pairs = (),
        headers: Pairs = (),
        payload_sha256: str = EMPTY_SHA256,
        body: Callable[[], Iterator[bytes]] | None = None,
        size: int = 0,
        *,
        extra: Pairs = (),
        allow: tuple[int, ...] = (),
    ) -> Iterator[httpx.Response]:
        """Send with retries; yields a streaming answer of status 2xx or one that is allowed. `extra` is not signed."""
        for attempt in range(RETRIES + 1):
            request = self.bucket.request(method, blob_id, query, headers, payload_sha256)
            try:
                response = self._once(request, body, size, extra)
            except httpx.HTTPError as error:
                failure = ObjectStoreError(f"{method} {request.shown}: {str(error) or type(error).__name__}")
            else:
                if response.is_success or response.status_code in allow:
                    break
                failure = _refusal(method, request, response, self._backend)
                response.close()
                if response.status_code not in _RETRY_STATUS:
                    raise failure
            if attempt == RETRIES:
                raise failure
            pause = RETRY_PAUSE * 2**attempt * random.uniform(0.75, 1.25)
            log.debug("%s; next try in %.1f s", failure, pause)
            time.sleep(pause)
        try:
            yield response
        except httpx.HTTPError as error:
            raise ObjectStoreError(f"{method} {request.shown}: {str(error) or type(error).__name__}") from None
        finally:
            response.close()

    def _once(
        self, request: SignedRequest, body: Callable[[], Iterator[bytes]] | None, size: int, extra: Pairs
    ) -> httpx.Response:
        headers = [*request.headers, *extra, ("Accept-Encoding", "identity"), ("User-Agent", "nydus-py")]
        if body is not None or request.method in ("PUT", "POST"):
            headers.append(("Content-Length", str(size)))
        # raw_path: httpx would encode again what was signed
        url = httpx.URL(str(request.origin)).copy_with(raw_path=request.target.encode("ascii"))
        message = httpx.Request(
            request.method,
            url,
            headers=[("Host", request.origin.netloc), *headers],
            content=body() if body is not None else None,
            extensions={"timeout": self._http.timeout.as_dict()},
        )
        try:
            return self._http.send(message, stream=True)
        except OSError as error:
            raise ObjectStoreError(f"{request.method} {request.shown}: {os_reason(error)}") from None

    def _shown(self, blob_id: str) -> str:
        return f"{self.bucket.name}: object {self.bucket.key(blob_id)}"


def _answer(response: httpx.Response) -> bytes:
    """A small answer's body; a longer one is cut."""
    data = bytearray()
    for piece in response.iter_raw():
        data += piece
        if len(data) > _MAX_ANSWER:
            break
    return bytes(data)


def _said(body: bytes) -> str:
    found = (_CODE.search(body), _MESSAGE.search(body))
    parts = [" ".join(html.unescape(match[1].decode("utf-8", "replace")).split()) for match in found if match]
    return f" ({': '.join(parts)})" if parts else ""


def _refusal(method: str, request: SignedRequest, response: httpx.Response, backend: ObjectBackend) -> ObjectStoreError:
    status = response.status_code
    try:
        said = _said(_answer(response))
    except httpx.HTTPError:
        said = ""
    hint = ""
    if status in (301, 307):
        region = response.headers.get("x-amz-bucket-region", "")
        hint = f"; the bucket is elsewhere{f', in region {region}' if region else ''}: correct region or endpoint"
    elif status in (401, 403):
        hint = "; check access_key_id, access_key_secret, session_token and the rights on the bucket"
    elif status == 404 and b"NoSuchBucket" in said.encode():
        hint = f"; bucket_name {backend.bucket_name!r} does not exist there"
    return ObjectStoreError(f"{method} {request.shown}: status {status}{said}{hint}", status=status)


def _tls(ca_files: tuple[str, ...], skip_verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in ca_files:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise ObjectStoreError(f"ca_cert_files: {path} cannot be used: {error}") from None
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _xml(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
