"""The path that a search lays, to be certified along."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles import NeedOracle

import thinsight as ts
from thinsight import Reduction, Schedule
from thinsight.searches.certify import path_for
from thinsight.searches.search import along, shared_layers


def result_of(evaluator: NeedOracle, schedule: Schedule) -> ts.SearchResult:
    found = ts.gsearch(evaluator, 0.0)
    return replace(found, trials=(), schedule=schedule, reduction=Reduction(schedule, search={"first_layer": 1}))


@pytest.fixture(scope="module")
def oracle() -> NeedOracle:
    return NeedOracle(64, [[64, 8, 8, 4]] * 4)


def test_a_path_goes_through_what_was_found_and_on(oracle: NeedOracle) -> None:
    found = Schedule([1, 0.1, 0.1, 0.05])
    path = path_for(oracle, result_of(oracle, found))
    costs = [oracle.cost(each) for each in path]
    assert costs == sorted(costs, reverse=True)
    assert found in path
    assert path[-1] == Schedule.step(4, 1, 1 / 64)
    assert shared_layers(along(Reduction(found), path)) == 1
    half = oracle.cost(found) ** 0.5
    ratios = np.divide(costs[1:], costs[:-1])
    early = ratios[: sum(cost > half for cost in costs) - 1]
    assert costs[0] >= 0.6
    assert early.max() < 0.92 <= ratios[len(early) + 1 :].max()  # longer steps, then short ones


def test_where_little_was_found_the_path_begins_before_it(oracle: NeedOracle) -> None:
    found = Schedule([1, 0.9, 0.7, 0.6])  # 1.25x
    path = path_for(oracle, result_of(oracle, found))
    first = oracle.cost(path[0])
    assert oracle.cost(found) < first
    assert first == pytest.approx(oracle.cost(found) ** 0.5, rel=0.02)


def test_a_search_that_found_nothing_still_has_a_path(oracle: NeedOracle) -> None:
    path = path_for(oracle, result_of(oracle, Schedule.full(4)))
    assert len(path) > 1
    assert not any(each.is_full for each in path)


def test_an_adaptive_reduction_is_all_of_its_path(oracle: NeedOracle) -> None:
    schedules = (Schedule([1, 1, 0.5, 0.5]), Schedule([1, 1, 0.25, 0.25]))
    adaptive = ts.Adaptive("concentration", 2, (0.5,), schedules, (0.5, 0.5))
    reduction = Reduction(adaptive.mean(), adaptive=adaptive)
    found = replace(result_of(oracle, adaptive.mean()), reduction=reduction)
    assert along(reduction, path_for(oracle, found)) == [reduction]
