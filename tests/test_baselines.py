"""Each baseline has its paper's shape, and under a budget spends it to within one token per layer, never
more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinsight import baselines
from thinsight.baselines import BASELINES, get_baseline
from thinsight.budget import Budget, FlopsBudget, KeepBudget, LatencyModel, TimeBudget
from thinsight.errors import ThinsightError
from thinsight.ranking import get_ranker
from thinsight.reduction import Reduction
from thinsight.runtime.handle import check_rankable
from thinsight.schedule import Schedule

L = 12
CONFIG = {
    "num_hidden_layers": L,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 100,
}


def budget_of(schedule: Schedule, n_vision: int = 100, n_text: int = 20) -> FlopsBudget:
    return FlopsBudget.like(CONFIG, schedule, n_vision=n_vision, n_text=n_text)


def one_more_everywhere(schedule: Schedule, n: int) -> Schedule:
    """Every layer that is reduced at all keeps one token more."""
    return Schedule([min(1.0, (c + 1) / n) for c in schedule.counts(n)])


def assert_meets(budget: Budget, reduction: Reduction) -> None:
    for schedule in reduction.adaptive.schedules if reduction.adaptive else [reduction.schedule]:
        assert budget.spent(schedule) <= budget.limit * (1 + 1e-9)
        more = one_more_everywhere(schedule, budget.n_vision)
        assert more == schedule or budget.spent(more) > budget.limit
    assert reduction.average(budget.spent) <= budget.limit * (1 + 1e-9)


def statistics_of(layers: int, tokens: int = 80, seed: int = 0) -> np.ndarray:
    """Attention that is flat in early layers and peaked in late ones, as decoders have it."""
    draw = np.random.default_rng(seed).random((layers, tokens))
    return draw ** np.linspace(1, 8, layers)[:, None]


def least_rate(name: str, layers: int, scale_layers: bool) -> float:
    """The lowest mean keep rate of a method: what its layers above the first step cost."""

    def scaled(layer: int) -> int:
        return max(1, round(layer * layers / 32))

    full = {
        "fastv": scaled(2) if scale_layers else 2,
        "dart": scaled(2) if scale_layers else 2,
        "sparsevlm": scaled(2) if scale_layers else 2,
        "pyramiddrop": layers // 4,
        "fitprune": 1,
        "autoprune": 1,
    }
    return full.get(name, 0) / layers


@pytest.mark.parametrize("layers", [12, 14, 32])
@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125, 0.0625])
@pytest.mark.parametrize("scale_layers", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_each_method_meets_a_budget_or_refuses_it(name: str, scale_layers: bool, rate: float, layers: int) -> None:
    if name == "sparsevlm" and not scale_layers and layers < 16:
        pytest.skip("has no layer 15")
    budget = KeepBudget(layers, 64, rate)

    def make() -> Reduction:
        return get_baseline(name).make(budget, statistics=statistics_of(layers), scale_layers=scale_layers)

    if least_rate(name, layers, scale_layers) > rate:
        with pytest.raises(ThinsightError, match="cannot go below a mean keep rate"):
            make()
        return
    assert_meets(budget, make())


@pytest.mark.parametrize("name", BASELINES)
def test_each_method_meets_budgets_of_other_units(name: str) -> None:
    config = {**CONFIG, "num_hidden_layers": 32}
    latency = LatencyModel("cpu", "float32", 1, 0.01, (0.0, 50.0, 200.0), (0.001, 0.003, 0.02))
    for budget in (FlopsBudget.ratio(config, 2.0, n_vision=101, n_text=20), TimeBudget(latency, 32, 101, 20, 150.0)):
        assert_meets(budget, get_baseline(name).make(budget, statistics=statistics_of(32)))


@pytest.mark.parametrize("name", BASELINES)
def test_each_methods_ranker_can_rank_where_its_schedule_drops(name: str) -> None:
    budget = KeepBudget(32, 64, 0.25)
    reduction = get_baseline(name).make(budget, statistics=statistics_of(32))
    check_rankable(reduction.schedule, get_ranker(reduction.ranker))
    keep = reduction.ranker.get("keep", reduction.schedule.keep_rates[0])
    assert keep == reduction.schedule.keep_rates[0]  # what depends on the count is told the count


def test_the_registry_names_its_entries() -> None:
    assert [each.name for each in BASELINES.values()] == list(BASELINES)
    assert get_baseline("fastv").arxiv == "2403.06764"
    assert get_baseline("random").make(KeepBudget(8, 10, 0.5), seed=3).ranker == {"name": "random", "seed": 3}
    with pytest.raises(ThinsightError, match=r"baseline is 'fastw'; did you mean 'fastv'\? choose one of fastv, vtw,"):
        get_baseline("fastw")
    with pytest.raises(ThinsightError, match=r"FitPrune needs statistics=: attention_statistics"):
        get_baseline("fitprune").make(KeepBudget(8, 10, 0.5))


def test_the_documentation_has_a_row_for_each() -> None:
    text = (Path(__file__).parents[1] / "docs" / "baselines.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(BASELINES)
    for row, each in zip(rows, BASELINES.values(), strict=True):
        assert each.title in row
        assert each.arxiv in row


def test_sparsevlms_constants() -> None:
    schedule = baselines.sparsevlm(32).schedule
    assert schedule.counts(576) == (576,) * 2 + (300,) * 4 + (200,) * 9 + (110,) * 17
    assert baselines.sparsevlm(64).schedule.reductions(576) == {4: 300, 12: 200, 30: 110}
    assert baselines.sparsevlm(12).schedule.reductions(576) == {1: 300, 2: 200, 6: 110}
    counts = baselines.sparsevlm(budget=KeepBudget(32, 576, 0.25)).schedule.counts(576)
    assert counts[2] / counts[15] == pytest.approx(300 / 110, rel=0.02)
    assert counts[6] / counts[15] == pytest.approx(200 / 110, rel=0.02)


def test_layers_of_32_scale_with_the_depth() -> None:
    budget = KeepBudget(12, 64, 0.125)
    with pytest.raises(ThinsightError, match=r"FastV \(one step at layer 2\) cannot go below"):
        baselines.fastv(budget=budget)
    assert list(baselines.fastv(budget=budget, scale_layers=True).schedule.reductions(64)) == [1]
    deep = KeepBudget(48, 64, 0.25)
    assert list(baselines.dart(budget=deep, scale_layers=True).schedule.reductions(64)) == [3]
    assert list(baselines.dart(budget=deep).schedule.reductions(64)) == [2]
    assert baselines.fastv(budget=KeepBudget(32, 64, 0.25), scale_layers=True) == baselines.fastv(
        budget=KeepBudget(32, 64, 0.25)
    )


def test_methods_at_layer_0_keep_one_count_everywhere() -> None:
    budget = KeepBudget(12, 64, 0.125)
    for name in ("visionzip", "fastervlm", "vispruner", "divprune", "cdpruner", "random", "uniform"):
        assert get_baseline(name).make(budget).schedule.counts(64) == (8,) * 12
    assert baselines.downsample(budget=budget).schedule.counts(64) == (8,) * 12


def fitprune_counts(statistics: np.ndarray, threshold: float) -> list[int]:
    """The published rule: drop the least attended tokens as long as enough attention is left."""
    layers, tokens = statistics.shape
    counts, alive = [tokens], tokens
    for layer in range(layers - 1):
        total = statistics[layer].sum()
        order = sorted(range(tokens), key=lambda token: statistics[layer][token])
        drop, left = 0, total
        while drop < tokens and left - statistics[layer][order[drop]] >= (1 - threshold) * total - 1e-12:
            left -= statistics[layer][order[drop]]
            drop += 1
        alive = min(alive, tokens - drop)
        counts.append(alive)
    return counts


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125])
def test_fitprune_is_one_threshold_for_all_layers(rate: float) -> None:
    statistics, budget = statistics_of(12, 64), KeepBudget(12, 64, rate)
    found = baselines.fitprune(statistics, budget).schedule.counts(64)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = sum(fitprune_counts(statistics, middle)) <= rate * 12 * 64
        low, high = (low, middle) if fits else (middle, high)
    wanted = fitprune_counts(statistics, high)
    assert all(0 <= have - want <= 1 for have, want in zip(found, wanted, strict=True))
    assert len(set(found)) > 3


def test_fitprune_spends_a_budget_that_attention_does_not_ask_for() -> None:
    budget = KeepBudget(12, 64, 0.5)
    assert_meets(budget, baselines.fitprune([[1.0] * 8 + [0.0] * 56] * 12, budget))


def test_fitprune_does_not_care_for_order_and_scale_of_its_statistics() -> None:
    statistics, budget = statistics_of(12, 64), KeepBudget(12, 100, 0.3)
    shuffled = [np.random.default_rng(1).permutation(7 * layer).tolist() for layer in statistics]
    assert baselines.fitprune(shuffled, budget) == baselines.fitprune(statistics, budget)


def test_fastv_is_one_step() -> None:
    reduction = baselines.fastv(L)
    assert reduction.schedule == Schedule.step(L, 2, 0.5)
    assert reduction.ranker["name"] == "text-attention"
    assert reduction.ranker["queries"] == "last"


def test_vtw_withdraws_everything_at_half_depth() -> None:
    assert baselines.vtw(L).schedule.keep_rates == (1.0,) * 6 + (0.0,) * 6
    assert baselines.vtw(L, layer=4).schedule.keep_rates == (1.0,) * 4 + (0.0,) * 8


def test_pyramiddrop_is_a_staircase_with_the_papers_mean() -> None:
    schedule = baselines.pyramiddrop(32).schedule
    assert schedule.keep_rates == (1.0,) * 8 + (0.5,) * 8 + (0.25,) * 8 + (0.125,) * 8
    assert schedule.mean_keep_rate == pytest.approx(0.469, abs=5e-4)  # the paper's table 1


@pytest.mark.parametrize("layers", [32, 12])
def test_autoprune_gives_each_prompt_the_published_curve(layers: int) -> None:
    """The public code's rule, for some values of the mutual information."""
    budget, n = KeepBudget(layers, 5760, 0.25), 5760
    family = baselines.autoprune(budget=budget).adaptive
    assert family.layer == 2
    for summed in (-0.1, 0.0, 0.3, 1.0, 1.7, 2.5):  # bits over 32 heads
        schedule = family.schedules[family.level(summed / 32)]
        slope = round(min(0.4, max(0.4 - 0.2 * summed, 0)) / 0.05) * 0.05
        curve = [0.75 / (1 + math.exp(slope * (32 * i / layers - 14.9 - slope))) for i in range(1, layers - 1)]
        head = [1.0, 2.5 * 0.25]
        low, high = 0.0, 20.0
        for _ in range(100):
            scale = (low + high) / 2
            rates = head + [min(head[1], scale * rate) for rate in curve]
            low, high = (scale, high) if sum(rates) < 0.25 * layers else (low, scale)
        assert schedule.counts(n) == pytest.approx([rate * n for rate in rates], abs=3)


