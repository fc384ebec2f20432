"""Options on the command line: every one is taken, or refused by name before any data or model is read.

Which options there are is read from the command itself; which search takes which is written down here.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun
from typer.testing import CliRunner

from thinsight import Reduction, Schedule, cli, loading
from thinsight.errors import BadInput
from thinsight.job import options as told
from thinsight.job.options import ModelOptions, SearchOptions
from thinsight.searches.search import FRONTIER, under_budget
from thinsight.searches.search import SEARCHES as NAMED

COMMANDS: dict[str, Any] = {
    str(command.name or command.callback.__name__): command.callback
    for command in cli.app.registered_commands
    if command.callback is not None
}
BAD_NUMBERS = ("nan", "inf", "-inf", "-1", "x", "1e999")

# How each search is asked for, and a value that each option could have.
SEARCHES = {
    "gsearch": {"method": "gsearch"},
    "gsearch, bayes": {"method": "gsearch", "solver": "bayes"},
    "frontier": {"frontier": True},
    "frontier, budget": {"frontier": True, "budget": 0.5},
    **{name: {"method": name, "budget": 0.5} for name in under_budget()},
    "budget": {"budget": 0.5},
}
VALUES = {
    "early_stop": 0.9,
    "first_layer": 2,
    "n_trials": 12,
    "solver": "bisect",
    "start": "start",
    "step": 4,
    "trade_off": 0.5,
    "max_drop": 0.1,
    "budget": 0.5,
    "budget_unit": "keep",
    "ranker": "uniform",
    "seed": 3,
}
ANY = {"ranker", "seed"}
UNDER_A_BUDGET = {"budget", "budget_unit", "first_layer", "n_trials", *ANY}
TAKEN = {
    "gsearch": {"early_stop", "first_layer", "max_drop", "solver", "step", *ANY},
    "gsearch, bayes": {"first_layer", "max_drop", "n_trials", "solver", "trade_off", *ANY},
    "frontier": {"max_drop", "n_trials", "budget", *ANY},
    "frontier, budget": {"n_trials", "budget", "budget_unit", *ANY},
    "adaptive": {"start", *UNDER_A_BUDGET},
    "psigmoid": {"start", *UNDER_A_BUDGET},
    "random": UNDER_A_BUDGET,
    "sensitivity": {"start", *UNDER_A_BUDGET},
    "budget": {"start", *UNDER_A_BUDGET},
}


@pytest.fixture(autouse=True)
def _nothing_is_read(tmp_path: Path, small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, where no data is read and no weights are."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("data or weights are read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(loading.DEMOS, "demo", Path(small.model))
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", None)
    for module in (
        "opening.load_examples",
        "opening.read_examples",
        "commands.load_examples",
        "commands.read_examples",
    ):
        monkeypatch.setattr(f"thinsight.job.{module}", refuse)
    Reduction(Schedule([1, 1, 0.5, 0.5])).save_pretrained("start")


def error_of(*arguments: object) -> str:
    """The one line that a refused command prints; it leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert sorted(Path().rglob("*")) == before
    return result.stderr.strip()


def options_of(command: str, *kinds: type) -> Iterator[tuple[str, str]]:
    """The options and arguments of a command whose values are of these types: each one's name in the code and
    on the command line."""
    for name, hint in typing.get_type_hints(COMMANDS[command], include_extras=True).items():
        if hint is type(None) or name == "context":
            continue
        value, about = typing.get_args(hint)
        flat = {value, *typing.get_args(value)}
        flat |= {inner for each in flat for inner in typing.get_args(each)}  # list[float] | None
        if flat & set(kinds):
            declared = (about.default, *(about.param_decls or ()))
            yield name, next((each for each in declared if str(each).startswith("--")), name)


def said(option: str, value: str) -> list[str]:
    """An option or argument with a value, the argument before it with one of its own."""
    if option.startswith("--"):
        return [f"{option}={value}"]
    return ["x"] * (option in ("question", "repo")) + [value]


# -- which search takes what ---------------------------------------------------------------------------------


def test_the_table_has_every_search_and_every_option_that_one_of_them_lacks() -> None:
    assert {name.split(",")[0] for name in SEARCHES} == {"gsearch", "frontier", "budget", *under_budget()}
    assert set(TAKEN) == set(SEARCHES)
    assert set(told._NOT_OF_ALL) <= set(VALUES)
    assert set(told._PARAMETERS) <= set(told._NOT_OF_ALL)
    own = {"evaluator", "budgets", "study", "resume", "observer", "rankers", "amplitude", "floor"}
    for search in (FRONTIER, *NAMED.values()):
        names = set(search.parameters) - own
        assert names - {"warm_start", "confidence"} <= set(VALUES), search


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("option", VALUES)
def test_an_option_is_taken_or_refused_by_name(search: str, option: str, small: SmallRun) -> None:
    given: dict[str, Any] = {**SEARCHES[search], option: VALUES[option]}
    if search == "gsearch, bayes" and option == "solver":
        given["solver"] = "bayes"
    options = SearchOptions(model=ModelOptions(small.model, device="cpu"), **given)
    if option in TAKEN[search]:
        options.check()
    else:
        with pytest.raises(BadInput, match=option):
            options.check()
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()
        ]
        assert option in error_of("search", *flags)


