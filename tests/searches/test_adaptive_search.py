"""The adaptive search: spends by prompt where that helps, holds the budget on average, resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import SmoothOracle

from thinsight.budget import Budget, FlopsBudget, KeepBudget
from thinsight.errors import ThinsightError
from thinsight.evaluation.result import Evaluation
from thinsight.experimental.adaptive import STATISTIC, adaptive_search
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule
from thinsight.searches import sensitivity_search

L, N, EXAMPLES = 8, 32, 48


class PromptOracle(SmoothOracle):
    """Every example has an attention of its own; ``sign`` says whether flat ones need many tokens (1), peaked
    ones do (-1), or nobody needs any (0)."""

    def __init__(self, sign: int) -> None:
        super().__init__(N, L, [6.0] * N, [1.0] * EXAMPLES)
        self.concentrations = np.random.default_rng(0).permutation(EXAMPLES) / EXAMPLES
        place = {1: 1 - self.concentrations, -1: self.concentrations, 0: np.zeros(EXAMPLES)}[sign]
        self.needs = (4 + 24 * place) * (sign != 0)  # the best-ranked so many tokens are needed
        self.passes = 0

    def reduction(self, schedule: Schedule) -> Reduction:
        return Reduction(schedule, "uniform")

    def statistics(self, reduction: Reduction) -> np.ndarray:
        assert reduction.adaptive.statistic == STATISTIC
        self.passes += 1
        return self.concentrations

    def sample(self, schedule: Any, share: float) -> Evaluation:
        family = getattr(schedule, "adaptive", None)
        plain = getattr(schedule, "schedule", schedule)
        self.calls.append((family or plain, share))
        lost = []
        for value, need in list(zip(self.concentrations, self.needs, strict=True))[: round(share * EXAMPLES)]:
            own = plain if family is None else family.schedules[family.level(value)]
            lacking = np.clip(need - np.array(own.counts(N)), 0, None)
            lost.append(float(lacking[:6].mean()) / 4)
        probability = np.exp(-np.array(lost))
        return Evaluation(
            score=float((probability > 0.5).mean()), agreement=float(probability.mean()), share=share, cost=share
        )


def spent_on_average(oracle: PromptOracle, reduction: Reduction, budget: Budget) -> float:
    """What the calibration prompts cost, one by one."""
    family = reduction.adaptive
    return float(np.mean([budget.spent(family.schedules[family.level(v)]) for v in oracle.concentrations]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unit", ["keep", "flops"])
def test_it_spends_where_the_attention_says(sign: int, unit: str) -> None:
    budget: Budget = KeepBudget(L, N, 0.5)
    if unit == "flops":
        config = {
            "num_hidden_layers": L,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 160,
            "vocab_size": 100,
        }
        budget = FlopsBudget.ratio(config, 1.7, n_vision=N, n_text=10)
    oracle = PromptOracle(sign)
    found = adaptive_search(oracle, budget, n_trials=16)
    plain = sensitivity_search(oracle, budget, n_trials=16)
    assert found.evaluations <= 16
    assert oracle.passes == 1
    family = found.reduction.adaptive
    assert family is not None
    rates = [schedule.mean_keep_rate for schedule in family.schedules]
    assert rates == sorted(rates, reverse=sign == 1)
    assert found.agreement > plain.agreement + 0.02
    assert spent_on_average(oracle, found.reduction, budget) <= budget.limit * (1 + 1e-9)
    assert spent_on_average(oracle, found.reduction, budget) == pytest.approx(found.spent)
    assert found.spent > 0.97 * budget.limit
    assert found.schedule == family.mean() == found.reduction.schedule


def test_without_a_gain_the_plain_schedule_stays() -> None:
    found = adaptive_search(PromptOracle(0), KeepBudget(L, N, 0.5), n_trials=16)
    assert found.reduction.adaptive is None
    assert any(trial.why.startswith("spread") for trial in found.trials)


def test_statistics_that_are_all_alike_spread_nothing() -> None:
    oracle = PromptOracle(1)
    oracle.concentrations = np.full(EXAMPLES, 0.3)
    assert adaptive_search(oracle, KeepBudget(L, N, 0.5), n_trials=16).reduction.adaptive is None


def test_resumed_equals_straight(tmp_path: Path) -> None:
    class Stopped(PromptOracle):
        def sample(self, schedule: Any, share: float) -> Evaluation:
            if len(self.calls) >= 50:
                raise KeyboardInterrupt
            return super().sample(schedule, share)

    budget, journal = KeepBudget(L, N, 0.5), tmp_path / "study.jsonl"
    straight = adaptive_search(PromptOracle(1), budget, n_trials=16)
    assert len({(trial.schedule, trial.share) for trial in straight.trials}) > 50
    with pytest.raises(KeyboardInterrupt):
        adaptive_search(Stopped(1), budget, n_trials=16, study=journal)
    rest = PromptOracle(1)
    assert adaptive_search(rest, budget, n_trials=16, study=journal, resume=True) == straight
    again = PromptOracle(1)
    assert adaptive_search(again, budget, n_trials=16, study=journal, resume=True) == straight
    assert not again.calls


@pytest.mark.parametrize(
    ("evaluator", "trials", "words"),
    [
        (SmoothOracle(N, L, [6.0] * N, [1.0]), 16, "evaluator has no statistics"),
        (PromptOracle(1), 11, "n_trials is 11; it must be a whole number of at least 12"),
    ],
)
def test_bad_arguments(evaluator: Any, trials: int, words: str) -> None:
    with pytest.raises(ThinsightError, match=words):
        adaptive_search(evaluator, KeepBudget(L, N, 0.5), n_trials=trials)
