"""Certified searches: the exact test against enumeration, and what a certificate says at every corner."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta, binom, multinomial

import thinsight as ts
from thinsight.certificate import Step, certifiable, examples_needed, least_examples
from thinsight.evaluation import Evaluation, Example
from thinsight.records import parse_json
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule
from thinsight.searches.certify import (
    accepted,
    best_of_bands,
    check_disjoint,
    exact_p_value,
    fingerprint_of,
    judge,
    largest_surplus,
    lay_path,
    one_step,
    path_for,
    split_examples,
    uniforms,
)
from thinsight.searches.run import SearchResult, Trial

LAYERS, N = 8, 64


def statistic(losses: int, wins: int, n: int, max_drop: float) -> float:
    """Tango's, his equations (10) to (13) written out again: the share of wins solves A q^2 + B q + C = 0."""
    a, b = 2 * n, -losses - wins + (2 * n - losses + wins) * max_drop
    c = -wins * max_drop * (1 - max_drop)
    share = (math.sqrt(b * b - 4 * a * c) - b) / (2 * a)
    return (losses - wins - n * max_drop) / math.sqrt(n * (2 * share + max_drop * (1 - max_drop)))


def enumerated(losses: int, wins: int, n: int, max_drop: float) -> float:
    """The p-value from every table there is, at 1,500 shares of wins."""
    limit = min(float(beta.ppf(0.999, wins + 1, n - wins)) if wins < n else 1.0, (1 - max_drop) / 2)
    seen = statistic(losses, wins, n, max_drop) + 1e-9
    tables = [(b, c) for b in range(n + 1) for c in range(n + 1 - b) if statistic(b, c, n, max_drop) <= seen]
    least: dict[int, int] = {}
    for b, c in tables:
        least[b] = min(c, least.get(b, n))
    shares = np.linspace(0, limit, 1500)
    total = np.zeros_like(shares)
    for b, c in least.items():  # every c from the least one on belongs to it, or this is no exact test
        assert {each for lost, each in tables if lost == b} == {*range(c, n + 1 - b)}
        of_wins = binom.sf(c - 1, n - b, np.minimum(1, shares / (1 - shares - max_drop)))
        total += binom.pmf(b, n, shares + max_drop) * of_wins
    return min(1.0, float(total.max()) + 0.001)


@pytest.mark.parametrize(
    ("losses", "wins", "n", "max_drop"),
    [
        (0, 0, 3, 0.5), (0, 0, 60, 0.05), (1, 0, 60, 0.1), (0, 2, 60, 0.02), (3, 4, 90, 0.05),
        (2, 9, 90, 0.03), (10, 12, 120, 0.05), (1, 1, 150, 0.03), (5, 6, 150, 0.02), (0, 3, 150, 0.01),
        (20, 25, 150, 0.04), (0, 60, 60, 0.1),
    ],
)  # fmt: skip
def test_it_agrees_with_full_enumeration(losses: int, wins: int, n: int, max_drop: float) -> None:
    assert exact_p_value(losses, wins, n, max_drop) == pytest.approx(enumerated(losses, wins, n, max_drop), abs=0.001)


def test_the_enumeration_is_of_multinomial_tables() -> None:
    """The two factors of its probability against the one of the textbook."""
    b, c, n, won, lost = 4, 3, 20, 0.1, 0.25
    both = binom.pmf(b, n, lost) * binom.pmf(c, n - b, won / (1 - lost))
    assert both == pytest.approx(multinomial.pmf([b, c, n - b - c], n, [lost, won, 1 - lost - won]))


