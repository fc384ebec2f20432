"""Certified searches: a path of schedules, tested from costly to cheap on examples that had no part in laying it.

Learn then Test with a fixed sequence (Angelopoulos et al., arXiv 2110.01052), as Pareto Testing does it for
pruned Transformers (Laufer-Goldshtein et al., arXiv 2210.07913), with one exact paired test. Knows nothing about
models: it sees an evaluator, scores and numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..certificate import CLUSTERED, NUISANCE, Certificate, Step
from ..errors import BadInput
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..evaluation.bounds import check_confidence
from ..evaluation.result import Evaluation, design_effect
from ..reduction import Reduction
from ..schedule import Schedule, real
from .run import SearchResult

ON_THE_PATH = "path"  # why a trial was run: a search lays its own path
START, APART, MOST = 1.5, 0.08, 15  # of a path: first FLOPs ratio, largest gap, schedules
_TIE = 1e-9  # two statistics of equal tables differ by rounding
_GRID, _FINE = 64, 16  # nuisance values: over the whole interval, then around the worst
_WINDOW = 8.0  # standard deviations of the losses that are summed over


# -- the exact test ------------------------------------------------------------------------------------------


def exact_p_value(losses: int, wins: int, n: int, max_drop: float) -> float:
    """The p-value of "the true drop is at least ``max_drop``": of ``n`` pairs, ``losses`` lost and ``wins`` won.

    Exact at every n: the chance, under the worst share of wins there can be, of a table whose score statistic
    (Tango, Statistics in Medicine 17:891, 1998) is at most the one seen (Hsueh, Liu & Chen, Biometrics 57:478,
    2001; Sidik, Statistics in Medicine 22:265, 2003). The worst share is looked for up to its upper confidence
    limit of 99.9 % (Clopper & Pearson, Biometrika 26:404, 1934), and the 0.1 % are added (Berger & Boos 1994).

    Raises:
        ThinsightError: counts that cannot be.
    """
    from scipy.special import betaincinv

    if min(losses, wins) < 0 or not 1 <= n >= losses + wins:
        raise BadInput(f"{losses} losses and {wins} wins of {n} pairs: they must be parts of the pairs")
    if not 0 < max_drop < 1:
        return 1.0 if max_drop <= 0 else 0.0
    seen = float(_tango(np.array([float(losses)]), np.array([float(wins)]), n, max_drop)[0])
    if seen >= 0:
        return 1.0
    top = (1 - max_drop) / 2  # losses and wins together are at most all
    if wins < n:
        top = min(top, float(betaincinv(wins + 1, n - wins, 1 - NUISANCE)))
    region = _Region(seen, n, max_drop, top)
    coarse = np.concatenate([[0.0], np.geomspace(min(0.01 / n, top / 2), top, _GRID)])
    chances = region.chances(coarse)
    worst = int(chances.argmax())
    fine = np.linspace(coarse[max(0, worst - 1)], coarse[min(len(coarse) - 1, worst + 1)], _FINE)
    return min(1.0, float(max(chances.max(), region.chances(fine).max())) + NUISANCE)


def _tango(b: NDArray[np.float64], c: NDArray[np.float64], n: int, m: float) -> NDArray[np.float64]:
    """Tango's statistic of "drop = m" for b losses and c wins: below 0 where less was lost. Rises with b, falls
    with c."""
    linear = -b - c + (2 * n - b + c) * m
    won = (np.sqrt(linear**2 + 8 * n * c * m * (1 - m)) - linear) / (4 * n)  # likeliest share of wins
    found: NDArray[np.float64] = (b - c - n * m) / np.sqrt(np.maximum(n * (2 * won + m * (1 - m)), 1e-300))
    return found


class _Region:
    """All tables that speak at least as loudly for the schedule as the one seen."""

    def __init__(self, seen: float, n: int, max_drop: float, top: float) -> None:
        self.n, self.max_drop = n, max_drop
        mean = n * (top + max_drop)
        most = min(n, int(mean + _WINDOW * math.sqrt(mean) + 30))
        self.losses = np.arange(most + 1)
        self.least = self._least_wins(seen)  # (most + 1,): wins from which on a table belongs to it

    def _least_wins(self, seen: float) -> NDArray[np.int64]:
        losses, n = self.losses.astype(float), self.n
        low = np.full(len(losses), -1)  # does not belong
        high = n - self.losses + 1  # belongs, or is no table any more
        while (high - low > 1).any():
            middle = (low + high) // 2
            inside = _tango(losses, np.maximum(middle, 0).astype(float), n, self.max_drop) <= seen + _TIE
            moving = high - low > 1
            high, low = np.where(moving & inside, middle, high), np.where(moving & ~inside, middle, low)
        return high

    def chances(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The region's probability where wins have these shares and losses ``max_drop`` more, from above by at
        most 1e-12."""
        from scipy.special import betainc, gammaln

        lost = shares + self.max_drop
        mean = (self.n * lost)[:, None]
        near = np.abs(self.losses - mean) <= _WINDOW * np.sqrt(mean) + 30
        row, b = np.nonzero(near & (self.least <= self.n - self.losses))
        rest, least = self.n - b, self.least[b]
        p, q = lost[row], np.minimum(shares[row] / (1 - lost[row]), 1.0)
        log_choose = gammaln(self.n + 1) - gammaln(b + 1) - gammaln(rest + 1)
        of_losses = np.exp(log_choose + b * np.log(p) + rest * np.log1p(-p))
        of_wins = np.where(least == 0, 1.0, betainc(np.maximum(least, 1), rest - least + 1, q))
        total = np.bincount(row, weights=of_losses * of_wins, minlength=len(shares))
        return np.asarray(total, dtype=np.float64) + 1e-12


