"""Every function that takes a model takes a wrapper of one, and does with it what it does with the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_images, tiny_inputs, tiny_llava, tiny_processor
from torch import nn

import thinsight as ts
from benchmarks.simulated import SimulatedTransport
from thinsight.evaluation import Example
from thinsight.evaluation.consistency import attention_statistics
from thinsight.experimental.captured import EagerReplay
from thinsight.runtime import layer_scores
from thinsight.timing import measure, profile

SCHEDULE = ts.Schedule([1, 0.7, 0.5, 0.2])
EXAMPLES = [Example(f"e{i}", (image,), "what color ?", ("red",)) for i, image in enumerate(tiny_images(3))]
INPUTS = tiny_inputs([[3, 5], [2, 9]])


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


WRAPPERS: dict[str, Callable[[], Any]] = {
    "peft": adapted,
    "compiled": lambda: torch.compile(tiny_llava(), backend="eager"),
    "parallel": lambda: nn.DataParallel(tiny_llava()).eval(),
}
INSIDE: dict[str, Callable[[], Any]] = {
    "peft": lambda: adapted().get_base_model(),
    "compiled": tiny_llava,
    "parallel": tiny_llava,
}


def scored(model: Any) -> Any:
    evaluator = ts.Evaluator(model, tiny_processor(), EXAMPLES, "agreement", max_new_tokens=3)
    return evaluator.fingerprint, evaluator.predictions(SCHEDULE), evaluator(SCHEDULE).per_example.tolist()


def searched(model: Any) -> Any:
    options = {"metric": "agreement", "max_new_tokens": 2, "certify": False}
    return ts.search(model, tiny_processor(), EXAMPLES, max_drop=1.0, **options).schedule.keep_rates


def pooled(model: Any) -> Any:
    made = functools.partial(ts.Evaluator, model, tiny_processor(), EXAMPLES, max_new_tokens=2)
    pool = ts.Pool(transport=SimulatedTransport(made, 2))
    return pool.full_score, pool(SCHEDULE).score


def captured(model: Any) -> Any:
    with ts.apply(model, SCHEDULE) as handle, torch.no_grad():
        with ts.CapturedPrefill(model, handle, recorder=EagerReplay()) as fast:
            logits = handle.model(**INPUTS).logits
        return fast.replayed, logits.tolist()


def timed(model: Any) -> Any:
    found = measure(model, INPUTS, SCHEDULE, runs=1, warmup=0, new_tokens=2)
    return found.kv_full, found.kv_reduced, found.device


def ranked(model: Any) -> Any:
    return ts.rank_consistency(model, tiny_processor(), EXAMPLES).tau.tolist()


USES: dict[str, Callable[[Any], Any]] = {
    "Evaluator": scored,
    "Pool": pooled,
    "search": searched,
    "rank_consistency": ranked,
    "attention_statistics": lambda model: attention_statistics(model, tiny_processor(), EXAMPLES).tolist(),
    "encode_images": lambda model: [each.tolist() for each in ts.encode_images(model, INPUTS).features],
    "layer_scores": lambda model: layer_scores(model, INPUTS).scores.tolist(),
    "CapturedPrefill": captured,
    "measure": timed,
    "profile": lambda model: profile(model, INPUTS, rates=(0.5, 1.0), runs=1, warmup=0).tokens,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_used_as_the_model_in_it(kind: str, use: str) -> None:
    found, wanted = (USES[use](made[kind]()) for made in (WRAPPERS, INSIDE))
    assert repr(found) == repr(wanted)


def test_adapters_make_a_difference() -> None:
    """So that the test above could tell them."""
    found = USES["rank_consistency"](adapted()), USES["rank_consistency"](tiny_llava())
    assert not np.allclose(*found)
