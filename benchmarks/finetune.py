"""The paper's Table 5 on the embedded demo: fine-tuning with a reduction switched on, against the same steps without.

`python -m benchmarks.finetune` trains the demo twice on the same questions about freshly drawn training scenes, once
under the schedule that P-Sigmoid found at 12.5 % (benchmarks/results/demo.csv) and once without, and scores both on the
test set, with and without the schedule. Writes benchmarks/results/finetune.json; minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import thinsight as ts
from benchmarks.results import interval_words
from thinsight.evaluation import Interval
from thinsight.job.findings import drop_of
from thinsight.records import write_atomically

RESULTS = Path(__file__).parent / "results"
BUDGET = 0.125
STEPS, IMAGES, RATE, WARMUP = 150, 16, 1e-4, 15
IGNORED = -100
WITHOUT, WITH = "the same steps without", "with the schedule switched on"


def schedule_of(results: Path, budget: float = BUDGET) -> ts.Reduction:
    """What P-Sigmoid found for the demo, seed 0."""
    with (results / "demo.csv").open(encoding="utf-8") as file:
        found = next(
            row
            for row in csv.DictReader(file)
            if row["method"] == "psigmoid" and float(row["budget"]) == budget and row["seed"] == "0"
        )
    return ts.Reduction(ts.Schedule([float(rate) for rate in found["keep_rates"].split()]), json.loads(found["ranker"]))


def batch(processor: Any, rng: np.random.Generator, images: int) -> tuple[dict[str, Tensor], Tensor]:
    """One question about each of so many new training scenes with the answer and its end behind it, and (batch, tokens)
    bool: what of it is the prompt."""
    from training.assets import load_assets
    from training.questions import LATER_WEIGHTS, ask
    from training.scenes import draw_scene

    scenes = [draw_scene(rng, load_assets("train")) for _ in range(images)]
    questions = [ask(rng, scene, 1, LATER_WEIGHTS)[0] for scene in scenes]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    end = processor.tokenizer.eos_token
    texts = [f"{prompt} {question.answer} {end}" for prompt, question in zip(prompts, questions, strict=True)]
    pixels = [Image.fromarray(scene.pixels) for scene in scenes]
    inputs = dict(processor(text=texts, images=pixels, padding=True, return_tensors="pt"))
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        length = len(processor.tokenizer(text).input_ids) - len(processor.tokenizer(prompt).input_ids)
        labels[row, -length:] = inputs["input_ids"][row, -length:]
    return {**inputs, "labels": labels}, labels == IGNORED


def rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(reduction: ts.Reduction | None, steps: int, images: int, seed: int = 0) -> tuple[Any, Any]:
    """The demo after so many steps; the questions are the same whatever the reduction."""
    model, processor = ts.load_demo()
    processor.tokenizer.padding_side = "left"
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    with nullcontext() if reduction is None else ts.apply(model.train(), reduction) as handle:
        for step in range(steps):
            inputs, is_prompt = batch(processor, rng, images)
            for group in optimiser.param_groups:
                group["lr"] = RATE * rate(step, steps)
            with nullcontext() if handle is None else handle.prompt(is_prompt):
                loss = model(**inputs, use_cache=False).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            if step % 20 == 0 or step == steps - 1:
                print(f"{WITHOUT if reduction is None else WITH}: step {step}, loss {float(loss):.3f}", flush=True)
    return model.eval(), processor


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=IMAGES, help="in each step, with one question each")
    parser.add_argument("--limit", type=int, help="so many test questions, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.json")
    given = parser.parse_args(argv)
    reduction, examples = schedule_of(RESULTS), ts.load_examples("demo:test", limit=given.limit)
    before = ts.Evaluator(*ts.load_demo(), examples)
    first = {"reduced": before(reduction), "full": before.full}
    rows = [{"training": "none", "reduced": first["reduced"].score, "full": first["full"].score}]
    scored = {}
    for name, under in ((WITHOUT, None), (WITH, reduction)):
        after = ts.Evaluator(*train(under, given.steps, given.images), examples)
        scored[name] = {"reduced": after(reduction), "full": after.full}
        row: dict[str, Any] = {"training": name}
        for side, found in scored[name].items():
            lost = drop_of(first[side], found, examples)
            row |= {side: found.score, f"{side}_gain": [-lost.mean, -lost.high, -lost.low]}
        rows.append(row)
    gap = drop_of(scored[WITH]["reduced"], scored[WITHOUT]["reduced"], examples)
    record = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "steps": given.steps,
        "questions": given.steps * given.images,
        "test": len(examples),
        "keep_rates": reduction.schedule.keep_rates,
        "rows": rows,
        "with_minus_without": [gap.mean, gap.low, gap.high],
    }
    write_atomically(given.out, json.dumps(record, indent=1) + "\n")
    print("\n".join(lines(given.out)[0]))


def lines(path: Path) -> tuple[list[str], bool, str]:
    """A table, and the claim with whether it holds."""
    found = json.loads(path.read_text())
    heads = ["fine-tuned", "score under the schedule", "gain [95 %]", "score of the full model", "gain [95 %]"]
    table = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in found["rows"]:
        gains = [
            interval_words(Interval(*row[f"{side}_gain"])) if f"{side}_gain" in row else ""
            for side in ("reduced", "full")
        ]
        cells = [row["training"], f"{100 * row['reduced']:.1f}", gains[0], f"{100 * row['full']:.1f}", gains[1]]
        table.append(f"| {' | '.join(cells)} |")
    gap = Interval(*found["with_minus_without"])
    holds = gap.low > 0 and found["rows"][2]["reduced_gain"][1] > 0
    head = (
        f"The embedded demo, {found['steps']} steps of AdamW on {found['questions']:,} new questions about training "
        f"scenes, scored on {found['test']:,} test questions under P-Sigmoid's schedule at {100 * BUDGET:g} % "
        f"({found['date']}, `python -m benchmarks.finetune`)."
    )
    said = (
        f"Fine-tuning with P-Sigmoid's schedule at {100 * BUDGET:g} % switched on helps it (on the demo): "
        f"{interval_words(gap)} points more than the same steps without."
    )
    return [head, "", *table], holds, said


if __name__ == "__main__":
    main()