def largest_surplus(n: int, max_drop: float, confidence: float = 0.95) -> int:
    """By how much losses may outnumber wins among ``n`` examples that certify ``max_drop``; below 0: wins must
    outnumber losses; below ``-n``: no table certifies it.

    It is the most where nothing else changes. A schedule beyond it is not certified, whatever its p-value, so
    that its run may end as soon as it cannot come back below it.
    """

    def passes(surplus: int) -> bool:
        return exact_p_value(max(surplus, 0), max(-surplus, 0), n, max_drop) <= 1 - confidence

    low, high = -n - 1, math.ceil(n * max_drop)  # passes (or is no table), fails
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


# -- one schedule on one set ---------------------------------------------------------------------------------


def uniforms(ids: Iterable[str]) -> NDArray[np.float64]:
    """A number in [0, 1) for each example, from a hash of its id: the same in every run and for every schedule."""
    digests = (hashlib.sha256(f"thinsight {each}".encode(errors="surrogatepass")).digest() for each in ids)
    return np.array([(int.from_bytes(digest[:8], "big") >> 11) / 2**53 for digest in digests])


def judge(
    full: ArrayLike,
    reduced: ArrayLike,
    max_drop: float,
    *,
    confidence: float = 0.95,
    groups: Sequence[Hashable] | None = None,
    thresholds: ArrayLike | None = None,
    surplus: int | None = None,
) -> Step:
    """The test of one schedule on one set of examples.

    Scores that are neither 0 nor 1 are rounded, both of an example at its one threshold (coupled rounding):
    means stay what they are, and the test of shares is one of mean scores. Where questions of one image go
    together, losses, wins and examples are divided by the design effect (Rao & Scott, Biometrics 48:577, 1992),
    rounded against the schedule.

    Args:
        full: shape (examples,), the full model's scores, in [0, 1].
        reduced: shape (examples,), the schedule's.
        max_drop: the drop to be ruled out.
        confidence: with which it is.
        groups: one label per example, its image; None: each its own.
        thresholds: shape (examples,), see `uniforms`; None: 1/2, which is right for scores of 0 and 1.
        surplus: `largest_surplus`; None: computed.
    """
    f, r = np.asarray(full, dtype=np.float64), np.asarray(reduced, dtype=np.float64)
    for name, scores in (("full", f), ("reduced", r)):
        if scores.ndim != 1 or scores.shape != f.shape or not ((scores >= 0) & (scores <= 1)).all():
            raise BadInput(f"{name} needs one score in [0, 1] per example to be certified, got shape {scores.shape}")
    n = len(f)
    limits = 0.5 if thresholds is None else np.asarray(thresholds)
    right, still = limits < f, limits < r
    losses, wins = int((right & ~still).sum()), int((still & ~right).sum())
    effect = round(design_effect(right.astype(float) - still, groups), 9)
    scale = effect if effect > CLUSTERED else 1.0
    size = max(1, math.floor(n / scale))
    lost = min(size, math.ceil(losses / scale))
    p = exact_p_value(lost, min(size - lost, math.floor(wins / scale)), size, max_drop)
    allowed = largest_surplus(n, max_drop, confidence) if surplus is None else surplus
    within = float(f.mean() - r.mean()) < (allowed + 0.5) / n
    return Step(float(r.mean()), losses, wins, p, effect, certified=within and p <= 1 - confidence)


