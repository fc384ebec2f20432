"""How many examples each fuzz test draws: a few dozen in `make test`, thousands in `make fuzz`.

The draws are the same in every run. Memory is held to a bound per test, and no example may hang.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("THINSIGHT_FUZZ_EXAMPLES", "60"))
MOST_SECONDS = 20  # for one example: a hang, not a measure of speed
MOST_MEMORY = 2 * 2**20  # KiB that a whole test may add to the process

settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=MOST_SECONDS * 1000,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_MEMORY, f"the process grew by {grown / 2**20:.1f} GiB"