def test_random_and_uniform_keep_the_schedule() -> None:
    schedule = Schedule.step(L, 3, 0.3)
    assert baselines.random(schedule, seed=4).schedule == schedule
    assert baselines.random(schedule, seed=4).ranker == {"name": "random", "seed": 4}
    assert baselines.uniform(schedule).schedule == schedule
    assert baselines.uniform(schedule).ranker["name"] == "uniform"


@settings(max_examples=40, deadline=None)
@given(
    rates=st.lists(st.floats(0, 1), min_size=L - 4, max_size=L - 4),
    n_vision=st.integers(1, 300),
    n_text=st.integers(0, 50),
)
def test_budgets_hold_exactly(rates: list[float], n_vision: int, n_text: int) -> None:
    budget = budget_of(Schedule([1.0] * 4 + sorted(rates, reverse=True)), n_vision, n_text)
    for reduction in (
        baselines.fastv(budget=budget),
        baselines.vtw(budget=budget),
        baselines.pyramiddrop(budget=budget),
    ):
        assert_meets(budget, reduction)


def test_a_step_gets_its_own_cost_back() -> None:
    step = Schedule.step(L, 2, 0.37)
    assert baselines.fastv(budget=budget_of(step)).schedule == step


def test_ratio_budget() -> None:
    budget = FlopsBudget.ratio(CONFIG, 2.0, n_vision=100, n_text=20)
    assert budget.spent(Schedule.full(L)) == pytest.approx(2 * budget.flops)
    assert_meets(budget, baselines.fastv(budget=budget))


