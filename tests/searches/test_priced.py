"""The priced search: a tolerance spent where a dropped token loses least per FLOP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles import NeedOracle, SmoothOracle

import thinsight as ts
from thinsight.errors import BadInput
from thinsight.searches.certify import path_for
from thinsight.searches.priced import cheapest_at, priced_search
from thinsight.searches.sensitivity import ExitModel

N, LAYERS, READ = 64, 12, 6


def read_until(layer: int) -> SmoothOracle:
    """A quarter of the tokens is wanted to the end, the others up to a layer; some examples are lost early."""
    leaves = [LAYERS] * (N // 4) + [layer] * (N - N // 4)
    return SmoothOracle(N, LAYERS, leaves, np.geomspace(0.01, 8.0, 160))


def test_it_keeps_in_shallow_layers_what_pays_in_deep_ones() -> None:
    few, half = N // 16, N // 2
    shallow = [N] * 4 + [few] * (LAYERS - 4)  # needs all for two layers more, then hardly any
    deep = [half] * LAYERS  # needs a half to the end
    oracle = NeedOracle(N, [*[[few] * LAYERS] * 18, shallow, deep])
    ours, theirs = priced_search(oracle, 0.05), ts.gsearch(oracle, 0.05)  # one of 20 may go
    for found in (ours, theirs):
        assert found.drop == pytest.approx(0.05)
        assert oracle(found.schedule).score == found.score
    assert theirs.schedule.counts(N) == (N, N, *[half] * (LAYERS - 2))  # who comes first takes the tolerance
    assert ours.schedule.keep_rates[3] == 1
    assert oracle.cost(ours.schedule) < 0.8 * oracle.cost(theirs.schedule)


def test_the_path_falls_in_cost_and_goes_on_behind_what_was_found() -> None:
    oracle = read_until(READ)
    found = priced_search(oracle, 0.05)
    path = path_for(oracle, found)
    costs = [oracle.cost(each) for each in path]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < oracle.cost(found.schedule)
    further = [trial.schedule for trial in found.trials if trial.why == "path" and not trial.accepted]
    assert path[-1] == min(further, key=oracle.cost)


def test_each_schedule_of_the_path_holds_its_cost() -> None:
    losses = np.array([[0.1, 0.2, 0.4], [0.0, 0.1, 0.3]])
    model, oracle = ExitModel(LAYERS, 2, (2, 8), (0.5, 0.25, 0.0), losses), NeedOracle(N, [[1] * LAYERS])
    for share in (0.9, 0.5, 0.2):
        schedule = cheapest_at(oracle, model, share)
        assert schedule is not None
        assert share - 1 / N <= schedule.mean_keep_rate <= share
        assert schedule.keep_rates[:2] == (1.0, 1.0)
    assert cheapest_at(oracle, model, 0.1) is None  # two layers of twelve keep all


def test_nothing_within_the_tolerance_leaves_the_full_model() -> None:
    oracle = NeedOracle(N, [[N] * LAYERS] * 4)  # the last token of the last layer is needed
    found = priced_search(oracle, 0.0)
    assert found.schedule.is_full
    assert found.drop == 0
    assert not any(trial.accepted for trial in found.trials if trial.why == "path")


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "study.jsonl"
    oracle = read_until(READ)
    whole = priced_search(oracle, 0.05, study=journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-3]))
    calls = len(oracle.calls)
    assert priced_search(oracle, 0.05, study=journal, resume=True).schedule == whole.schedule
    assert len(oracle.calls) - calls <= 4  # the lines that were lost, and the full model


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    oracle = read_until(READ)
    with pytest.raises(BadInput, match="max_drop is -1"):
        priced_search(oracle, -1)
    with pytest.raises(BadInput, match="first_layer is 12"):
        priced_search(oracle, 0.01, first_layer=LAYERS)
    assert not oracle.calls
