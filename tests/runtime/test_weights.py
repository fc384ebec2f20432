"""A reduction knows the weights that it was searched on, in whatever form they are loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_inputs, tiny_llava

from thinsight.errors import BadInput
from thinsight.reduction import Reduction
from thinsight.runtime import apply, weights_of
from thinsight.runtime.anatomy import decoder_layers
from thinsight.runtime.weights import difference
from thinsight.schedule import Schedule

SCHEDULE = Schedule([1.0, 0.5, 0.5, 0.25])


def known(model: Any) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(json.dumps(weights_of(model)))
    return stored


def test_the_same_weights_in_any_dtype_are_the_same(tmp_path: Path) -> None:
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    for first in (torch.float32, torch.bfloat16, torch.float16):
        saved = type(model).from_pretrained(tmp_path, dtype=first)
        for second in (torch.float32, torch.bfloat16, torch.float16):
            assert difference(type(model).from_pretrained(tmp_path, dtype=second), known(saved)) is None


def test_other_weights_are_told_apart_and_both_are_named() -> None:
    model, other = tiny_llava(), tiny_llava()
    with torch.no_grad():
        for weight in decoder_layers(other)[-1].parameters():
            weight += 0.01
    other.name_or_path = "someone/else"
    reduction = Reduction(
        SCHEDULE, base_model_name_or_path="someone/model", weights={**known(model), "revision": "abc"}
    )
    with apply(model, reduction):
        pass
    with pytest.warns(UserWarning, match=r"someone/model at abc.*someone/else.*here.*there"), apply(other, reduction):
        other(**tiny_inputs([[3, 5]]))
    assert difference(other.to(torch.bfloat16), known(model)) is not None


def test_in_one_dtype_the_last_digit_counts() -> None:
    model, other = tiny_llava(), tiny_llava()
    with torch.no_grad():
        for weight in decoder_layers(other)[0].parameters():
            weight *= 1.0005  # as after a short fine-tuning
    assert difference(other, known(model)) is not None


def test_adapters_and_offloaded_weights_do_not_matter() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llava()
    stored = known(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    assert difference(wrapped.get_base_model(), stored) is None
    assert set(known(wrapped.get_base_model())["numbers"]) == set(stored["numbers"])
    assert difference(tiny_llava().to("meta"), stored) is None
    assert known(tiny_llava().to("meta"))["numbers"] == {}


def test_it_is_kept_with_the_reduction_and_read_strictly(tmp_path: Path) -> None:
    reduction = Reduction(SCHEDULE, weights=weights_of(tiny_llava()))
    reduction.save_pretrained(tmp_path)
    assert Reduction.from_pretrained(tmp_path) == reduction
    assert hash(Reduction.from_pretrained(tmp_path)) == hash(reduction)
    good: dict[str, Any] = json.loads((tmp_path / "reduction_config.json").read_text())
    for bad in (
        [],
        {},
        {**good["weights"], "more": 1},
        {**good["weights"], "dtype": None},
        {**good["weights"], "revision": 3},
        {**good["weights"], "numbers": {"0.a": []}},
        {**good["weights"], "numbers": {"0.a": [True]}},
        {**good["weights"], "numbers": {"0.a": ["1"]}},
        {**good["weights"], "numbers": [1.0]},
    ):
        with pytest.raises(BadInput, match="weights"):
            Reduction.from_dict({**good, "weights": bad})


def test_a_search_says_what_it_ran_on() -> None:
    from tiny import tiny_images, tiny_processor

    import thinsight as ts

    model = tiny_llava()
    images = enumerate(tiny_images(4))
    examples = [ts.Example(str(i), (image,), "what color ?", metric="agreement") for i, image in images]
    found = ts.search(model, tiny_processor(), examples, budget=0.5, method="psigmoid", n_trials=2, max_new_tokens=2)
    assert found.reduction.weights is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, found.reduction).remove()
    assert dataclasses.replace(found.reduction, weights=None) != found.reduction
