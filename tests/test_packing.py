"""Packed weights: the same answers, and the same model afterwards, however it is copied or saved."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_inputs, tiny_llava
from torch import nn
from transformers import LlavaForConditionalGeneration

from thinsight import Schedule, ThinsightError, apply, pack
from thinsight.packing import packed_layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SCHEDULE = Schedule([1.0, 1.0, 0.5, 0.25])


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return tiny_llava()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return tiny_inputs([[3, 5], [2, 9]])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def generate(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)


@torch.inference_mode()
def test_a_packed_model_answers_alike_with_and_without_a_reduction(model, inputs) -> None:
    full, logits = generate(model, inputs), model(**inputs).logits
    with apply(model, SCHEDULE):
        reduced = generate(model, inputs)
    with pack(model, smallest=0):
        assert len(packed_layers(model)) == 4 * 7 + 1  # every projection, and the head
        assert torch.equal(generate(model, inputs), full)
        torch.testing.assert_close(model(**inputs).logits, logits)
        with apply(model, SCHEDULE):
            assert torch.equal(generate(model, inputs), reduced)
    assert torch.equal(model(**inputs).logits, logits)


def test_unpacking_restores_every_weight_and_object(model) -> None:
    before, modules = weights(model), list(model.modules())
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = pack(model, smallest=0)
    assert same(weights(model), before)  # also while packed
    handle.unpack()
    handle.unpack()
    assert same(weights(model), before)
    assert [type(module) for module in model.modules()] == [type(module) for module in modules]
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learns


def test_copies_and_files_of_a_packed_model(model, inputs, tmp_path: Path) -> None:
    before = weights(model)
    with pack(model, smallest=0):
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    assert same(weights(twin), before)
    assert torch.equal(generate(twin, inputs), generate(model, inputs))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert same(weights(loaded), before)


def test_shared_and_small_weights_and_subclasses_stay(model) -> None:
    class Quantised(nn.Linear):
        pass

    model.lm_head.weight = model.get_input_embeddings().weight
    model.get_decoder().layers[0].mlp.down_proj.__class__ = Quantised
    with pack(model, smallest=32 * 64):
        packed = {id(layer) for layer in packed_layers(model)}
        wanted = [layer.mlp for layer in model.get_decoder().layers]
        assert packed == {
            id(each)
            for index, mlp in enumerate(wanted)
            for each in (mlp.gate_proj, mlp.up_proj, *((mlp.down_proj,) if index else ()))
        }


def test_gradients_flow_through(model, inputs) -> None:
    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        return model.get_decoder().layers[0].input_layernorm.weight.grad.clone()

    plain = gradient()
    with pack(model, smallest=0):
        torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-4)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh one, which does not write out a trace of its work for pytest: that takes ten times as long."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_layers_compile_to_one_graph(model, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    layer = model.get_decoder().layers[0].mlp
    states = torch.randn(2, 3, model.config.text_config.hidden_size, requires_grad=True)

    def result(run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        states.grad = None
        with torch.no_grad():
            output = run(states)
        run(states).square().sum().backward()
        return output, states.grad.clone()

    plain = result(layer)
    with pack(model, smallest=0):
        fast = result(torch.compile(layer, backend=backend, fullgraph=True))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.conformance
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_a_packed_model_compiles_under_a_reduction(model, inputs) -> None:
    with pack(model, smallest=0), apply(model, SCHEDULE):
        logits = torch.compile(model, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits)


def test_hooks_on_a_layer_stay(model, inputs) -> None:
    seen = []
    layer = model.get_decoder().layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *_: seen.append(True))
    with pack(model, smallest=0):
        model(**inputs)
    assert seen


def test_what_cannot_be_done_is_said(model) -> None:
    with pytest.raises(ThinsightError, match=r"no plain linear layer of 524288 weights or more"):
        pack(model)
    with pytest.raises(ThinsightError, match=r"is torch.float16 on cpu: load the model in float32"):
        pack(tiny_llava().half(), smallest=0)
    with pytest.raises(ThinsightError, match=r"on meta: weights are packed for the CPU alone"):
        pack(tiny_llava().to("meta"), smallest=0)
    with pytest.raises(ThinsightError, match=r"training mode"):
        pack(tiny_llava().train(), smallest=0)
    with pack(model, smallest=0):
        with pytest.raises(ThinsightError, match=r"no plain linear layer"):
            pack(model, smallest=0)
        with pytest.raises(ThinsightError, match=r"call unpack\(\) before moving it to torch.float16 on cpu"):
            model.half()
        with pytest.raises(ThinsightError, match=r"call unpack\(\) before loading others"):
            model.load_state_dict(weights(tiny_llava()))
        model.to("cpu")  # nothing to move


def test_nothing_is_packed_where_one_layer_cannot_be(model) -> None:
    model.lm_head.half()
    with pytest.raises(ThinsightError, match=r"lm_head is torch.float16"):
        pack(model, smallest=0)
    assert not packed_layers(model)
