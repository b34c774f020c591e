"""Signatures of bootstraps: label `nydus-signature` holds, in base64, RSA PKCS#1 v1.5 over the SHA-256 of the file."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from pathlib import Path

from snapshotter.errors import PermissionDenied, SettingsError
from snapshotter.labels import SIGNATURE

DEFAULT_KEY = Path("/signing/nydus-image-signing-public.key")


class Signatures:
    """Raises SettingsError when `required` and the key cannot be used."""

    def __init__(self, key_file: Path, *, required: bool) -> None:
        self._key_file, self._required = key_file, required
        if not required:
            return
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            key = load_pem_public_key(key_file.read_bytes())
        except OSError as error:
            raise SettingsError(
                f"image.validate_signature: public key {key_file} (image.public_key_file): {error.strerror}"
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise SettingsError(f"image.public_key_file {key_file}: is not a public key in PEM form") from None
        if not isinstance(key, RSAPublicKey):
            raise SettingsError(f"image.public_key_file {key_file}: is not an RSA key")
        self._key = key

    def check(self, bootstrap: Path, labels: Mapping[str, str], image: str) -> None:
        """Returns for a bootstrap that may be mounted. Raises PermissionDenied, OSError."""
        text = labels.get(SIGNATURE)
        try:
            signature = base64.b64decode(text, validate=True) if text is not None else b""
        except (binascii.Error, ValueError):
            raise PermissionDenied(f"image {image}: label {SIGNATURE} is not base64: not mounted") from None
        if not self._required:
            return
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
        from cryptography.hazmat.primitives.hashes import SHA256

        if not signature:
            raise PermissionDenied(
                f"image {image}: its bootstrap is not signed (label {SIGNATURE}) and image.validate_signature is set: "
                "sign it, or convert it with a tool that does"
            )
        with bootstrap.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        try:
            self._key.verify(signature, digest, PKCS1v15(), Prehashed(SHA256()))
        except InvalidSignature:
            raise PermissionDenied(
                f"image {image}: the signature of its bootstrap was not made with the key of {self._key_file}"
            ) from None
