"""A comparison on a small model: every method at equal cost, chosen without the test set, resumable."""

from __future__ import annotations

import csv
import errno
import io
import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import failing_writes, full_disk
from rich.console import Console
from small_run import SmallRun

from thinsight import Evaluator, load_examples
from thinsight.baselines import BASELINES
from thinsight.errors import BadInput, StorageError, ThinsightError
from thinsight.evaluation import full_model
from thinsight.evaluation import store as feature_store
from thinsight.evaluation.examples import Example
from thinsight.job.compare import CompareOutcome, compare
from thinsight.job.options import CompareOptions, ModelOptions, SearchOptions, method_names
from thinsight.job.pipeline import search_and_report
from thinsight.loading import load_model
from thinsight.progress import Watcher
from thinsight.records import decode, encode
from thinsight.reduction import Reduction
from thinsight.report.comparison import Comparison, Run, certified_costs, certified_table, markdown, table, to_csv
from thinsight.schedule import Schedule
from thinsight.searches.certify import certify, exact_p_value
from thinsight.searches.search import under_budget

BUDGETS = (0.6, 0.2)
SEARCHED = ["search-random" if name == "random" else name for name in under_budget()]
BUDGETS_OF_COMMAND = CompareOptions().budgets


def options_for(small: SmallRun, out: Path, **changes: Any) -> CompareOptions:
    options = CompareOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=small.calibration,
        test_data=small.test,
        max_new_tokens=2,
        batch_size=4,
        budgets=BUDGETS,
        n_trials=12,
        out=out,
    )
    return replace(options, **changes)


