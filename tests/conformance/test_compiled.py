"""Compiled models: decoding is one graph that is compiled once; a compiled prefill never skips the reduction.

Knows nothing about any one family.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers import CompileConfig, PreTrainedModel

from thinsight.runtime import apply
from thinsight.schedule import Schedule

from .behaviours import behaviour
from .checks import Case, close, generate
from .families import FAMILIES
from .family import Family
from .inputs import Spec

CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))
RAGGED: tuple[Spec, ...] = ([3, 5], [2, 3, 9])
SINGLE: tuple[Spec, ...] = ([2, 3, 9],)

some = [f for f in FAMILIES.values() if f.core or f.name in ("qwen2.5-vl", "mistral3")]  # it takes long


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, no second compilation of a frame, and nothing left for later tests."""
    torch._dynamo.reset()
    # pytest would have the compiler write out a trace of its work, which takes ten times as long as the work
    with torch._dynamo.config.patch(error_on_recompile=True), silenced("torch.__trace"):
        yield
    torch._dynamo.reset()


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """While it lasts, a logger says nothing."""
    logger = logging.getLogger(name)
    level, logger.disabled = logger.level, True
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.disabled = False
        logger.setLevel(level)


def compiled(backend: Any) -> dict[str, Any]:
    """Options of `generate` with which every token but the first comes out of one whole graph."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """(steps, batch, vocab) of five greedy steps."""
    return torch.stack(generate(model, inputs, 5, **options).logits)


@pytest.mark.conformance
@pytest.mark.parametrize("specs", [RAGGED, SINGLE], ids=["ragged", "single"])
@behaviour("compiled", some)
def test_decoding_compiles_once_and_equals_eager_decoding(family: Family, specs: tuple[Spec, ...]) -> None:
    model, inputs, graphs = family.build(), family.inputs(specs, seed=20), []

    def keep(graph: Any, example: Any) -> Any:  # a function, as a config's copy of it is the same
        graphs.append(graph)
        return graph.forward

    with CASE.apply(model):
        eager = logits_of(model, inputs, cache_implementation="static")
        fast = logits_of(model, inputs, **compiled(keep))
    assert len(graphs) == 1
    close(fast, eager)


@pytest.mark.conformance
@behaviour("compiled", [FAMILIES[name] for name in ("llava", "qwen3-vl")])
def test_a_compiled_prefill_is_the_eager_one(family: Family) -> None:
    """The graph breaks where a hook runs."""
    model, inputs = family.build(), family.inputs(RAGGED, seed=21)
    with CASE.apply(model), torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        eager = model(**inputs, logits_to_keep=1).logits
        close(torch.compile(model, backend="eager")(**inputs, logits_to_keep=1).logits, eager)


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("schedule", "most"), [([1, 0.8, 0.5, 0.1], 14), ([1, 0.5, 0.5, 0.5], 11)], ids=["three", "one"]
)
@behaviour("compiled", [FAMILIES["llava"]])
def test_a_planned_prefill_compiles_to_few_graphs_once(family: Family, schedule: list[float], most: int) -> None:
    """Of four layers; the second pass compiles nothing."""
    model, inputs, graphs = family.build(), family.inputs(SINGLE, seed=21), []

    def keep(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with apply(model, Schedule(schedule)) as handle, torch.no_grad(), handle.planned(handle.plan(**inputs)):
        eager = model(inputs_embeds=embeds, logits_to_keep=1).logits
        fast = torch.compile(model, backend=keep)
        with torch._dynamo.config.patch(error_on_recompile=False):
            close(fast(inputs_embeds=embeds, logits_to_keep=1).logits, eager)
            assert 1 < len(graphs) <= most
            before = len(graphs)
            close(fast(inputs_embeds=embeds, logits_to_keep=1).logits, eager)
            assert len(graphs) == before


@pytest.mark.parametrize("skip", [True, False])
@behaviour("compiled", [FAMILIES["llava"]])
def test_what_was_compiled_before_does_not_leave_the_reduction_out(family: Family, skip: bool) -> None:
    """Nor does what was compiled under it stay when it is off; whether the compiler guards hooks or not."""
    model, inputs = family.build(), family.inputs(RAGGED, seed=21)
    fast = torch.compile(model, backend="eager")
    settings = {"error_on_recompile": False, "skip_nnmodule_hook_guards": skip}
    with torch.no_grad(), torch._dynamo.config.patch(**settings):
        stock = model(**inputs, logits_to_keep=1).logits
        close(fast(**inputs, logits_to_keep=1).logits, stock)
        with CASE.apply(fast if skip else model):  # the wrapper or the model inside: it is the same
            reduced = model(**inputs, logits_to_keep=1).logits
            assert (reduced - stock).abs().max() > 1e-2
            close(fast(**inputs, logits_to_keep=1).logits, reduced)
        close(fast(**inputs, logits_to_keep=1).logits, stock)


@behaviour("compiled", [family for family in some if "compiled" not in family.refuses])
def test_a_prefill_does_not_compile_to_one_graph(family: Family) -> None:
    """The compiler says so, and does not leave the reduction out."""
    model, inputs = family.build(), family.inputs(SINGLE, seed=21)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with CASE.apply(model), torch.no_grad(), pytest.raises(Unsupported):
        whole(**inputs, logits_to_keep=1)


@pytest.mark.conformance
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_decoding_compiled_to_machine_code_equals_eager_decoding() -> None:
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.inputs(RAGGED, seed=22)
    with CASE.apply(model):
        eager = logits_of(model, inputs, cache_implementation="static")
        close(logits_of(model, inputs, **compiled("inductor")), eager)