@pytest.mark.parametrize("search", ["adaptive", "frontier", "psigmoid", "random", "sensitivity", "gsearch, bayes"])
def test_too_few_trials_are_refused_at_once(search: str, small: SmallRun) -> None:
    options = SearchOptions(model=ModelOptions(small.model, device="cpu"), **SEARCHES[search])
    least = options.search.least_trials
    replace(options, n_trials=least).check()
    with pytest.raises(BadInput, match=f"n_trials is {least - 1}: "):
        replace(options, n_trials=least - 1).check()


@pytest.mark.parametrize("name", ["frontier", *under_budget()])
def test_the_fewest_trials_are_those_that_the_search_itself_asks_for(name: str) -> None:
    search = FRONTIER if name == "frontier" else NAMED[name]
    least = search.least_trials
    with pytest.raises(BadInput, match=f"n_trials is {least - 1}; it must be a whole number of at least {least}"):
        search(None, None, n_trials=least - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-drop", 5), "max_drop is 5.0, but scores lie between 0 and 1: give points as hundredths, 0.05"),
        (("--budget-unit", "furlongs"), "budget_unit is 'furlongs' without a budget"),
        (("--budget", 0.5, "--budget-unit", "furlongs"), "budget_unit is 'furlongs'; choose one of"),
        (("--trade-off", "nan"), "trade_off is nan, which solver 'bisect' does not take"),
        (("--trade-off", "nan", "--solver", "bayes"), "trade_off is nan; it must be"),
        (("--budget", 0.5, "--n-trials", 1), "n_trials is 1: Sensitivity search needs at least 8"),
        (("--max-drop", 0.1, "--n-trials", 9), "n_trials is 9, which solver 'bisect' does not take"),
        (("--budget", 0.5, "--solver", "bayes"), "solver is 'bayes', which Sensitivity search does not take"),
        (("--frontier", "--first-layer", 1), "first_layer is 1, which Frontier does not take"),
        (("--frontier", "--budget", 0.01), "budget is 0.01: a frontier begins at a mean keep rate of 0.05"),
        (("--budget", 0.5, "--ranker", "auto:queries=last"), "'auto' has no settings"),
        (("--budget", 0.5, "--ranker", "oracle"), "ranker is 'oracle'"),
        (("--seed", 2**31), "seed is 2147483648"),
        (("--test-data", "x.jsonl"), "--test-data needs --data"),
    ],
)
def test_a_search_that_cannot_be_meant(arguments: tuple[object, ...], words: str) -> None:
    assert words in error_of("search", *arguments)


def test_options_that_the_compared_methods_do_not_take() -> None:
    assert "n_trials is 9, which only searches take" in error_of("compare", "--methods=fastv", "--n-trials=9")
    line = error_of("compare", "--methods=search-random,fastv", "--ranker=uniform")
    assert "ranker is {'name': 'uniform'}, which only search-psigmoid takes" in line
    assert "seeds are (0, 1)" in error_of("compare", "--methods=fastv", "--seeds=2")
    assert "'--seeds'" in error_of("compare", "--methods=random", f"--seeds={10**30}")
    assert "n_trials is 8: Sensitivity search, adaptive" in error_of("compare", "--n-trials=8")
    assert "budget_unit is 'ms', and the default budgets" in error_of("compare", "--budget-unit=ms")


def test_a_large_drop_is_allowed_with_a_warning() -> None:
    assert SearchOptions(max_drop=0.2).warning == ""
    assert "lets the score fall by 50 points; 0.005 is 0.5 points" in SearchOptions(max_drop=0.5).warning


# -- every option of every command ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_empty_values_are_refused(command: str) -> None:
    for _, option in options_of(command, str, Path, int, float):
        for empty in ("", " "):
            line = error_of(command, *said(option, empty))
            assert line == f"error: {option} is {empty!r}, which is empty: give a value, or leave it out"


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_that_are_none_are_refused_by_name(command: str) -> None:
    for name, option in options_of(command, int, float):
        for number in BAD_NUMBERS:
            others = ["--solver=bayes"] * (name == "trade_off")
            line = error_of(command, *others, *said(option, number))
            assert name in line or option in line, line


def test_the_commands_have_the_numbers_and_texts_that_they_are_thought_to_have() -> None:
    """So that the two tests above look at something."""
    numbers = {(command, name) for command in COMMANDS for name, _ in options_of(command, int, float)}
    wanted = {
        ("search", "max_drop"),
        ("search", "confidence"),
        ("plan", "agreement"),
        ("compare", "budget"),
        ("bench", "runs"),
    }
    assert wanted <= numbers
    texts = {(command, name) for command in COMMANDS for name, _ in options_of(command, str, Path)}
    assert {("search", "data"), ("search", "out"), ("show", "image"), ("convert", "source")} <= texts