# -- the path ------------------------------------------------------------------------------------------------


def certify(
    path: Sequence[Schedule | Reduction],
    evaluator: Any,
    max_drop: float,
    confidence: float = 0.95,
    *,
    strict: bool = False,
    early: bool = True,
    used: Collection[str] = (),
    known: Sequence[Step] = (),
    on_step: Callable[[Step, int, int], None] | None = None,
) -> Certificate:
    """Test schedules from costly to cheap, and stop at the first that fails: the last one before it is certified.

    With probability ``confidence`` at least, the mean score of the certified schedule on data like the
    evaluator's is less than ``max_drop`` below the full model's. Testing in a fixed order and never going on
    behind a failure is what makes one test of each enough (arXiv 2110.01052, fixed sequence testing). What that
    takes: the path was laid without these examples, they are a fair and independent draw (of images) from what
    the model will see, and they serve one certificate. With metric "agreement" every changed answer is a loss,
    and no labels are needed.

    Args:
        path: schedules, or reductions where rankers differ, costly ones first: see `lay_path`.
        evaluator: what searches take, on examples that had no part in the path.
        max_drop: the largest drop that is promised, above 0, in the metric's own unit (0.01 is one point).
        confidence: of the promise.
        strict: test one question per image, so that nothing is assumed about questions of one image.
        early: end a schedule's run as soon as it cannot be certified any more. Changes no certificate.
        used: fingerprints (`fingerprint_of`) of examples that certificates were given on before.
        known: the first steps of an interrupted run of the same path on the same examples.
        on_step: called as ``on_step(step, place, schedules)`` after each test.

    Raises:
        ThinsightError: ``max_drop`` is not above 0; an empty path, or one that gets dearer; an evaluator without
            scores per example.
    """
    check_promise(max_drop, confidence)
    schedules = _checked(path)
    oracle = as_evaluator(evaluator)
    full = _scores(oracle.full, None)
    ids, groups = _names(oracle, len(full))
    rows = _one_each(ids, groups) if strict else np.arange(len(ids))
    thresholds = uniforms(ids)[rows]
    labels = [groups[row] for row in rows]
    surplus = largest_surplus(len(rows), max_drop, confidence)
    floor = float(full.mean()) - (surplus + 0.5) / len(full) if early and not strict else None
    steps = list(known)
    while len(steps) < len(schedules) and (not steps or steps[-1].certified):
        for evaluation in _run(oracle, path[len(steps) : len(steps) + max(1, oracle.at_once)], floor):
            if steps and not steps[-1].certified:
                break  # run beside the one that failed, and not looked at
            step = Step(evaluation.score, None, None, None, 1.0, certified=False, complete=False)
            if evaluation.complete:
                step = judge(
                    full[rows],
                    _scores(evaluation, len(full))[rows],
                    max_drop,
                    confidence=confidence,
                    groups=None if strict else labels,
                    thresholds=thresholds,
                    surplus=surplus,
                )
            steps.append(step)
            if on_step is not None:
                on_step(step, len(steps) - 1, len(schedules))
    fingerprint = fingerprint_of(oracle)
    return Certificate(
        path=schedules,
        steps=tuple(steps),
        n=len(rows),
        images=len(set(labels)),
        max_drop=float(max_drop),
        confidence=float(confidence),
        full_score=float(full[rows].mean()),
        fingerprint=fingerprint,
        strict=strict,
        used_before=fingerprint in used,
        metric=getattr(evaluator, "metric_names", ""),
    )


