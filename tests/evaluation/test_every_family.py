"""The evaluator against plain `generate()` under `apply`, token for token, on every supported family."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import decoder_of
from conformance.inputs import EOS
from family_processor import RowProcessor

from thinsight.evaluation import Evaluator, rank_consistency
from thinsight.evaluation.decoding import DecodingRules, decode
from thinsight.evaluation.features import VisionCache
from thinsight.evaluation.prompts import PromptReader, pad_batch
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.runtime.anatomy import sliding_layers
from thinsight.schedule import Schedule
from thinsight.searches.search import rankers_for

HELD = {name: family for name, family in FAMILIES.items() if family.model_type in ROWS}
NEW_TOKENS = 5
FULL = Schedule.full(4)
REDUCED = Schedule([1, 0.7, 0.4, 0])
SPECS = ([3, 5], [2, 3, 9], [4, 1, 2, 2])
UNREADABLE = {  # towers whose attention cannot be told per token
    *("llava-next", "llava-next-video", "llava-onevision", "llava-pixtral", "video-llava", "idefics2"),
    *("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "glm4v", "glm4v-moe", "glm4.6v"),
    *("mistral3", "lighton-ocr", "glmga", "glm-ocr", "paddleocr-vl", "got-ocr2", "pp-chart2table", "video-llama-3"),
    *("exaone4.5", "aria", "kimi-k2.5", "hyperclovax-vision-v2", "cosmos3-edge", "muse-glimmer", "minimax-m3-vl"),
    *("mistral3", "lighton-ocr", "gemma4", "gemma4-moe", "gemma4-unified", "llama4", "molmo2"),
    *("qwen2.5-omni", "qwen3-omni"),
    *("ernie4.5-vl", "granite4-vision", "minicpm-v-4.7", "perception-lm", "fast-vlm", "gemma3n"),
    *("mistral3-ministral3", "mistral3-mistral4"),
    *("qwen3.5", "qwen3.5-moe", "lfm2-vl", "lfm3-vl", "minicpm-v-4.6", "minicpm-ocr"),
    *("deepseek-ocr2", "hunyuan-vl", "step3.7"),
}
STOP = [EOS, *range(60, 70)]  # so that answers end at various lengths


@lru_cache(maxsize=1)
def model_of(name):
    model = HELD[name].build()
    model.generation_config.eos_token_id = STOP
    return model


def generated(name, processor, reduction):
    """Each example's answer by `generate`, in one padded batch."""
    model, found = model_of(name), []
    inputs = HELD[name].batch(processor.rows).inputs
    with apply(model, reduction):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        ends = [place + 1 for place, token in enumerate(row) if token in STOP]
        found.append(tuple(row[: min(ends, default=len(row))]))
    return found


def evaluator_of(name, processor, **settings):
    settings = {"batch_size": 2, "max_new_tokens": NEW_TOKENS, **settings}
    return Evaluator(model_of(name), processor, processor.examples, **settings)


@for_each(HELD.values())
def test_answers_are_those_of_generate(family):
    name = family.name
    processor = RowProcessor(HELD[name], SPECS)
    evaluator = evaluator_of(name, processor)
    full, reduced = generated(name, processor, FULL), generated(name, processor, REDUCED)
    assert [answer.tokens for answer in evaluator.full_answers] == full
    assert evaluator.predictions(REDUCED) == [processor.tokenizer.decode(tokens) for tokens in reduced]
    assert full != reduced  # some answers were not the drafted ones


@for_each(HELD.values())
def test_a_search_chooses_among_rankers_that_can_rank(family):
    evaluator = evaluator_of(family.name, RowProcessor(family, SPECS))
    found = rankers_for(evaluator)
    names = [ranker["first"]["name"] if "first" in ranker else ranker["name"] for ranker in found]
    assert names[:2] == ["text-attention"] * 2
    assert names[-1] == "cdpruner"
    assert ("vision-attention" in names) is (family.name not in UNREADABLE)
    for ranker in found:
        assert evaluator.sample(Reduction(REDUCED, ranker), 0.5).agreement is not None


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "internvl-qwen2", "qwen3-vl"])
def test_agreement_is_that_of_generate(name):
    processor = RowProcessor(HELD[name])
    evaluator = evaluator_of(name, processor, metric="agreement")
    full = generated(name, processor, FULL)
    reduction = Reduction(Schedule([1, 1, 1, 0.8]), "uniform")
    expected = generated(name, processor, reduction)
    same = [float(a == b) for a, b in zip(expected, full, strict=True)]
    assert evaluator(reduction).per_example.tolist() == same


BEYOND_CORE = pytest.mark.conformance


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "aya-vision",
        "lfm2-vl",
        "qwen3.5",
        "paligemma",
        "glm4v",
        *(
            pytest.param(name, marks=BEYOND_CORE)
            for name in ("paligemma2", "cohere2-vision", "llava-mistral", "qwen2-vl", "qwen3-vl-moe")
        ),
    ],
)
def test_a_draft_that_is_wrong_on_the_way_changes_nothing(name, reduced):
    """Windows, where there are any, are shorter than the prompts: rejected tokens must not use them up. Nor may they
    stay in the state of a layer that carries one."""
    model, processor = model_of(name), RowProcessor(HELD[name], SPECS)
    schedule = REDUCED if reduced else FULL
    expected = generated(name, processor, schedule)
    assert max(map(len, expected)) > 3
    if sliding_layers(model):
        assert min(len(row.ids) for row in processor.rows) > decoder_of(model).config.sliding_window
    agreed = [tokens[:-1][:right] for tokens, right in zip(expected, (2, 0, 1), strict=True)]
    drafts = [(*tokens, 50, 51, 52, 53) for tokens in agreed]
    prompts = PromptReader(model, processor).prompts(processor.examples)
    vision = VisionCache(PromptReader(model, processor)).inputs(processor.examples)
    rules = DecodingRules.of(model.generation_config, NEW_TOKENS)
    with apply(model, schedule) as handle:
        answers = decode(model, pad_batch(prompts, 0), vision, rules, drafts=drafts, prompt_scope=handle.prompt)
    assert [answer.tokens for answer in answers] == expected


@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "qwen2.5-vl"])
def test_rank_consistency_runs_on_batches_as_on_single_prompts(name):
    processor = RowProcessor(HELD[name])
    settings = (model_of(name), processor, processor.examples)
    batched, alone = (rank_consistency(*settings, batch_size=size) for size in (3, 1))
    assert np.allclose(batched.tau_matrix, alone.tau_matrix, atol=0.03)  # equal scores may change places
    assert batched.tau.shape == (3,)
    assert 0 < np.abs(batched.tau).max() < 1


def test_positions_are_those_of_generate():
    """What the first pass and the first steps are given, for a family with positions on several axes."""
    name = "qwen2.5-vl"
    model, processor = model_of(name), RowProcessor(HELD[name])
    seen = []
    decoder_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    inputs = HELD[name].batch(processor.rows[:2]).inputs
    model.generate(**inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    expected, seen[:] = list(seen), []
    blind = [replace(example, answers=()) for example in processor.examples[:2]]  # no draft to try first
    evaluator = Evaluator(model, processor, blind, max_new_tokens=3, batch_size=2)
    assert evaluator.full_answers
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=False))
    assert len(seen) > 1
    model_of.cache_clear()
