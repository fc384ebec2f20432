"""A model whose type is not listed runs where a check of it has passed, and nowhere else; every refusal says how."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conformance.families import FAMILIES
from conformance.refused import REFUSED
from planted import FAULTS
from safetensors.torch import save_file
from tiny import tiny_llava, tiny_processor
from typer.testing import CliRunner

import thinsight as ts
from thinsight import checked, cli
from thinsight.errors import BadInput, StorageError, Unsupported
from thinsight.job.opening import check_unlisted
from thinsight.runtime import anatomy
from thinsight.schedule import Schedule

HALF = Schedule([1, 0.7, 0.4, 0.2])
CODE = """
from transformers import LlavaConfig, LlavaForConditionalGeneration


class TheirConfig(LlavaConfig):
    model_type = "their_vl"


class TheirModel(LlavaForConditionalGeneration):
    config_class = TheirConfig
"""


@pytest.fixture(autouse=True)
def _nothing_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_passed", set())
    monkeypatch.setenv("THINSIGHT_CACHE", str(tmp_path / "cache"))


def outside() -> Any:
    """A model of a type that is not listed: LLaVA under another name."""
    model = tiny_llava()
    model.config.model_type = "outside"
    return model


@pytest.fixture(scope="module")
def passed() -> ts.CheckResult:
    result = ts.check(outside())
    assert result.passed
    return result


@pytest.fixture(scope="module")
def their(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that brings its own code."""
    folder = tmp_path_factory.mktemp("their")
    model = tiny_llava()
    model.config.save_pretrained(folder)
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, folder / "model.safetensors")
    tiny_processor().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["model_type"], config["architectures"] = "their_vl", ["TheirModel"]
    config["auto_map"] = {"AutoConfig": "their.TheirConfig", "AutoModelForImageTextToText": "their.TheirModel"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "their.py").write_text(CODE, "utf-8")
    return folder


def refused(model: Any, **options: Any) -> str:
    """What `apply` says, which leaves no hook behind."""
    with pytest.raises(ts.ThinsightError) as error:
        ts.apply(model, HALF, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())
    return str(error.value)


def test_without_a_check_it_is_refused_and_told_how_to_check() -> None:
    for options in ({}, {"unlisted": True}):
        assert "`thinsight check --model ...`" in refused(outside(), **options)
    assert "no check of it has passed" in refused(outside(), unlisted=True)


def test_a_check_that_passed_in_this_process_lets_it_run_if_it_is_asked_for() -> None:
    model = outside()
    assert ts.check(model).passed
    assert "model_type is 'outside'" in refused(model)
    with ts.apply(model, HALF, unlisted=True) as handle:
        assert handle.on
    ts.apply(model, HALF).remove()  # it was let in
    refused(outside())
    ts.apply(outside(), HALF, unlisted=True).remove()


def test_a_check_that_fails_lets_nothing_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = outside()
    assert ts.check(model).passed
    with monkeypatch.context() as patch:
        FAULTS["one extra token kept"][0](patch)
        result = ts.check(model)
    assert not result.passed
    assert "no check of it has passed" in refused(model, unlisted=True)
    path = result.save(tmp_path / "failed.json")
    assert "says that this model fails: one prompt" in refused(model, unlisted=path)
    result.store()
    refused(model)


def test_a_stored_result_lets_it_run_without_a_word(passed: ts.CheckResult) -> None:
    path = passed.store()
    assert path.parent == checked.cache_folder()
    ts.apply(outside(), HALF).remove()
    path.unlink()
    refused(outside())


def test_a_result_by_path_lets_it_run(passed: ts.CheckResult, tmp_path: Path) -> None:
    model = outside()
    ts.apply(model, HALF, unlisted=passed.save(tmp_path / "check.json")).remove()
    assert "is missing" in refused(outside(), unlisted=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_class", "somewhere.Else"),
        ("transformers", "5.0.0"),
        ("thinsight", "0.0.1"),
        ("attention", "eager"),
        ("layers", ("conv",)),
        ("code", "0123456789abcdef"),
    ],
)
def test_a_result_holds_for_what_it_names(passed: ts.CheckResult, tmp_path: Path, field: str, value: Any) -> None:
    other = replace(passed, identity=replace(passed.identity, **{field: value}))
    assert f"its {field} is" in refused(outside(), unlisted=other.save(tmp_path / "other.json"))
    other.store()
    refused(outside())


