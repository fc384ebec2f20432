"""The main job on a small model: what it leaves, at which cost it compares, and that an interruption loses
nothing."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import changes, failing_writes, full_disk
from small_run import SmallRun

from thinsight import Evaluator, Reduction, drop_interval, load_examples
from thinsight.errors import StorageError, ThinsightError
from thinsight.evaluation import full_model
from thinsight.evaluation.full_model import FullModel
from thinsight.job import pipeline
from thinsight.job.options import ModelOptions, SearchOptions
from thinsight.job.pipeline import SearchOutcome, search_and_report
from thinsight.loading import checkpoint_hash, load_model
from thinsight.progress import Watcher
from thinsight.report.data import load_report_data
from thinsight.searches import Search


def options_for(small: SmallRun, out: Path, **changes: Any) -> SearchOptions:
    options = SearchOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=small.calibration,
        test_data=small.test,
        max_drop=0.7,
        certify=False,
        max_new_tokens=2,
        batch_size=4,
        timing_runs=1,
        new_tokens=2,
        pictures=2,
        out=out,
    )
    return replace(options, **changes)


@pytest.fixture(scope="module")
def outcome(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> SearchOutcome:
    return search_and_report(options_for(small, tmp_path_factory.mktemp("out") / "run", command="the command"))


def test_the_folder_is_a_reduction_and_a_report(outcome: SearchOutcome, small: SmallRun) -> None:
    saved = Reduction.from_pretrained(outcome.folder)
    assert saved == outcome.reduction
    assert saved.base_model_name_or_path == "model"
    assert (saved.search or {})["checkpoint"] == checkpoint_hash(small.model)
    assert saved.model_type == "llava"
    assert not saved.schedule.is_full
    page = outcome.report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "G-Search" in page
    assert load_report_data(outcome.folder).keep_rates == saved.schedule.keep_rates
    assert (outcome.folder / "study.jsonl").exists()


def test_what_is_passed_on_says_nothing_of_this_machine(outcome: SearchOutcome, small: SmallRun) -> None:
    """The folder's other files are of the run, and are not pushed."""
    for name in ("README.md", "reduction_config.json"):
        text = (outcome.folder / name).read_text()
        assert str(small.folder) not in text
        assert not re.search(r"/(tmp|home|root|Users|private)/", text)
    assert 'from_pretrained("path/to/model")' in (outcome.folder / "README.md").read_text()
    assert (outcome.reduction.measured or {})["test"]["name"] == "test.jsonl"


def test_methods_stand_side_by_side_at_equal_cost(outcome: SearchOutcome) -> None:
    full, found, *rivals = outcome.data.methods
    assert [row.name for row in rivals] == ["FastV-like (one step at layer 2)", "Uniform", "Random"]
    assert (full.kind, found.kind) == ("full", "found")
    assert full.flops_ratio == 1.0
    assert found.flops_ratio > 1.0
    assert all(row.flops <= found.flops * (1 + 1e-12) for row in rivals)
    assert all(row.flops == found.flops for row in rivals[1:])
    steps = np.diff(rivals[0].keep_rates)
    assert np.flatnonzero(steps).tolist() == [1]  # one step, between layers 1 and 2


def test_scores_are_those_of_the_evaluator_on_the_test_set(outcome: SearchOutcome, small: SmallRun) -> None:
    model, processor = load_model(small.model, device="cpu")
    examples = load_examples(small.test)
    evaluator = Evaluator(model, processor, examples, max_new_tokens=2, batch_size=4)
    found = evaluator(outcome.reduction)
    headline = outcome.data.headline
    assert headline is not None
    assert headline.score == found.score
    assert headline.full_score == evaluator.full_score
    drop = drop_interval(evaluator.full.per_example, found.per_example, groups=[example.group for example in examples])
    assert headline.drop == drop


def test_what_was_measured_is_saved_with_the_reduction(outcome: SearchOutcome) -> None:
    measured, headline = outcome.reduction.measured, outcome.data.headline
    assert measured is not None
    assert headline is not None
    assert measured["score"] == headline.score
    assert measured["drop_interval_95"] == [headline.drop.low, headline.drop.high]
    assert measured["test"]["examples"] == 12
    assert measured["latency"]["device"] == "cpu"
    assert measured["flops_ratio"] == headline.flops_ratio
    assert outcome.reduction.search is not None
    assert outcome.reduction.search["evaluations"] == len(outcome.data.trials)


