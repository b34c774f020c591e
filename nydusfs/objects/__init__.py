"""Object stores (S3, OSS): signed requests, and a client that pushes and reads blobs.

`Bucket` signs and addresses requests and does no I/O; `client.ObjectClient` is the synchronous client of `nydusify`;
nydusd reads through `nydusfs.sources.objects`.
"""

from nydusfs.objects.bucket import Bucket, SignedRequest
from nydusfs.objects.credentials import CredentialChain
from nydusfs.objects.signing import EMPTY_SHA256, ObjectKeys

__all__ = ["EMPTY_SHA256", "Bucket", "CredentialChain", "ObjectKeys", "SignedRequest"]
