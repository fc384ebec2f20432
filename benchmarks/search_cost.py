"""What G-Search costs with everything that makes it cheap, and without prefix reuse and early stops.

`python -m benchmarks.search_cost`. Counts to the token, on the embedded demo's calibration set. Each way has
an evaluator of its own, and the full model's pass over the set is not counted: every search needs it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import RESULTS, Columns, Results, Row, about, number, setting
from thinsight import Evaluator, Schedule, gsearch, load_examples
from thinsight.evaluation.result import Evaluation
from thinsight.loading import load_demo

COLUMNS: Columns = {
    "way": setting("way"),
    "evaluations": number("evaluations", "{:.0f}"),
    "runs of the full model": number("full_runs", "{:.2f}"),
    "wall s": number("wall_s", "{:.0f}"),
    "CPU s": number("cpu_s", "{:.0f}"),
    "score": number("score", "{:.4f}"),
    "same schedule": setting("same"),
}
CHEAP, WHOLE = "reuse and early stops", "neither"


class EveryExample:
    """An evaluator that cannot stop early."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __call__(self, schedule: Schedule) -> Evaluation:
        return self._evaluator(schedule)

    def __getattr__(self, name: str) -> Any:
        if name == "at_least":
            raise AttributeError(name)
        return getattr(self._evaluator, name)


def searched(evaluator: Any, way: str, max_drop: float) -> tuple[Row, Schedule]:
    """One search, the full model's pass ahead of the clock."""
    full = evaluator.full_score
    wall, cpu = time.perf_counter(), time.process_time()
    result = gsearch(evaluator, max_drop)
    row = {
        "way": way,
        "max_drop": max_drop,
        "full_score": full,
        "score": result.score,
        "evaluations": result.evaluations,
        "full_runs": result.full_forwards,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }
    return row, result.schedule


def both(model: Any, processor: Any, examples: Sequence[Any], max_drop: float) -> list[Row]:
    """A row for each way, and whether they found the same schedule."""
    cheap = Evaluator(model, processor, examples)
    whole = EveryExample(Evaluator(model, processor, examples, reuse=False))
    found = [searched(cheap, CHEAP, max_drop), searched(whole, WHOLE, max_drop)]
    same = found[0][1] == found[1][1]
    return [{**row, "keep_rates": list(schedule.keep_rates), "same": same} for row, schedule in found]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--examples", type=int, help="so many of the set; all if not given")
    parser.add_argument("--out", type=Path, default=RESULTS / "search_cost.json")
    arguments = parser.parse_args(argv)
    model, processor = load_demo()
    examples = load_examples("demo:calibration")[: arguments.examples]
    results = Results(arguments.out, about(torch.device("cpu")), COLUMNS, resume=False)
    results.add(*both(model, processor, examples, arguments.max_drop))
    results.print("G-Search on the embedded demo")


if __name__ == "__main__":
    main()
