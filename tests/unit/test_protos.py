"""The committed gRPC code is what the .proto files say."""

import pytest


def test_generated_code_is_fresh() -> None:
    pytest.importorskip("grpc_tools")
    from protos.generate import stale

    assert stale() == []
