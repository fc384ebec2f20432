"""Draws the frozen calibration and test sets of the package: `python -m training.make_data`.

Both come from the same generator and the same held-out fonts, but from different scenes, photographs' halves
and digit writers, none of which training saw. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from training.assets import load_assets
from training.questions import TASKS, Question
from training.scenes import Scene, draw_scene

IMAGES = {"calibration": 128, "test": 384}
QUESTIONS_PER_IMAGE = 3
DEMO = Path(__file__).parent.parent / "src" / "thinsight" / "demo"


def balanced_questions(rng: np.random.Generator, scene: Scene, asked: Counter[str]) -> list[Question]:
    """Questions of different tasks, the least asked tasks first."""
    order = sorted(TASKS, key=lambda task: (asked[task], rng.random()))
    questions = [question for task in order if (question := TASKS[task](rng, scene)) is not None]
    return questions[:QUESTIONS_PER_IMAGE]


def write_split(split: str, seed: int, folder: Path) -> Counter[str]:
    rng = np.random.default_rng((seed, zlib.crc32(split.encode())))
    assets = load_assets(split)
    asked: Counter[str] = Counter()
    lines: list[dict[str, str]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES[split]):
        scene = draw_scene(rng, assets)
        name = f"images/{split}-{number:04d}.webp"
        Image.fromarray(scene.pixels).save(folder / name, quality=92, method=6)
        for question in balanced_questions(rng, scene, asked):
            asked[question.task] += 1
            lines.append(
                {
                    "id": f"{split}-{len(lines):04d}",
                    "image": name,
                    "question": question.text,
                    "answer": question.answer,
                    "task": question.task,
                    "background": "photograph" if scene.photographic else "plain",
                }
            )
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--out", type=Path, default=DEMO)
    arguments = parser.parse_args()
    for split in IMAGES:
        asked = write_split(split, arguments.seed, arguments.out)
        print(f"{split}: {sum(asked.values())} questions on {IMAGES[split]} images; {dict(asked)}")


if __name__ == "__main__":
    main()
