"""Certified searches end to end on a small model: what is promised, on which data, and that an interruption changes
nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun
from typer.testing import CliRunner

import thinsight as ts
from thinsight import Reduction, Schedule, load_examples
from thinsight.certificate import Plan, least_drop, least_examples, outlook, too_few
from thinsight.cli import app
from thinsight.errors import BadInput
from thinsight.evaluation import Evaluator
from thinsight.job import pipeline
from thinsight.job.opening import load_sets
from thinsight.job.options import CompareOptions, ModelOptions, SearchOptions
from thinsight.job.pipeline import SearchOutcome, search_and_report
from thinsight.loading import load_model
from thinsight.progress import Watcher
from thinsight.searches.certify import fingerprint_of, judge

MAX_DROP = 0.95  # which 12 answers of a random model can certify


def options_for(small: SmallRun, out: Path, **changes: Any) -> SearchOptions:
    options = SearchOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=small.calibration,
        test_data=small.test,
        max_drop=MAX_DROP,
        max_new_tokens=2,
        batch_size=4,
        timing_runs=1,
        new_tokens=2,
        pictures=0,
        out=out,
    )
    return replace(options, **changes)


class Notes(Watcher):
    """Keeps what was said; interrupts at a note or stage that begins so."""

    def __init__(self, stop: str = "") -> None:
        self.notes: list[str] = []
        self.stop = stop

    def on_note(self, text: str) -> None:
        self.notes.append(text)
        if self.stop and text.strip().startswith(self.stop):
            raise KeyboardInterrupt

    on_stage = on_note

    @property
    def text(self) -> str:
        return "\n".join(self.notes)


@pytest.fixture(scope="module")
def told() -> Notes:
    return Notes()


@pytest.fixture(scope="module")
def outcome(small: SmallRun, told: Notes, tmp_path_factory: pytest.TempPathFactory) -> SearchOutcome:
    return search_and_report(options_for(small, tmp_path_factory.mktemp("out") / "run"), told)


def certificate_of(outcome: SearchOutcome) -> ts.Certificate:
    certificate = outcome.reduction.certificate
    assert certificate is not None
    return certificate


def test_the_certificate_is_that_of_the_test_set(outcome: SearchOutcome, small: SmallRun) -> None:
    certificate, examples = certificate_of(outcome), load_examples(small.test)
    model, processor = load_model(small.model, device="cpu")
    evaluator = Evaluator(model, processor, examples, max_new_tokens=2, batch_size=4)
    assert certificate.n == 12
    assert (certificate.max_drop, certificate.confidence, certificate.used_before) == (MAX_DROP, 0.95, False)
    assert certificate.fingerprint == fingerprint_of(examples)
    assert certificate.schedule == outcome.reduction.schedule
    assert not outcome.reduction.schedule.is_full
    full, reduced = evaluator.full.per_example, evaluator(outcome.reduction).per_example
    assert full is not None
    assert reduced is not None
    groups = [example.group for example in examples]
    assert certificate.certified == judge(full, reduced, MAX_DROP, groups=groups)
    headline = outcome.data.headline
    assert headline is not None
    assert headline.score == certificate.score
    assert Reduction.from_pretrained(outcome.folder) == outcome.reduction


def test_the_path_was_laid_by_the_search_before(outcome: SearchOutcome, told: Notes) -> None:
    stored = json.loads((outcome.folder / "stages" / "search.json").read_text())
    path = [Schedule(rates) for rates in stored["path"]]
    assert tuple(path) == certificate_of(outcome).path
    assert Schedule(stored["reduction"]["keep_rates"]) in path
    begun = told.notes.index("Certifying on the test set")
    assert [note for note in told.notes[begun:] if "fewer FLOPs" in note]
    assert not [note for note in told.notes[:begun] if "fewer FLOPs" in note]
    assert "% of scores unchanged, about" in told.text


def test_the_record_says_what_the_search_had_found(outcome: SearchOutcome) -> None:
    search, stored = outcome.reduction.search, json.loads((outcome.folder / "stages" / "search.json").read_text())
    assert search is not None
    found = stored["reduction"]["keep_rates"]
    assert search.get("found", list(outcome.reduction.schedule.keep_rates)) == found


def test_interrupted_amid_the_path_it_comes_to_the_same_certificate(
    outcome: SearchOutcome, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(small, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        search_and_report(options, Notes("3 of "))
    assert len(list((tmp_path / "run" / "stages").glob("certify-*.json"))) == 3
    assert Reduction.from_pretrained(tmp_path / "run").certificate is None
    known: list[int] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        known.append(len(more["known"]))
        return ts.certify(*arguments, **more)

    monkeypatch.setattr(pipeline, "certify", watched)
    resumed = search_and_report(replace(options, resume=True))
    assert known == [3]
    assert certificate_of(resumed) == certificate_of(outcome)
    assert resumed.data.methods == outcome.data.methods
    again = search_and_report(replace(options, resume=True))
    assert known == [3]
    assert again.reduction == resumed.reduction


def test_one_file_gives_a_quarter_to_the_search(small: SmallRun, tmp_path: Path) -> None:
    watcher = Notes()
    outcome = search_and_report(options_for(small, tmp_path / "run", data=small.both, test_data=None), watcher)
    dataset = outcome.data.dataset
    assert dataset is not None
    assert (dataset.calibration_size, dataset.test_size) == (8, 20)  # of 14 images with two questions each
    assert certificate_of(outcome).n == 20
    assert (dataset.calibration_name, dataset.test_name) == (
        f"{small.both} (a quarter)",
        f"{small.both} (the other three quarters)",
    )
    sets = load_sets(small.both, None, None, split=(0.25, ""))
    assert not {example.group for example in sets.calibration} & {example.group for example in sets.test}


def test_which_sets_the_demo_takes() -> None:
    assert SearchOptions().split == (0.25, "demo:certification")
    for other in (SearchOptions(certify=False), SearchOptions(budget=0.5), CompareOptions()):
        assert other.split == (0.5, "demo:test")
    assert SearchOptions(frontier=True).certified
    assert not SearchOptions(frontier=True, budget=0.5).certified


def test_sets_that_share_an_image_are_refused(small: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="show an image of the calibration set, the first is 'calibration-0-color'"):
        search_and_report(options_for(small, tmp_path / "run", test_data=small.both))


def test_too_few_examples_are_warned_of_before_any_work(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thinsight.job.opening.open_model", opened)
    watcher = Notes()
    with pytest.raises(KeyboardInterrupt):
        search_and_report(options_for(small, tmp_path / "run", max_drop=0.01), watcher)
    assert "warning: 12 examples to certify on show a drop of less than 22.23 points at best" in watcher.text
    assert "less than 1 point takes at least 301 at 95 % confidence" in watcher.text


def test_where_nothing_is_certified_the_full_model_stays(small: SmallRun, tmp_path: Path) -> None:
    watcher = Notes()
    outcome = search_and_report(options_for(small, tmp_path / "run", max_drop=0.3), watcher)
    assert certificate_of(outcome).schedule is None
    assert outcome.reduction.schedule.is_full
    assert "The full model stays. With " in watcher.text
    assert outcome.data.headline is not None
    assert outcome.data.headline.flops_ratio == 1.0


def test_a_confidence_reaches_the_certificate_and_binds_the_run(small: SmallRun, tmp_path: Path) -> None:
    options = options_for(small, tmp_path / "run", confidence=0.8, max_drop=0.9)
    assert certificate_of(search_and_report(options)).confidence == 0.8
    for changes in ({"confidence": 0.9}, {"certify": False, "confidence": None}):
        with pytest.raises(BadInput, match=r"was made with confidence 0\.8"):
            search_and_report(replace(options, resume=True, **changes))


def test_a_frontier_is_certified_along_its_points(small: SmallRun, tmp_path: Path) -> None:
    outcome = search_and_report(options_for(small, tmp_path / "run", frontier=True, n_trials=4))
    certificate = certificate_of(outcome)
    cheapest = min((Schedule(row.keep_rates) for row in outcome.data.frontier), key=lambda each: each.mean_keep_rate)
    assert certificate.path[-1] == cheapest


# -- a set that was used before ------------------------------------------------------------------------------


def test_a_cache_folder_remembers_which_sets_were_used(small: SmallRun, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> tuple[bool, str]:
        watcher = Notes()
        options = options_for(small, tmp_path / name, cache_dir=tmp_path / "cache", **changes)
        return certificate_of(search_and_report(options, watcher)).used_before, watcher.text

    assert run("first")[0] is False
    assert run("the same again")[0] is False  # no further draw: the same promise along the same path
    used, text = run("another", max_drop=0.9)
    assert used
    assert "had been used for a certificate before" in text
    assert run("another set", test_data=small.calibration, data=small.test)[0] is False


def test_a_folder_tells_what_its_earlier_reduction_was_certified_on(
    outcome: SearchOutcome, small: SmallRun, tmp_path: Path
) -> None:
    outcome.reduction.save_pretrained(tmp_path)
    assert certificate_of(search_and_report(options_for(small, tmp_path, max_drop=0.9))).used_before
    again = search_and_report(options_for(small, tmp_path, max_drop=0.9, resume=True))
    assert certificate_of(again).used_before


def test_an_earlier_reduction_that_cannot_be_read_stops_nothing(small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "reduction_config.json").write_text("{")
    watcher = Notes()
    assert not certificate_of(search_and_report(options_for(small, tmp_path), watcher)).used_before
    assert "warning: an earlier reduction's certificate is not read: " in watcher.text


# -- without a certificate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"certify": False}, {"max_drop": None, "budget": 0.5, "n_trials": 8}])
def test_without_a_certificate_every_output_says_estimated(
    changes: dict[str, Any], small: SmallRun, tmp_path: Path
) -> None:
    watcher = Notes()
    outcome = search_and_report(options_for(small, tmp_path / "run", **changes), watcher)
    assert outcome.reduction.certificate is None
    assert "What is lost is estimated, not certified: " in watcher.text
    assert "estimated, not certified" in (outcome.folder / "README.md").read_text()
    assert not list((outcome.folder / "stages").glob("certif*"))


def test_no_certify_on_the_command_line(small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        "search",
        "--model",
        small.model,
        "--device",
        "cpu",
        "--data",
        small.calibration,
        "--test-data",
        small.test,
    ]
    given += ["--max-new-tokens", "2", "--max-drop", "0"]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2
    assert "max_drop is 0.0, and no number of examples can show that nothing at all is lost" in refused.stderr
    result = CliRunner().invoke(app, [*given, "--no-certify"])
    assert result.exit_code == 0, result.output
    assert "estimated, not certified: --no-certify was given" in result.stderr


# -- ts.search -----------------------------------------------------------------------------------------------


def found_by(small: SmallRun, **options: Any) -> ts.SearchResult:
    model, processor = load_model(small.model, device="cpu")
    return ts.search(model, processor, small.both, MAX_DROP, max_new_tokens=2, batch_size=4, **options)


def test_one_call_certifies_on_three_quarters(small: SmallRun) -> None:
    result = found_by(small)
    certificate = result.certificate
    assert certificate is not None
    assert certificate.n == 20  # of 28, ten of 14 images
    assert result.reduction.certificate == certificate
    assert result.schedule == certificate.schedule == result.reduction.schedule
    assert (result.score, result.full_score) == (certificate.score, certificate.full_score)
    assert certificate.promise in " ".join(
        str(cell) for table in result._tables() for row in table.rows for cell in row
    )


def test_one_call_certifies_on_the_set_that_it_is_given(small: SmallRun) -> None:
    model, processor = load_model(small.model, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 2, "batch_size": 4}
    result = ts.search(model, processor, small.calibration, MAX_DROP, test_examples=small.test, **options)
    assert result.certificate is not None
    assert result.certificate.fingerprint == fingerprint_of(load_examples(small.test))
    with pytest.raises(BadInput, match="share an image with those searched on, 'calibration-0-color' the first"):
        ts.search(model, processor, small.calibration, MAX_DROP, test_examples=small.both, **options)


def test_one_call_with_too_little_data_warns_and_keeps_the_full_model(small: SmallRun) -> None:
    model, processor = load_model(small.model, device="cpu")
    with pytest.warns(UserWarning, match="20 examples to certify on show a drop of less than 14"):
        result = ts.search(model, processor, small.both, max_new_tokens=2, batch_size=4)
    assert result.certificate is not None
    assert result.schedule.is_full
    assert result.certificate.reason


def test_one_call_without_a_certificate(small: SmallRun) -> None:
    result = found_by(small, certify=False)
    assert result.certificate is None
    assert "estimated" in str(result._tables()[0].rows)


# -- how much data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_drop", [0.005, 0.01, 0.05, 0.5])
def test_the_fewest_examples_and_the_smallest_drop_are_each_others_inverse(max_drop: float) -> None:
    least = least_examples(max_drop)
    assert least_drop(least) <= max_drop < least_drop(least - 1)
    assert too_few(least, max_drop) == ""
    assert f"takes at least {least:,} at 95 %" in too_few(least - 1, max_drop)
    assert judge([1.0] * least, [1.0] * least, max_drop).certified
    assert not judge([1.0] * (least - 1), [1.0] * (least - 1), max_drop).certified


def test_a_plan_says_how_many_examples_certify_what() -> None:
    plan = Plan(0.01, agreement=0.983, n=100)
    text = " ".join(plan.lines)
    assert "takes at least 301 examples" in text
    assert f"{outlook(0.01, 0.983, 100)}." in text
    assert "With 98.3 % of scores unchanged, about 1,400 examples certify 1 point; 100 certify about 5.07" in text
    assert "100 examples to certify on show a drop of less than 2.98 points at best" in text
    (table,) = plan._tables()
    assert [column.short for column in table.columns][4] == "98.3 %"
    drops = [[float(cell) for cell in row[1:]] for row in table.rows]
    assert all(row == sorted(row) for row in drops)
    assert drops == sorted(drops, reverse=True)


def plan(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_plan_command(outcome: SearchOutcome, small: SmallRun) -> None:
    assert "least 301 examples" in plan().stdout
    assert "certify about" in plan("--agreement", 0.98, "--data", small.test).stdout
    certificate = certificate_of(outcome)
    assert certificate.agreement is not None
    told = plan("--reduction", outcome.folder, "--max-drop", 0.05).stdout
    assert outlook(0.05, certificate.agreement) in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-drop", 0), "max_drop is 0.0, and no number of examples"),
        (("--confidence", 0.9995), "confidence is 0.9995; no p-value is below 0.001"),
        (("--agreement", 1.5), "agreement is 1.5; it must be a share of examples"),
        (("--reduction", "{bare}"), "has no certificate with an agreement: give --agreement"),
        (("--reduction", "{bare}", "--agreement", 0.9), "agreement is 0.9, and reduction"),
        (("--data", "{empty}"), "holds no examples"),
    ],
)
def test_a_plan_that_cannot_be_made(arguments: tuple[Any, ...], words: str, tmp_path: Path) -> None:
    Reduction(Schedule([1, 1, 0.5, 0.5])).save_pretrained(tmp_path / "bare")
    (tmp_path / "empty").write_text("")
    places = {"bare": tmp_path / "bare", "empty": tmp_path / "empty"}
    result = plan(*(str(each).format(**places) for each in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
