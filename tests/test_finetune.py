"""Fine-tuning the embedded model under a reduction (the setting of the paper's Table 5, arXiv 2412.00556)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import thinsight as ts
from thinsight.evaluation.examples import open_image
from thinsight.evaluation.prompts import prompt_text

IGNORED = -100
QUESTIONS, STEPS = 4, 3


def answered(processor: Any, examples: list[ts.Example]) -> dict[str, Tensor]:
    """A batch of questions with their answers behind them; the answers are the labels."""
    prompts = [prompt_text(processor, example) for example in examples]
    texts = [f"{prompt} {example.answers[0]}" for prompt, example in zip(prompts, examples, strict=True)]
    images = [open_image(example.images[0]) for example in examples]
    batch = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        length = len(processor.tokenizer(text).input_ids) - len(processor.tokenizer(prompt).input_ids)
        labels[row, -length:] = batch["input_ids"][row, -length:]
    return {**batch, "labels": labels}


def test_fine_tuning_under_a_reduction_lowers_the_loss() -> None:
    model, processor = ts.load_demo()
    processor.tokenizer.padding_side = "left"
    batch = answered(processor, ts.load_examples("demo:calibration", limit=QUESTIONS, seed=2))
    schedule = ts.Schedule.step(model.config.text_config.num_hidden_layers, 2, 0.1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    with ts.apply(model.train(), schedule) as handle:
        with handle.prompt(batch["labels"] == IGNORED):
            for _ in range(STEPS):
                loss = model(**batch, use_cache=False).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        assert {len(row) for row in handle.kept(2)} == {schedule.counts(256)[2]}
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
