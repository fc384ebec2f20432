"""Hostile command lines: one line and exit code 2, or a command that goes as far as to load the model."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from thinsight import cli
from thinsight.errors import BadInput

from .strategies import texts

fuzz = settings(settings.get_profile("fuzz"))

SENSIBLE = (
    "0.25",
    "1",
    "4",
    "16",
    "demo",
    "demo-internvl",
    "demo:test",
    "keep",
    "gsearch",
    "sensitivity",
    "sdpa",
    "cpu",
)
REACHED = "this is where weights would be loaded"


@cache
def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, each with any value."""
    name = draw(st.sampled_from(sorted(_commands())))
    line = [name]
    values = st.one_of(st.sampled_from(SENSIBLE), texts)
    parameters = _commands()[name].params
    for parameter in draw(st.lists(st.sampled_from(parameters), max_size=4)) if parameters else ():
        if parameter.param_type_name == "argument":
            line.append(draw(values))
        else:
            flag = parameter.opts[0]
            joined = draw(st.booleans())
            if parameter.is_flag:
                line.append(flag)
            else:
                value = draw(values)
                line += [f"{flag}={value}"] if joined else [flag, value]
    return line


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise BadInput(REACHED)

    for module in ("thinsight.job.opening", "thinsight.loading"):
        monkeypatch.setattr(f"{module}.load_model", reached)
    monkeypatch.setattr("thinsight.convert.convert", reached)


@fuzz
@given(command_lines())
def test_command_lines(line: list[str]) -> None:
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            result = CliRunner().invoke(cli.app, line)
        finally:
            os.chdir(before)
        left = [path for path in Path(folder).rglob("*") if path.name.endswith(".part")]
    assert result.exception is None or isinstance(result.exception, SystemExit), line
    assert result.exit_code in (0, 2), line
    if result.exit_code == 2:
        last = result.stderr.rstrip("\n").split("\n")[-1]
        assert last.startswith("error: "), line
        assert len(last) < 2000, line
        assert not any(ord(each) < 32 for each in last), line
    assert left == []
