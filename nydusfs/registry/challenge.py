"""WWW-Authenticate challenges and token replies, as pure functions.

RFC 7235 allows several challenges in one header, quoted strings that hold commas and equals signs, any letter case
and blanks around '='; registries use all of it. Splitting at `",` and `=` (reference behaviour) breaks on such values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from nydusfs.errors import AuthError

# A token without a stated life; the distribution token specification says 60 s, upstream's daemon takes 600.
DEFAULT_EXPIRY = 60.0
MAX_HEADER = 16 * 1024
MAX_TOKEN_REPLY = 1 << 20

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?=\s|,|$)")
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")  # credentials-like blob of other schemes
_COMMA = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate. `scheme` and the parameter names are lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> str:
        return self.parameters.get(name, "")


def parse_challenges(headers: str | Iterable[str]) -> list[Challenge]:
    """Every challenge of one or several WWW-Authenticate values, in order. What cannot be read is left out."""
    found: list[Challenge] = []
    for header in [headers] if isinstance(headers, str) else headers:
        found += _parse_one(header[:MAX_HEADER])
    return found


def _parse_one(text: str) -> list[Challenge]:
    found: list[Challenge] = []
    position = 0
    while position < len(text):
        if comma := _COMMA.match(text, position):
            position = comma.end()
        scheme = _SCHEME.match(text, position)
        if scheme is None:
            break
        position = scheme.end()
        parameters: dict[str, str] = {}
        if opaque := _TOKEN68.match(text, position):
            position = opaque.end()  # "Negotiate abc==": nothing in it for us
        while True:
            comma = _COMMA.match(text, position)
            start = comma.end() if comma else position
            parameter = _PARAMETER.match(text, start)
            if parameter is None:
                break
            name, quoted, bare = parameter.groups()
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
            parameters.setdefault(name.lower(), value)
            position = parameter.end()
        found.append(Challenge(scheme.group(1).lower(), parameters))
    return found


def choose(challenges: Iterable[Challenge]) -> Challenge | None:
    """The one to answer: bearer with a realm before basic, whatever their order."""
    listed = list(challenges)
    for wanted in ("bearer", "basic"):
        for challenge in listed:
            if challenge.scheme == wanted and (wanted == "basic" or challenge.get("realm")):
                return challenge
    return None


@dataclass(frozen=True, slots=True)
class TokenReply:
    """`expires_in` in seconds from now."""

    token: str
    expires_in: float


def parse_token_reply(body: bytes, where: str = "token server") -> TokenReply:
    """Reads `token` or `access_token` and `expires_in`. Raises AuthError that names `where`, never showing the body."""
    if len(body) > MAX_TOKEN_REPLY:
        raise AuthError(f"{where}: answer of {len(body)} bytes is no token reply", url=where)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        raise AuthError(f"{where}: answer is not JSON", url=where) from None
    if not isinstance(reply, dict):
        raise AuthError(f"{where}: answer is not a JSON object", url=where)
    token = reply.get("token") or reply.get("access_token")
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise AuthError(f"{where}: answer holds no token", url=where)
    expires = reply.get("expires_in")
    try:
        seconds = float(expires) if expires is not None and not isinstance(expires, bool) else DEFAULT_EXPIRY
    except (TypeError, ValueError, OverflowError):
        seconds = DEFAULT_EXPIRY
    # also refuses NaN and what a clock cannot hold
    return TokenReply(token, seconds if 0 < seconds < 1e9 else DEFAULT_EXPIRY)