@pytest.mark.parametrize(("n", "max_drop"), [(60, 0.1), (150, 0.02), (150, 0.05), (300, 0.01)])
def test_a_false_promise_is_made_at_most_so_often(n: int, max_drop: float) -> None:
    """Its size at the boundary, summed over all tables: never above 5 %, and not far below it either."""
    most_wins = 45
    limits = []  # per number of wins, the most losses that are certified; -1: none
    for wins in range(most_wins + 1):
        losses = limits[-1] if limits else -1
        while losses + 1 + wins <= n and exact_p_value(losses + 1, wins, n, max_drop) <= 0.05:
            losses += 1
        limits.append(losses)
    sizes = []
    for share in [0.0, *np.geomspace(0.0005, 0.1, 25)]:
        size = binom.sf(most_wins, n, share)  # what is not summed over counts as certified
        for wins, losses in enumerate(limits):
            if losses >= 0:
                lost = binom.cdf(losses, n - wins, (share + max_drop) / (1 - share))
                size += binom.pmf(wins, n, share) * lost
        sizes.append(size)
    assert 0.02 < max(sizes) <= 0.05


def test_more_losses_speak_against_it_and_more_wins_for_it() -> None:
    for n in (40, 150, 1152):
        for losses in range(5):
            for wins in range(5):
                p = exact_p_value(losses, wins, n, 0.03)
                assert exact_p_value(losses + 1, wins, n, 0.03) >= p - 1e-9
                assert exact_p_value(losses, wins + 1, n, 0.03) <= p + 1e-9
                if p <= 0.05:
                    assert exact_p_value(losses, wins, n, 0.05) <= 0.05


def test_corners_of_the_test() -> None:
    assert exact_p_value(0, 0, 3, 0.01) == pytest.approx(0.99**3 + 0.001, abs=1e-6)
    assert exact_p_value(3, 0, 3, 0.01) == exact_p_value(1, 0, 100, 0.01) == exact_p_value(0, 0, 50, 0.0) == 1.0
    assert exact_p_value(0, 5, 5, 1.0) == 0.0
    for counts in ((-1, 0, 3), (2, 2, 3), (0, 0, 0)):
        with pytest.raises(ts.BadInput, match="parts of the pairs"):
            exact_p_value(*counts, 0.01)


def test_the_figures_of_a_real_set() -> None:
    """1,152 questions, one point: the prototype's p-values, which an enumeration bore out."""
    assert exact_p_value(7, 8, 1152, 0.01) == pytest.approx(0.004, abs=0.0005)
    assert exact_p_value(7, 5, 1152, 0.01) == pytest.approx(0.012, abs=0.0005)
    assert exact_p_value(22, 7, 1152, 0.02) == pytest.approx(0.0857, abs=0.0005)


# -- surplus, thresholds, design effect ----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "one_point", "two_points"), [(384, 0, 2), (768, 2, 8), (1152, 5, 14), (2000, 12, 29)])
def test_the_largest_surplus(n: int, one_point: int, two_points: int) -> None:
    assert (largest_surplus(n, 0.01), largest_surplus(n, 0.02)) == (one_point, two_points)


@pytest.mark.parametrize("n", [30, 100, 384, 1152])
def test_no_table_beyond_the_largest_surplus_is_certified(n: int) -> None:
    """So the rule that ends a run early forbids nothing that the p-value alone would allow."""
    surplus = largest_surplus(n, 0.02)
    for wins in range(max(0, -surplus - 1), 30):
        if 0 <= (losses := surplus + 1 + wins) <= n - wins:
            assert exact_p_value(losses, wins, n, 0.02) > 0.05


def test_too_few_examples_certify_nothing() -> None:
    assert largest_surplus(3, 0.01) <= -3
    assert exact_p_value(0, least_examples(0.01) * 0, least_examples(0.01), 0.01) <= 0.05
    assert exact_p_value(0, 0, least_examples(0.01) - 1, 0.01) > 0.05
    assert least_examples(0.01) == 301


def test_thresholds_come_from_ids_alone() -> None:
    first = uniforms(["a", "b", "c"])
    assert (first >= 0).all()
    assert (first < 1).all()
    assert first[[2, 0]].tolist() == uniforms(["c", "a"]).tolist()
    many = uniforms(str(number) for number in range(20_000))
    assert np.histogram(many, 10, (0, 1))[0] == pytest.approx(2000, abs=200)


