"""A reduction by `from_pretrained`'s quantization_config: it runs as under apply, and comes back from config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_inputs, tiny_llava
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import thinsight as ts
from thinsight.runtime.handle import applied

REDUCTION = ts.Reduction(ts.Schedule([1.0, 0.5, 0.5, 0.25]), {"name": "random", "seed": 3})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_llava().save_pretrained(tmp_path / "model")
    REDUCTION.save_pretrained(tmp_path / "reduction")
    return tmp_path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_inputs([[3, 5], [2, 3, 4]])).logits
    return found


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def test_it_runs_as_under_apply_and_can_be_taken_off(checkpoint: Path) -> None:
    plain = load(checkpoint / "model")
    with ts.apply(plain, REDUCTION):
        wanted = logits(plain)
    for reduction in (checkpoint / "reduction", str(checkpoint / "reduction"), REDUCTION, REDUCTION.to_dict()):
        model = load(checkpoint / "model", quantization_config=ts.ReductionConfig(reduction))
        assert applied(model)
        assert torch.equal(logits(model), wanted)
    ts.remove(model)
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(plain), wanted)


def test_it_is_saved_into_the_config_and_comes_back(checkpoint: Path) -> None:
    model = load(checkpoint / "model", quantization_config=ts.ReductionConfig(REDUCTION, per="prompt"))
    wanted = logits(model)
    model.save_pretrained(checkpoint / "again")
    stored = json.loads((checkpoint / "again" / "config.json").read_text())["quantization_config"]
    assert stored == {"quant_method": "thinsight", "reduction": REDUCTION.to_dict(), "per": "prompt"}
    again = load(checkpoint / "again")
    assert applied(again)
    assert torch.equal(logits(again), wanted)
    again.save_pretrained(checkpoint / "third")
    assert torch.equal(logits(load(checkpoint / "third")), wanted)


def test_without_thinsight_the_folder_is_a_plain_model(checkpoint: Path) -> None:
    load(checkpoint / "model", quantization_config=ts.ReductionConfig(REDUCTION)).save_pretrained(checkpoint / "again")
    script = (
        "import sys; from transformers import AutoModelForImageTextToText as A; m = A.from_pretrained(sys.argv[1]); "
        "assert 'thinsight' not in sys.modules; print(sum(len(x._forward_pre_hooks) for x in m.modules()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint / "again")], capture_output=True, text=True, check=True
    )
    assert told.stdout.split()[-1] == "0"
    assert "thinsight" in told.stderr  # transformers says that it skips the method


def test_dtype_generation_and_training_go_on(checkpoint: Path) -> None:
    model = load(checkpoint / "model", dtype=torch.bfloat16, quantization_config=ts.ReductionConfig(REDUCTION))
    assert model.dtype == torch.bfloat16
    out = model.generate(**tiny_inputs([[3, 5]]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 8
    model.train()
    batch = tiny_inputs([[3, 5]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ts.ReductionConfig(3), "reduction is a int"),
        (lambda: ts.ReductionConfig("/no/such/folder"), "there is no folder"),
        (lambda: ts.ReductionConfig(REDUCTION, bits=4), "takes no 'bits'"),
        (lambda: ts.ReductionConfig({"schema_version": 1}), r"config\.json: quantization_config\.reduction"),
    ],
)
def test_what_is_wrong_is_said_at_once(make: Any, words: str) -> None:
    with pytest.raises(ts.ThinsightError, match=words):
        make()


def test_a_reduction_of_another_model_is_refused_by_apply(checkpoint: Path) -> None:
    with pytest.raises(ts.BadInput, match="7 keep rates but the model has 4"):
        load(checkpoint / "model", quantization_config=ts.ReductionConfig(ts.Reduction(ts.Schedule.full(7))))


def test_the_place_of_quantisation_is_taken(checkpoint: Path) -> None:
    load(checkpoint / "model", quantization_config=ts.ReductionConfig(REDUCTION)).save_pretrained(checkpoint / "again")
    with pytest.raises(ValueError, match="ReductionConfig"):
        load(checkpoint / "again", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_pipeline_runs_under_it(checkpoint: Path) -> None:
    from tiny import tiny_images, tiny_processor
    from transformers import pipeline

    reduced = load(checkpoint / "model", quantization_config=ts.ReductionConfig(REDUCTION))
    plain, processor = load(checkpoint / "model"), tiny_processor()
    seen = []
    reduced.model.language_model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None).shape[1]),
        with_kwargs=True,
    )

    def answer(model: Any) -> Any:
        run = pipeline("image-text-to-text", model=model, processor=processor)
        return run(images=tiny_images(1)[0], text="<image> what color ?", max_new_tokens=2, do_sample=False)

    answer(reduced)
    assert seen[0] < 16  # of 16 vision tokens and some words
    answer(plain)
