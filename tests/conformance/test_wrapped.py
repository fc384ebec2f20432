"""Models inside wrappers, and with adapters in their layers: a reduction goes onto the model inside.

Knows nothing about any one family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from stock_faults import takes_adapters
from torch import nn
from transformers import PreTrainedModel

from thinsight.errors import ThinsightError
from thinsight.runtime import Handle, remove
from thinsight.schedule import Schedule

from .behaviours import behaviour
from .checks import Case, close
from .families import FAMILIES
from .family import PADDED, Family
from .test_model_stays import insides, logits_of

CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))


def kept(handle: Handle) -> list[list[int]]:
    """Which tokens entered the last layer."""
    return [row.tolist() for row in handle.kept(3)]


# --- adapters


def adapter(model: PreTrainedModel) -> LoraConfig:
    """In attention, of tower and decoder; drawn at random, so that it changes what the model says."""
    torch.manual_seed(0)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if re.fullmatch(r".*\.[qkv]_proj(\.linear)?", name)]
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False)


def with_peft(family: Family) -> tuple[Any, PreTrainedModel]:
    """PEFT's wrapper, and the model in it."""
    model = family.build()
    return get_peft_model(model, adapter(model)), model


def with_transformers(family: Family) -> tuple[Any, PreTrainedModel]:
    """A model that transformers has put an adapter on."""
    model = family.build()
    model.add_adapter(adapter(model))
    return model.eval(), model


ADAPTED = [with_peft, with_transformers] if takes_adapters() else [with_peft]


@behaviour("peft adapter")
def test_a_model_with_an_adapter_is_reduced_as_the_merged_model_is(family: Family) -> None:
    inputs = family.inputs(PADDED, seed=35)
    merged = with_peft(family)[0].merge_and_unload()
    with CASE.apply(family.model()):
        plain = logits_of(family.model(), inputs)
    with CASE.apply(merged) as handle:
        wanted, chosen = logits_of(merged, inputs), kept(handle)
    assert (wanted - plain).abs().max() > 1e-2
    for build in ADAPTED:
        wrapper, model = build(family)
        stock, before = logits_of(wrapper, inputs), insides(model)
        with CASE.apply(wrapper) as handle:
            assert handle.model is model
            close(logits_of(wrapper, inputs), wanted)
            assert kept(handle) == chosen
            with torch.no_grad():
                close(wrapper(**family.placed(inputs), logits_to_keep=1).logits[:, -1], wanted[0])
            with pytest.raises(ThinsightError, match="has a reduction on already"):
                CASE.apply(model)
        assert insides(model) == before
        assert torch.equal(logits_of(wrapper, inputs), stock)


# --- data parallelism


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@behaviour("data parallel")
def test_a_data_parallel_model_is_reduced_as_the_one_inside_is(family: Family) -> None:
    inputs = family.inputs(PADDED, seed=36)
    with CASE.apply(family.model()) as handle, torch.no_grad():
        wanted, chosen = family.model()(**inputs).logits, kept(handle)
    model = family.build()
    stock, before = logits_of(model, inputs), insides(model)
    with one_process():
        for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
            wrapper = wrap(model)
            with CASE.apply(wrapper) as handle, torch.no_grad():
                assert handle.model is model
                assert torch.equal(wrapper(**inputs).logits, wanted)
                assert kept(handle) == chosen
            assert insides(model) == before
    assert torch.equal(logits_of(model, inputs), stock)


@behaviour("data parallel")
def test_copies_on_several_devices_are_refused(family: Family) -> None:
    """Before anything is put on; and where it was put on the model inside, in the copy's pass."""
    model, inputs = family.build(), family.inputs(PADDED, seed=36)
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]  # what it finds on a machine with two GPUs
    with pytest.raises(ThinsightError, match="use DistributedDataParallel"):
        CASE.apply(wrapper)
    copy = model.base_model._replicate_for_data_parallel()
    with CASE.apply(model), pytest.raises(ThinsightError, match="use DistributedDataParallel"):
        copy(**inputs)


# --- wrappers in each other, and those that are more than their inside

LLAVA = FAMILIES["llava"]

WRAPPERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled adapter": lambda model: torch.compile(get_peft_model(model, adapter(model)), backend="eager"),
    "adapter in parallel": lambda model: nn.DataParallel(get_peft_model(model, adapter(model))),
    "mixed adapter": lambda model: get_peft_model(model, adapter(model), mixed=True),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_taken_off_until_the_model_is_found(wrap: Callable[[PreTrainedModel], Any]) -> None:
    model = LLAVA.build()
    wrapper, before = wrap(model), insides(model)
    handle = CASE.apply(wrapper)
    assert handle.model is model
    remove(wrapper)
    assert not handle.on
    assert insides(model) == before


class Other(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def with_prompts(model: PreTrainedModel) -> PeftModel:
    """Tokens of an adapter's own in front of every prompt."""
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def activated(model: PreTrainedModel) -> PeftModel:
    """A LoRA that begins at certain tokens of the prompt, which its wrapper looks for."""
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


REFUSED: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "unknown": (Other, "model is a Other; .*, such as the LlavaForConditionalGeneration in it"),
    "nothing": (lambda model: Other(nn.Linear(1, 1)), "model is a Other; pass a loaded transformers model$"),
    "no module": (lambda model: "llava", "model is a str; pass a loaded transformers model$"),
    "prompts": (with_prompts, "PROMPT_TUNING: .* use adapters that live in the layers"),
    "activated": (activated, "LORA: .* use adapters that live in the layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrapper_that_is_more_than_its_inside_is_refused(name: str) -> None:
    wrap, message = REFUSED[name]
    model = LLAVA.build()
    wrapper = wrap(model)
    before = insides(model)
    with pytest.raises(ThinsightError, match=message):
        CASE.apply(wrapper)
    assert insides(model) == before