def test_rounding_keeps_means_and_changes_no_score_of_0_and_1() -> None:
    rng = np.random.default_rng(0)
    limits = uniforms(str(number) for number in range(50_000))
    full = rng.choice([0.3, 0.6, 0.9, 1.0], len(limits))
    reduced = np.clip(full - rng.choice([0.0, 0.0, 0.3, -0.1], len(limits)), 0, 1)
    step = judge(full, reduced, 0.5, thresholds=limits)
    assert step.losses is not None
    assert step.wins is not None
    assert (step.losses - step.wins) / len(limits) == pytest.approx((full - reduced).mean(), abs=0.005)
    whole, still = rng.integers(0, 2, 500), rng.integers(0, 2, 500)
    given = judge(whole, still, 0.1, thresholds=limits[:500])
    assert given == judge(whole, still, 0.1)
    assert (given.losses, given.wins) == (int((whole > still).sum()), int((still > whole).sum()))


@pytest.mark.parametrize("scores", [[1.2, 0, 0], [math.nan, 0, 0], [-0.1, 0, 0], [[1, 0, 0]], [1, 0]])
def test_scores_that_no_metric_gives_are_refused(scores: Any) -> None:
    with pytest.raises(ts.BadInput, match=r"one score in \[0, 1\]"):
        judge([1.0, 1.0, 0.0], scores, 0.01)


def test_questions_that_go_together_count_for_less() -> None:
    images = np.repeat(np.arange(400), 3)
    full, together, apart = np.ones(1200), np.ones(1200), np.ones(1200)
    together[:6] = 0  # two images, all three questions of each
    apart[::200] = 0  # six images, one question of each
    alone, clustered = (judge(full, scores, 0.02, groups=images.tolist()) for scores in (apart, together))
    assert alone.design_effect == 1.0
    assert clustered.design_effect == pytest.approx(3.0, abs=0.02)
    assert (alone.losses, clustered.losses) == (6, 6)
    assert alone.p_value == exact_p_value(6, 0, 1200, 0.02)
    assert clustered.p_value == exact_p_value(2, 0, int(1200 / clustered.design_effect), 0.02)
    assert alone.p_value < clustered.p_value


# -- certificates --------------------------------------------------------------------------------------------


