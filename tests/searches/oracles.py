"""Synthetic evaluators: schedules in, scores out, no model.

They know nothing about any search. An example is answered when, at every layer, the tokens that entered it
hold what the example needs there; the score is the share of examples answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from thinsight.evaluation.bounds import LossTest, random_order
from thinsight.evaluation.result import Evaluation
from thinsight.schedule import Schedule
from thinsight.searches import SearchEvaluator, StandIn


class NeedOracle(SearchEvaluator):
    """Each example needs at least so many top-ranked tokens at each layer: ``needs[example][layer]``.

    ``lost`` further examples are wrong whatever happens, as some are for any real model.
    """

    def __init__(self, n: int, needs: Sequence[Sequence[int]], lost: int = 0) -> None:
        self.num_vision_tokens = n
        self.num_layers = len(needs[0])
        self.needs = [tuple(need) for need in needs]
        self.lost = lost
        self.full_score = len(needs) / (len(needs) + lost)
        self.calls: list[Schedule] = []

    def score(self, counts: Sequence[int]) -> float:
        answered = sum(all(c >= k for c, k in zip(counts, need, strict=True)) for need in self.needs)
        return answered / (len(self.needs) + self.lost)

    def __call__(self, schedule: Schedule) -> Evaluation:
        self.calls.append(schedule)
        return Evaluation(score=self.score(schedule.counts(self.num_vision_tokens)), cost=schedule.mean_keep_rate)


class TokenOracle(NeedOracle):
    """The paper's assumption with real sets: one ranking per example, and nested essential sets.

    ``rankings[e]`` orders the tokens of example e, best first, alike in all layers. ``essential[e][layer]``
    are the tokens it needs there; a deep layer's set is contained in a shallow one's, but need not be a
    prefix of the ranking.
    """

    def __init__(
        self, n: int, rankings: Sequence[Sequence[int]], essential: Sequence[Sequence[frozenset[int]]], lost: int = 0
    ) -> None:
        super().__init__(n, [[0] * len(sets) for sets in essential], lost)
        self.rankings = rankings
        self.essential = essential

    def score(self, counts: Sequence[int]) -> float:
        answered = 0
        for ranking, sets in zip(self.rankings, self.essential, strict=True):
            answered += all(need <= set(ranking[:c]) for c, need in zip(counts, sets, strict=True))
        return answered / (len(self.rankings) + self.lost)


class StoppingOracle(NeedOracle):
    """Stops as soon as the examples left cannot lift the score to the floor, as a real evaluator does."""

    def at_least(self, schedule: Schedule, floor: float, **_: Any) -> Evaluation:
        self.calls.append(schedule)
        counts = schedule.counts(self.num_vision_tokens)
        total = len(self.needs) + self.lost
        best = len(self.needs)
        for seen, need in enumerate(self.needs, start=1):
            best -= not all(c >= k for c, k in zip(counts, need, strict=True))
            if best / total < floor:
                return Evaluation(score=best / total, complete=seen == len(self.needs), cost=seen / total)
        return Evaluation(score=best / total, cost=1.0)


class InterruptedOracle(StandIn):
    """Another oracle that is stopped by Ctrl-C after every ``every`` evaluations."""

    def __init__(self, inner: NeedOracle, every: int) -> None:
        super().__init__(inner)
        self.every = every
        self.left = every

    def __call__(self, schedule: Schedule) -> Evaluation:
        if self.left == 0:
            self.left = self.every
            raise KeyboardInterrupt
        self.left -= 1
        return self.inner(schedule)


class SeveralOracle(StandIn):
    """Another oracle, asked for ``at_once`` schedules at a time. They finish last one first, ``rounds`` keeps
    their number, and whatever the inner one raises goes on once the others are finished.
    """

    def __init__(self, inner: Any, at_once: int) -> None:
        super().__init__(inner)
        self.at_once = at_once
        self.rounds: list[int] = []

    def __call__(self, schedule: Schedule) -> Evaluation:
        self.rounds.append(1)
        return self.inner(schedule)

    def several(
        self,
        schedules: Sequence[Schedule],
        floor: float | None,
        done: Callable[[int, Evaluation], object],
        **early: Any,
    ) -> None:
        assert len(set(schedules)) == len(schedules) <= self.at_once
        self.rounds.append(len(schedules))
        failure: BaseException | None = None
        for place, schedule in reversed(list(enumerate(schedules))):
            try:
                if floor is None:
                    done(place, self.inner(schedule))
                else:
                    done(place, self.inner.at_least(schedule, floor, **early))
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure


def all_counts(n: int, num_layers: int, first_layer: int) -> Iterator[tuple[int, ...]]:
    """Every count vector that a schedule may have."""
    for tail in combinations_with_replacement(range(n, -1, -1), num_layers - first_layer):
        yield (n,) * first_layer + tail


class SmoothOracle(SearchEvaluator):
    """An evaluator with a smooth signal: example e loses ``weight[e]`` times the tokens that leave too soon.

    Token t (ranked, 0 the best of ``n``) is wanted up to layer ``leaves[t]``; each layer that it lacks before
    costs the answer's log-probability ``weight[e] / n``. An example is answered where the probability stays
    above a half. ``sample`` runs the first share of the examples.
    """

    samples = True

    def __init__(self, n: int, num_layers: int, leaves: Sequence[float], weights: Sequence[float]) -> None:
        self.num_vision_tokens, self.num_layers = n, num_layers
        self.leaves = np.asarray(leaves, dtype=float)
        self.weights = np.asarray(weights, dtype=float)
        self.full_score = 1.0
        self.full_cost = float(len(weights))
        self.calls: list[tuple[Schedule, float]] = []

    def lacking(self, schedule: Schedule) -> float:
        """Layers that tokens lack, per token."""
        counts = np.array(schedule.counts(self.num_vision_tokens))
        stays = np.array([(counts > token).sum() for token in range(self.num_vision_tokens)])
        return float(np.clip(self.leaves - stays, 0, None).mean())

    def sample(self, schedule: Schedule, share: float) -> Evaluation:
        self.calls.append((schedule, share))
        weights = self.weights[: max(1, round(share * len(self.weights)))]
        probability = np.exp(-weights * self.lacking(schedule))
        return Evaluation(
            score=float((probability > 0.5).mean()),
            agreement=float(probability.mean()),
            share=len(weights) / len(self.weights),
            cost=len(weights) * schedule.mean_keep_rate,
            full_score=1.0,
        )

    def __call__(self, schedule: Schedule) -> Evaluation:
        return self.sample(schedule, 1.0)


class DrawingOracle(NeedOracle):
    """Runs examples one by one in a random order, and stops by a confidence as the real evaluator does.

    Without one it stops as soon as it is certain, in a random order too. ``run`` counts the examples.
    """

    run = 0

    def at_least(self, schedule: Schedule, floor: float, confidence: float | None = None, seed: int = 0) -> Evaluation:
        self.calls.append(schedule)
        counts = schedule.counts(self.num_vision_tokens)
        total = len(self.needs)
        order = random_order(np.ones(total), [seed, hash(counts) % 2**32])
        allowed = (1 - floor) * total
        test = LossTest(np.ones(total), allowed, confidence or 0.5)
        lost = 0
        for seen, example in enumerate(order, start=1):
            loss = not all(c >= k for c, k in zip(counts, self.needs[example], strict=True))
            lost += loss
            self.run += 1
            doubtful = test.sees(float(loss)) and confidence is not None
            if (lost > allowed or doubtful) and seen < total:
                return Evaluation(score=min(floor, 1 - lost / total), complete=False, cost=seen / total)
        return Evaluation(score=1 - lost / total, cost=1.0)