def test_a_result_under_another_name_is_not_believed(passed: ts.CheckResult) -> None:
    """A file that was renamed by hand to look like this model's."""
    other = replace(passed, identity=replace(passed.identity, transformers="5.0.0"))
    other.store().rename(checked.cache_folder() / passed.identity.file_name)
    refused(outside())


def test_a_damaged_result_is_an_error_and_no_pass(passed: ts.CheckResult) -> None:
    path = passed.store()
    path.write_text(path.read_text("utf-8").replace("outside", "inside"), "utf-8")
    with pytest.raises(StorageError, match="damaged"):
        ts.apply(outside(), HALF)


def test_what_can_never_run_is_refused_whatever_is_said(passed: ts.CheckResult, tmp_path: Path) -> None:
    for name in ("florence2", "mllama"):
        build, message = REFUSED[name]
        for unlisted in (True, passed.save(tmp_path / "check.json")):
            with pytest.raises(Unsupported, match=message):
                ts.apply(build(), HALF, unlisted=unlisted)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda model: setattr(model.config, "image_token_id", [4, 5]), r"image_token_id is \[4, 5\]"),
        (lambda model: setattr(model.config, "image_token_id", None), "has no image_token_id"),
        (lambda model: setattr(model.config, "video_token_id", 4), "counted twice"),
        (lambda model: setattr(model.get_decoder().config, "num_hidden_layers", 9), "num_hidden_layers is 9"),
        (lambda model: setattr(model, "get_decoder", lambda: model), "which has no list `layers`"),
    ],
    ids=["several ids", "no id", "one id for two", "layers", "a decoder with its head"],
)
def test_odd_parts_are_named(odd: Any, message: str) -> None:
    model = outside()
    odd(model)
    with pytest.raises(Unsupported, match=message):
        ts.apply(model, HALF, unlisted=True)
    result = ts.check(model)
    assert not result.passed
    assert len(result.failures) == 1
    assert re.search(message, result.failures[0].note)


# --- the command, and code that a checkpoint brings


def run(*line: str) -> Any:
    return CliRunner().invoke(cli.app, ["check", "--device", "cpu", *line], catch_exceptions=False)


def test_code_of_a_checkpoint_is_checked_and_then_runs(their: Path, tmp_path: Path) -> None:
    given = ("--model", str(their), "--trust-remote-code")
    with pytest.raises(BadInput, match=r"model_type is 'their_vl'.*thinsight check"):
        ts.load_model(their, device="cpu", trust_remote_code=True)
    found = run(*given, "--json", "--out", str(tmp_path / "check.json"))
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["passed"] is True
    assert said["identity"]["model_type"] == "their_vl"
    assert said["identity"]["code"]
    assert ts.CheckResult.load(tmp_path / "check.json").passed
    model, _ = ts.load_model(their, device="cpu", trust_remote_code=True)  # for a check of its class is stored
    ts.apply(model, HALF).remove()


def test_code_that_has_changed_is_not_what_was_checked(their: Path, tmp_path: Path) -> None:
    model, processor = ts.load_model(their, device="cpu", trust_remote_code=True, unlisted=True)
    result = ts.check(model, processor)
    assert result.passed
    other = replace(result, identity=replace(result.identity, code="0" * 16))
    assert "its code is" in refused(model, unlisted=other.save(tmp_path / "other.json"))


def test_unlisted_on_a_command_checks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = outside()
    check_unlisted(model, tiny_processor())
    assert len(list(checked.cache_folder().glob("*.json"))) == 1
    ts.apply(model, HALF).remove()
    monkeypatch.setattr("thinsight.job.opening.check", lambda *_: pytest.fail("it is checked again"))
    check_unlisted(outside(), tiny_processor())
    check_unlisted(FAMILIES["llava"].model(), tiny_processor())  # which is listed


def test_unlisted_on_a_command_is_refused_where_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["each token counted twice"][0](monkeypatch)
    with pytest.raises(Unsupported, match=r"fails its check: vision tokens are counted once \(it counts 32"):
        check_unlisted(outside(), tiny_processor())
    assert not checked.cache_folder().exists()


def test_the_command_says_so_by_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llava().save_pretrained(tmp_path / "model")
    found = run("--model", str(tmp_path / "model"))  # it has no processor
    assert found.exit_code == 0, found.output
    assert "random pixels" in found.stdout
    FAULTS["one extra token kept"][0](monkeypatch)
    found = run("--model", str(tmp_path / "model"), "--no-processor")
    assert found.exit_code == 1
    assert "fails" in found.stdout


def test_help_has_an_example() -> None:
    assert "Examples: thinsight check --model" in " ".join(run("--help").stdout.split())
