"""A pool of exact answers: for each of many schedules, which questions the model gets right under it.

`python -m benchmarks.pool --model demo` runs the schedules below over the calibration and the test set (1,536
questions on 512 images), one after the other, and writes what it has after each; a later call goes on. From the
pools that come with the code, `benchmarks/coverage.py` simulates whole searches in minutes, without a model.

A pool holds one step at layer 2 with ever fewer tokens, staircases of several steps, what G-Search visits on the
calibration set and on resampled ones, and points of the sensitivity search's frontier.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinsight.cost import DecoderShape, decoder_shape
from thinsight.evaluation.base import SearchEvaluator
from thinsight.evaluation.result import Evaluation
from thinsight.records import write_atomically
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule

RESULTS = Path(__file__).parent / "results"
FOLDERS = {"demo": "model", "demo-internvl": "model-internvl"}
MODELS = tuple(FOLDERS)
SETS = ("demo:calibration", "demo:test")
FIRST_LAYER = 2

ONE_STEP = {
    "demo": "128 64 32 16 48 24 20 12 96 40 28 18 80 112 56 36 26 22 14 10 8 72 152 44 30 6 4 176 208 2",
    "demo-internvl": "32 16 24 12 20 14 10 8 40 28 18 48 22 26 36 13 11 15 9 6 4 56 44 2",
}
"""Tokens from layer 2 on, the most telling first."""

# (tokens, over how many layers from layer 2 on); the last one goes on to the end
STAIRS = {
    "demo": (
        ((64, 1), (32, 9)),
        ((64, 3), (32, 7)),
        ((32, 7), (16, 3)),
        ((32, 5), (16, 5)),
        ((64, 1), (48, 9)),
        ((32, 1), (16, 9)),
        ((32, 3), (16, 7)),
        ((64, 3), (16, 7)),
        ((20, 5), (12, 5)),
        ((24, 3), (12, 7)),
        ((16, 4), (15, 3), (14, 2), (13, 1)),
        ((16, 9), (8, 1)),
        ((17, 9), (0, 1)),
        ((128, 2), (64, 8)),
        ((96, 3), (32, 7)),
        ((48, 4), (24, 6)),
        ((32, 9), (0, 1)),
        ((24, 9), (0, 1)),
        ((20, 8), (8, 2)),
    ),
    "demo-internvl": (
        ((32, 1), (16, 11)),
        ((32, 4), (16, 8)),
        ((16, 8), (8, 4)),
        ((16, 4), (8, 8)),
        ((24, 4), (12, 8)),
        ((20, 6), (10, 6)),
        ((14, 10), (6, 2)),
        ((12, 11), (0, 1)),
        ((16, 11), (0, 1)),
        ((12, 8), (8, 4)),
        ((48, 2), (24, 10)),
    ),
}
STEP = {"demo": 16, "demo-internvl": 4}  # of G-Search's counts


@dataclass
class Pool:
    """Right or wrong, per schedule and question.

    Attributes:
        name: the model's.
        n_vision: vision tokens of the median prompt, in which counts are told.
        n_text: its other tokens.
        groups: shape (questions,), the number of each question's image.
        calibration: shape (questions,), whether the question is of the calibration set.
        full: shape (questions,), whether the full model is right.
        schedules: in the order in which they were run.
        origins: per schedule, who proposed it.
        ratios: per schedule, FLOPs of the full model on the median prompt over those under the schedule.
        right: per schedule, shape (questions,), whether it is right.
        same: per schedule, shape (questions,), whether it says what the full model says.
    """

    name: str
    n_vision: int
    n_text: int
    groups: NDArray[np.int64]
    calibration: NDArray[np.bool_]
    full: NDArray[np.bool_]
    schedules: list[Schedule] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    right: list[NDArray[np.bool_]] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = {schedule: place for place, schedule in enumerate(self.schedules)}

    def __len__(self) -> int:
        return len(self.full)

    @property
    def num_layers(self) -> int:
        return self.schedules[0].num_layers

    @cached_property
    def shape(self) -> DecoderShape:
        """The model's decoder, by which schedules that were not run are counted, too."""
        folder = RESULTS.parents[1] / "src" / "thinsight" / "demo" / FOLDERS[self.name]
        text = json.loads((folder / "config.json").read_text())["text_config"]
        return decoder_shape(SimpleNamespace(text_config=SimpleNamespace(**text)))

    def spent(self, schedule: Schedule) -> float:
        """FLOPs of the median prompt, as a share of the full model's."""
        return self.shape.prefill_flops(self.n_vision, self.n_text, schedule) / self._whole

    @cached_property
    def _whole(self) -> float:
        return self.shape.prefill_flops(self.n_vision, self.n_text)

    def add(self, schedule: Schedule, origin: str, ratio: float, right: Any, same: Any) -> None:
        self.places[schedule] = len(self.schedules)
        self.schedules.append(schedule)
        self.origins.append(origin)
        self.ratios.append(ratio)
        self.right.append(np.asarray(right, dtype=bool))
        self.same.append(np.asarray(same, dtype=bool))

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            n_vision=np.array(self.n_vision),
            n_text=np.array(self.n_text),
            groups=self.groups.astype(np.int32),
            calibration=self.calibration,
            full=self.full,
            keep_rates=np.array([schedule.keep_rates for schedule in self.schedules]),
            origins=np.array(self.origins),
            ratios=np.array(self.ratios),
            right=np.packbits(np.array(self.right), axis=1),
            same=np.packbits(np.array(self.same), axis=1),
        )
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Pool:
        held = np.load(path)
        count = len(held["full"])

        def rows(name: str) -> list[NDArray[np.bool_]]:
            return list(np.unpackbits(held[name], axis=1, count=count).astype(bool))

        return cls(
            path.stem.removeprefix("pool-"),
            int(held["n_vision"]),
            int(held["n_text"]),
            held["groups"].astype(np.int64),
            held["calibration"],
            held["full"],
            [Schedule(rates) for rates in held["keep_rates"].tolist()],
            held["origins"].tolist(),
            held["ratios"].tolist(),
            rows("right"),
            rows("same"),
        )


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"pool-{name}.npz"


