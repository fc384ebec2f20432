"""`thinsight.check` passes on models that run rightly, leaves them as they were, and finds planted faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import Family
from conformance.refused import REFUSED
from planted import FAULTS
from tiny import tiny_inputs, tiny_llava
from torch import nn
from transformers.models.llama import modeling_llama

import thinsight as ts
from thinsight.checked import FAILS, NOT_CHECKED, PASSES
from thinsight.errors import StorageError, Unsupported
from thinsight.schedule import Schedule

HALF = Schedule([1, 0.7, 0.4, 0.2])


def shown(result: ts.CheckResult) -> str:
    """What failed, for a test that fails."""
    return "; ".join(f"{line.name}: {line.note} {line.difference}" for line in result.failures)


@for_each()
def test_it_passes_on_every_family(family: Family) -> None:
    """From the config alone, random weights; what a prompt of each kind gives is measured, not skipped."""
    result = ts.check(family.build())
    assert result.passed, shown(result)
    missing = [line.name for line in result.lines if line.state == NOT_CHECKED]
    assert set(missing) <= {"videos", "a second turn, an image"}
    assert result.noise is not None
    assert 0 < result.noise < 1e-4
    assert result.dtype == "float32"


def test_it_passes_with_a_processor_and_leaves_the_model_as_it_was(llava: Any, processor: Any) -> None:
    inputs = tiny_inputs([[3, 5], [2, 3, 4]])
    llava.generate(**inputs, max_new_tokens=2)  # which leaves a mark of its own on a module
    before = [(list(m._forward_pre_hooks), list(m._forward_hooks), sorted(vars(m))) for m in llava.modules()]
    with torch.no_grad():
        stock = llava(**inputs).logits
        result = ts.check(llava.train(), processor)
        assert llava.training
        again = llava.eval()(**inputs).logits
    assert result.passed, shown(result)
    assert "LlavaProcessor" in result.inputs
    assert torch.equal(stock, again)
    assert llava.config._attn_implementation == "sdpa"
    assert [(list(m._forward_pre_hooks), list(m._forward_hooks), sorted(vars(m))) for m in llava.modules()] == before


@pytest.mark.conformance
@pytest.mark.parametrize("name", ["demo", "demo-internvl"])
def test_it_passes_on_the_embedded_models(name: str) -> None:
    model, processor = ts.load_demo(name=name)
    for given in (processor, None):
        result = ts.check(model, given)
        assert result.passed, shown(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_are_measured_against_the_resolution_of_the_dtype(dtype: torch.dtype) -> None:
    result = ts.check(tiny_llava().to(dtype))
    assert result.passed, shown(result)
    assert result.noise is not None
    assert result.noise > torch.finfo(dtype).eps / 100
    line = next(line for line in result.lines if line.name == "a padded batch")
    assert line.tolerance is not None
    assert line.tolerance >= 2 * torch.finfo(dtype).eps


def test_a_trained_model_passes_in_bfloat16() -> None:
    """Of which rounding changes more than of random weights."""
    model, _ = ts.load_demo(name="demo-internvl")
    result = ts.check(model.to(torch.bfloat16))
    assert result.passed, shown(result)
    assert result.dtype == "bfloat16"


class RoundingInputs(nn.Linear):
    """int8 weights, and inputs in 511 steps up to the largest of the batch, as dynamic quantisers take them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.register_buffer("scale", linear.weight.detach().abs().amax() / 127)
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        step = input.abs().amax() / 511
        return nn.functional.linear((input / step).round() * step, self.weight * self.scale, self.bias)


def quantise(model: Any) -> Any:
    for layer in model.get_decoder().layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, RoundingInputs(getattr(layer.mlp, name)))
    return model


def test_layers_that_round_their_inputs_are_measured_by_that() -> None:
    model = quantise(tiny_llava())
    result = ts.check(model)
    assert result.passed, shown(result)
    assert result.dtype == "float32"
    assert result.noise is not None
    assert result.noise > 1e-3  # more than float32 is allowed


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found_in_quantised_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, line = FAULTS[name]
    plant(monkeypatch)
    failures = ts.check(quantise(tiny_llava())).failures
    assert line in [each.name for each in failures]


def test_what_eager_attention_rounds_is_no_fault(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights can be read of that alone, and in float16 it may round far more than what the model runs."""
    exact = modeling_llama.eager_attention_forward

    def coarse(*args: Any, **more: Any) -> Any:
        output, weights = exact(*args, **more)
        return output + 3e-4 * output.cos(), weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", coarse)
    result = ts.check(llava)
    assert result.passed, shown(result)
    [line] = [line for line in result.lines if line.name == "ranked by text attention"]
    assert line.difference is not None
    assert line.difference > 1e-4  # which the other lines are not allowed


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_decoders_of_any_depth(layers: int) -> None:
    result = ts.check(tiny_llava(layers=layers))
    assert result.passed, shown(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, llava: Any) -> None:
    plant, line = FAULTS[name]
    plant(monkeypatch)
    result = ts.check(llava.to(dtype))
    assert not result.passed
    assert line in [each.name for each in result.failures], shown(result)


def test_a_model_that_cannot_ever_run_is_refused_with_its_reason() -> None:
    for name in ("florence2", "mllama"):
        build, message = REFUSED[name]
        with pytest.raises(Unsupported, match=message):
            ts.check(build())


def test_a_reduction_that_is_on_is_refused(llava: Any) -> None:
    with ts.apply(llava, HALF), pytest.raises(Unsupported, match="has a reduction on"):
        ts.check(llava)


def test_odd_parts_are_a_finding_that_says_what_is_odd() -> None:
    model = FAMILIES["llava"].build()
    model.config.video_token_id = model.config.image_token_id  # Molmo 2's
    result = ts.check(model)
    assert not result.passed
    assert "counted twice" in result.failures[0].note


def test_what_rounding_hides_is_no_pass(llava: Any) -> None:
    """Vision tokens that change nothing: no fault could be seen."""
    llava.model.multi_modal_projector.linear_2.weight.data.zero_()
    llava.model.multi_modal_projector.linear_2.bias.data.zero_()
    for layer in llava.get_decoder().layers:
        layer.self_attn.v_proj.weight.data.zero_()
    result = ts.check(llava)
    assert [line.name for line in result.failures] == ["what is dropped can be seen"], shown(result)


def test_a_result_is_stored_whole(tmp_path: Path, llava: Any) -> None:
    result = ts.check(llava)
    path = result.save(tmp_path / "check.json")
    assert ts.CheckResult.load(path) == result
    assert json.loads(path.read_text("utf-8"))["passed"] is True
    assert {line.state for line in result.lines} <= {PASSES, FAILS, NOT_CHECKED}
    path.write_text(path.read_text("utf-8").replace('"passes"', '"fails"', 1), "utf-8")
    with pytest.raises(StorageError, match="damaged"):
        ts.CheckResult.load(path)
    with pytest.raises(StorageError, match="is missing"):
        ts.CheckResult.load(tmp_path / "none.json")
