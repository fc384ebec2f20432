"""What the suite's tests have in common: holding a model's steps to the reference.

Knows nothing about any one family.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from thinsight.checking.comparing import Case as Case
from thinsight.checking.comparing import FixedScores as FixedScores
from thinsight.checking.comparing import compare_steps
from thinsight.checking.comparing import generate as generate
from thinsight.checking.comparing import scores_of as scores_of
from thinsight.schedule import Schedule

from .family import Family
from .inputs import Batch

FULL = Schedule.full(4)
NEARLY_FULL = Schedule([1, 0.99, 0.98, 0.97])
"""Keeps every token of up to 33, but has every hook installed and every count computed."""


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def paged_cache() -> PagedAttentionCache:
    """The cache of continuous batching as far as its type tells: it holds nothing."""
    return PagedAttentionCache.__new__(PagedAttentionCache)


def check_steps(family: Family, case: Case, batch: Batch, attn: str | None = None, steps: int = 4) -> None:
    """Generate greedily from a batch; hold kept tokens and the logits of every step to the reference."""
    compared = list(compare_steps(family, case, batch, attn, steps))
    assert len(compared) == len(batch.rows)
    for row in compared:
        assert row.kept is None or row.kept == row.wanted
        assert len(row.steps) == steps
        for got, wanted in row.steps:
            close(got, wanted)