class Maker:
    """Runs schedules on an embedded model and keeps them in a pool."""

    def __init__(self, name: str, folder: Path, minutes: float) -> None:
        import thinsight as ts
        from thinsight.job.findings import MedianPrompt

        self.ends = time.monotonic() + 60 * minutes
        self.model, self.processor = ts.load_demo(name=name)
        sets = [ts.load_examples(each) for each in SETS]
        examples = [example for each in sets for example in each]
        self.evaluator = ts.Evaluator(
            self.model, self.processor, examples, batch_size=16, cache_dir=folder / "cache", cache_gib=2
        )
        prompt = MedianPrompt.of(self.model.config, self.evaluator.prompt_sizes)
        self.flops, self.flops_full = prompt.flops, prompt.flops()
        self.file = path_of(name, folder)
        self.evaluator.share(Schedule.full(self.evaluator.num_layers), FIRST_LAYER)
        if self.file.exists():
            self.pool = Pool.load(self.file)
            return
        numbers: dict[str, int] = {}
        groups = np.array([numbers.setdefault(example.group, len(numbers)) for example in examples])
        full = self.evaluator.full.per_example
        assert full is not None
        calibration = np.arange(len(examples)) < len(sets[0])
        self.pool = Pool(name, prompt.n_vision, prompt.n_text, groups, calibration, full > 0.5)

    def score(self, schedule: Schedule, origin: str) -> int:
        """The schedule's place in the pool, run if it is not there yet."""
        if schedule in self.pool.places:
            return self.pool.places[schedule]
        if time.monotonic() > self.ends:
            raise SystemExit("time is up; run it again to go on")
        began = time.monotonic()
        scores = self.evaluator(schedule).per_example
        assert scores is not None
        said = [answer.text for answer in self.evaluator.full_answers]
        same = [a == b for a, b in zip(self.evaluator.predictions(schedule), said, strict=True)]
        self.pool.add(schedule, origin, self.flops_full / self.flops(schedule), scores > 0.5, same)
        self.pool.save(self.file)
        drop = 100 * (self.pool.full.mean() - self.pool.right[-1].mean())
        counts = schedule.counts(self.pool.n_vision)
        print(
            f"{self.pool.name} {origin} {counts} {self.pool.ratios[-1]:.2f}x drop {drop:.2f} "
            f"same {100 * np.mean(same):.2f} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        return self.pool.places[schedule]

    def stairs(self, steps: Sequence[tuple[int, int]]) -> Schedule:
        counts = [self.pool.n_vision] * FIRST_LAYER
        for tokens, layers in steps:
            counts += [tokens] * layers
        return Schedule([count / self.pool.n_vision for count in counts])

    def run(self, parts: Iterable[str]) -> None:
        for part in parts:
            getattr(self, f"_{part}")()

    def _step(self) -> None:
        depth = self.evaluator.num_layers
        for count in map(int, ONE_STEP[self.pool.name].split()):
            self.score(Schedule.step(depth, FIRST_LAYER, count / self.pool.n_vision), "one step")

    def _stairs(self) -> None:
        for steps in STAIRS[self.pool.name]:
            self.score(self.stairs(steps), "staircase")

    def _gsearch(self) -> None:
        """G-Search at a coarse step on the calibration set, then on resampled ones; all that it tries."""
        from thinsight.searches.gsearch import gsearch

        for seed in range(8):
            for max_drop in (0.01, 0.02):
                rows = np.flatnonzero(self.pool.calibration)
                if seed:
                    rows = np.random.default_rng(seed).integers(len(self.pool), size=len(rows))
                found = gsearch(Redrawn(self.pool, rows, self), max_drop, step=STEP[self.pool.name])
                print(f"gsearch, draw {seed}, {max_drop}: {found.schedule.counts(self.pool.n_vision)}", flush=True)

    def _exact(self) -> None:
        """G-Search to the token on the calibration set, by itself; what it accepted."""
        import thinsight as ts

        evaluator = ts.Evaluator(self.model, self.processor, ts.load_examples(SETS[0]), batch_size=16)
        for max_drop in (0.01,):
            found = ts.gsearch(
                evaluator, max_drop, study=self.file.parent / f"gsearch-{self.pool.name}-{max_drop}.jsonl", resume=True
            )
            for trial in [trial for trial in found.trials if trial.accepted]:
                self.score(trial.schedule, "G-Search")

    def _frontier(self) -> None:
        """The sensitivity search's frontier on the calibration set, ranked by text attention."""
        import thinsight as ts

        evaluator = ts.Evaluator(self.model, self.processor, ts.load_examples(SETS[0]), batch_size=16)
        found = ts.frontier(
            evaluator,
            (0.25, 0.3, 0.4, 0.5, 0.65, 0.8),
            study=self.file.parent / f"frontier-{self.pool.name}.jsonl",
            resume=True,
        )
        for point in found.points:
            self.score(point.schedule, "frontier")


class Redrawn(SearchEvaluator):
    """What a search sees of a redrawn set: rows of the pool, one as often as it was drawn.

    A schedule that the pool does not hold is run by the maker, or without one counts as all wrong; ``missed``
    tells how many did.
    """

    def __init__(self, pool: Pool, rows: NDArray[np.int64], maker: Maker | None = None) -> None:
        self.pool, self.rows, self.maker = pool, rows, maker
        self.num_layers, self.num_vision_tokens = pool.num_layers, pool.n_vision
        self.asked, self.missed = 0, 0

    @cached_property
    def full_score(self) -> float:
        return float(self.pool.full[self.rows].mean())

    @cached_property
    def full(self) -> Evaluation:
        return Evaluation(self.full_score, self.pool.full[self.rows].astype(float), full_score=self.full_score)

    def cost(self, candidate: Schedule | Reduction) -> float:
        return self.pool.spent(self.bind(candidate).schedule) / self.pool.spent(Schedule.full(self.num_layers))

    def __call__(self, schedule: Schedule | Reduction) -> Evaluation:
        schedule = schedule.schedule if isinstance(schedule, Reduction) else schedule
        self.asked += 1
        place = self.pool.places.get(schedule)
        if place is None and self.maker is not None:
            place = self.maker.score(schedule, "G-Search")
        if place is None:
            self.missed += 1
            return Evaluation(0.0)
        right = self.pool.right[place][self.rows]
        return Evaluation(float(right.mean()), right.astype(float), full_score=self.full_score)


def parts_of(given: str) -> Iterator[str]:
    known = ("step", "stairs", "gsearch", "exact", "frontier")
    for part in given.split(","):
        if part not in known:
            raise SystemExit(f"part {part!r}: choose from {', '.join(known)}")
        yield part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--parts", default="step,stairs,gsearch,exact,frontier")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=1e6, help="start no schedule after so long")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    Maker(arguments.model, arguments.out, arguments.minutes).run(list(parts_of(arguments.parts)))


if __name__ == "__main__":
    main()
