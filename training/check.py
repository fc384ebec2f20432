"""Accepts or refuses a trained demo model, and puts an accepted one into the package.

`python -m training.check --run runs/demo` exports the checkpoint as a stock transformers folder, measures it
on the frozen test set with the package's own evaluator, and compares with the bars below. Only a model that
holds all of them is copied to `src/thinsight/demo/model`, with a card that states what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

import thinsight as ts
from training.make_data import DEMO
from training.model import build_model, build_processor

MEAN_ACCURACY, TASK_ACCURACY, BLIND_ACCURACY = 0.90, 0.75, 0.30
BLIND_BATCH = 64
PROBE_RATE, PROBE_LAYER = 0.25, 2  # the step under which rankers are compared


@dataclass(frozen=True)
class Findings:
    """What was measured on the frozen test set; accuracies in 0..1."""

    questions: int
    tasks: dict[str, float]
    blind: float  # the question without any image
    other_image: float  # the question with another question's image
    text_attention: float
    random: float
    ranking_gain: ts.evaluation.Interval

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.tasks.values())))

    def failures(self) -> list[str]:
        """The bars that do not hold, in words."""
        lines = [
            f"{task}: {score:.3f} < {TASK_ACCURACY}"
            for task, score in self.tasks.items()
            if score < TASK_ACCURACY
        ]
        if self.mean < MEAN_ACCURACY:
            lines.append(f"mean over tasks: {self.mean:.3f} < {MEAN_ACCURACY}")
        if self.blind >= BLIND_ACCURACY:
            lines.append(f"without the image: {self.blind:.3f} >= {BLIND_ACCURACY}")
        if self.ranking_gain.low <= 0:
            lines.append(f"text attention does not beat random: {self.ranking_gain}")
        return lines


def export(run: Path, folder: Path) -> int:
    """Write the run's checkpoint as float16 safetensors with its processor; returns the training step."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    model = build_model(0, state["recipe"]["layers"])
    model.load_state_dict(state["model"])
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return int(state["step"])


def find(folder: Path) -> Findings:
    """Measure the exported model on the frozen test set."""
    model, processor = ts.load_model(folder, dtype="float32", device="cpu")
    examples = ts.load_examples("demo:test")
    full = ts.Evaluator(model, processor, examples, batch_size=32).full
    assert full.per_example is not None
    tasks: dict[str, list[float]] = defaultdict(list)
    for example, score in zip(examples, full.per_example, strict=True):
        tasks[str(example.task)].append(float(score))
    probe = ts.Schedule.step(model.config.text_config.num_hidden_layers, PROBE_LAYER, PROBE_RATE)
    ranked = {
        name: ts.Evaluator(model, processor, examples, batch_size=32, ranker=name)(probe)
        for name in ("text-attention", "random")
    }
    by_attention, by_chance = ranked["text-attention"].per_example, ranked["random"].per_example
    assert by_attention is not None
    assert by_chance is not None
    gain = ts.paired_bootstrap(by_attention, by_chance, groups=[e.group for e in examples])
    return Findings(
        questions=len(examples),
        tasks={task: float(np.mean(scores)) for task, scores in sorted(tasks.items())},
        blind=blind_accuracy(model, processor, examples),
        other_image=other_image_accuracy(model, processor, examples),
        text_attention=ranked["text-attention"].score,
        random=ranked["random"].score,
        ranking_gain=gain,
    )


@torch.inference_mode()
def blind_accuracy(model: LlavaForConditionalGeneration, processor: Any, examples: list[ts.Example]) -> float:
    """Exact match when the prompt holds the question alone."""
    right = 0
    for start in range(0, len(examples), BLIND_BATCH):
        batch = examples[start : start + BLIND_BATCH]
        messages = [[{"role": "user", "content": [{"type": "text", "text": e.question}]}] for e in batch]
        texts = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor.tokenizer(texts, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(answer.strip() == e.answers[0] for answer, e in zip(answers, batch, strict=True))
    return right / len(examples)


def other_image_accuracy(
    model: LlavaForConditionalGeneration, processor: Any, examples: list[ts.Example]
) -> float:
    """Exact match when every question is asked of an image half the set away."""
    shift = len(examples) // 2
    swapped = [
        ts.Example(e.id, examples[(i + shift) % len(examples)].images, e.question, e.answers)
        for i, e in enumerate(examples)
    ]
    return float(ts.Evaluator(model, processor, swapped, batch_size=32).full_score)


def card(findings: Findings, run: Path, step: int) -> str:
    """The model card."""
    recipe = json.loads((run / "recipe.json").read_text())
    rows = "\n".join(f"| {task} | {100 * score:.1f} |" for task, score in findings.tasks.items())
    gain = findings.ranking_gain
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# thinsight demo model

A small `LlavaForConditionalGeneration` (CLIP vision tower of 4 layers, MLP projector, Llama decoder of
{recipe["layers"]} layers, 256 vision tokens), trained from scratch so that thinsight can be tried and tested
without a download. It answers ten kinds of short questions about synthetic scenes, and nothing else. Weights
are float16.

## How it was trained
`make train`: {step} steps of {recipe["batch"]} images on two CPU cores, seed {recipe["seed"]}; the recipe is
`training/train.py`, the scenes `training/scenes.py`, the questions `training/questions.py`.
The shipped weights were made in several sittings while the recipe took shape: the losses joined at the steps
that it names, its learning-rate decay was stretched twice and shortened once, and handwritten numbers had up
to three digits until step 2,100. The final recipe has not been run from scratch in one go: `make train` is
meant to give a model like this one, not the same weights.

**Attention was grounded in training.** Beside the answers, an auxiliary loss names what each patch shows, and
others pull attention over the vision tokens, in every decoder layer but the first: the question's as a whole
towards the patches that it is about, and that of a word that names something towards what it names. Linear
probes on hidden states add what a word refers to, what it is compared with, and what is asked for. So that
attention ranks well here was built in, not found: run `thinsight analyze --model ...` to learn whether it
does on your model, and do not infer it from this one.

## Accuracy on the frozen test set
{findings.questions} questions, exact match, percent.

| task | accuracy |
|---|---|
{rows}
| **mean over tasks** | **{100 * findings.mean:.1f}** |
| without the image | {100 * findings.blind:.1f} |
| with another image | {100 * findings.other_image:.1f} |

With {100 * PROBE_RATE:.0f} % of the vision tokens from layer {PROBE_LAYER} on: ranked by text attention
{100 * findings.text_attention:.1f}, at random {100 * findings.random:.1f}; the gain is
{100 * gain.mean:.1f} points (95 % paired bootstrap interval {100 * gain.low:.1f} to {100 * gain.high:.1f}).

## Data
Scenes are drawn from Python packages: fonts of matplotlib and of the font-* packages, handwritten digits of
scikit-learn (UCI optical recognition of handwritten digits), photographs of scikit-image and scikit-learn.
The test and calibration sets use digit writers, fonts and photographs that training never saw.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.run / "model"
    step = export(arguments.run, folder)
    findings = find(folder)
    (folder / "README.md").write_text(card(findings, arguments.run, step))
    print((folder / "README.md").read_text())
    if failures := findings.failures():
        sys.exit("refused:\n" + "\n".join(failures))
    shutil.rmtree(DEMO / "model", ignore_errors=True)
    shutil.copytree(folder, DEMO / "model")
    print(f"accepted: {DEMO / 'model'}")


if __name__ == "__main__":
    main()