class Answers:
    """An evaluator that says which examples are right under each schedule of a path, and stops early as
    `thinsight.Evaluator` does."""

    num_layers, num_vision_tokens = LAYERS, N

    def __init__(self, full: Sequence[float], by_schedule: dict[Schedule, Sequence[float]], images: int = 1) -> None:
        self.table = {schedule: np.array(scores, dtype=float) for schedule, scores in by_schedule.items()}
        scores = np.array(full, dtype=float)
        self.full = Evaluation(float(scores.mean()), scores)
        self.examples = [example(number, number // images) for number in range(len(scores))]
        self.ran: list[Schedule] = []

    def __call__(self, schedule: Schedule) -> Evaluation:
        self.ran.append(schedule)
        return Evaluation(float(self.table[schedule].mean()), self.table[schedule])


class Stopping(Answers):
    def at_least(self, schedule: Schedule, floor: float) -> Evaluation:
        whole = self(schedule)
        return whole if whole.score >= floor else Evaluation((whole.score + floor) / 2, complete=False)


def example(number: int, image: int, folder: str = "b") -> Example:
    picture = Image.new("RGB", (2, 2), (image % 256, image // 256, len(folder)))
    return Example(f"{folder}-{number}", (picture,), "What?", ("this",), group=f"{folder}{image}")


PATH = [Schedule.step(LAYERS, 2, rate) for rate in (0.5, 0.25, 0.125, 0.0625)]


def answers(losses: Sequence[int], wins: Sequence[int], n: int = 1152, kind: type[Answers] = Answers) -> Answers:
    """Under each schedule of the path so many examples lost and won; 90 % right under the full model."""
    full = np.ones(n)
    full[-n // 10 :] = 0
    table = {}
    for place, schedule in enumerate(PATH[: len(losses)]):
        scores = full.copy()
        scores[: losses[place]] = 0
        scores[n - wins[place] :] = 1
        table[schedule] = scores
    return kind(full, table)


def test_the_last_one_before_a_failure_is_certified() -> None:
    evaluator = answers([0, 7, 22, 0], [0, 8, 7, 20])
    certificate = ts.certify(PATH, evaluator, 0.01)
    assert certificate.schedule == PATH[1]
    assert evaluator.ran == PATH[:3]  # nothing behind a failure is even run, though it would pass
    assert (certificate.n, certificate.losses, certificate.wins, certificate.place) == (1152, 7, 8, 1)
    assert certificate.p_value == exact_p_value(7, 8, 1152, 0.01)
    assert [step.certified for step in certificate.steps] == [True, True, False]
    assert (certificate.max_drop, certificate.confidence, certificate.images) == (0.01, 0.95, 1152)
    assert certificate.drop == pytest.approx(-1 / 1152)
    assert certificate.reason == (
        "not certified at 1 point: 22 losses and 7 wins in 1,152 examples; this schedule loses 1.3"
    )
    assert certificate.needed is None


def test_a_whole_path_may_be_certified() -> None:
    certificate = ts.certify(PATH, answers([0, 1, 1, 2], [1, 1, 1, 2]), 0.01)
    assert certificate.schedule == PATH[-1]
    assert (certificate.reason, certificate.failed, certificate.needed) == ("", None, None)


def test_the_full_model_remains_where_the_first_one_fails() -> None:
    certificate = ts.certify(PATH, answers([11, 0], [6, 0]), 0.01)
    assert certificate.schedule is None
    assert certificate.place is None
    assert (certificate.losses, certificate.wins, certificate.p_value, certificate.drop) == (0, 0, None, 0.0)
    assert certificate.needed == pytest.approx(3300, rel=0.15)
    assert certificate.reason.startswith("not certified at 1 point: 11 losses and 6 wins in 1,152 examples: about 3,")
    assert "the full model" in repr(certificate)


@pytest.mark.parametrize("n", [3, 20, 299])
def test_so_few_examples_certify_nothing_even_where_nothing_changes(n: int) -> None:
    certificate = ts.certify(PATH[:1], answers([0], [0], n), 0.01)
    assert certificate.schedule is None
    assert certificate.reason.startswith(f"not certified at 1 point: 0 losses and 0 wins in {n} examples: about ")
    assert certificate.needed is not None
    assert certificate.needed > n


@pytest.mark.parametrize("scores", [0.0, 1.0])
def test_a_full_model_that_is_always_wrong_or_always_right(scores: float) -> None:
    evaluator = Answers(np.full(400, scores), {PATH[0]: np.full(400, scores)})
    assert ts.certify(PATH[:1], evaluator, 0.01).schedule == PATH[0]


def test_early_stops_change_no_outcome() -> None:
    rng = np.random.default_rng(1)
    stopped = 0
    for _ in range(60):
        n, max_drop = int(rng.integers(100, 900)), float(rng.choice([0.01, 0.02, 0.05]))
        losses = np.sort(rng.integers(0, n // 20, 3)).tolist()
        wins = rng.integers(0, n // 40, 3).tolist()
        whole = ts.certify(PATH[:3], answers(losses, wins, n, Stopping), max_drop, early=False)
        early = ts.certify(PATH[:3], answers(losses, wins, n, Stopping), max_drop)
        assert (early.schedule, early.p_value) == (whole.schedule, whole.p_value)
        assert [step.certified for step in early.steps] == [step.certified for step in whole.steps]
        if early.failed is not None and not early.failed.complete:
            stopped += 1
            assert "stopped as soon as" in early.reason
            assert (early.needed, early.failed.losses) == (None, None)
    assert stopped > 10


def test_a_score_between_is_tested_by_thresholds() -> None:
    """The same for every schedule, and not by the mean alone."""
    full = np.full(600, 0.9)
    evaluator = Answers(full, {PATH[0]: full, PATH[1]: full - 0.3})
    certificate = ts.certify(PATH[:2], evaluator, 0.02)
    assert certificate.schedule == PATH[0]
    assert (certificate.losses, certificate.wins) == (0, 0)
    assert certificate.failed is not None
    assert certificate.failed.losses == pytest.approx(180, abs=40)


def test_one_question_per_image() -> None:
    full = np.ones(3000)
    scores = full.copy()
    scores[:30] = 0  # all three questions of ten images
    evaluator = Answers(full, {PATH[0]: scores}, images=3)
    strict = ts.certify(PATH[:1], evaluator, 0.02, strict=True)
    assert (strict.n, strict.images, strict.losses or strict.steps[0].losses) == (1000, 1000, 10)
    assert strict.steps[0].design_effect == 1.0
    loose = ts.certify(PATH[:1], evaluator, 0.02)
    assert (loose.n, loose.images, loose.steps[0].losses) == (3000, 1000, 30)
    assert loose.steps[0].design_effect == pytest.approx(3.0, abs=0.05)
    again = ts.certify(PATH[:1], evaluator, 0.02, strict=True)
    assert again == strict


def test_an_oracle_without_examples() -> None:
    """Each of its scores is an example of its own, and its full scores are asked for."""

    class Oracle:
        num_layers, num_vision_tokens, full_score = LAYERS, N, 1.0

        def __call__(self, schedule: Schedule) -> Evaluation:
            return Evaluation(1.0, np.ones(400))

    certificate = ts.certify(PATH, Oracle(), 0.01)
    assert (certificate.schedule, certificate.n, certificate.images) == (PATH[-1], 400, 400)


def test_reductions_are_run_as_they_are() -> None:
    seen = []

    class Recording(Answers):
        def __call__(self, schedule: Any) -> Evaluation:
            seen.append(schedule)
            return super().__call__(schedule.schedule)

    path = [Reduction(PATH[0], "text-attention"), Reduction(PATH[1], "divprune")]
    evaluator = Recording(np.ones(400), {each: np.ones(400) for each in PATH})
    certificate = ts.certify(path, evaluator, 0.01)
    assert seen == path
    assert certificate.place == 1


def test_an_interrupted_run_goes_on_where_it_was() -> None:
    whole = ts.certify(PATH, answers([0, 7, 22, 0], [0, 8, 7, 20]), 0.01)
    told: list[tuple[Step, int, int]] = []
    evaluator = answers([0, 7, 22, 0], [0, 8, 7, 20])
    rest = ts.certify(PATH, evaluator, 0.01, known=whole.steps[:1], on_step=lambda *each: told.append(each))
    assert rest == whole
    assert evaluator.ran == PATH[1:3]
    assert told == [(whole.steps[1], 1, 4), (whole.steps[2], 2, 4)]
    evaluator.ran.clear()
    assert ts.certify(PATH, evaluator, 0.01, known=whole.steps) == whole
    assert evaluator.ran == []


def test_several_at_the_same_time_certify_the_same() -> None:
    """What was run beside the one that failed is not looked at."""
    evaluator = answers([0, 7, 22, 0], [0, 8, 7, 20])
    evaluator.at_once = 3  # type: ignore[attr-defined]
    assert ts.certify(PATH, evaluator, 0.01) == ts.certify(PATH, answers([0, 7, 22, 0], [0, 8, 7, 20]), 0.01)
    assert evaluator.ran == PATH[:3]
    evaluator.at_once = 2  # type: ignore[attr-defined]
    evaluator.ran.clear()
    assert ts.certify(PATH, evaluator, 0.01).schedule == PATH[1]
    assert evaluator.ran == PATH


def test_a_set_that_was_used_before_says_so() -> None:
    evaluator = answers([0], [0])
    first = ts.certify(PATH[:1], evaluator, 0.01)
    again = ts.certify(PATH[:1], evaluator, 0.02, used={first.fingerprint})
    assert (first.used_before, again.used_before) == (False, True)
    assert first.fingerprint == fingerprint_of(evaluator.examples) == fingerprint_of(evaluator.examples[::-1])
    assert fingerprint_of(evaluator.examples[1:]) != first.fingerprint


@pytest.mark.parametrize("max_drop", [0, 0.0, -0.01, math.nan, "1", None, 1.5, True])
def test_what_cannot_be_promised_is_refused_before_anything_runs(max_drop: Any) -> None:
    evaluator = answers([0], [0])
    with pytest.raises(ts.BadInput, match="max_drop is"):
        ts.certify(PATH[:1], evaluator, max_drop)
    assert evaluator.ran == []


def test_nothing_lost_at_all_is_explained() -> None:
    with pytest.raises(ts.BadInput, match="no number of examples can show that nothing at all is lost"):
        ts.certify(PATH[:1], answers([0], [0]), 0)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ([], "path is"),
        ([0.5], "path is"),
        ([PATH[1], PATH[0]], "costly schedules first"),
        ([PATH[0], PATH[0]], "costly schedules first"),
        ([PATH[0], Schedule.full(3)], "several depths"),
    ],
)
def test_bad_paths(path: Any, named: str) -> None:
    with pytest.raises(ts.BadInput, match=named):
        ts.certify(path, answers([0, 0], [0, 0]), 0.01)


def test_scores_per_example_are_needed() -> None:
    class Blind(Answers):
        def __call__(self, schedule: Schedule) -> Evaluation:
            return Evaluation(1.0)

    with pytest.raises(ts.BadInput, match="no score for each example"):
        ts.certify(PATH[:1], Blind(np.ones(10), {}), 0.01)


# -- stored --------------------------------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    certificate = ts.certify(PATH, answers([0, 7, 22, 0], [0, 8, 7, 20]), 0.01, strict=True)
    written: dict[str, Any] = parse_json(json.dumps(certificate.to_dict()))
    return written


@pytest.mark.parametrize("kind", [Answers, Stopping])
def test_a_certificate_comes_back_as_it_was(kind: type[Answers]) -> None:
    certificate = ts.certify(PATH, answers([0, 7, 40, 0], [0, 8, 0, 20], kind=kind), 0.01)
    back = ts.Certificate.from_dict(parse_json(json.dumps(certificate.to_dict())))
    assert back == certificate
    assert hash(back) == hash(certificate)
    assert back.reason == certificate.reason


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 0}, "images"),
        ({"n": "1152"}, "expected a whole number"),
        ({"images": 2000}, "images"),
        ({"max_drop": 0.0}, "outside of its range"),
        ({"confidence": 1.0}, "outside of its range"),
        ({"full_score": 1.5}, "outside of its range"),
        ({"extra": 1}, "unknown key"),
        ({"path": [[0.5] * 8]}, "more steps than schedules"),
        ({"path": [[0.5] * 8, [0.5] * 7, [0.2] * 8]}, "several depths"),
        ({"path": [[2.0] * 8] * 4}, "keep_rates"),
        ({"strict": 1}, "expected true or false"),
        ({"confidence": 0.99999}, "certified with p"),
    ],
)
def test_a_damaged_certificate_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ts.ThinsightError, match=named):
        ts.Certificate.from_dict({**stored(), **change})


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        (0, {"certified": False}, "behind one that failed"),
        (1, {"losses": -1}, "losses"),
        (1, {"losses": 1152}, "losses"),
        (1, {"losses": None}, "no results"),
        (1, {"p_value": 0.2}, "certified with p"),
        (1, {"p_value": 1.2}, "p 1.2"),
        (1, {"p_value": True}, "expected a finite number"),
        (2, {"complete": False}, "was stopped has results"),
        (2, {"design_effect": 0.5}, "outside of its range"),
        (2, {"score": 1.1}, "outside of its range"),
    ],
)
def test_a_damaged_step_is_refused(place: int, change: dict[str, Any], named: str) -> None:
    written = stored()
    written["steps"][place] |= change
    with pytest.raises(ts.ThinsightError, match=named):
        ts.Certificate.from_dict(written)
    with pytest.raises(ts.ThinsightError, match="must be an object"):
        ts.Certificate.from_dict([written])


