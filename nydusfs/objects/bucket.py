"""One bucket: addresses of its objects, and requests signed for them. No I/O but the credentials file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address

from nydusfs.config import ObjectBackend
from nydusfs.errors import ConfigError
from nydusfs.http import HttpError, Origin
from nydusfs.http.url import parse_authority
from nydusfs.objects.credentials import CredentialChain
from nydusfs.objects.signing import EMPTY_SHA256, Pairs, encode_path, encode_query, sign_oss, sign_v4


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """`target` is path and query, encoded; `headers` do not hold Host, which is `origin.netloc`."""

    method: str
    origin: Origin
    target: str
    headers: list[tuple[str, str]] = field(repr=False)

    @property
    def url(self) -> str:
        return f"{self.origin}{self.target}"

    @property
    def shown(self) -> str:
        """For messages: without query."""
        return f"{self.origin}{self.target.partition('?')[0]}"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class Bucket:
    """S3: `{scheme}://{endpoint}/{bucket}/{key}`; OSS: `{scheme}://{bucket}.{endpoint}/{key}` (reference 4.9), or as
    with S3 where the endpoint is an IP address, as OSS's own libraries do."""

    def __init__(self, backend: ObjectBackend) -> None:
        """Raises `ConfigError` for an endpoint that is no host[:port]."""
        self.backend = backend
        self.credentials = CredentialChain(backend)
        try:
            origin = parse_authority(backend.connection.scheme, backend.endpoint)
            self._in_path = backend.type == "s3" or _is_address(origin.host)
            host = backend.endpoint if self._in_path else f"{backend.bucket_name}.{backend.endpoint}"
            self.origin = parse_authority(backend.connection.scheme, host)
        except HttpError:
            raise ConfigError("endpoint", f"{backend.endpoint!r} is not a host[:port]") from None
        self.name = f"{backend.type} {self.origin}/{backend.bucket_name}"

    def key(self, blob_id: str) -> str:
        return self.backend.object_prefix + blob_id

    def request(
        self,
        method: str,
        blob_id: str,
        query: Pairs = (),
        headers: Iterable[tuple[str, str]] = (),
        payload_sha256: str = EMPTY_SHA256,
        now: datetime | None = None,
    ) -> SignedRequest:
        """A request for the object of a blob; `headers` are sent and, where the service wants it, signed.

        Raises `ObjectStoreError` when there are no usable credentials.
        """
        backend = self.backend
        key = self.key(blob_id)
        path = encode_path(f"/{backend.bucket_name}/{key}" if self._in_path else f"/{key}")
        # "?uploads" and not "?uploads=": OSS tells them apart
        target = f"{path}?{encode_query(query).replace('=&', '&').removesuffix('=')}" if query else path
        given = list(headers)
        keys = self.credentials.keys()
        if keys is not None:
            moment = now or datetime.now(UTC)
            if backend.type == "s3":
                host = self.origin.netloc
                given += sign_v4(keys, backend.region, method, host, path, query, payload_sha256, moment, given)
            else:
                given += sign_oss(keys, method, backend.bucket_name, key, query, moment, given)
        return SignedRequest(method, self.origin, target, given)