def check_promise(max_drop: Any, confidence: Any = 0.95) -> None:
    """Refuse what cannot be promised.

    Raises:
        ThinsightError: ``max_drop`` is not above 0 and at most 1, or ``confidence`` not between 0 and 1.
    """
    check_confidence(confidence)
    if confidence >= 1 - NUISANCE:
        raise BadInput(f"confidence is {confidence!r}; no p-value is below {NUISANCE}: give less than {1 - NUISANCE}")
    if real(max_drop) <= 0:
        raise BadInput(
            f"max_drop is {max_drop!r}, and no number of examples can show that nothing at all is lost: allow a "
            "little, such as 0.01, or search without a certificate (--no-certify, certify=False)"
        )
    if not real(max_drop) <= 1:
        raise BadInput(f"max_drop is {max_drop!r}; it must be a number above 0 and at most 1, such as 0.01")


def check_disjoint(searched: Sequence[Any], certifying: Sequence[Any]) -> None:
    """Refuse examples to certify on that share an image with those that were searched on.

    Args:
        searched: the examples on which the path is laid.
        certifying: those on which it is to be tested.

    Raises:
        ThinsightError: they do; with how many and one of them.
    """
    seen = {key for example in searched for key in example.image_keys}
    shared = [example for example in certifying if not seen.isdisjoint(example.image_keys)]
    if shared:
        raise BadInput(
            f"{len(shared)} of {len(certifying)} examples to certify on share an image with those searched on, "
            f"{shared[0].id!r} the first: a certificate needs images that the search has not seen"
        )


def split_examples(examples: Sequence[Any], share: float = 0.25) -> tuple[list[Any], list[Any]]:
    """Examples to search on, about ``share`` of the images, and the rest to certify on; no image is in both.

    Which is which goes by a hash of the examples' groups, the same on every machine.

    Raises:
        ThinsightError: a share outside of (0, 1), or too few images for two sets.
    """
    if not 0 < real(share) < 1:
        raise BadInput(f"share is {share!r}; it must be between 0 and 1, such as 0.25")
    joined: dict[str, str] = {}  # from one image to another one that goes into the same part

    def part(image: str) -> str:
        while joined.setdefault(image, image) != image:
            image = joined[image]
        return image

    for example in examples:
        for key in example.image_keys[1:]:
            joined[part(key)] = part(example.image_keys[0])
    names: dict[str, str] = {}  # per group of images, the least name that an example has for it
    for example in examples:
        group = part(example.image_keys[0])
        names[group] = min(names.get(group, example.group), example.group)
    if len(names) < 2:
        raise BadInput("the examples are about one image; a certificate needs images that the search has not seen")
    order = sorted(names, key=lambda group: hashlib.sha256(names[group].encode(errors="replace")).digest())
    chosen = {*order[: min(len(order) - 1, max(1, round(share * len(order))))]}
    parts: tuple[list[Any], list[Any]] = ([], [])
    for example in examples:
        parts[part(example.image_keys[0]) not in chosen].append(example)
    return parts


