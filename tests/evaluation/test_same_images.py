"""Questions about the same images: what they begin with is read once, and the answers stay those of each
alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.inputs import EOS, Row
from family_processor import RowProcessor
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight.evaluation import Evaluator, Example
from thinsight.evaluation.full_model import Siblings, siblings_of
from thinsight.evaluation.prompts import Prompt, PromptReader
from thinsight.families import FAMILIES as ROWS
from thinsight.runtime import can_share
from thinsight.runtime.anatomy import reads_prompt_both_ways

HELD = [family for family in FAMILIES.values() if family.model_type in ROWS]
SPECS = ([3, 5], [2, 3, 9], [4, 1, 2, 2])
NEW_TOKENS = 5
STOP = [EOS, *range(60, 70)]  # so that answers end at various lengths


def with_siblings(family: Any) -> RowProcessor:
    """Three prompts of various images, and two more that ask other things about the first two's."""
    processor = RowProcessor(family, SPECS)
    for number, donor in ((0, 1), (1, 2)):
        row, other = processor.rows[number], processor.rows[donor]
        processor.rows.append(Row([*row.parts[:-1], other.parts[-1]]))
        name = len(processor.rows) - 1
        processor.examples.append(Example(f"e{name}", processor.examples[number].images, f"row {name}", ("1 2",)))
    return processor


def generated(model: Any, family: Any, processor: RowProcessor) -> list[tuple[int, ...]]:
    inputs = family.batch(processor.rows).inputs
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    found = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        ends = [place + 1 for place, token in enumerate(row) if token in STOP]
        found.append(tuple(row[: min(ends, default=len(row))]))
    return found


def read_tokens(model: Any, work: Any) -> int:
    """How many columns the first decoder layer's attention reads."""
    total = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal total
        states = args[0] if args else kwargs["hidden_states"]
        total += states.shape[0] * states.shape[1]

    hook = model.get_decoder().layers[0].register_forward_pre_hook(count, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return total


@for_each(HELD)
def test_answers_are_those_of_generate(family: Any) -> None:
    model = family.build()
    model.generation_config.eos_token_id = STOP
    processor = with_siblings(family)
    shared, alone = (
        Evaluator(model, processor, processor.examples, batch_size=size, max_new_tokens=NEW_TOKENS, reuse=reuse)
        for size, reuse in ((2, True), (5, False))
    )
    tokens = [answer.tokens for answer in shared.full_answers]
    assert tokens == generated(model, family, processor)
    assert tokens[0] != tokens[3] or tokens[1] != tokens[4]  # the question counts
    assert tokens == [answer.tokens for answer in alone.full_answers]
    assert shared.full.agreement == pytest.approx(alone.full.agreement, rel=1e-3)
    prompts = PromptReader(model, processor).prompts(processor.examples)
    found = siblings_of(model, prompts, [tuple(example.image_keys) for example in processor.examples])
    if can_share(model) and not reads_prompt_both_ways(model):
        assert {each.members for each in found} == {(0, 3), (1, 4)}
    else:
        assert found == []


def test_images_are_read_once_for_all_questions() -> None:
    model = tiny_llava(layers=2)
    image, other = tiny_images(2)
    questions = ("what color is the circle ?", "how many ?", "which ?", "what number is written ?")
    examples = [Example(f"e{i}", (image,), question, ("red",)) for i, question in enumerate(questions)]
    examples.append(Example("alone", (other,), questions[0], ("red",)))

    def evaluate(reuse: bool) -> Evaluator:
        return Evaluator(model, tiny_processor(), examples, batch_size=3, max_new_tokens=1, metric="anls", reuse=reuse)

    shared, alone = evaluate(True), evaluate(False)
    fewer = read_tokens(model, lambda: shared.full)
    more = read_tokens(model, lambda: alone.full)
    assert fewer < 0.6 * more
    assert shared.full_answers == alone.full_answers


def test_other_beginnings_are_not_shared() -> None:
    """Text before the image that differs, and an image behind the question."""
    model = tiny_llava(layers=2)
    image = model.config.image_token_id

    def prompt(*ids: int) -> Prompt:
        return Prompt(torch.tensor(ids), ids.count(image))

    before = [prompt(5, image, image, 7), prompt(6, image, image, 7)]
    behind = [prompt(5, 6, image, image), prompt(5, 6, image, image)]
    asked = [prompt(5, image, image, 6, 7), prompt(5, image, image, 6), prompt(5, image, image, 6, 8, 9)]
    assert siblings_of(model, before, ["a", "a"]) == []
    assert siblings_of(model, behind, ["a", "a"]) == []
    assert siblings_of(model, asked, ["a", "b", "c"]) == []
    assert siblings_of(model, asked, ["a", "a", "a"]) == [Siblings((0, 1, 2), 3)]
