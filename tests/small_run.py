"""A model folder and data files as a user has them, small enough to search in a second.

Knows nothing about what is done with them. Shared by the tests of the pipeline and of the command.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tiny import tiny_images, tiny_llava, tiny_processor

QUESTIONS = {"color": "what color is the circle ?", "count": "how many ?"}


@dataclass(frozen=True)
class SmallRun:
    """Paths as texts: ``model``, ``calibration`` (16 examples), ``test`` (12), ``both`` (all of them, 14
    images)."""

    folder: Path
    model: str
    calibration: str
    test: str
    both: str


def make_small_run(folder: Path) -> SmallRun:
    """Write everything into ``folder``. No example has an answer, so the score is agreement."""
    model = folder / "model"
    tiny_llava().save_pretrained(model)
    tiny_processor().save_pretrained(model)
    calibration = _examples(folder, "calibration", 8)
    test = _examples(folder, "test", 6)
    return SmallRun(
        folder=folder,
        model=str(model),
        calibration=_write(folder / "calibration.jsonl", calibration),
        test=_write(folder / "test.jsonl", test),
        both=_write(folder / "both.jsonl", calibration + test),
    )


def _examples(folder: Path, name: str, images: int) -> list[dict[str, str]]:
    examples = []
    for i, image in enumerate(tiny_images(images, seed=len(name))):
        image.save(folder / f"{name}{i}.png")
        for task, question in QUESTIONS.items():
            example = {"id": f"{name}-{i}-{task}", "image": f"{name}{i}.png", "question": question, "task": task}
            examples.append(example)
    return examples


def _write(path: Path, examples: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)