def test_every_section_of_the_report_has_its_data(outcome: SearchOutcome) -> None:
    data = outcome.data
    assert {row.task for row in data.per_task} == {"color", "count"}
    assert [row.what for row in data.timing] == ["prefill", "prefill with images", "whole answer (2 tokens)"]
    assert data.consistency is not None
    assert len(data.consistency.tau) == 3
    assert data.dataset is not None
    assert (data.dataset.calibration_size, data.dataset.test_size) == (16, 12)
    assert data.dataset.metric == "agreement"
    assert data.commands == ("the command",)
    assert data.environment["torch"] == torch.__version__


def test_pictures_show_what_was_kept(outcome: SearchOutcome) -> None:
    schedule = outcome.reduction.schedule
    assert len(outcome.data.pictures) == 2
    for picture in outcome.data.pictures:
        assert picture.grid == (4, 4)
        assert picture.layers == tuple(schedule.reductions(16))
        counts = schedule.counts(16)
        assert [len(kept) for kept in picture.kept] == [counts[layer] for layer in picture.layers]


def test_changed_answers_are_those_of_the_evaluator(outcome: SearchOutcome, small: SmallRun) -> None:
    model, processor = load_model(small.model, device="cpu")
    examples = load_examples(small.test)
    evaluator = Evaluator(model, processor, examples, max_new_tokens=2, batch_size=4)
    full, reduced = evaluator.full.per_example, evaluator(outcome.reduction).per_example
    assert full is not None
    assert reduced is not None
    changes = outcome.data.changes
    assert changes is not None
    assert (changes.examples, changes.better) == (12, 0)  # agreement with the full model is never gained
    assert changes.worse == len(changes.rows) == int((reduced < full).sum())
    assert changes.worse > 0
    said = dict(zip((each.id for each in examples), evaluator.predictions(outcome.reduction), strict=True))
    assert {row.id: row.answer_reduced for row in changes.rows} == {row.id: said[row.id] for row in changes.rows}
    assert all(row.answer_full != row.answer_reduced for row in changes.rows)
    assert [picture.outcome for picture in outcome.data.pictures] == ["worse"] * min(2, changes.worse) + ["same"] * max(
        0, 2 - changes.worse
    )


class Stop(Watcher):
    """Interrupts when a stage begins, or after so many trials of the search."""

    def __init__(self, stage: str = "", trials: int = 0) -> None:
        self.stage, self.trials = stage, trials

    def on_stage(self, title: str) -> None:
        if self.stage and title.startswith(self.stage):
            raise KeyboardInterrupt

    def on_trial(self, trial: Any, progress: Any) -> None:
        self.trials -= 1
        if self.trials == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [Stop(trials=3), Stop("Testing FastV"), Stop("Looking")])