def test_a_ranker_can_be_replaced() -> None:
    assert baselines.fastv(L, ranker="vision-attention").ranker["name"] == "vision-attention"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: baselines.fastv(), "num_layers"),
        (lambda: baselines.fastv(5, budget=budget_of(Schedule.full(L))), "contradicts"),
        (lambda: baselines.fastv(budget=budget_of(Schedule.step(L, 0, 0.01))), "earlier layer"),
        (lambda: baselines.pyramiddrop(budget=budget_of(Schedule.step(L, 1, 0.0))), "earlier layer"),
        (lambda: FlopsBudget.ratio(CONFIG, 0.5, n_vision=10, n_text=3), "at least 1"),
        (lambda: baselines.random(), "either a schedule or budget="),
        (lambda: baselines.uniform(Schedule.full(L), budget=KeepBudget(L, 9, 0.5)), "either a schedule"),
        (lambda: baselines.fitprune([[1.0]] * 3, KeepBudget(L, 9, 0.5)), "3 layers, the budget's model"),
        (lambda: baselines.fitprune([[0.0]] * L, KeepBudget(L, 9, 0.5)), r"statistics\[0\] is no attention"),
        (lambda: baselines.fitprune([[-1.0, 3]] * L, KeepBudget(L, 9, 0.5)), "no attention"),
        (lambda: baselines.fitprune([[math.nan, 3]] * L, KeepBudget(L, 9, 0.5)), "no attention"),
        (lambda: baselines.fitprune([[]] * L, KeepBudget(L, 9, 0.5)), "no attention"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ThinsightError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
