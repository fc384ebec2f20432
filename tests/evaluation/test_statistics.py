"""Evaluation, the paired bootstrap, and the intervals that reports print."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaln, xlogy

from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation import Evaluation, drop_interval, paired_bootstrap
from thinsight.evaluation.result import score_to_expect, tango_interval


def test_evaluation_drop_and_checks() -> None:
    evaluation = Evaluation(score=0.9, full_score=1.0, per_example=[1, 0.8])
    assert evaluation.drop == pytest.approx(0.1)
    assert evaluation.per_example is not None
    assert evaluation.per_example.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        evaluation.per_example[0] = 0
    with pytest.raises(ThinsightError, match="full_score is None"):
        _ = Evaluation(score=0.9).drop
    with pytest.raises(ThinsightError, match="score is nan"):
        Evaluation(score=math.nan)
    with pytest.raises(ThinsightError, match="per_example has shape"):
        Evaluation(score=0.5, per_example=np.zeros((2, 2)))


def test_equal_columns_have_no_drop() -> None:
    scores = np.random.default_rng(0).random(50)
    interval = paired_bootstrap(scores, scores)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_seeded_and_ordered() -> None:
    rng = np.random.default_rng(1)
    full, reduced = rng.random(80), rng.random(80)
    first = paired_bootstrap(full, reduced, resamples=500, seed=4)
    assert first == paired_bootstrap(full, reduced, resamples=500, seed=4)
    assert first != paired_bootstrap(full, reduced, resamples=500, seed=5)
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(float(np.mean(full - reduced)))


def test_matches_the_normal_interval_of_many_examples() -> None:
    rng = np.random.default_rng(2)
    drops = rng.normal(0.3, 1.0, 2000)
    interval = paired_bootstrap(drops, np.zeros(2000), resamples=4000)
    half = 1.96 * drops.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(drops.mean() - half, abs=0.005)
    assert interval.high == pytest.approx(drops.mean() + half, abs=0.005)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        drops = (rng.random(120) < 0.3).astype(float)
        interval = paired_bootstrap(drops, np.zeros(120), resamples=400, level=0.9, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.82 <= hits / 200 <= 0.97


def test_groups_are_drawn_whole() -> None:
    drops = np.repeat([0.0, 1.0, 0.0, 0.0, 1.0, 1.0], 20)
    groups = [f"image {i // 20}" for i in range(120)]
    alone = paired_bootstrap(drops, np.zeros(120))
    grouped = paired_bootstrap(drops, np.zeros(120), groups=groups)
    assert grouped.mean == alone.mean
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    single = paired_bootstrap(drops, np.zeros(120), groups=list(range(120)))
    assert single == alone


def test_unequal_groups_weigh_examples_alike() -> None:
    interval = paired_bootstrap([1.0, 1.0, 1.0, 0.0], [0.0] * 4, groups=["a", "a", "a", "b"], resamples=300)
    assert interval.mean == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"full": [], "reduced": []}, "shape"),
        ({"full": [1.0], "reduced": [1.0, 0.0]}, "shape"),
        ({"full": [[1.0]], "reduced": [[1.0]]}, "shape"),
        ({"full": [1.0], "reduced": [math.nan]}, "not finite"),
        ({"full": [1.0], "reduced": [1.0], "groups": [1, 2]}, "groups has 2"),
        ({"full": [1.0], "reduced": [1.0], "resamples": 0}, "resamples is 0"),
        ({"full": [1.0], "reduced": [1.0], "level": 95}, "level is 95"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ThinsightError, match=named):
        paired_bootstrap(**arguments)


# -- Tango's score interval ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "wins", "count", "level", "low", "high"),
    [
        # Fagerland, Lydersen & Laake, Statistical Analysis of Contingency Tables (2017), table 8: Cavo et al.
        (6, 16, 161, 0.95, -0.1240, -0.0054),
        # R package PropCIs 0.3, scoreci.mp(25, 28, 618, 0.9) and scoreci.mp(60, 20, 1000, 0.95)
        (28, 25, 618, 0.90, -0.0148, 0.0247),
        (20, 60, 1000, 0.95, -0.0584, -0.0231),
        # no discordant pair: z^2 / (n + z^2), solved by hand
        (0, 0, 64, 0.95, -3.8415 / 67.8415, 3.8415 / 67.8415),
    ],
)
def test_tango_of_published_tables(losses: int, wins: int, count: int, level: float, low: float, high: float) -> None:
    found = tango_interval(losses, wins, count, level=level)
    assert found.mean == pytest.approx((losses - wins) / count)
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    mirrored = tango_interval(wins, losses, count, level=level)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


@pytest.mark.parametrize(
    "counts", [(2.0, 1.0, 2.0), (-1.0, 0.0, 2.0), (0.0, 0.0, 0.0), (math.nan, 0.0, 2.0), (0.0, 0.0, math.inf)]
)
def test_counts_that_cannot_be(counts: tuple[float, float, float]) -> None:
    with pytest.raises(BadInput, match="parts of the pairs"):
        tango_interval(*counts)


def columns(losses: int, wins: int, count: int) -> tuple[list[float], list[float]]:
    same = [1.0] * (count - losses - wins)
    return [1.0] * losses + [0.0] * wins + same, [0.0] * losses + [1.0] * wins + same


@pytest.mark.parametrize("count", [3, 10, 20])
def test_it_covers_at_every_truth_by_enumeration(count: int) -> None:
    """All tables of so many pairs, at 231 pairs of probabilities: nominal 95 %."""
    tables = [(b, c) for b in range(count + 1) for c in range(count + 1 - b)]
    found = [drop_interval(*columns(b, c, count)) for b, c in tables]
    low, high = np.array([each.low for each in found]), np.array([each.high for each in found])
    losses, wins = np.array(tables, dtype=float).T
    same = count - losses - wins
    ways = gammaln(count + 1) - gammaln(losses + 1) - gammaln(wins + 1) - gammaln(same + 1)
    covered = []
    for lost in np.linspace(0, 1, 21):
        for won in np.linspace(0, 1, 21)[: 21 - round(20 * lost)]:
            rest = max(0.0, 1 - lost - won)
            chances = np.exp(ways + xlogy(losses, lost) + xlogy(wins, won) + xlogy(same, rest))
            inside = (low <= lost - won + 1e-12) & (high >= lost - won - 1e-12)
            covered.append(float(chances[inside].sum()))
    assert len(covered) == 231
    assert min(covered) >= 0.92
    assert np.mean(covered) >= 0.95


@pytest.mark.parametrize("count", [1, 3, 64, 384, 1152])
def test_no_changed_answer_is_no_certainty(count: int) -> None:
    for scores in (np.ones(count), np.zeros(count), np.full(count, 0.3)):
        found = drop_interval(scores, scores)
        assert found.mean == 0.0
        assert found.high == -found.low
        assert found.high >= min(1.0, 3.7 / count)
    assert paired_bootstrap(np.ones(count), np.ones(count)).high == 0.0


def test_corners_of_three_examples() -> None:
    assert drop_interval([1, 1, 1], [0, 0, 0]).high == 1.0
    assert drop_interval([0, 0, 0], [1, 1, 1]).low == -1.0
    assert drop_interval([0, 0, 0], [1, 1, 1]).high > 0  # three wins in a row may be chance
    eight = drop_interval(np.zeros(8), np.ones(8))
    assert (eight.mean, eight.low) == (-1.0, -1.0)
    assert eight.high < 0


def test_the_interval_grows_with_the_design_effect() -> None:
    drops = np.repeat([0.0] * 90 + [1.0] * 10, 3)  # three questions an image, all of which change together
    images = [place // 3 for place in range(300)]
    alone = drop_interval(drops, np.zeros(300))
    together = drop_interval(drops, np.zeros(300), groups=images)
    fewer = tango_interval(10, 0, 100)  # an image counts as the one question that it is worth
    assert together.high - together.low > 1.6 * (alone.high - alone.low)
    assert (together.low, together.high) == (pytest.approx(fewer.low, abs=2e-3), pytest.approx(fewer.high, abs=2e-3))
    spread = drop_interval(drops, np.zeros(300), groups=[place % 100 for place in range(300)])
    assert spread == alone  # questions that do not go together: no narrower either


def test_one_image_is_one_example() -> None:
    found = drop_interval(np.ones(40), np.ones(40), groups=["one"] * 40)
    assert (found.low, found.high) == (-1.0, 1.0)


def test_clustered_answers_are_covered() -> None:
    rng = np.random.default_rng(0)
    images = [place // 3 for place in range(240)]
    hits, single = 0, 0
    for _ in range(300):
        drops = np.repeat((rng.random(80) < 0.1).astype(float), 3)
        found = [drop_interval(drops, np.zeros(240), groups=groups) for groups in (images, None)]
        hits += found[0].low <= 0.1 <= found[0].high
        single += found[1].low <= 0.1 <= found[1].high
    assert hits / 300 >= 0.93
    assert single / 300 < 0.85


def test_scores_between_are_no_narrower_than_the_bootstrap() -> None:
    rng = np.random.default_rng(4)
    full = rng.random(60)
    reduced = np.clip(full - rng.random(60) / 3, 0, 1)
    found, bootstrap = drop_interval(full, reduced), paired_bootstrap(full, reduced)
    assert found.mean == bootstrap.mean
    assert found.low <= bootstrap.low
    assert found.high >= bootstrap.high
    # one half-right answer lost: as half an example
    half = drop_interval([1.0] * 50, [0.5] + [1.0] * 49)
    assert half.high >= tango_interval(0.5, 0, 50).high > 0.02


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 0.6, 1.0])] * 2), min_size=1, max_size=12), st.integers(1, 4))
def test_every_interval_is_one(pairs: list[tuple[float, float]], images: int) -> None:
    full, reduced = zip(*pairs, strict=True)
    found = drop_interval(full, reduced, groups=[place % images for place in range(len(pairs))], resamples=20)
    least = min(1.0, 3.7 / len(pairs))
    assert -1 <= found.low <= max(-1, found.mean - least) + 1e-12
    assert 1 >= found.high >= min(1, found.mean + least) - 1e-12
    back = drop_interval(reduced, full, groups=[place % images for place in range(len(pairs))], resamples=20)
    assert back.mean == pytest.approx(-found.mean)


@pytest.mark.parametrize("count", [3, 40, 1152])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_no_corner_is_narrower_than_the_rule_of_three(count: int, images: int) -> None:
    """All right, all wrong, one changed image, and scores between that do not change: with groups too."""
    groups = [place // images for place in range(count)]
    one = np.ones(count)
    one[:images] = 0.0
    few = np.full(count, 0.3)
    few[0] = 0.6
    corners = [(np.ones(count), np.ones(count)), (np.zeros(count), np.zeros(count)), (np.ones(count), one)]
    corners += [(one, np.ones(count)), (few, few), (few, np.full(count, 0.3)), (np.zeros(count), np.full(count, 1e-9))]
    for full, reduced in corners:
        found = drop_interval(full, reduced, groups=groups, resamples=50)
        assert found.mean == pytest.approx(float((full - reduced).mean()))
        assert found.low <= max(-1.0, found.mean - 3.7 / count) + 1e-12
        assert found.high >= min(1.0, found.mean + 3.7 / count) - 1e-12
        assert found.low < found.mean < found.high or abs(found.mean) == 1


def test_scores_between_are_as_wide_as_when_they_are_rounded() -> None:
    """Both at one threshold, as a certificate rounds them: on average over thresholds."""
    rng = np.random.default_rng(5)
    full = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], 200)
    for changed in (0.02, 0.2, 0.6):
        reduced = np.where(rng.random(200) < changed, rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], 200), full)
        found = drop_interval(full, reduced, resamples=500)
        widths = []
        for _ in range(100):
            limits = rng.random(200)
            rounded = drop_interval((limits < full).astype(float), (limits < reduced).astype(float))
            widths.append(rounded.high - rounded.low)
        error = np.std(widths) / math.sqrt(len(widths))
        assert found.high - found.low >= np.mean(widths) - 2 * error


def test_scores_outside_of_a_metrics_range_are_refused() -> None:
    for bad in (-0.1, 1.5):
        with pytest.raises(BadInput, match="outside of"):
            drop_interval([bad, 1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("chances", "score"),
    [
        ([0.0] * 100, 0.03),  # nothing to guess: below 3 %
        ([0.5] * 100, 0.6),  # two standard errors of 5 points
        ([0.25] * 10_000, 0.28),  # standard errors of 0.4 points: 3 points count
        ([0.5, 0.0], 0.25 + 2 * 0.25),
        ([0.5], 1.5),  # one question with two answers tells nothing
    ],
)
def test_the_score_to_expect_of_more_than_chance(chances: list[float], score: float) -> None:
    assert score_to_expect(chances) == pytest.approx(score)