def fingerprint_of(evaluator: Any) -> str:
    """A hash of a set of examples (ids, images' names, questions, answers), whatever model or ranker runs them.

    Args:
        evaluator: an evaluator, or the examples themselves.
    """
    examples = evaluator if isinstance(evaluator, (list, tuple)) else getattr(evaluator, "examples", ())
    if not examples:  # an oracle's: by what it says
        return hashlib.sha256(str(getattr(evaluator, "fingerprint", "")).encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    for told in sorted(json.dumps([each.id, each.group, each.question, list(each.answers)]) for each in examples):
        digest.update(told.encode())
    return digest.hexdigest()[:16]


def _checked(path: Sequence[Schedule | Reduction]) -> tuple[Schedule, ...]:
    schedules = tuple(each.schedule if isinstance(each, Reduction) else each for each in path)
    if not schedules or not all(isinstance(each, Schedule) for each in schedules):
        raise BadInput(f"path is {path!r}; pass schedules or reductions, costly ones first")
    if len({each.num_layers for each in schedules}) > 1:
        raise BadInput("path holds schedules of several depths; pass schedules of one model")
    for costly, cheap in itertools.pairwise(schedules):
        if costly == cheap or all(a <= b for a, b in zip(costly.keep_rates, cheap.keep_rates, strict=True)):
            raise BadInput(f"path goes from {costly!r} to {cheap!r}; put costly schedules first")
    return schedules


def _scores(evaluation: Evaluation, count: int | None) -> NDArray[np.float64]:
    scores = evaluation.per_example
    if scores is None or (count is not None and len(scores) != count) or not np.isfinite(scores).all():
        raise BadInput("evaluator gives no score for each example, which a certificate is computed from")
    return scores


def _names(evaluator: SearchEvaluator, count: int) -> tuple[list[str], list[Hashable]]:
    """Ids and groups; each example its own where the evaluator does not tell."""
    if not evaluator.examples:
        return [str(number) for number in range(count)], list(range(count))
    return [example.id for example in evaluator.examples], [example.group for example in evaluator.examples]


def _one_each(ids: Sequence[str], groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """One example of each group, by a hash of the ids."""
    order = np.argsort(uniforms(f"one of {each}" for each in ids), kind="stable")
    first: dict[Hashable, int] = {}
    for row in order:
        first.setdefault(groups[row], int(row))
    return np.array(sorted(first.values()))


def _run(
    evaluator: SearchEvaluator, candidates: Sequence[Schedule | Reduction], floor: float | None
) -> list[Evaluation]:
    """Their evaluations in order, run at the same time where the evaluator can."""
    found: dict[int, Evaluation] = {}
    evaluator.several(candidates, floor, found.__setitem__)
    return [found[place] for place in range(len(candidates))]


# -- laying a path -------------------------------------------------------------------------------------------


def accepted(found: SearchResult) -> list[Schedule]:
    """What a search ran on all of its examples and took, costly ones first as G-Search finds them, and its
    result."""
    taken = [trial.schedule for trial in found.trials if trial.accepted and trial.complete and trial.share == 1]
    return list(dict.fromkeys([*taken, found.schedule]))


def spine_of(found: SearchResult) -> list[Schedule]:
    """What a search's path to certify along leads through: what it took, and on through what it tried behind that
    on a path of its own (``why`` "path"), if it has one."""
    tried = [trial.schedule for trial in found.trials if trial.why == ON_THE_PATH]
    return [*accepted(found), *(each for each in tried if each.mean_keep_rate < found.schedule.mean_keep_rate)]


def one_step(num_layers: int, n_vision: int, first_layer: int = 2) -> list[Schedule]:
    """All tokens before a layer and a number from there on, every number from ``n_vision`` - 1 down to 1. Made
    without looking at any data."""
    layer = min(first_layer, num_layers - 1)
    return [Schedule.step(num_layers, layer, count / n_vision) for count in range(n_vision - 1, 0, -1)]


def path_for(
    evaluator: Any, found: SearchResult | None = None, *, through: Sequence[Schedule] = (), first_layer: int = 2
) -> tuple[Schedule, ...]:
    """The path to certify along for an evaluator's model and prompts, none of whose answers are looked at.

    By default one step at ``first_layer``, or at the first behind it at which the ranker can rank, with ever fewer
    tokens. With ``found`` it leads through what that search took (or ``through`` these schedules) and then on, along
    the search's own path or one step at its first layer with fewer tokens still, so that a search whose examples were
    unlucky holds nothing up. How far each way of laying a path gets at the same promise is measured in
    benchmarks/results/coverage.md.

    Down to half of the way to what was found, where hardly any path ends and schedules take longest to run, steps are
    twice as long. Where that is less than 1.5x, the path begins there.

    Raises:
        ThinsightError: nothing costs less than the full model.
    """
    oracle = as_evaluator(evaluator)
    layers, n_vision = int(oracle.num_layers), int(oracle.num_vision_tokens)
    first_layer = max(first_layer, int(oracle.first_layer))
    spent = cache(oracle.cost if oracle.model is None else oracle.budget(1.0, "flops").spent)
    if found is None:
        return lay_path(one_step(layers, n_vision, first_layer), spent, n_vision, most=None)
    if found.reduction.adaptive is not None:  # there is nothing between two of them
        return (found.schedule,)
    spine = list(through) or spine_of(found)
    if not through and not any(trial.why == ON_THE_PATH for trial in found.trials):
        first = int((found.reduction.search or {}).get("first_layer", first_layer))
        spine += [step for step in one_step(layers, n_vision, first) if spent(step) < spent(found.schedule)]
    half = math.sqrt(spent(Schedule.full(layers)) / spent(found.schedule))
    path = lay_path(spine, spent, n_vision, start=max(1 + APART, half), most=None)
    if half <= START:  # little was found: a path that began where ours do might have passed it already
        return path
    early = lay_path(spine, spent, n_vision, apart=2 * APART, most=None)
    return (*(each for each in early if spent(each) > spent(path[0]) / (1 - APART)), *path)


def lay_path(
    schedules: Iterable[Schedule],
    spent: Callable[[Schedule], float],
    n_vision: int,
    *,
    start: float = START,
    apart: float = APART,
    most: int | None = MOST,
) -> tuple[Schedule, ...]:
    """A path to certify along: from costly to cheap through ``schedules``, no two neighbours far apart.

    Where the next schedule is more than ``apart`` cheaper than the last one, intermediates stand between, whose
    rates are geometric means of the two at every layer. It begins where the full model costs ``start`` times as
    much: a path without safe schedules ends before it has begun.

    Args:
        schedules: in any order, such as `accepted` or `one_step` give; those that cost as much as a cheaper-named
            one are left out.
        spent: what a schedule costs, such as FLOPs of the median prompt.
        n_vision: N, the tokens that rates are told in.
        start: the full model's cost over the first schedule's; the last schedule is in the path in any case.
        apart: largest share by which a schedule is cheaper than the one before.
        most: at most so many, further apart where that takes it; None: any number.

    Raises:
        ThinsightError: no schedules that cost less than the full model.
    """
    found = list(schedules)
    if not found:
        raise BadInput("there is no schedule to lay a path through; pass what a search accepted")
    cost = cache(spent)
    spine: list[Schedule] = []
    for schedule in sorted({Schedule.full(found[0].num_layers), *found}, key=cost, reverse=True):
        if not spine or cost(schedule) < cost(spine[-1]):
            spine.append(schedule)
    if len(spine) == 1:
        raise BadInput("no schedule costs less than the full model; there is nothing to certify")
    top, end = cost(spine[0]), cost(spine[-1])
    first = max(top / start, math.sqrt(top * end))  # of a short way, half
    while True:
        path = [_next(spine[0], first, spine, cost, n_vision)]
        while cost(path[-1]) > end and (most is None or len(path) <= most):
            path.append(_next(path[-1], (1 - apart) * cost(path[-1]), spine, cost, n_vision))
        if most is None or len(path) <= most:
            return tuple(path)
        apart = 1 - (1 - apart) * 0.98


def _next(
    last: Schedule, least: float, spine: Sequence[Schedule], cost: Callable[[Schedule], float], n_vision: int
) -> Schedule:
    """The cheapest schedule of the spine that costs less than the last one but at least so much; else one on the
    way to the next of the spine, or that one itself where no whole tokens lie between."""
    cheaper = [schedule for schedule in spine if cost(schedule) < cost(last)]
    within = [schedule for schedule in cheaper if cost(schedule) >= least]
    if within:
        return within[-1]
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        far = cost(_between(last, cheaper[0], middle, 0.5 / n_vision)) < least
        low, high = (low, middle) if far else (middle, high)
    found = _between(last, cheaper[0], low, 0.5 / n_vision)
    return found if cost(found) < cost(last) else cheaper[0]


def _between(costly: Schedule, cheap: Schedule, share: float, least: float) -> Schedule:
    pairs = zip(costly.keep_rates, cheap.keep_rates, strict=True)
    rates = (max(a, least) ** (1 - share) * max(b, least) ** share for a, b in pairs)
    return Schedule(list(itertools.accumulate((min(1.0, rate) for rate in rates), min)))


def best_of_bands(
    scored: Iterable[tuple[Schedule, float]], spent: Callable[[Schedule], float], band: float = APART
) -> list[Schedule]:
    """Of schedules with their scores, the best-scoring one in each band of costs, costly bands first; for
    several searches' schedules together."""
    best: dict[int, tuple[float, float, Schedule]] = {}
    for schedule, score in scored:
        cost = spent(schedule)
        place = math.floor(math.log(cost) / -math.log1p(-band))
        known = best.get(place)
        if known is None or (score, -cost) > known[:2]:
            best[place] = (score, -cost, schedule)
    return [best[place][2] for place in sorted(best, reverse=True)]