def test_a_reduction_carries_its_certificate(tmp_path: Path) -> None:
    certificate = ts.certify(PATH, answers([0, 7, 22, 0], [0, 8, 7, 20]), 0.01)
    reduction = Reduction(PATH[1], certificate=certificate)
    reduction.save_pretrained(tmp_path)
    back = Reduction.from_pretrained(tmp_path)
    assert back == reduction
    assert back.certificate == certificate
    assert "certified" in repr(back)
    assert "certificate" not in Reduction(PATH[1]).to_dict()
    nothing = ts.certify(PATH, answers([11, 0], [6, 0]), 0.01)
    assert Reduction(Schedule.full(LAYERS), certificate=nothing).certificate == nothing
    for given, named in ((certificate.to_dict(), "pass what thinsight.certify"), (nothing, "promises nothing but")):
        with pytest.raises(ts.BadInput, match=named):
            Reduction(PATH[1], certificate=given)  # type: ignore[arg-type]
    written = reduction.to_dict()
    written["certificate"]["steps"][1]["p_value"] = 0.5
    with pytest.raises(ts.ThinsightError, match=r"reduction_config\.json: certificate: a step is certified with p 0.5"):
        Reduction.from_dict(written)


# -- how much data -------------------------------------------------------------------------------------------


def test_how_many_examples_it_takes() -> None:
    """The figures of the simulation that the formula was fitted to: within a fifth, and never too few."""
    for agreement, found in ((0.99, 920), (0.98, 1540), (0.995, 610), (0.95, 3400)):
        assert examples_needed(0.01, agreement) == pytest.approx(found, rel=0.01)
    assert examples_needed(0.01, 1.0) == 300
    assert examples_needed(0.01, 0.98, 0.01) is None
    assert examples_needed(0.01, 0.98, 0.005) > 3 * examples_needed(0.01, 0.98)  # type: ignore[operator]
    assert examples_needed(0.01, 0.98, confidence=0.99) > examples_needed(0.01, 0.98)  # type: ignore[operator]


