"""A small HTTP/1.1 client over trio for ranged GETs of blobs.

httpx costs 850 us a request on trio and copies every body; chunks are fetched by the thousand, so the hot path is ours:
one keep-alive pool per origin, one receive buffer per body, strict parsing. See `client.HttpClient`.
"""

from nydusfs.http.client import HttpClient, Response
from nydusfs.http.errors import ConnectFailed, HttpError, HttpTimeout, ProtocolViolation
from nydusfs.http.url import Origin, Url, parse_url

__all__ = [
    "ConnectFailed",
    "HttpClient",
    "HttpError",
    "HttpTimeout",
    "Origin",
    "ProtocolViolation",
    "Response",
    "Url",
    "parse_url",
]
