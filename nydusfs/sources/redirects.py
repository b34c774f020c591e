"""Where a blob was last found behind a redirect, for as long as that holds."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from datetime import UTC, datetime
from urllib.parse import parse_qs

import trio

from nydusfs.http import Url

MAX_KEPT = 1024
_EARLY = 15.0  # seconds before a signature ends at which its URL is not used any more
# A target that does not say how long it is good for is asked for anew after this; until then a refusal ends it.
_UNSAID = 3600.0


def expiry(target: str, wall: float) -> float:
    """Seconds that a signed URL is still good for by what its query says; infinite when it says nothing.

    `target` is path and query, `wall` the time of day in seconds since 1970. Knows the signatures of S3 and GCS
    (version 4 and 2), OSS, Azure and CloudFront.
    """
    query = {name.lower(): values[0] for name, values in parse_qs(target.partition("?")[2]).items()}
    for prefix in ("x-amz-", "x-goog-", "x-oss-"):
        begin, life = query.get(f"{prefix}date", ""), query.get(f"{prefix}expires", "")
        if re.fullmatch(r"\d{8}T\d{6}Z", begin) and re.fullmatch(r"\d{1,9}", life):
            return _since(begin, "%Y%m%dT%H%M%SZ", wall) + int(life)
    if re.fullmatch(r"\d{9,11}", query.get("expires", "")):
        return int(query["expires"]) - wall
    if "sig" in query and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", query.get("se", "")):
        return _since(query["se"], "%Y-%m-%dT%H:%M:%SZ", wall)
    return float("inf")


def _since(text: str, form: str, wall: float) -> float:
    try:
        return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp() - wall
    except ValueError:
        return float("inf")


class Redirects:
    """Targets by blob id. A target is dropped when its time is over, and by whoever finds that it does not work."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Url, float]] = OrderedDict()

    def get(self, blob_id: str) -> Url | None:
        found = self._known.get(blob_id)
        if found is None:
            return None
        if trio.current_time() >= found[1]:
            del self._known[blob_id]
            return None
        return found[0]

    def keep(self, blob_id: str, target: Url) -> None:
        life = min(expiry(target.target, time.time()) - _EARLY, _UNSAID)
        if life <= 0:
            return
        while len(self._known) >= MAX_KEPT:
            self._known.popitem(last=False)
        self._known[blob_id] = (target, trio.current_time() + life)

    def drop(self, blob_id: str) -> None:
        self._known.pop(blob_id, None)
