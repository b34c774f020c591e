"""Manifests that name another one as their `subject`: the referrers API, and the tag that stands for it elsewhere.

A registry without the API (docker-registry 2.x) gets an index under the tag `sha256-<hex of the subject>`, which each
client that pushes a referrer keeps (distribution specification, "Referrers Tag Schema").
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from nydusfs.errors import NotFoundError, RegistryError
from nydusfs.registry.mediatypes import OCI_INDEX
from nydusfs.registry.reference import SHA256_DIGEST

if TYPE_CHECKING:
    from nydusfs.registry.client import RegistryClient

log = logging.getLogger(__name__)

_TRIES = 3
_MAX_INDEX = 4 << 20
_MAX_PAGES = 1000


def subject_of(body: bytes) -> str:
    """Digest of a manifest's subject, "" if it has none."""
    try:
        subject = json.loads(body).get("subject")
    except (ValueError, RecursionError, AttributeError):
        return ""
    digest = subject.get("digest") if isinstance(subject, dict) else None
    return digest if isinstance(digest, str) and SHA256_DIGEST.fullmatch(digest) else ""


def referrers(client: RegistryClient, repository: str, digest: str) -> list[dict[str, Any]]:
    """Descriptors of the manifests whose subject is `digest`, by the API, else by the tag."""
    what = f"referrers of {digest} in {client.host}/{repository}"
    found: list[dict[str, Any]] = []
    page = f"/v2/{repository}/referrers/{digest}"
    for _ in range(_MAX_PAGES):
        with client.transport.request(
            "GET", page, scope=f"repository:{repository}:pull", headers={"Accept": OCI_INDEX}
        ) as response:
            if response.status_code in (400, 404, 405) and not found:
                break
            if response.status_code != 200:
                client.transport.raise_for(response, what)
            data = bytearray()
            for piece in response.iter_raw():
                data += piece
                if len(data) > _MAX_INDEX:
                    raise RegistryError(f"{what}: list too long")
            found += _entries(bytes(data), what)
            if not (page := client.transport.next_page(response)):
                return found
    else:
        raise RegistryError(f"{what}: more than {_MAX_PAGES} pages")
    return _tagged(client, repository, digest)


def add_to_tag(client: RegistryClient, repository: str, subject: str, media_type: str, body: bytes) -> None:
    """Adds a manifest that was pushed to the index under its subject's tag. Two clients may do this at once: what was
    written is read again."""
    entry = descriptor(media_type, body)
    for _ in range(_TRIES):
        entries = _tagged(client, repository, subject)
        if any(one.get("digest") == entry["digest"] for one in entries):
            return
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*entries, entry]}
        client.put_manifest(repository, tag_of(subject), OCI_INDEX, json.dumps(index, indent=2).encode())
    if not any(one.get("digest") == entry["digest"] for one in _tagged(client, repository, subject)):
        log.warning("%s/%s: other clients keep changing the list of referrers of %s", client.host, repository, subject)


def descriptor(media_type: str, body: bytes) -> dict[str, Any]:
    document = json.loads(body)
    config = document.get("config")
    kind = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else None)
    entry = {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(body).hexdigest()}", "size": len(body)}
    entry |= {"artifactType": kind} if kind else {}
    annotations = document.get("annotations")
    return entry | ({"annotations": annotations} if isinstance(annotations, dict) and annotations else {})


def tag_of(digest: str) -> str:
    return digest.replace(":", "-", 1)


def _tagged(client: RegistryClient, repository: str, digest: str) -> list[dict[str, Any]]:
    try:
        found = client.manifest(repository, tag_of(digest), mirrors=False)  # it is written again
    except NotFoundError:
        return []
    return _entries(found.body, f"{client.host}/{repository}:{tag_of(digest)}")


def _entries(body: bytes, what: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(body)["manifests"]
    except (ValueError, RecursionError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RegistryError(f"{what}: not an index of manifests")
    return entries
