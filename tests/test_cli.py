"""The command: every subcommand on a small model, and every mistake as one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from small_run import SmallRun
from typer.testing import CliRunner, Result

from thinsight import Reduction, Schedule, __version__, get_ranker, list_rankers, loading
from thinsight.cli import _EXAMPLES, _GROUPS, app
from thinsight.evaluation import examples as example_files
from thinsight.evaluation import full_model
from thinsight.job.options import ranker_of
from thinsight.searches import SEARCHES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in its own folder, where the default output folder does not exist yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def error_of(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    line = result.stderr.strip().split("\n")[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    return line


def search(small: SmallRun, *more: object) -> Result:
    options = ["--model", small.model, "--data", small.calibration, "--test-data", small.test, "--device", "cpu"]
    return run("search", *options, "--max-drop", 0.7, "--no-certify", "--max-new-tokens", 2, *more)


def test_batches_and_early_stops_of_a_search(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any) -> int:
        warnings.warn("the machine is odd", stacklevel=1)
        return 2

    monkeypatch.setattr(full_model, "fastest", found)
    result = search(small, "--batch-size", "auto", "--early-stop", 0.9, "--limit", 4, "--step", 8)
    assert result.exit_code == 0
    assert "The calibration set runs in batches of 2 prompts" in result.stderr
    assert "warning: the machine is odd\n" in result.stderr
    record = Reduction.from_pretrained("thinsight-out").search
    assert record is not None
    assert record["confidence"] == 0.9


def test_an_evaluation_in_the_fastest_batches(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_model, "fastest", lambda *_: 2)
    on_it = ("--model", small.model, "--data", small.test, "--device", "cpu", "--max-new-tokens", 2)
    found, plain = (run("evaluate", *on_it, "--batch-size", size) for size in ("auto", 2))
    assert found.exit_code == 0
    assert "The examples run in batches of 2 prompts" in found.stderr
    assert "run in batches" not in plain.stderr
    assert found.stdout == plain.stdout


def mislabeled(small: SmallRun, source: str) -> str:
    """The same questions, each with a label that no model gives."""
    lines = [json.loads(line) | {"answer": "zzz"} for line in Path(source).read_text().splitlines()]
    path = Path(source).with_name(f"zzz-{Path(source).name}")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "command",
    [
        ("search", "--max-drop", 0.01),
        ("search", "--budget", 0.6),
        ("search", "--frontier", "--max-drop", 0.01),
        ("compare", "--budget", 0.6, "--methods", "fastv"),
    ],
)
def test_a_full_model_that_scores_nothing_is_not_searched(small: SmallRun, command: tuple[object, ...]) -> None:
    on_it = ("--model", small.model, "--device", "cpu", "--max-new-tokens", 2, "--out", "run")
    wrong, wrong_test = mislabeled(small, small.calibration), mislabeled(small, small.test)
    line = error_of(*command, *on_it, "--data", wrong, "--test-data", wrong_test)
    assert "the full model scores 0.0 %" in line
    assert "it says" in line
    assert "the label is 'zzz' (exact_match)" in line
    assert not list(Path("run").rglob("*.json*"))
    if command[1] == "--max-drop":
        mended = run(*command[:2], 0.7, *on_it, "--data", small.calibration, "--test-data", small.test)
        assert mended.exit_code == 0  # into the same folder, without --resume


def test_a_score_of_nothing_is_still_a_result_of_evaluate(small: SmallRun) -> None:
    wrong = mislabeled(small, small.test)
    result = run("evaluate", "--model", small.model, "--data", wrong, "--device", "cpu", "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert "0.0 %" in result.stdout
    assert "Warning: the full model scores 0.0 %" in result.stdout
    assert "the drop says nothing" in " ".join(result.stdout.split())
    assert "no loss could be told" not in result.stdout


def test_a_search_tells_of_a_test_set_that_says_nothing(small: SmallRun) -> None:
    """That set is not looked at before the search is over."""
    wrong = mislabeled(small, small.test)
    on_it = ("--model", small.model, "--device", "cpu", "--max-new-tokens", 2, "--max-drop", 0.7)
    result = run("search", *on_it, "--data", small.calibration, "--test-data", wrong)
    assert result.exit_code == 0
    assert "Warning: on the test set the full model scores 0.0 %" in result.stdout
    assert "Warning: on the test set the full model scores" in run("report").stdout


@pytest.mark.parametrize("command", ["search", "compare", "evaluate"])
def test_batch_sizes_that_are_none(command: str) -> None:
    for size in ("many", "-1", "1.5"):
        assert f"batch_size is '{size}': it must be" in error_of(command, "--batch-size", size)
    line = error_of(command, "--batch-size", "9" * 5000)
    assert line.startswith("error: batch_size is '999")
    assert line.endswith("999': it must be a whole number of at least 1, or 'auto'")
    assert len(line) == len("error: ") + 1000
    assert "batch_size is 0: it must be" in error_of(command, "--batch-size", 0)


def test_a_timed_batch_is_a_number() -> None:
    assert "valid integer" in error_of("bench", "--batch-size", "auto")


# -- everything works ----------------------------------------------------------------------------------------


def test_search_then_everything_else_on_its_folder(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = search(small, "--out", "run")
    assert found.exit_code == 0
    assert "G-Search" in found.stdout
    assert "Report:    run/report.html" in found.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "thinsight search --model" in page  # the report says how it was made

    on_it = ("--reduction", "run", "--model", small.model, "--data", small.test, "--device", "cpu")
    evaluated = run("evaluate", *on_it, "--max-new-tokens", 2)
    assert evaluated.exit_code == 0
    measured = Reduction.from_pretrained("run").measured
    assert measured is not None
    assert f"{100 * measured['score']:.1f} %" in evaluated.stdout

    timed = run("bench", *on_it, "--runs", 1, "--new-tokens", 1, "--batch-size", 2)
    assert timed.exit_code == 0
    assert "Decoder FLOPs of the median prompt" in timed.stdout
    assert "KV cache after prefill, measured" in timed.stdout

    (tmp_path / "run" / "report.html").unlink()
    assert run("report", "run").exit_code == 0
    assert "G-Search" in (tmp_path / "run" / "report.html").read_text()


def test_analyze_writes_a_table_and_a_plot(small: SmallRun, tmp_path: Path) -> None:
    result = run("analyze", "--model", small.model, "--data", small.test, "--out", "plots/tau.html", "--limit", 4)
    assert result.exit_code == 0
    assert "tau" in result.stdout
    assert "<svg" in (tmp_path / "plots" / "tau.html").read_text()


def test_show_draws_a_picture_and_prints_both_answers(small: SmallRun, tmp_path: Path) -> None:
    image = small.folder / "test0.png"
    model = ("--model", small.model, "--device", "cpu")
    result = run("show", image, "what color is the circle ?", *model, "--out", "kept.png", "--max-new-tokens", 2)
    assert result.exit_code == 0
    for words in ("Question:      what color is the circle ?", "Full model:", "Reduced model:", "FastV at 50 %"):
        assert words in result.stdout
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width > 100


def test_the_default_folder_is_found_for_its_own_model_only(small: SmallRun, tmp_path: Path) -> None:
    schedule = Schedule([1.0, 1.0, 0.5, 0.25])
    Reduction(schedule, base_model_name_or_path=small.model).save_pretrained("thinsight-out")
    common = ("--data", small.test, "--runs", 1, "--new-tokens", 1, "--batch-size", 1)
    assert "reduction: thinsight-out" in run("bench", "--model", small.model, *common).stdout
    Reduction(schedule, base_model_name_or_path="another").save_pretrained("thinsight-out")
    assert "reduction: FastV at 50 %" in run("bench", "--model", small.model, *common).stdout


def test_the_default_folder_is_found_for_a_model_that_moved_and_not_for_its_namesake(
    small: SmallRun, tmp_path: Path
) -> None:
    """Both are called "model": what was searched is told by its checkpoint."""
    assert search(small, "--limit", 4, "--step", 16).exit_code == 0
    common = ("--data", small.test, "--runs", 1, "--new-tokens", 1, "--batch-size", 1)
    moved, other = tmp_path / "a" / "renamed", tmp_path / "b" / "model"
    shutil.copytree(small.model, moved)
    shutil.copytree(small.model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2:] = bytes(byte ^ 1 for byte in weights[-2:])  # as a fine-tuned model differs: in weights alone
    (other / "model.safetensors").write_bytes(weights)
    assert "reduction: thinsight-out" in run("bench", "--model", small.model, *common).stdout
    assert "reduction: thinsight-out" in run("bench", "--model", moved, *common).stdout
    assert "reduction: FastV at 50 %" in run("bench", "--model", other, *common).stdout


def test_every_command_runs_without_arguments(small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself is large; here a small one stands in its place."""
    demo = tmp_path / "demo"
    demo.mkdir()
    for name, source in (("calibration", small.calibration), ("test", small.test), ("certification", small.test)):
        lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
        for line in lines:
            line["image"] = str(small.folder / line["image"])
        (demo / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(loading.DEMOS, "demo", Path(small.model))
    monkeypatch.setattr(example_files, "_DEMO_FOLDER", demo)
    for command in ("search", "evaluate", "answer", "bench", "analyze", "show", "report", "plan"):
        result = run(command)
        assert result.exit_code == 0, result.output
    assert Reduction.from_pretrained("thinsight-out").base_model_name_or_path == "demo"
    assert (tmp_path / "thinsight-kept.png").exists()
    assert (tmp_path / "thinsight-analysis.html").exists()


def test_version_and_help() -> None:
    assert run("--version").stdout == f"thinsight {__version__}\n"
    for arguments in ((), ("--help",)):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "evaluate" in result.stdout
    assert "--max-drop" in run("search", "--help").stdout


# -- mistakes ------------------------------------------------------------------------------------------------


def test_the_help_of_a_command_with_many_options_has_headings_and_examples() -> None:
    lines = run("search", "--help").stdout.splitlines()
    headings = [line for line in lines if line and not line.startswith((" ", "Usage"))]
    groups = ["Model", "Data", "What is asked for", "Search", "Scoring", "More than one device"]
    assert headings == ["Options:", *(f"{group}:" for group in groups), "Examples:"]
    for example in _EXAMPLES["search"]:
        assert f"  {example}" in lines  # whole, to be copied
    assert "Examples:" not in run("models", "--help").stdout
    assert "Model:" not in run("plan", "--help").stdout  # few options need none
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {parameter.name for command in commands.values() for parameter in command.params}
    assert {name for names in _GROUPS.values() for name in names} <= known
    assert set(_EXAMPLES) <= set(commands)
    for name, command in commands.items():  # no option is lost under the headings
        told = run(name, "--help").stdout
        assert all(parameter.opts[0] in told for parameter in command.params)


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("serve", "Options, Model, Server, Limits, Images by address, Examples"),
        ("data", "Arguments, Options, Model, Data, Scoring, Examples"),
        ("answer", "Options, Model, Data, Scoring, More than one device, Examples"),
        ("check", "Options, Model, Examples"),
        ("push", "Arguments, Options, Examples"),
        ("plan", "Options, Examples"),
    ],
)
def test_headings_of_commands(command: str, headings: str) -> None:
    told = run(command, "--help").stdout
    assert ", ".join(re.findall(r"^(\w[\w ]*):$", told, re.M)) == headings
    assert told.split("Options:")[1].split("\n\n")[0].splitlines()[-1].startswith("  --help")  # the last one


