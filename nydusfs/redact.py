"""What may be shown of addresses and headers that can hold credentials."""

from __future__ import annotations

import re

HIDDEN = "(hidden)"
_USER = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)?.*@")
# Of Dragonfly's headers and those that only name somebody; any other value may be a token.
_PUBLIC_HEADERS = ("x-dragonfly-", "host", "user-agent", "accept")


def public_url(text: str) -> str:
    """Without user and password, and without the query: mirrors and signed URLs have keys there. For any text."""
    head, mark, _ = _USER.sub(lambda found: f"{found[1] or ''}{HIDDEN}@", text).partition("?")
    return head + (mark and f"?{HIDDEN}")


def public_header(name: str, value: str) -> str:
    """A header's value if it can be no secret."""
    return public_url(value) if name.lower().startswith(_PUBLIC_HEADERS) else HIDDEN
