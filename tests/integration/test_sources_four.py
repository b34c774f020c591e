"""One good source among four, over sockets: no error reaches a reader and few requests are wasted.

Latencies are judged in virtual time by `test_source_race` and here only in the long layer; `tests.bench.bench_sources`
prints all figures.
"""

from __future__ import annotations

import pytest

from tests.bench.bench_sources import measure


@pytest.mark.parametrize("good", ["origin", "mirror"])
def test_a_thousand_reads(good: str) -> None:
    result = measure(1000, 8, 0.02, good)
    assert result.errors == 0
    assert result.extra <= 0.06  # what it costs to find out about each source counts for more in a short run
    assert result.recovered_after < 30


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("good", ["origin", "mirror"])
def test_a_hundred_thousand_reads(good: str) -> None:
    """100 readers at once and 200 ms, so about 4 minutes."""
    result = measure(100_000, 100, 0.2, good)
    assert result.errors == 0
    assert result.extra <= 0.03
    assert result.ratio <= 1.5
    assert result.recovered_after <= 5