def test_options_stand_under_their_headings() -> None:
    told = run("serve", "--help").stdout
    limits = told.split("Limits:")[1].split("\n\n")[0]
    assert re.findall(r"^  (--[\w-]+)", limits, re.M) == [f"--{name.replace('_', '-')}" for name in _GROUPS["Limits"]]


@pytest.mark.parametrize("words", [words for lines in _EXAMPLES.values() for words in lines])
def test_examples_of_the_help_are_command_lines(words: str) -> None:
    command = typer.main.get_command(app)
    name, *rest = shlex.split(words)[1:]
    with command.make_context("thinsight", [name], resilient_parsing=True) as context:
        own = command.commands[name]  # type: ignore[attr-defined]
        own.make_context(name, rest, parent=context)


def test_shells_complete_commands_and_options() -> None:
    def complete(line: str) -> list[str]:
        asked = {"_THINSIGHT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        told = subprocess.run(
            [sys.executable, "-m", "thinsight"],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            check=False,
        )
        return told.stdout.split()

    assert complete("thinsight sea") == ["search"]
    assert set(complete("thinsight search --max-")) == {"--max-drop", "--max-new-tokens"}


def test_unknown_commands_and_options_are_one_line() -> None:
    for arguments in (["serch"], ["search", "--max-dorp", "1"], ["search", "--seed", "x"], ["bench", "--runs", "0"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "thinsight --help" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search", "--model", "./nowhere"), "neither a folder that exists nor a hub id"),
        (("search", "--dtype", "int3"), "dtype is 'int3'"),
        (("search", "--device", "tpu9"), "device is 'tpu9'"),
        (("search", "--attn", "none"), "attn is 'none'"),
        (("search", "--data", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
        (("search", "--max-drop", "-1"), "max_drop is -1.0"),
        (("search", "--ranker", "oracle"), "ranker is 'oracle'"),
        (("search", "--ranker", "random:seed"), "write settings as name:key=value"),
        (("search", "--ranker", "random:seed=1,seed=2"), "each key once"),
        (("search", "--ranker", "random:=1"), "write settings as name:key=value"),
        (("search", "--ranker", "random:seed=--1"), "ranker 'random': seed is '--1'"),
        (("compare", "--ranker", "visionzip:keep=2"), "ranker 'visionzip': keep is 2"),
        (("search", "--first-layer", "99"), "first_layer is 99 but the model has layers 0 to 3"),
        (("search", "--first-layer", "0"), "first_layer is 0, but ranker 'text-attention'"),
        (("search", "--attn", "flash_attention_2"), "use --attn sdpa"),
        (("search", "--model", "x" * 5000), "name too long"),
        (("search", "--out", "x" * 5000), "name too long"),
        (("search", "--ranker", "text-attention:queries=first"), "queries is 'first'"),
        (("search", "--metric", "vibes"), "metric is 'vibes'"),
        (("evaluate", "--reduction", "./nowhere"), "there is no folder"),
        (("evaluate", "--metric", "vibes"), "metric is 'vibes'"),
        (("evaluate", "--cache-gib", "nan"), "cache_gib is nan"),
        (("search", "--cache-gib", "-1"), "cache_gib is -1.0"),
        (("bench", "--data", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
        (("analyze", "--data", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
        (("show", "picture.png"), "without a question"),
        (("show", "picture.png", "what ?"), "'picture.png' does not exist: give the path of an image file"),
        (("show", "picture.png", "what ?", "--out", "kept.xyz"), "does not end like a picture"),
        (("show", "picture.png", "what ?", "--out", "kept"), "does not end like a picture"),
        (("report", "nowhere"), "no report.json in nowhere"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], words: str, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.DEMOS, "demo", Path(small.model))
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", None)  # found before any weight is loaded
    assert words.lower() in error_of(*arguments).lower()


@pytest.mark.parametrize(
    ("text", "ranker"),
    [
        ("random", {"name": "random"}),
        ("random:seed=3", {"name": "random", "seed": 3}),
        ("visionzip:keep=0.25", {"name": "visionzip", "keep": 0.25}),
        ("visionzip: keep = 2.5e-1 , contextual=0", {"name": "visionzip", "keep": 0.25, "contextual": 0}),
        ("cdpruner:invert=true", {"name": "cdpruner", "invert": True}),
        ("text-attention:rows=null,queries=last", {"name": "text-attention", "rows": None, "queries": "last"}),
        ('text-attention:queries="last",rows=8', {"name": "text-attention", "rows": 8, "queries": "last"}),
        ("staged:first=random,then=text-attention", {"name": "staged", "first": "random", "then": "text-attention"}),
        (
            'staged:first={"name": "random", "seed": 1},then=uniform',
            {"name": "staged", "first": {"name": "random", "seed": 1}, "then": "uniform"},
        ),
    ],
)
def test_settings_of_a_ranker_are_json_or_words(text: str, ranker: dict[str, Any]) -> None:
    assert ranker_of(text) == ranker
    assert get_ranker(ranker).name == ranker["name"]


def test_every_setting_of_every_ranker_can_be_said_and_is_named_when_it_is_wrong() -> None:
    for name in list_rankers():
        whole = get_ranker(name).to_dict() | ({"rows": None} if name == "text-attention" else {})
        for key, value in whole.items():
            if key != "name":
                said = f"{name}:{key}={json.dumps(value)}"
                assert get_ranker(ranker_of(said)).to_dict()[key] == value, said
                for wrong in ("nonsense", "-1", "1.5", "NaN", "1e999", "[]", "", "9" * 5000):
                    line = error_of("search", "--ranker", f"{name}:{key}={wrong}")
                    assert line.startswith(f"error: ranker {name!r}: {key}"), line
        assert f"ranker {name!r} has no setting 'colour'" in error_of("search", "--ranker", f"{name}:colour=1")


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("search --data=./nowhere --out={}", True),
        ("search --data=./nowhere --cache-dir={}", True),
        ("compare --data=./nowhere --out={}", True),
        ("analyze --data=./nowhere --out={}", True),
        ("show ./nowhere what? --out={}", True),
        ("convert . --out={}", True),
        ("search --budget=0.5 --start={}", False),
        ("search --data={}", False),
        ("search --data=demo:test --test-data={}", False),
        ("search --model={}", False),
        ("evaluate --reduction={}", False),
        ("show {} what?", False),
        ("report {}", False),
        ("convert {} --out=x", False),
    ],
)
def test_a_path_may_begin_with_ones_own_home_alone(
    line: str, writes: bool, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command fails for another reason too; no folder is named after the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(loading.DEMOS, "demo", Path(small.model))
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", None)
    error_of(*line.format("~/here/x.png").split())
    assert (tmp_path / "home" / "here").exists() == writes
    refused = error_of(*line.format("~nouser/x.png").split())
    assert "~nouser/x.png" in refused
    assert not writes or "'~nouser/x.png' begins with a user who has no home here" in refused
    assert not [path for path in tmp_path.rglob("*") if "~" in path.name]


def test_unwritable_outputs(small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = ("--model", small.model)
    assert "is a file" in error_of("search", *model, "--out", "file")
    assert "cannot be written" in error_of("analyze", *model, "--out", "file/plot.html")
    assert "is a folder" in error_of("show", *model, "--out", tmp_path)


def test_a_damaged_or_unfitting_reduction(small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", None)  # found before any weight is loaded
    model = ("--model", small.model, "--data", small.test)
    Reduction(Schedule.full(9)).save_pretrained("nine")
    assert "has 9 layers but model" in error_of("evaluate", *model, "--reduction", "nine")
    Reduction(Schedule.full(4), model_type="other").save_pretrained("other")
    assert "is for model type 'other'" in error_of("bench", *model, "--reduction", "other")
    Reduction(Schedule.full(4), ranker="oracle").save_pretrained("oracle")
    assert "the reduction oracle: ranker is 'oracle'" in error_of("bench", *model, "--reduction", "oracle")
    Reduction(Schedule.step(4, 0, 0.5)).save_pretrained("early")
    assert "keep_rates[0] is 0.5" in error_of("evaluate", *model, "--reduction", "early")
    config = tmp_path / "nine" / "reduction_config.json"
    config.write_text(config.read_text()[:40])
    assert "not valid JSON" in error_of("evaluate", *model, "--reduction", "nine")


def test_a_metric_that_needs_answers_is_refused_before_weights(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", None)
    lines = [json.loads(line) for line in Path(small.test).read_text().splitlines()]
    bare = [{"id": line["id"], "image": line["image"], "question": line["question"]} for line in lines]
    data = small.folder / "bare.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in bare))
    options = ("--model", small.model, "--data", data, "--metric", "exact_match")
    assert "has no answer, which metric 'exact_match' needs" in error_of("evaluate", *options)
    assert "has no answer, which metric 'exact_match' needs" in error_of("search", *options)


def test_no_error_moves_the_cursor_or_fills_the_screen() -> None:
    line = error_of("evaluate", "--model", "a\x1b[2Jb")
    assert "model 'a\\x1b[2Jb' is" in line
    line = error_of("report", "x\x1b]0;owned\x07/" + "y" * 5000)
    assert "\x1b" not in line
    assert "\x07" not in line
    for option in ("--dtype", "--no-such-option-", "--metric"):
        assert len(error_of("evaluate", option, "z" * 500_000)) < 1100
    assert len(error_of("evaluate", "--" + "z" * 500_000)) < 1100


def test_what_is_printed_does_not_move_the_cursor(small: SmallRun) -> None:
    Reduction(Schedule.full(4)).save_pretrained("kept\x1b[2J")
    result = run("show", "--model", small.model, "--reduction", "kept\x1b[2J", "--out", "p\x1b[1m.png")
    assert result.exit_code == 0
    assert "Reduction:     kept\\x1b[2J\n" in result.stdout
    assert "Picture:       p\\x1b[1m.png\n" in result.stdout
    assert "\x1b" not in result.output


def test_trouble_with_the_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr("thinsight.report.data.load_report_data", full)
    assert error_of("report") == "error: report.html: No space left on device; check the path and the disk"


def test_a_second_search_needs_resume(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("thinsight.job.pipeline.measure", interrupted)
        first = search(small, "--out", "my run")
    assert first.exit_code == 130
    last = first.stderr.strip().split("\n")[-1]
    assert last.startswith("interrupted: what is done is kept; continue with `thinsight search --model")
    assert "--out 'my run' --resume`" in last
    assert "holds a search already" in search(small, "--out", "my run").stderr
    assert search(small, "--out", "my run", "--resume").exit_code == 0


def test_ctrl_c_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thinsight.report.data.load_report_data", interrupted)
    result = run("report")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


# -- as a process --------------------------------------------------------------------------------------------


def process(*arguments: str, path: str = str(ROOT / "src")) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_as_a_process() -> None:
    result = process("-m", "thinsight", "report", "./nowhere")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no report.json in nowhere")
    assert result.stderr.count("\n") == 1


def test_help_names_every_search() -> None:
    told = " ".join(run("search", "--help").stdout.replace("│", " ").split())
    assert f"{', '.join(SEARCHES)}. Default: gsearch, for a budget sensitivity." in told


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from thinsight.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'optuna') if name in sys.modules])"
    )
    assert process("-c", code).stdout.strip().split("\n")[-1] == "[]"
