"""Draws the frozen calibration, test and certification sets of the package: `python -m training.make_data`.

All come from the same generator and the same held-out fonts, but from different scenes. Calibration has its own
photographs' halves and digit writers; test and certification share theirs, and are two independent draws of one
distribution. Training saw none of it. The same seed gives the same files.

`--further 1000` draws so many more images of that distribution instead, into the folder of `--out`: questions by
which to check that a certificate holds. They are not part of the package.
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

IMAGES = {"calibration": 128, "test": 384, "certification": 1000}
FURTHER = "further"
QUESTIONS_PER_IMAGE = 3
DEMO = Path(__file__).parent.parent / "src" / "thinsight" / "demo"


def balanced_questions(rng: np.random.Generator, scene: Scene, asked: Counter[str]) -> list[Question]:
    """Questions of different tasks, the least asked tasks first."""
    order = sorted(TASKS, key=lambda task: (asked[task], rng.random()))
    questions = [question for task in order if (question := TASKS[task](rng, scene)) is not None]
    return questions[:QUESTIONS_PER_IMAGE]


def write_split(split: str, seed: int, folder: Path, images: int | None = None) -> Counter[str]:
    """Draw a set; ``images`` None: as many as the package has of it."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode())))
    assets = load_assets("calibration" if split == "calibration" else "test")
    asked: Counter[str] = Counter()
    lines: list[dict[str, str]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES[split] if images is None else images):
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
    parser.add_argument("--further", type=int, metavar="IMAGES", help="draw so many further images, and nothing else")
    arguments = parser.parse_args()
    if arguments.further is not None and arguments.out == DEMO:
        parser.error("--further needs --out: further images are not part of the package")
    sets = IMAGES if arguments.further is None else {FURTHER: arguments.further}
    for split, images in sets.items():
        asked = write_split(split, arguments.seed, arguments.out, images)
        print(f"{split}: {sum(asked.values())} questions on {images} images; {dict(asked)}")


if __name__ == "__main__":
    main()
