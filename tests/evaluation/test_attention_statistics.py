"""Mean attention profiles: against eager attention, and stretched to one length."""

from __future__ import annotations

import numpy as np
import pytest
from test_consistency import LAYERS, eager_scores, make_examples
from tiny import tiny_llava, tiny_processor

from thinsight.baselines import fitprune
from thinsight.budget import KeepBudget
from thinsight.errors import ThinsightError
from thinsight.evaluation import attention_statistics
from thinsight.evaluation.consistency import _profile


def test_profiles_are_the_mean_of_sorted_shares() -> None:
    examples = make_examples(3)
    found = attention_statistics(tiny_llava(), tiny_processor(), examples, batch_size=2)
    profiles = []
    for example in examples:
        scores = -np.sort(-np.asarray(eager_scores(example), dtype=float), axis=1)
        profiles.append(scores / scores.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, np.mean(profiles, axis=0), rtol=1e-4)
    assert found.shape == (LAYERS, 16)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    schedule = fitprune(found, KeepBudget(LAYERS, 16, 0.5)).schedule
    assert 0.45 < sum(schedule.counts(16)) / (LAYERS * 16) <= 0.5


def test_profiles_of_fewer_tokens_are_stretched() -> None:
    scores = np.array([[3.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(_profile(scores, 4), [[0.375, 0.375, 0.125, 0.125], [0.25] * 4])
    np.testing.assert_allclose(_profile(scores, 2), [[0.75, 0.25], [0.5, 0.5]])


def test_scores_below_0_are_refused() -> None:
    with pytest.raises(ThinsightError, match="scores below 0"):
        attention_statistics(tiny_llava(), tiny_processor(), make_examples(1), ranker="uniform")
