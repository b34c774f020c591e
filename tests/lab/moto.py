"""moto's S3, IAM and STS as a server that checks each signature with AWS' own botocore.

Our own object server (`objects.py`) reads the specification as we do; this one is somebody else's reading.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.process import Child, can_connect, free_port

REGION = "eu-central-1"
_SETUP = 8  # calls that make users, roles and the bucket; from then on every request needs a signature
_ALL = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})
_TRUST = json.dumps({
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}],
})  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """`user`: settings of a user's keys; `session`: of a role's, which end and need a session token."""

    endpoint: str
    name: str
    user: dict[str, Any]
    session: dict[str, Any]


@contextmanager
def moto_bucket(folder: Path, objects: Mapping[str, bytes], name: str = "blobs") -> Iterator[Bucket]:
    import boto3

    port = free_port()
    server = Child(
        "moto", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder / "moto.log",
        env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(_SETUP - 1 + len(objects))},
    )  # fmt: skip
    try:
        server.wait_ready(lambda: can_connect(("127.0.0.1", port)), 60)
        common = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": REGION,
                  "aws_access_key_id": "x", "aws_secret_access_key": "x"}  # fmt: skip
        iam, sts, s3 = (boto3.client(service, **common) for service in ("iam", "sts", "s3"))
        iam.create_user(UserName="node")
        key = iam.create_access_key(UserName="node")["AccessKey"]
        iam.put_user_policy(UserName="node", PolicyName="all", PolicyDocument=_ALL)
        role = iam.create_role(RoleName="puller", AssumeRolePolicyDocument=_TRUST)["Role"]
        iam.put_role_policy(RoleName="puller", PolicyName="all", PolicyDocument=_ALL)
        session = sts.assume_role(RoleArn=role["Arn"], RoleSessionName="node")["Credentials"]
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        for path, data in objects.items():
            s3.put_object(Bucket=name, Key=path, Body=data)
        base = {"scheme": "http", "endpoint": f"127.0.0.1:{port}", "bucket_name": name, "region": REGION}
        yield Bucket(
            base["endpoint"], name,
            {**base, "access_key_id": key["AccessKeyId"], "access_key_secret": key["SecretAccessKey"]},
            {**base, "access_key_id": session["AccessKeyId"], "access_key_secret": session["SecretAccessKey"],
             "session_token": session["SessionToken"]},
        )  # fmt: skip
    finally:
        server.stop()
