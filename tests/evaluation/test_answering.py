"""Answers a batch at a time: what the model says by itself under the reduction, row by row."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight as ts
from thinsight.errors import BadInput
from thinsight.evaluation import Example
from thinsight.evaluation.prompts import PromptReader
from thinsight.schedule import Schedule

QUESTIONS = ("what color is the circle ?", "how many ?", "which ?")
EXAMPLES = [Example(f"e{i}", (image,), QUESTIONS[i]) for i, image in enumerate(tiny_images(3))]
SCHEDULE = Schedule([1, 0.75, 0.75, 0.25])


def said(schedule: Schedule | None, model: Any = None) -> list[str]:
    model, processor = model or tiny_llava(), tiny_processor()
    answers = []
    for example in EXAMPLES:
        inputs = PromptReader(model, processor).batch([example])
        with ts.apply(model, schedule or Schedule.full(4)), torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return [each.strip() for each in answers]


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.full(4), None])
def test_answers_are_what_generate_says(schedule: Schedule | None) -> None:
    answerer = ts.Answerer(tiny_llava(), tiny_processor(), schedule, max_new_tokens=4, kept=True)
    found = answerer.answers(EXAMPLES)
    assert [(each.id, each.text) for each in found] == list(zip(["e0", "e1", "e2"], said(schedule), strict=True))
    assert said(SCHEDULE) != said(None)
    for each in found:
        assert {layer: len(kept) for layer, kept in (each.kept or {}).items()} == (
            {1: 12, 3: 4} if schedule == SCHEDULE else {}
        )
    assert said(None, answerer.model) == said(None)  # the model is as it was


def test_which_tokens_were_kept() -> None:
    model, processor = tiny_llava(), tiny_processor()
    found = ts.Answerer(model, processor, SCHEDULE, max_new_tokens=2, kept=True).answers(EXAMPLES)
    with ts.apply(model, SCHEDULE) as handle, torch.no_grad():
        model(**PromptReader(model, processor).batch(EXAMPLES[1:2]))
        assert found[1].kept == {layer: handle.kept(layer)[0].tolist() for layer in (1, 3)}


def test_a_batch_of_columns_as_ray_data_gives_it() -> None:
    answerer = ts.Answerer(tiny_llava(), tiny_processor(), SCHEDULE, max_new_tokens=4)
    images = [each.images[0] for each in EXAMPLES]
    file = io.BytesIO()
    images[0].save(file, "PNG")  # type: ignore[union-attr]
    mixed = np.array([None] * 3, dtype=object)
    mixed[:] = [file.getvalue(), np.asarray(images[1]), images[2]]
    found = answerer({"question": np.array(QUESTIONS), "image": mixed, "id": np.arange(3)})
    assert found["answer"] == said(SCHEDULE)
    assert list(found["id"]) == [0, 1, 2]
    assert "kept" not in found
    many = ts.Answerer(tiny_llava(), tiny_processor(), SCHEDULE, max_new_tokens=4, kept=True)
    found = many({"question": QUESTIONS, "images": [[each] for each in images]})
    assert found["answer"] == said(SCHEDULE)
    assert sorted(json.loads(found["kept"][0])) == ["1", "3"]


def test_what_cannot_be_answered_is_said() -> None:
    model, processor = tiny_llava(), tiny_processor()
    with pytest.raises(BadInput, match="processor is None: a loaded model"):
        ts.Answerer(model)
    with pytest.raises(BadInput, match="dtype is 'float16': a loaded model"):
        ts.Answerer(model, processor, dtype="float16")
    with pytest.raises(BadInput, match="max_new_tokens is 0"):
        ts.Answerer(model, processor, max_new_tokens=0)
    with pytest.raises(BadInput, match="schedule has 9 keep rates but the model has 4"):
        ts.Answerer(model, processor, Schedule.step(9, 2, 0.5))
    answerer = ts.Answerer(model, processor)
    with pytest.raises(BadInput, match=r"columns \['picture', 'question'\]: it must have question, and image"):
        answerer({"question": ["which ?"], "picture": ["a.png"]})
    with pytest.raises(BadInput, match="image is a bytes that is none"):
        answerer({"question": ["which ?"], "image": [b"no image"]})
