"""Pictures of kept tokens: what stands in them is what the model did, and examples are chosen without
looking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import Example
from thinsight.evaluation.prompts import PromptReader
from thinsight.evaluation.result import Evaluation
from thinsight.job.findings import failures_first, outcomes, picture_of, spread, varied
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.schedule import Schedule

EXAMPLE = Example("a", (tiny_images(1)[0],), "what color is the circle ?", ("red",))


def test_kept_tokens_are_those_of_the_model() -> None:
    model, processor = tiny_llava(), tiny_processor()
    reduction = Reduction(Schedule([1.0, 0.5, 0.5, 0.125]))
    picture = picture_of(model, processor, EXAMPLE, reduction, max_new_tokens=2)
    assert (picture.grid, picture.layers) == ((4, 4), (1, 3))
    with apply(model, reduction) as handle, torch.inference_mode():
        model(**PromptReader(model, processor).typical_batch([EXAMPLE], 1))
        kept = [tuple(handle.kept(layer)[0].tolist()) for layer in (1, 3)]
    assert list(picture.kept) == kept
    assert [len(indices) for indices in picture.kept] == [8, 2]


def test_answers_are_those_of_generate() -> None:
    model, processor = tiny_llava(), tiny_processor()
    reduction = Reduction(Schedule([1.0, 0.25, 0.0, 0.0]))
    picture = picture_of(model, processor, EXAMPLE, reduction, max_new_tokens=3)
    inputs = PromptReader(model, processor).typical_batch([EXAMPLE], 1)

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    assert picture.answer_full == answer()
    with apply(model, reduction):
        assert picture.answer_reduced == answer()
    assert picture.truth == "red"


def test_the_image_is_the_one_the_model_saw() -> None:
    wide = tiny_images(1, size=56)[0].resize((112, 56))
    picture = picture_of(
        tiny_llava(), tiny_processor(), Example("a", (wide,), "what ?"), Reduction(Schedule.full(4)), max_new_tokens=1
    )
    middle = wide.resize((56, 28), resample=3).crop((14, 0, 42, 28))  # bicubic, then the center
    assert picture.image.size == (28, 28)
    difference = np.abs(np.asarray(picture.image, float) - np.asarray(middle, float))
    assert difference.max() <= 2


def test_a_full_schedule_keeps_everything() -> None:
    picture = picture_of(tiny_llava(), tiny_processor(), EXAMPLE, Reduction(Schedule.full(4)), max_new_tokens=1)
    assert picture.layers == (3,)
    assert picture.kept == (tuple(range(16)),)


def test_several_images_show_the_first_one() -> None:
    pair = Example("pair", tuple(tiny_images(2)), "what ?")
    reduction = Reduction(Schedule.step(4, 1, 0.25), "uniform")
    picture = picture_of(tiny_llava(), tiny_processor(), pair, reduction, max_new_tokens=1)
    assert [len(kept) for kept in picture.kept] == [4]


def test_a_question_that_is_too_long_for_the_model() -> None:
    """The tiny model has 512 positions."""
    arguments = (tiny_llava(), tiny_processor())
    image, reduction = EXAMPLE.images, Reduction(Schedule.full(4))
    with pytest.warns(UserWarning, match=r"example 'long' has 6.. tokens, .* at most 512"):
        picture_of(*arguments, Example("long", image, "red " * 600 + "?"), reduction, max_new_tokens=1)
    with pytest.raises(ThinsightError, match=r"example 'longer' has 30.. tokens, .* at most 512"):
        picture_of(*arguments, Example("longer", image, "red " * 3000 + "?"), reduction, max_new_tokens=1)


def test_no_image() -> None:
    with pytest.raises(ThinsightError, match="has no image"):
        picture_of(tiny_llava(), tiny_processor(), Example("a", (), "what ?"), Reduction(Schedule.full(4)))


def test_many_layers_are_thinned_evenly() -> None:
    assert spread([2, 3, 5], 7) == [2, 3, 5]
    assert spread(range(2, 32), 4) == [2, 12, 21, 31]


def test_failures_come_first_then_gains_then_others_of_every_task() -> None:
    image = tiny_images(1)[0]
    groups = ["x", "x", "y", "z", "z", "w"]
    examples = [Example(str(i), (image,), "what ?", group=group) for i, group in enumerate(groups)]
    full = Evaluation(0.5, np.array([1.0, 1.0, 0.0, 0.5, 1.0, 1.0]))
    reduced = Evaluation(0.5, np.array([0.5, 0.0, 0.5, 0.5, 1.0, 1.0]))
    worse, better = outcomes(full, reduced)
    assert (worse, better) == ([1, 0], [2])
    chosen = [(example.id, outcome) for example, outcome in failures_first(examples, worse, better, 9)]
    assert chosen == [("1", "worse"), ("0", "worse"), ("2", "better"), ("3", "same"), ("5", "same")]
    for count in range(6):
        shown = [(example.id, outcome) for example, outcome in failures_first(examples, worse, better, count)]
        assert shown == chosen[:count]


def test_varied_takes_tasks_in_turn_and_no_image_twice() -> None:
    image = tiny_images(1)[0]

    def example(name: str, task: str, group: str) -> Example:
        return Example(name, (image,), "what ?", group=group, extra={"task": task})

    examples = [
        example("a1", "a", "x"),
        example("b1", "b", "x"),
        example("b2", "b", "y"),
        example("a2", "a", "y"),
        example("a3", "a", "z"),
    ]
    assert [e.id for e in varied(examples, 9)] == ["a1", "b2", "a3"]
    assert [e.id for e in varied(examples, 1)] == ["a1"]
    assert varied([], 3) == []
