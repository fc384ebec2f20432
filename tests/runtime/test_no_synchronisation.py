"""Between the first and the last decoder layer of a prefill nothing asks the device for a number, and nowhere
in one that follows a plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import IMAGES, PADDED, Family
from torch.utils._python_dispatch import TorchDispatchMode

from thinsight.errors import ThinsightError
from thinsight.experimental.captured import NeverWaiting
from thinsight.runtime import apply, decoder_layers, vision_token_mask
from thinsight.runtime.cache import CACHE, fresh_cache
from thinsight.schedule import Schedule

SCHEDULE = Schedule([1, 0.7, 0.4, 0.2])
# what makes the host wait for the device: a number read, or a shape that depends on numbers
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}

# Step 3.7's stock experts ask in every layer which of them have tokens, ERNIE which tokens are vision; Gemma 3n's first
# MLPs look at a number that they make
QUIET = [family for name, family in FAMILIES.items() if name not in ("step3.7", "ernie4.5-vl", "gemma3n")]


class Watching(TorchDispatchMode):
    """Notes operations that wait, while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        if self.on and name in WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def inside_layers(model: Any, watching: Watching) -> Iterator[None]:
    """Watch from before the first layer's hooks until behind the last layer's."""
    layers = decoder_layers(model)

    def begin(*_: Any) -> None:
        watching.on = True

    def end(*_: Any) -> None:
        watching.on = False

    hooks = [layers[0].register_forward_pre_hook(begin, prepend=True), layers[-1].register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def waits(family: Family, specs: Any, **options: Any) -> list[str]:
    model = family.build()
    inputs = family.batch(family.rows(list(specs))).inputs
    watching = Watching()
    with apply(model, SCHEDULE, **options), inside_layers(model, watching), torch.no_grad(), watching:
        model(**inputs)
    return watching.found


@pytest.mark.parametrize("queries", ["instruction", "last"])
@pytest.mark.parametrize("per", ["image", "prompt"])
@for_each(QUIET)
def test_layers_never_wait(family: Family, per: str, queries: str) -> None:
    assert waits(family, PADDED, per=per, ranker={"name": "text-attention", "queries": queries}) == []


@for_each(QUIET)
def test_the_watch_would_see_it(family: Family) -> None:
    model = family.build()
    watching = Watching()

    def look(module: Any, args: Any, kwargs: Any) -> None:
        bool((args[0] if args else kwargs["hidden_states"]).sum() > 0)

    with inside_layers(model, watching), torch.no_grad(), watching:
        hook = decoder_layers(model)[2].register_forward_pre_hook(look, with_kwargs=True)
        model(**family.batch(family.rows(list(IMAGES))).inputs)
        hook.remove()
    assert watching.found == ["aten::_local_scalar_dense"]


# --- a planned pass, as a whole

# Llama 4, Gemma 4 and Qwen3-Omni look for their images on the device; a sliding cache counts on the CPU; experts
# multiply in bfloat16 alone there; PaliGemma looks at its masks, ERNIE at which tokens go to which experts
NOT_THERE = (
    "llava-mistral", "gemma3", "aya-vision", "cohere2-vision", "glm4v-moe", "qwen3-vl-moe", "paligemma",
    "paligemma2", "lfm3-vl", "qwen3.5-moe",
    "shieldgemma2", "exaone4.5", "muse-glimmer", "aria", "kimi-k2.5", "minimax-m3-vl",
    "gemma4", "gemma4-moe", "gemma4-unified", "llama4", "qwen3-omni", "deepseek-ocr2", "step3.7",
    "gemma3n", "ernie4.5-vl", "mistral3-mistral4",
)  # fmt: skip
STATES = ("conv", "linear_attention")  # layers that hold no keys
PLANNED = [family for name, family in FAMILIES.items() if name not in NOT_THERE]


def planned_pass(family: Family, ranker: Any, per: str, plan: bool) -> list[int]:
    """A prefill on the meta device, where tensors have no numbers: lengths of the cache's layers that hold keys."""
    model = family.build()
    inputs = family.batch(family.rows([[3, 5]])).inputs
    with apply(model, SCHEDULE, ranker=ranker, per=per) as handle, torch.no_grad():
        made = handle.plan(**inputs)
        assert made is not None
        made = made.mapped(lambda _, tensor: tensor.to("meta"))
        vision = vision_token_mask(model, inputs["input_ids"])
        embeds = model.get_input_embeddings()(inputs["input_ids"]).to("meta")
        model.to("meta")
        with handle.planned(made if plan else None), handle.vision(vision), NeverWaiting():
            cache = model(inputs_embeds=embeds, logits_to_keep=1, **fresh_cache(model))[CACHE]
    return [layer.keys.shape[2] for layer in cache.layers if hasattr(layer, "keys")]


@pytest.mark.parametrize("per", ["image", "prompt"])
@for_each(PLANNED)
def test_a_planned_pass_runs_where_there_are_no_numbers(family: Family, per: str) -> None:
    lengths = planned_pass(family, "text-attention", per, plan=True)
    assert len(lengths) == sum(kind not in STATES for kind in family.layer_types)
    assert all(after < before for before, after in itertools.pairwise(lengths))


@for_each([FAMILIES["llava"]])
def test_a_pass_without_a_plan_does_not(family: Family) -> None:
    with pytest.raises(ThinsightError, match="waits for the device"):
        planned_pass(family, "text-attention", "image", plan=False)


@for_each([FAMILIES["llava"]])
def test_nor_does_a_ranker_that_looks_at_numbers(family: Family) -> None:
    with pytest.raises(NotImplementedError, match="nonzero"):  # there are no numbers to look at
        planned_pass(family, "random", "image", plan=True)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: torch.tensor([1.0, 2.0]), "lift_fresh"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: torch.equal(x, x), "equal"),
    ],
)
def test_what_a_recording_cannot_hold_is_named(operation: Any, name: str) -> None:
    x = torch.arange(4.0)
    with NeverWaiting():
        x + 1
        with pytest.raises(ThinsightError, match=f"waits for the device .aten::{name}"):
            operation(x)