def test_an_interrupted_run_continues_to_the_same_result(
    stop: Stop, outcome: SearchOutcome, small: SmallRun, tmp_path: Path
) -> None:
    options = options_for(small, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        search_and_report(options, stop)
    resumed = search_and_report(replace(options, resume=True))
    assert resumed.reduction.schedule == outcome.reduction.schedule
    assert resumed.data.methods == outcome.data.methods
    assert resumed.data.consistency == outcome.data.consistency


def test_resuming_runs_no_stage_again(outcome: SearchOutcome, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this stage was done already")

    for room, name in ((Search, "__call__"), (pipeline, "measure"), (pipeline, "rank_consistency")):
        monkeypatch.setattr(room, name, refuse)
    monkeypatch.setattr(Evaluator, "_decode", refuse)
    monkeypatch.setattr(FullModel, "_answer", refuse)
    again = search_and_report(options_for(small, outcome.folder, resume=True, command="the command"))
    assert again.reduction == outcome.reduction
    assert replace(again.data, created="", pictures=()) == replace(outcome.data, created="", pictures=())


def value_of(content: bytes) -> Any:
    """Of a JSON text, None where it is none."""
    with suppress(ValueError):
        return json.loads(content)
    return None


RESUMED = ["run", "stages/search", "stages/test-found", "stages/test-fastv", "stages/timing", "stages/consistency"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_changed_digit_of_a_run_is_an_error_that_names_the_file(
    name: str, outcome: SearchOutcome, small: SmallRun, tmp_path: Path
) -> None:
    shutil.copytree(outcome.folder, tmp_path / "run")
    path = tmp_path / "run" / f"{name}.json"
    whole = path.read_bytes()
    # a number's last digit may be one that no float tells from another
    path.write_bytes(next(each for each in changes(whole, 9) if value_of(each) not in (None, value_of(whole))))
    remedy = "restore it, or give another --out" if name == "run" else "remove it, then resume"
    assert f"{name}.json is damaged (its checksum differs: it was changed after it was written); {remedy}" in (
        error_of(options_for(small, tmp_path / "run", resume=True, command="the command"))
    )


def test_a_changed_digit_of_the_journal_is_an_error_that_names_the_line(
    outcome: SearchOutcome, small: SmallRun, tmp_path: Path
) -> None:
    """And what the message says to do about it leads to the same result."""
    shutil.copytree(outcome.folder, tmp_path / "run")
    options = options_for(small, tmp_path / "run", resume=True, command="the command")
    (tmp_path / "run" / "stages" / "search.json").unlink()
    journal = tmp_path / "run" / "study.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], next(changes(lines[2], 1)), *lines[3:]]))
    assert "study.jsonl, line 3 is damaged (its checksum differs" in (said := error_of(options))
    assert "; remove the line, then resume" in said
    journal.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    resumed = search_and_report(options)
    assert resumed.reduction.schedule == outcome.reduction.schedule
    assert resumed.data.methods == outcome.data.methods


def test_a_reduction_that_was_edited_does_not_lead_a_resumed_run_astray(
    outcome: SearchOutcome, small: SmallRun, tmp_path: Path
) -> None:
    """Its scores would be those of another schedule."""
    shutil.copytree(outcome.folder, tmp_path / "run")
    path = tmp_path / "run" / "reduction_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "keep_rates": [1.0, 1.0, 1.0, 0.0]}))
    options = options_for(small, tmp_path / "run", resume=True, command="the command")
    assert search_and_report(options).reduction == outcome.reduction
    assert Reduction.from_pretrained(tmp_path / "run") == outcome.reduction


def test_an_odd_byte_in_a_file_name_costs_no_finished_search(small: SmallRun, tmp_path: Path) -> None:
    """Python hands it over as half of a surrogate pair, which UTF-8 has no bytes for."""
    odd = small.folder / "caf\udce9.jsonl"
    shutil.copy(small.calibration, odd)
    options = options_for(small, tmp_path / "r\udce9sum\udce9", data=str(odd), command=f"search {odd}")
    outcome = search_and_report(options)
    assert outcome.reduction.search is not None
    assert "caf\\udce9.jsonl" in outcome.report.read_text(encoding="utf-8")
    loaded = load_report_data(outcome.folder)
    assert loaded.dataset is not None
    assert loaded.dataset.calibration_name.endswith("caf\\udce9.jsonl")
    again = search_and_report(replace(options, resume=True))
    assert again.reduction == outcome.reduction == Reduction.from_pretrained(outcome.folder)


def test_a_full_disk_costs_a_run_no_more_than_the_stage(
    outcome: SearchOutcome, small: SmallRun, tmp_path: Path
) -> None:
    """Wherever it happens there is no half of a file, and when there is room again the run goes on."""
    options = options_for(small, tmp_path / "run", resume=True, command="the command")
    for attempts in itertools.count():
        with failing_writes(3 + 10 * attempts, full_disk()) as failed, suppress(StorageError):
            search_and_report(options)
        assert not list((tmp_path / "run").rglob("*.part"))
        if not failed:
            break
    assert attempts >= 3
    resumed = search_and_report(options)
    assert resumed.reduction.schedule == outcome.reduction.schedule
    assert resumed.data.methods == outcome.data.methods


def test_a_confidence_reaches_the_search_and_its_record(small: SmallRun, tmp_path: Path) -> None:
    options = options_for(small, tmp_path / "run", early_stop=0.9)
    outcome = search_and_report(options)
    assert outcome.reduction.search is not None
    assert outcome.reduction.search["confidence"] == 0.9
    message = error_of(replace(options, resume=True, early_stop=None))
    assert "made with early_stop 0.9, this run has None" in message


def test_a_batch_size_is_found_once_and_kept_with_the_run(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def two(tokens: list[int], *_: Any) -> int:
        measured.append(len(tokens))
        return 2

    sizes: list[int] = []
    answers = Evaluator._answers

    def watched(self: Evaluator, *arguments: Any, **more: Any) -> Any:
        sizes.append(self.batch_size)
        return answers(self, *arguments, **more)

    monkeypatch.setattr(full_model, "fastest", two)
    monkeypatch.setattr(Evaluator, "_answers", watched)
    options = options_for(small, tmp_path / "run", batch_size="auto")
    with pytest.raises(KeyboardInterrupt):
        search_and_report(options, Stop("Testing FastV"))
    assert measured == [16, 12]
    resumed = search_and_report(replace(options, resume=True))
    assert measured == [16, 12]
    assert set(sizes) == {2}
    plain = search_and_report(options_for(small, tmp_path / "plain", batch_size=2))
    assert resumed.reduction.schedule == plain.reduction.schedule
    assert resumed.data.methods == plain.data.methods
    assert resumed.data.timing[0].batch == 2


def error_of(options: SearchOptions) -> str:
    with pytest.raises(ThinsightError) as caught:
        search_and_report(options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_folder_is_not_overwritten_nor_mixed(outcome: SearchOutcome, small: SmallRun) -> None:
    assert "--resume" in error_of(options_for(small, outcome.folder))
    assert "max_drop" in error_of(options_for(small, outcome.folder, resume=True, max_drop=0.1))
    assert "fingerprint" in error_of(options_for(small, outcome.folder, resume=True, max_new_tokens=3))


def test_one_file_is_split_by_image(small: SmallRun, tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(Watcher):
        def on_note(self, text: str) -> None:
            notes.append(text)

    outcome = search_and_report(options_for(small, tmp_path / "run", data=small.both, test_data=None), Notes())
    dataset = outcome.data.dataset
    assert dataset is not None
    assert dataset.calibration_size == dataset.test_size == 14
    assert dataset.calibration_hash != dataset.test_hash
    assert any("split by image: 14 examples to calibrate on, 14 to test on" in note for note in notes)


def test_a_rank_free_search_may_begin_at_layer_0(small: SmallRun, tmp_path: Path) -> None:
    options = options_for(small, tmp_path / "run", ranker="uniform", first_layer=0, max_drop=1.0)
    outcome = search_and_report(options)
    assert outcome.reduction.schedule.keep_rates == (0.0,) * 4
    assert outcome.data.methods[2].name == "FastV-like (one step at layer 0)"  # a step at 2 cannot be as cheap


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"max_drop": math.nan}, "max_drop is nan"),
        ({"first_layer": 4}, "first_layer is 4 but the model has layers 0 to 3"),
        ({"first_layer": 0}, "first_layer is 0, but ranker 'text-attention'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"cache_gib": -1.0}, "cache_gib is -1.0"),
        ({"ranker": "oracle"}, "ranker is 'oracle'"),
        ({"ranker": {"name": "text-attention", "columns": 3}}, "no setting 'columns'"),
        ({"solver": "guess"}, "solver is 'guess'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"early_stop": 1.5}, "early_stop is 1.5"),
        (
            {"early_stop": 0.9, "max_drop": None, "budget": 0.5},
            "early_stop is 0.9, which Sensitivity search does not take, but G-Search: leave it out",
        ),
        ({"early_stop": 0.9, "frontier": True}, "early_stop is 0.9, which Frontier does not take"),
        ({"confidence": 0.9}, "confidence is 0.9, but nothing is promised with --no-certify"),
        ({"confidence": 0.9, "max_drop": None, "budget": 0.5}, "confidence is 0.9, but nothing is promised und"),
        ({"confidence": 1.5, "certify": True}, "confidence is 1.5; it must be between 0 and 1"),
        (
            {"max_drop": 0.0, "certify": True},
            "no number of examples can show that nothing at all is lost: allow a little",
        ),
        ({"max_drop": 5.0}, "max_drop is 5.0, but scores lie between 0 and 1: give points as hundredths, 0.05"),
        ({"max_drop": math.inf}, "max_drop is inf"),
        ({"seed": 2**31}, "seed is 2147483648"),
        ({"max_drop": None, "budget": 0.5, "ranker": "oracle"}, "ranker is 'oracle'"),
        ({"early_stop": 0.9, "solver": "bayes"}, "early_stop is 0.9, but solver 'bayes'"),
        ({"metric": "vibes"}, "metric is 'vibes'"),
        ({"metric": "exact_match"}, "has no answer"),
        ({"data": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"data": None}, "--test-data needs --data"),
        ({"model": ModelOptions("./nowhere")}, "neither a folder that exists nor a hub id"),
    ],
)
def test_bad_input_is_refused_before_long_work(
    changes: dict[str, Any], words: str, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("long work began")

    monkeypatch.setattr(Evaluator, "_decode", refuse)
    monkeypatch.setattr(FullModel, "_answer", refuse)
    out = tmp_path / "run"
    assert words in error_of(options_for(small, out, **changes))
    assert not (out / "run.json").exists()  # so that the corrected command needs no --resume


def test_bad_data_is_named(small: SmallRun, tmp_path: Path) -> None:
    line = {"id": "a", "image": "picture.png", "question": "what ?"}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(line))
    assert "'a': image" in error_of(options_for(small, tmp_path / "run", data=str(data)))
    (tmp_path / "picture.png").write_bytes((small.folder / "test0.png").read_bytes()[:60])
    assert "truncated or no image" in error_of(options_for(small, tmp_path / "run", data=str(data)))
    (tmp_path / "picture.png").write_bytes((small.folder / "test0.png").read_bytes())
    assert "2 test examples show an image of the calibration set" in error_of(
        options_for(small, tmp_path / "run", data=str(data))
    )
    data.write_text("")
    assert "no examples" in error_of(options_for(small, tmp_path / "run", data=str(data)))