@pytest.fixture(scope="module")
def outcome(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> CompareOutcome:
    return compare(options_for(small, tmp_path_factory.mktemp("out") / "run"))


def test_every_method_holds_the_budget_or_says_why_not(outcome: CompareOutcome) -> None:
    runs = outcome.comparison.runs
    assert {(run.budget, run.method) for run in runs} == {
        (budget, method) for budget in BUDGETS for method in (*SEARCHED, *BASELINES)
    }
    for run in runs:
        if run.refused:
            assert "cannot go below" in run.refused
            continue
        assert 0 < run.spent <= run.budget * (1 + 1e-12)
        if run.method in ("adaptive", "autoprune"):
            continue  # its rates are a mean of several schedules
        counts = Schedule(run.keep_rates).counts(16)
        more = sum(min(16, count + 1) for count in counts)
        assert more / (16 * len(counts)) > run.budget  # within one token per layer
    reached = {run.method for run in runs if not run.refused and run.budget == 0.2}
    assert {"sensitivity", "adaptive", "psigmoid", "search-random", "divprune", "visionzip", "random"} <= reached


def test_scores_are_those_of_the_evaluator_on_the_test_set(outcome: CompareOutcome, small: SmallRun) -> None:
    model, processor = load_model(small.model, device="cpu")
    test = Evaluator(model, processor, load_examples(small.test), max_new_tokens=2, batch_size=4)
    stored = json.loads((outcome.files[0].parent / "stages" / "found-keep-0.6-fastv.json").read_text())
    reduction = Reduction(Schedule(stored["keep_rates"]), stored["ranker"])
    [run] = [run for run in outcome.comparison.runs if (run.method, run.budget) == ("fastv", 0.6)]
    np.testing.assert_array_equal(run.per_example, test(reduction).per_example)
    assert outcome.comparison.full_score == test.full_score


def found_by(small: SmallRun, out: Path) -> list[Any]:
    """Schedules and rankers of all runs, whatever the test set says of them."""
    names = ("search-sensitivity", "search-psigmoid", "search-random", "fitprune")
    runs = compare(options_for(small, out, methods=names, budgets=(0.6,))).comparison.runs
    return [(run.method, run.keep_rates, run.ranker, run.calibration_score) for run in runs]


def test_choosing_never_touches_the_test_set(small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other test questions the same schedules are found; and nothing of the test set is run before."""
    other = tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in Path(small.test).read_text().splitlines()][:6]
    for line in lines:
        line |= {"image": str(small.folder / line["image"]), "question": "what shape ?"}
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    same = replace(small, test=str(other))
    assert found_by(small, tmp_path / "one") == found_by(same, tmp_path / "two")

    order: list[str] = []
    report = Evaluator._report

    def noted(self: Evaluator, *args: Any) -> None:  # after each batch, of the full model too
        order.append("test" if self.examples[0].id.startswith("test") else "calibration")
        report(self, *args)

    monkeypatch.setattr(Evaluator, "_report", noted)
    search = SearchOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=small.calibration,
        test_data=small.test,
        budget=0.6,
        n_trials=8,
        max_new_tokens=2,
        batch_size=4,
        timing_runs=1,
        new_tokens=2,
        pictures=0,
        out=tmp_path / "search",
    )
    assert search_and_report(search).data.search is not None
    assert order.index("test") > len(order) - 1 - order[::-1].index("calibration")


def test_an_interruption_loses_nothing(small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"methods": ("search-psigmoid", "fastv", "random"), "budgets": (0.6,)}
    straight = compare(options_for(small, tmp_path / "straight", **chosen))
    calls: list[int] = []
    call = Evaluator.__call__

    def stopping(self: Evaluator, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return call(self, *args)

    monkeypatch.setattr(Evaluator, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(options_for(small, tmp_path / "run", **chosen))
    resumed = compare(options_for(small, tmp_path / "run", resume=True, **chosen))
    same = [replace(run, seconds=0.0) for run in straight.comparison.runs]
    assert [replace(run, seconds=0.0) for run in resumed.comparison.runs] == same
    with pytest.raises(ThinsightError, match="was made with n_trials 12"):
        compare(options_for(small, tmp_path / "run", resume=True, n_trials=9, **chosen))


def test_a_damaged_journal_is_an_error_and_no_refusal(small: SmallRun, tmp_path: Path) -> None:
    options = options_for(small, tmp_path / "run", methods=("search-random",), budgets=(0.6,), n_trials=8)
    journal = tmp_path / "run" / "studies" / "keep-0.6-search-random-seed0.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("garbage\n")
    with pytest.raises(StorageError, match="line 1 is not a search journal's"):
        compare(options)
    journal.unlink()
    [run] = compare(replace(options, resume=True)).comparison.runs
    assert not run.refused
    straight = compare(replace(options, out=tmp_path / "straight")).comparison
    assert replace(run, seconds=0.0) == replace(straight.runs[0], seconds=0.0)


def test_a_full_disk_is_an_error_and_no_refusal(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    chosen = {"methods": ("search-sensitivity",), "budgets": (0.6,), "n_trials": 8, "cache_gib": 0.0}
    options = options_for(small, tmp_path / "run", **chosen)
    monkeypatch.setattr(feature_store, "save_file", full)
    with pytest.raises(StorageError, match="temporary file"):
        compare(options)
    monkeypatch.undo()
    assert not compare(replace(options, resume=True)).comparison.runs[0].refused


def labeled_with(small: SmallRun, source: str, name: str, answer: str) -> str:
    """The same questions with one label for all."""
    lines = [json.loads(line) | {"answer": answer} for line in Path(source).read_text().splitlines()]
    path = small.folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("wrong", ["data", "test_data"])
def test_labels_that_no_answer_meets_are_refused_before_anything_is_searched(
    small: SmallRun, tmp_path: Path, wrong: str
) -> None:
    options = options_for(small, tmp_path / "run", methods=("search-random", "fastv"), budgets=(0.6,))
    mislabeled = labeled_with(small, getattr(options, wrong), f"{wrong}-zzz.jsonl", "zzz")
    with pytest.raises(BadInput, match="the label is 'zzz'"):
        compare(replace(options, **{wrong: mislabeled}))
    assert not (tmp_path / "run" / "run.json").exists()
    assert compare(options).comparison.doubt == ""  # mended: the same command, into the same folder


def test_a_doubtful_score_is_said_with_the_tables() -> None:
    run = replace(run_of("fastv", (0.0,) * 4), ranker={"name": "uniform"})
    plain = Comparison("m", "t", "h", "keep", 20, (0,), 0.02, 4.0, (0.0,) * 4, ("a",) * 4, (run,), {})
    comparison = replace(plain, doubt="the full model scores 2 %")
    assert markdown(comparison).startswith("**Warning:** the full model scores 2 %\n")
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(comparison)
    assert console.file.getvalue().startswith("Warning: the full model scores 2 %")
    assert decode(Comparison, json.loads(json.dumps(encode(comparison))), "here", "run it again") == comparison


def test_a_batch_size_is_found_once_and_kept_with_the_comparison(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def two(tokens: list[int], *_: Any) -> int:
        measured.append(len(tokens))
        return 2

    monkeypatch.setattr(full_model, "fastest", two)
    methods = ("search-sensitivity", "fastv")
    given: dict[str, Any] = {"batch_size": "auto", "budgets": (0.6,), "n_trials": None}
    auto = options_for(small, tmp_path / "auto", methods=methods[1:], **given)
    compare(auto)
    assert measured == [12]  # a baseline runs nothing on the calibration set
    found = compare(replace(auto, methods=methods, resume=True)).comparison
    assert measured == [12, 16]
    plain = compare(replace(auto, out=tmp_path / "plain", batch_size=2, methods=methods)).comparison
    assert [replace(run, seconds=0) for run in found.runs] == [replace(run, seconds=0) for run in plain.runs]
    assert found.full_per_example == plain.full_per_example
    again = compare(replace(auto, methods=methods, resume=True, seeds=(0, 1))).comparison
    assert measured == [12, 16]
    assert len(again.runs) == 3


def test_files_hold_what_was_found(outcome: CompareOutcome) -> None:
    names = [path.name for path in outcome.files]
    assert names[:3] == ["comparison.json", "comparison.csv", "comparison.md"]
    read = decode(Comparison, json.loads(outcome.files[0].read_text()), "here", "run it again")
    assert read == outcome.comparison
    rows = list(csv.DictReader(outcome.files[1].read_text().splitlines()))
    assert [row["method"] for row in rows] == [run.method for run in outcome.comparison.runs]
    assert "**Sensitivity search**" in outcome.files[2].read_text()
    pytest.importorskip("matplotlib")
    assert names[3:] == ["comparison.pdf", "comparison.png"]
    assert outcome.files[3].read_bytes().startswith(b"%PDF")


def test_a_comparison_that_cannot_be_written_leaves_the_old_files(outcome: CompareOutcome, small: SmallRun) -> None:
    """Written by the run that is done, all of whose stages are there."""
    folder = outcome.files[0].parent
    before = {path.name: path.read_bytes() for path in outcome.files}
    for call in range(1, 26, 4):  # the probe of the folder, then five steps for each of five files
        with failing_writes(call, full_disk()) as failed, suppress(StorageError):
            compare(options_for(small, folder, resume=True))
        assert failed
        assert not list(folder.rglob("*.part"))
        kinds = ("comparison.json", "comparison.csv", "comparison.md")
        assert {name: (folder / name).read_bytes() for name in kinds} == {name: before[name] for name in kinds}


def run_of(method: str, per_example: tuple[float, ...], seed: int | None = None, refused: str = "") -> Run:
    score = float(np.mean(per_example)) if per_example else 0.0
    return Run(0.5, method, method.title(), seed, (1.0, 0.0), "uniform", 0.5, 2.0, score, per_example, refused=refused)


def test_the_table_averages_seeds_and_pairs_examples() -> None:
    runs = (
        run_of("sensitivity", (1.0, 1.0, 0.0, 1.0), seed=0),
        run_of("sensitivity", (1.0, 0.0, 0.0, 1.0), seed=1),
        run_of("fastv", (1.0, 0.0, 0.0, 0.0)),
        run_of("vtw", (), refused="cannot go below 0.6"),
    )
    comparison = Comparison(
        "m", "t", "h", "keep", 20, (0, 1), 0.75, 4.0, (1.0, 1.0, 0.0, 1.0), ("a", "b", "c", "d"), runs, {}
    )
    ours, fastv, vtw = table(comparison)
    assert (ours.method, ours.seeds, ours.score) == ("sensitivity", 2, 0.625)
    assert ours.spread == pytest.approx(0.125)
    assert ours.behind is None
    assert fastv.behind is not None
    assert fastv.behind.mean == pytest.approx(0.375)
    assert fastv.drop is not None
    assert fastv.drop.mean == 0.5
    assert fastv.flops_ratio == 2.0
    assert vtw.refused == "cannot go below 0.6"
    assert "| Vtw | refused: cannot go below 0.6 |" in markdown(comparison)


# -- certified costs -----------------------------------------------------------------------------------------


def ladder(method: str, counts: dict[float, tuple[int, int]], seed: int | None = None, n: int = 1000) -> list[Run]:
    """A method at several budgets, each with so many losses and wins of n, 90 % right under the full model."""
    runs = []
    for budget, (losses, wins) in counts.items():
        scores = [0.0] * losses + [1.0] * (n * 9 // 10 - losses) + [1.0] * wins + [0.0] * (n // 10 - wins)
        rates = (1.0, budget)
        score = float(np.mean(scores))
        spent = (1 + budget) / 2
        runs.append(
            Run(budget, method, method.title(), seed, rates, {"name": "x"}, spent, 4 * spent, score, (*scores,))
        )
    return runs


EXAMPLES = [Example(f"t{place}", (), "What?", ("this",), group=f"image {place}") for place in range(1000)]


def compared(*runs: Run) -> Comparison:
    full = (1.0,) * 900 + (0.0,) * 100
    groups = tuple(str(example.group) for example in EXAMPLES)
    return Comparison("m", "t", "h", "keep", 16, (0,), 0.9, 4.0, full, groups, runs, {})


def test_each_method_is_certified_along_its_own_budgets() -> None:
    good = ladder("sensitivity", {0.5: (1, 1), 0.25: (3, 3), 0.125: (30, 2)}, seed=0)
    early = ladder("fastv", {0.25: (9, 0), 0.5: (2, 0), 0.125: (0, 20)})  # the cheapest is behind a failure
    never = ladder("vtw", {0.5: (40, 0)})
    refused = replace(never[0], method="dart", refused="cannot go below 0.6", keep_rates=(), per_example=(), flops=0.0)
    comparison = compared(*good, *early, *never, refused)
    found = certified_costs(comparison, EXAMPLES, 0.01)
    assert [(each.method, each.budget, each.seed) for each in found] == [
        ("sensitivity", 0.25, 0),
        ("fastv", 0.5, None),
        ("vtw", None, None),
    ]
    assert [each.flops_ratio for each in found] == [1 / 0.625, 1 / 0.75, 1.0]
    assert [len(each.certificate.steps) for each in found] == [3, 2, 1]
    assert found[0].certificate.p_value == exact_p_value(3, 3, 1000, 0.01)
    assert found[1].certificate.path == tuple(Schedule((1.0, rate)) for rate in (0.5, 0.25, 0.125))
    assert len({each.certificate.fingerprint for each in found}) == 1
    read = decode(Comparison, json.loads(json.dumps(encode(replace(comparison, certified=found)))), "here", "again")
    assert read.certified == found


def test_each_seed_is_a_method_of_its_own() -> None:
    runs = [*ladder("random", {0.5: (1, 1), 0.25: (40, 0)}, 0), *ladder("random", {0.5: (40, 1), 0.25: (1, 1)}, 1)]
    found = certified_costs(compared(*runs), EXAMPLES, 0.01)
    assert [(each.seed, each.budget) for each in found] == [(0, 0.5), (1, None)]
    told = certified_table(replace(compared(*runs), certified=found))
    assert [row[0] for row in told.rows] == ["Random", "Random, seed 1"]


def test_two_budgets_of_one_cost_are_tested_once() -> None:
    first, second, third = ladder("fastv", {0.5: (1, 1), 0.25: (3, 3), 0.125: (40, 0)})
    comparison = compared(first, replace(first, budget=0.4), second, third)
    [found] = certified_costs(comparison, EXAMPLES, 0.01)
    assert len(found.certificate.path) == 3
    assert found.budget == 0.25
    rows = list(csv.DictReader(to_csv(replace(comparison, certified=(found,))).splitlines()))
    assert [row["certified"] for row in rows] == ["certified", "certified", "certified", "not certified"]
    assert "certified" not in to_csv(comparison)


def test_the_tables_say_what_is_promised_and_of_how_many() -> None:
    comparison = compared(*ladder("sensitivity", {0.5: (1, 1)}), *ladder("vtw", {0.5: (40, 0), 0.25: (0, 0)}))
    comparison = replace(comparison, certified=certified_costs(comparison, EXAMPLES, 0.01, metric="exact_match"))
    text = markdown(comparison)
    assert "### What each method costs at 1 point, certified with 95 % confidence" in text
    p = f"{np.ceil(1000 * exact_p_value(1, 1, 1000, 0.01)) / 1000:.3f}"
    assert rf"| **Sensitivity** | 1.33x | 0.5 | 1 / 1 | {p} | all of its budgets are certified |" in text
    assert "| Vtw | 1.00x | | | | not certified at 1 point: 40 losses and 0 wins in 1,000 examples; " in text
    assert "several promises: each one holds with 95 % confidence" in text
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(comparison)
    for words in ("What each method costs at 1 point", "several promises", "all of its budgets are certified"):
        assert words in console.file.getvalue()
    assert "certified" not in markdown(replace(comparison, certified=()))


def test_a_comparison_certifies_on_the_scores_it_has(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `certify` does that runs each schedule; too few examples are told before any work; nothing is run again."""
    options = options_for(small, tmp_path / "run", methods=("fastv", "divprune"), n_trials=None)
    plain = compare(options).comparison
    assert plain.certified == ()
    told: list[str] = []

    class Noting(Watcher):
        def on_note(self, text: str) -> None:
            told.append(text)

    monkeypatch.setattr(Evaluator, "_report", lambda *_: pytest.fail("ran the model again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        outcome = compare(replace(options, resume=True, max_drop=0.9, confidence=0.8), Noting())
    assert not any("certify no method" in text for text in told)
    monkeypatch.undo()
    found = outcome.comparison
    assert [run.per_example for run in found.runs] == [run.per_example for run in plain.runs]
    assert {each.method for each in found.certified} == {run.method for run in found.runs if not run.refused}
    assert "What each method costs at 90 points, certified with 80 % confidence" in outcome.files[2].read_text()
    model, processor = load_model(small.model, device="cpu")
    test = Evaluator(model, processor, load_examples(small.test), max_new_tokens=2, batch_size=4)
    for each in found.certified:
        runs = sorted((run for run in found.runs if run.method == each.method), key=lambda run: -run.flops)
        path = [Reduction(Schedule(run.keep_rates), run.ranker) for run in runs if not run.refused]
        assert certify(path, test, 0.9, 0.8) == each.certificate
        assert each.certificate.metric == test.metric_names != ""
    compare(replace(options, resume=True, max_drop=0.01), Noting())
    assert any("12 test examples certify no method at max_drop 0.01" in text for text in told)


def test_a_hostile_title_stays_in_its_cell() -> None:
    scored = replace(run_of("sensitivity", (1.0,)), title="mine |\n| <b>x</b>")
    refused = run_of("vtw", (), refused="a `b` | \x1b[31m\n| c |")
    comparison = Comparison("m", "t", "h", "keep", 20, (0,), 1.0, 4.0, (1.0,), ("a",), (scored, refused), {})
    ours, last = markdown(comparison).splitlines()[-2:]
    assert ours.startswith(r"| **mine \| \| \<b\>x\</b\>** | 100.0 |")
    assert last == r"| Vtw | refused: a \`b\` \| \\x1b\[31m \| c \| | | | | |"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("fastw",)}, "method is 'fastw'"),
        ({"budgets": ()}, "budgets is"),
        ({"budgets": (0.5, 0.5)}, "none twice"),
        ({"budgets": (1.5,)}, "budget is 1.5"),
        ({"budget_unit": "tokens"}, "budget_unit is 'tokens'"),
        ({"n_trials": 2}, "n_trials is 2: Sensitivity search needs at least 8"),
        ({"n_trials": 11}, "n_trials is 11: Sensitivity search, adaptive needs at least 12"),
        ({"n_trials": 0, "methods": ("search-random",)}, "n_trials is 0: Random search needs at least 1"),
        ({"methods": ("fastv", "random")}, "n_trials is 12, which only searches take"),
        (
            {"ranker": "uniform", "methods": ("search-sensitivity", "fastv")},
            "ranker is 'uniform', which only search-psigmoid takes",
        ),
        ({"seeds": (0, 1), "methods": ("fastv",), "n_trials": None}, "seeds are .* nothing random"),
        ({"budget_unit": "ms", "budgets": BUDGETS_OF_COMMAND}, "budget_unit is 'ms', and the default budgets"),
        ({"data": None}, "--test-data needs --data"),
        ({"ranker": "oracle"}, "ranker is 'oracle'"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number of at least 1, or 'auto'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"cache_gib": -1.0}, "cache_gib is -1.0"),
        ({"metric": "vibes"}, "metric is 'vibes'"),
        ({"max_drop": 0.0}, "max_drop is 0.0, and no number of examples"),
        ({"max_drop": 1.5}, "max_drop is 1.5"),
        ({"max_drop": 0.01, "confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 0.9}, "confidence is 0.9, but no max_drop"),
    ],
)
def test_bad_options_are_named_before_any_work(
    small: SmallRun, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ThinsightError, match=words):
        compare(options_for(small, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_every_name_is_known() -> None:
    assert {"sensitivity", "adaptive", "psigmoid", "search-random"} <= set(SEARCHED)
    assert len(set(method_names())) == len(method_names()) == len(BASELINES) + len(SEARCHED)