@pytest.mark.parametrize(("n", "agreement", "points"), [(384, 0.99, 1.56), (1152, 0.98, 1.10), (5000, 0.97, 0.63)])
def test_what_so_many_examples_certify(n: int, agreement: float, points: float) -> None:
    found = certifiable(n, agreement)
    assert 100 * found == pytest.approx(points, rel=0.15)
    needed = examples_needed(found * 1.0001, agreement)
    assert needed is not None
    assert needed <= n


# -- sets and paths ------------------------------------------------------------------------------------------


def test_images_are_on_one_side_only() -> None:
    examples = [example(number, number // 3) for number in range(300)]
    searched, rest = split_examples(examples)
    assert (len(searched), len(rest)) == (75, 225)
    check_disjoint(searched, rest)
    assert split_examples(examples[::-1])[0] == searched[::-1]
    with pytest.raises(ts.BadInput, match="1 of 226 examples to certify on share an image"):
        check_disjoint(searched, [*rest, searched[0]])
    with pytest.raises(ts.BadInput, match="one image"):
        split_examples(examples[:3])
    with pytest.raises(ts.BadInput, match="share is"):
        split_examples(examples, 1.0)


def test_images_that_one_example_shows_together_stay_together() -> None:
    examples = [example(number, number) for number in range(40)]
    pairs = [
        replace(examples[i], id=f"pair {i}", images=(*examples[i].images, *examples[i + 1].images)) for i in (0, 1, 7)
    ]
    for share in (0.1, 0.25, 0.5, 0.9):
        check_disjoint(*split_examples([*examples, *pairs], share))
        check_disjoint(*split_examples([*pairs, *examples], share))


def spent(schedule: Schedule) -> float:
    return 1 + 9 * schedule.mean_keep_rate


def test_the_path_of_an_evaluator() -> None:
    evaluator = answers([0], [0])
    path = path_for(evaluator)
    assert path == lay_path(one_step(LAYERS, N), lambda schedule: schedule.mean_keep_rate, N, most=None)
    assert evaluator.ran == []
    found = SearchResult(PATH[1], Reduction(PATH[1]), (), "gsearch", 0.01, 1.0, 1.0, 0)
    through = path_for(evaluator, found)
    assert PATH[1] in through
    assert through[-1] == path[-1]
    assert path_for(evaluator, found, through=PATH)[-1] == PATH[-1]
    assert evaluator.ran == []


def test_a_path_falls_in_small_steps_and_begins_safely() -> None:
    path = lay_path(one_step(LAYERS, N), spent, N)
    costs = [spent(schedule) for schedule in path]
    assert len(path) <= 15
    assert 1.4 < spent(Schedule.full(LAYERS)) / costs[0] <= 2
    assert all(0 < 1 - cheap / costly <= 0.081 for costly, cheap in itertools.pairwise(costs))
    assert costs[-1] == spent(Schedule.step(LAYERS, 2, 1 / N))
    fine = lay_path(one_step(LAYERS, N), spent, N, most=None)
    costs = [spent(schedule) for schedule in fine]
    assert all(0 < 1 - cheap / costly <= 0.08 for costly, cheap in itertools.pairwise(costs))


def test_a_path_leads_through_what_a_search_took_with_steps_between() -> None:
    taken = [Schedule.step(LAYERS, 2, 0.25), Schedule.stages(LAYERS, {2: 0.25, 4: 0.0})]
    path = lay_path(taken, spent, N)
    costs = [spent(schedule) for schedule in path]
    assert path[-1] == taken[-1]
    assert any(abs(spent(taken[0]) / cost - 1) < 0.05 for cost in costs)
    assert all(0 < 1 - cheap / costly <= 0.08 for costly, cheap in itertools.pairwise(costs))
    assert ts.certify(path, Answers(np.ones(400), {each: np.ones(400) for each in path}), 0.01).schedule == path[-1]


def test_a_path_through_little_or_nothing() -> None:
    near = Schedule.step(LAYERS, 2, 0.9)
    path = lay_path([near, Schedule.full(LAYERS)], spent, N)
    assert path[-1] == near
    for schedules in ([], [Schedule.full(LAYERS)]):
        with pytest.raises(ts.BadInput, match="no schedule"):
            lay_path(schedules, spent, N)


def test_what_a_search_took() -> None:
    def trial(schedule: Schedule, accepted: bool = True, share: float = 1.0) -> Trial:
        return Trial(2, 0.5, 32, 1.0, True, accepted, schedule, share=share)

    trials = (trial(PATH[0]), trial(PATH[2], False), trial(PATH[1], share=0.25), trial(PATH[1]))
    found = SearchResult(PATH[1], Reduction(PATH[1]), trials, "gsearch", 0.01, 1.0, 1.0, 0)
    assert accepted(found) == [PATH[0], PATH[1]]


def test_the_best_of_each_band() -> None:
    scored = [(PATH[0], 0.9), (Schedule.step(LAYERS, 2, 0.51), 0.95), (PATH[1], 0.8)]
    assert best_of_bands(scored, spent) == [scored[1][0], PATH[1]]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Step(0.9, 1, 1, 0.004, 1.0, True), "1 loss, 1 win, p 0.004: certified"),
        (Step(0.9, 1200, 0, 0.4, 1.0, False), "1,200 losses, 0 wins, p 0.400: not certified"),
        (Step(0.9, None, None, None, 1.0, False, complete=False), "stopped: it could not be certified any more"),
    ],
)
def test_what_came_of_a_step_in_words(step: Step, said: str) -> None:
    assert step.told == said
