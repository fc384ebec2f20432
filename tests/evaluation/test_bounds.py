"""The betting test on losses: how often it is wrong, against a test that waits until it is certain."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import prod

import numpy as np
import pytest

from thinsight.errors import ThinsightError
from thinsight.evaluation.bounds import LossTest, check_confidence, random_order

WEIGHTS = {
    "even": np.ones(60),
    "skewed": np.linspace(0.02, 3.0, 60),
    "misleading": np.linspace(3.0, 0.02, 60),  # the lossy parts come last
}


def losses_of(total, seed=0):
    """60 parts of up to 8 lost examples, later ones more often; they add up to ``total``."""
    losses = np.zeros(60)
    rng = np.random.default_rng(seed)
    while losses.sum() < total:
        part = min(59, int(60 * rng.beta(2, 1)))
        losses[part] += losses[part] < 8
    return losses


def seen_until_failed(losses, weights, allowed, confidence, seed):
    """How many parts were seen when the test failed; None if it never did."""
    order = random_order(weights, seed)
    test = LossTest(weights[order], allowed, confidence)
    for number, part in enumerate(order, start=1):
        if test.sees(losses[part]):
            return number
    return None


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("total", [12, 100])
def test_what_is_allowed_fails_no_more_often_than_promised(name, confidence, total):
    """The losses are exactly what is allowed: the hardest case. A look after every part."""
    losses = losses_of(total)
    failed = [
        seen_until_failed(losses, WEIGHTS[name], total + 1e-9, confidence, seed) is not None for seed in range(400)
    ]
    assert np.mean(failed) <= 1 - confidence


def test_the_promise_is_made_use_of():
    """A test that never failed would keep every promise."""
    losses = losses_of(100)
    failed = [seen_until_failed(losses, WEIGHTS["even"], 100 + 1e-9, 0.8, seed) is not None for seed in range(400)]
    assert np.mean(failed) > 0.02


def test_too_much_is_found_sooner_than_by_waiting_for_certainty():
    losses, weights = losses_of(200), WEIGHTS["even"]
    seen = {
        confidence: np.mean([seen_until_failed(losses, weights, 100, confidence, seed) for seed in range(200)])
        for confidence in (0.8, 0.95, 0.99, 1 - 1e-15)  # the last is certainty but for rounding
    }
    assert list(seen.values()) == sorted(seen.values())
    assert seen[0.99] < 0.75 * seen[1 - 1e-15]


def test_losses_above_what_is_allowed_fail_for_certain():
    for name, weights in WEIGHTS.items():
        losses = losses_of(31)
        for seed in range(50):
            seen = seen_until_failed(losses, weights, 30, 0.999, seed)
            assert seen is not None, name
    assert LossTest([1.0, 1.0], 0.0, 0.99).sees(0.5)
    assert not LossTest([1.0, 1.0], 0.0, 0.99).sees(0.0)


def test_no_loss_never_fails():
    assert seen_until_failed(np.zeros(60), WEIGHTS["skewed"], 0.0, 0.5, 0) is None


def test_the_order_is_one_of_draws_in_proportion_to_the_weights():
    weights = np.array([1.0, 2.0, 5.0])
    drawn = Counter(tuple(random_order(weights, [7, seed])) for seed in range(4_000))
    for order in permutations(range(3)):
        left = [weights[list(order[i:])] for i in range(3)]
        chance = prod(part[0] / part.sum() for part in left)
        assert drawn[order] / 4_000 == pytest.approx(chance, abs=0.03)
    assert random_order(weights, 3) == random_order(weights, 3)


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 99, float("nan"), "high", True])
def test_what_is_no_confidence(confidence):
    with pytest.raises(ThinsightError, match="confidence is"):
        check_confidence(confidence)
