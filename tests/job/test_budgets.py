"""The main job under a budget, and along a frontier, on a small model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_run import SmallRun

from thinsight import Reduction
from thinsight.budget import LatencyModel, TimeBudget
from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import load_examples
from thinsight.evaluation.prompts import PromptReader
from thinsight.job.options import ModelOptions, SearchOptions
from thinsight.job.pipeline import search_and_report
from thinsight.loading import load_model
from thinsight.report.data import load_report_data
from thinsight.schedule import Schedule
from thinsight.timing import profile


def options_for(small: SmallRun, out: Path, **changes: Any) -> SearchOptions:
    options = SearchOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=small.calibration,
        test_data=small.test,
        max_new_tokens=2,
        batch_size=4,
        n_trials=8,
        timing_runs=1,
        new_tokens=2,
        pictures=0,
        out=out,
    )
    return replace(options, **changes)


@pytest.mark.parametrize(
    ("method", "title"),
    [
        (None, "Sensitivity search"),
        ("adaptive", "Sensitivity search, adaptive"),
        ("psigmoid", "P-Sigmoid"),
        ("random", "Random search"),
    ],
)
def test_a_budget_is_held_saved_and_reported(small: SmallRun, tmp_path: Path, method: str | None, title: str) -> None:
    options = options_for(small, tmp_path / "run", budget=0.6, method=method, n_trials=12)
    outcome = search_and_report(options)
    saved = Reduction.from_pretrained(outcome.folder)
    assert saved.average(lambda each: sum(each.counts(16))) <= 0.6 * 16 * saved.schedule.num_layers
    assert saved.search["budget"] == {"unit": "keep", "limit": 0.6, "n_vision": 16}
    assert outcome.data.methods[1].name == title
    assert outcome.data.search.budget == "60 % mean keep rate"
    assert outcome.data.search.max_drop is None
    page = outcome.report.read_text()
    assert title in page
    assert "60 % mean keep rate" in page
    assert load_report_data(outcome.folder).trials == outcome.data.trials


def test_a_search_may_start_from_a_reduction(small: SmallRun, tmp_path: Path) -> None:
    """One for another depth."""
    Reduction(Schedule([1, 1, 0.9, 0.9, 0.2, 0.2])).save_pretrained(tmp_path / "start")
    start = str(tmp_path / "start")
    search_and_report(options_for(small, tmp_path / "run", budget=0.6, start=start))
    tried = [json.loads(line) for line in (tmp_path / "run" / "study.jsonl").read_text().splitlines()]
    assert tried[0]["settings"]["start"] == list(
        Schedule([1, 1, 0.9, 0.9, 0.2, 0.2]).resample(tried[0]["evaluator"]["num_layers"]).keep_rates
    )
    for changes, words in (
        ({"method": "random"}, "start is .*, which Random search does not take, but Sensitivity search"),
        ({"frontier": True}, "start is .*, which Frontier does not take"),
        ({"budget": None, "n_trials": None}, "start is .*, which G-Search does not take"),
        ({"start": str(tmp_path / "nothing")}, "there is no folder"),
    ):
        with pytest.raises(ThinsightError, match=words):
            options_for(small, tmp_path / "other", **{"budget": 0.6, "start": start, **changes}).check()


@pytest.mark.parametrize("ranker", ["auto", None])
def test_the_search_chooses_the_ranker(ranker: str | None, small: SmallRun, tmp_path: Path) -> None:
    options = options_for(small, tmp_path / "run", budget=0.6, ranker=ranker, n_trials=12)
    outcome = search_and_report(options)
    tried = [json.loads(line) for line in (outcome.folder / "study.jsonl").read_text().splitlines()[1:]]
    names = {line["ranker"]["name"] for line in tried if "ranker" in line}
    assert names == {"text-attention", "staged"}
    assert outcome.reduction.ranker["name"] in names


@pytest.mark.parametrize(
    "changes", [{"ranker": "uniform"}, {"ranker": {"name": "uniform"}, "frontier": True}, {"max_drop": 0.5}]
)
def test_a_named_ranker_and_searches_that_do_not_choose(
    changes: dict[str, Any], small: SmallRun, tmp_path: Path
) -> None:
    options = options_for(small, tmp_path / "run", **{"budget": None if "max_drop" in changes else 0.6, **changes})
    assert not options.chooses_ranker
    name = options.first_ranker if isinstance(options.first_ranker, str) else options.first_ranker["name"]
    assert name == ("text-attention" if "max_drop" in changes else "uniform")


def test_a_frontier_gives_every_cost_and_picks(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = search_and_report(options_for(small, tmp_path / "run", frontier=True, budget=0.55))
    rows = outcome.data.frontier
    kept = [row.mean_keep_rate for row in rows]
    assert kept == sorted(kept)
    [taken] = [row for row in rows if row.chosen]
    assert taken.keep_rates == outcome.reduction.schedule.keep_rates
    assert taken.mean_keep_rate <= 0.55
    assert taken.score == max(row.score for row in rows if row.mean_keep_rate <= 0.55)
    assert load_report_data(outcome.folder).frontier == rows
    assert "The frontier" in outcome.report.read_text()
    Console().print(outcome.data)
    assert "The frontier, on the calibration set" in capsys.readouterr().out
    begun = json.loads((outcome.folder / "study.jsonl").read_text().splitlines()[0])
    assert begun["settings"]["n_trials"] == 8


def test_a_frontier_picks_by_a_tolerance_and_names_no_solver(small: SmallRun, tmp_path: Path) -> None:
    options = options_for(small, tmp_path / "run", frontier=True, max_drop=1.0, n_trials=4)
    outcome = search_and_report(options)
    assert outcome.reduction.schedule.keep_rates == outcome.data.frontier[0].keep_rates  # the cheapest
    assert outcome.data.search is not None
    assert outcome.data.search.solver == ""


def test_a_latency_model_is_fitted_kept_and_used_again(small: SmallRun, tmp_path: Path) -> None:
    model, processor = load_model(small.model, device="cpu")
    latency = profile(model, PromptReader(model, processor).typical_batch(load_examples(small.calibration), 4), runs=1)
    assert (latency.batch, latency.device, latency.dtype) == (4, "cpu", "float32")
    assert list(latency.tokens) == sorted(latency.tokens)
    assert list(latency.seconds) == sorted(latency.seconds)
    assert latency.seconds[0] > 0
    options = options_for(small, tmp_path / "run", budget=1e6, budget_unit="ms", method="random")
    outcome = search_and_report(options)
    used = outcome.reduction.search["budget"]
    assert (used["unit"], used["limit"]) == ("ms", 1e6)
    again = search_and_report(replace(options, resume=True))
    assert again.reduction.search["budget"] == used
    stored = LatencyModel.from_dict(used["latency"])
    layers = outcome.reduction.schedule.num_layers
    assert TimeBudget(stored, layers, used["n_vision"], used["n_text"], 1e6).holds(outcome.reduction.schedule)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0.5, "max_drop": 0.1}, "max_drop and budget are both given"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": 0.5, "method": "gsearch"}, "'gsearch' needs max_drop"),
        ({"method": "psigmoid"}, "'psigmoid' needs a budget"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"ranker": "auto"}, "ranker 'auto' needs a budget"),
        ({"frontier": True, "budget_unit": "ms", "budget": 1.0}, "frontier has its own search"),
        ({"budget": 0.1, "ranker": "text-attention"}, "the budget is 0.1"),
    ],
)
def test_bad_options_are_named(small: SmallRun, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ThinsightError, match=words):
        search_and_report(options_for(small, tmp_path / "run", **changes))
