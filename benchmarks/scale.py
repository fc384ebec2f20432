"""What searches take on 1 to 64 workers: real searches and dispatcher, on a clock and an evaluator that are not real.

Each batch of each evaluation takes seconds that are known, which depend on the layer from which tokens are dropped and
vary by batch; each call costs the driver's round trip; each worker is lost now and then where ``--losses`` says so. So
what is measured is what the way of splitting costs: workers that wait, and batches that nobody needed.

Writes benchmarks/results/scale.md, in minutes on one core.

    python -m benchmarks.scale
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import thinsight as ts
from benchmarks.simulated import SimulatedTransport
from thinsight.evaluation import Evaluation, Pool
from thinsight.evaluation.bounds import Order
from thinsight.evaluation.result import Part
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule
from thinsight.searches import SearchEvaluator

WORKERS = (1, 2, 4, 8, 16, 64)
LAYERS, TOKENS, BATCH = 28, 576, 8
EXAMPLES, MANY = 4096, 16_384
FEW, MOST = 8, 64  # workers that are lost now and then, and to which many examples are given
SECONDS, ROUND_TRIP = 0.5, 0.005  # of a batch under the full model, and of a call
LIFE, START = 1200.0, 60.0  # seconds after which each worker is lost, on average, and until there is another one


@dataclass(frozen=True)
class _Answer:
    margin: float = 5.0


class Simulated(SearchEvaluator):
    """Examples that each need so many tokens at each layer, in batches, scored as `thinsight.Evaluator` scores them."""

    num_layers, num_vision_tokens, samples, first_layer = LAYERS, TOKENS, True, 1
    score_range = 0.0, 1.0

    def __init__(self, examples: int = EXAMPLES) -> None:
        rng = np.random.default_rng(1)
        most = rng.beta(0.6, 4.0, size=(examples, 1)) * TOKENS
        falls = np.sort(rng.random((examples, LAYERS)), axis=1)[:, ::-1]
        self._needs = np.floor(most * falls)
        self.batch_size: int = BATCH
        self.fingerprint = f"simulated {examples}"
        lists = [list(range(start, min(start + BATCH, examples))) for start in range(0, examples, BATCH)]
        ones = np.ones(examples)
        self._ran: list[list[int]] = []  # batches of the calls so far
        self.count_only = False
        self._order = Order(lists, ones, ones, rng.exponential(3.0, examples), np.zeros(examples))

    @property
    def full(self) -> Evaluation:
        """All right."""
        return Evaluation(1.0, np.ones(len(self._needs)), full_score=1.0)

    full_score = 1.0

    def known_full(self) -> list[_Answer]:
        """Computed before: the same for every search and way of splitting."""
        return [_Answer()]

    def take_full(self, answers: list[_Answer]) -> None:
        """Nothing to know."""

    def plan(self) -> Order:
        """See `Evaluator.plan`."""
        return self._order

    def key_of(self, candidate: Schedule | Reduction) -> str:
        """See `Evaluator.key_of`."""
        return repr(self.bind(candidate).schedule.counts(TOKENS))

    def part(self, candidate: Schedule | Reduction, batch: list[int]) -> Part:
        """See `Evaluator.part`."""
        scores = self._scores(candidate, batch)
        return Part(tuple(scores.tolist()), tuple((scores - 1.0).tolist()), (1.0,) * len(batch))

    def __call__(self, candidate: Schedule | Reduction) -> Evaluation:
        return self._run(candidate, self._order.batches, None)

    def at_least(
        self, candidate: Schedule | Reduction, floor: float, confidence: float | None = None, seed: int = 0
    ) -> Evaluation:
        return self._run(candidate, self._order.hardest_first(), floor)

    def sample(self, candidate: Schedule | Reduction, share: float) -> Evaluation:
        return self._run(candidate, self._order.sample(share), None)

    def seconds(self, worker: Hashable, method: str, arguments: tuple[Any, ...]) -> float:
        """What a call takes: a batch as much as its tokens in all layers, one in ten up to twice as long."""
        if method == "part":
            return ROUND_TRIP + self._batch_seconds(arguments[0], arguments[1])
        if method in ("__call__", "at_least", "sample"):
            before = self._ran
            self.count_only = True
            getattr(self, method)(*arguments)
            self.count_only = False
            ran, self._ran = self._ran[len(before) :], before
            return ROUND_TRIP + sum(self._batch_seconds(arguments[0], batch) for batch in ran)
        return ROUND_TRIP

    def _batch_seconds(self, candidate: Schedule | Reduction, batch: list[int]) -> float:
        text = f"{candidate!r} {batch[0]}"
        drawn = random.Random(hashlib.sha256(text.encode()).digest()).random()
        slow = 1.0 + (10 * (drawn - 0.9) if drawn > 0.9 else 0.0)
        return SECONDS * slow * (0.3 + 0.7 * self.bind(candidate).schedule.mean_keep_rate)

    def _scores(self, candidate: Schedule | Reduction, batch: list[int]) -> Any:
        counts = np.array(self.bind(candidate).schedule.counts(TOKENS))
        return (counts >= self._needs[batch]).all(axis=1).astype(float)

    def _run(self, candidate: Schedule | Reduction, batches: Any, floor: float | None) -> Evaluation:
        scores = np.full(len(self._needs), np.nan)
        ran = []
        for batch in batches:
            scores[batch] = self._scores(candidate, batch)
            ran.append(batch)
            if floor is not None and self._order.is_lost(scores, batch, floor, None):
                break
        self._ran = [*self._ran, *ran]
        if not self.count_only:
            self._order.note(scores)
        run = np.flatnonzero(~np.isnan(scores))
        complete = floor is None or len(run) == len(scores)
        score = float(np.mean(scores[run])) if complete else min(self._order.upper_bound(scores), floor or 0.0)
        return Evaluation(
            score,
            scores,
            complete,
            1.0,
            agreement=float(np.mean(np.exp(scores[run] - 1.0))),
            share=len(run) / len(scores) if complete else 1.0,
        )


@dataclass(frozen=True)
class Row:
    """One search on so many workers."""

    search: str
    split: str
    workers: int
    speedup: float  # over the seconds that one evaluator takes
    wasted: float  # batches that a single evaluator would not have run, as a share of all that were
    idle: float  # of the workers' seconds
    same: bool  # as what one evaluator finds


SEARCHES: dict[str, Callable[[Any], Sequence[ts.SearchResult]]] = {
    "gsearch": lambda evaluator: [ts.gsearch(evaluator, 0.01, step=8)],
    "random": lambda evaluator: [ts.random_search(evaluator, 0.25, n_trials=64)],
    "psigmoid": lambda evaluator: [ts.psigmoid(evaluator, 0.25, n_trials=16)],
    "sensitivity": lambda evaluator: [ts.sensitivity_search(evaluator, 0.25, n_trials=16)],
    "frontier": lambda evaluator: ts.frontier(evaluator, [0.125, 0.25, 0.5]).points,
}


def outcome(found: Sequence[ts.SearchResult]) -> Any:
    """What is compared: not how many evaluations it took, which are more where candidates are tried at once."""
    return [(each.schedule, each.reduction.ranker, each.score) for each in found]


def alone(search: str, examples: int) -> tuple[Any, float, int]:
    """One evaluator without workers: what it finds, its seconds and its batches."""
    evaluator = _Clocked(examples)
    found = SEARCHES[search](evaluator)
    return outcome(found), evaluator.clock, evaluator.batches


class _Clocked(Simulated):
    """Counts the seconds of what it runs itself; a batch that it has run for a candidate is known."""

    def __init__(self, examples: int) -> None:
        super().__init__(examples)
        self.clock, self.batches = 0.0, 0
        self._known: set[tuple[str, int]] = set()

    def _run(self, candidate: Schedule | Reduction, batches: Any, floor: float | None) -> Evaluation:
        self._ran = []
        evaluation = super()._run(candidate, batches, floor)
        key = self.key_of(candidate)
        for batch in self._ran:
            if (key, batch[0]) not in self._known:
                self._known.add((key, batch[0]))
                self.clock += self._batch_seconds(self.bind(candidate), batch)
                self.batches += 1
        return evaluation


def measured(
    search: str, split: str, workers: int, examples: int, expected: tuple[Any, float, int], losses: bool
) -> Row:
    """One search on workers."""
    local = Simulated(examples)
    began = START if losses else 0.0
    kills = [began + number * LIFE / workers for number in range(1, 10_000)] if losses else []
    made = (lambda: local) if split == "batches" else (lambda: _whole(examples))
    clock = made()
    transport = SimulatedTransport(made, workers, clock.seconds, kills=kills, starts=began)
    pool = Pool(transport=transport, inner=local if split == "batches" else None)
    assert pool.workers == workers
    found = SEARCHES[search](pool)
    seconds = transport.clock - began
    batches = sum(method == "part" for _, method, _ in transport.calls)
    what, alone_seconds, alone_batches = expected
    wasted = max(0.0, 1 - alone_batches / batches) if batches else float("nan")
    idle = 1 - sum(transport.busy.values()) / (workers * seconds)
    return Row(search, split, workers, alone_seconds / seconds, wasted, idle, outcome(found) == what)


def _whole(examples: int) -> Any:
    evaluator = Simulated(examples)
    return _NoBatches(evaluator)


class _NoBatches(SearchEvaluator):
    """The same evaluator, which shows no batches."""

    num_layers, num_vision_tokens, samples, first_layer, full_score = LAYERS, TOKENS, True, 1, 1.0
    score_range = 0.0, 1.0

    def __init__(self, inner: Simulated) -> None:
        self._inner = inner
        self.fingerprint = inner.fingerprint

    def __call__(self, candidate: Any) -> Evaluation:
        return self._inner(candidate)

    def at_least(self, candidate: Any, floor: float, confidence: float | None = None, seed: int = 0) -> Evaluation:
        return self._inner.at_least(candidate, floor)

    def sample(self, candidate: Any, share: float) -> Evaluation:
        return self._inner.sample(candidate, share)

    def seconds(self, worker: Hashable, method: str, arguments: tuple[Any, ...]) -> float:
        """Of a call."""
        return self._inner.seconds(worker, method, arguments)


def table(rows: list[Row]) -> list[str]:
    """As Markdown."""
    lines = [
        "| search | split by | workers | speed-up | of linear | batches not needed | workers idle | finds the same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wasted = "" if row.wasted != row.wasted else f"{100 * row.wasted:.1f} %"
        lines.append(
            f"| {row.search} | {row.split} | {row.workers} | {row.speedup:.2f} | {row.speedup / row.workers:.2f} | "
            f"{wasted} | {100 * row.idle:.1f} % | {'yes' if row.same else 'no'} |"
        )
    return lines


def rows_of(search: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Of one search: rows without losses, with losses, and on many examples."""
    expected = alone(search, EXAMPLES)
    rows = [measured(search, "batches", workers, EXAMPLES, expected, False) for workers in WORKERS]
    if search == "gsearch":
        rows.append(measured(search, "candidates", FEW, EXAMPLES, expected, False))
    lossy = search in ("gsearch", "random")
    faulty = [measured(search, "batches", workers, EXAMPLES, expected, True) for workers in (FEW, MOST) if lossy]
    return rows, faulty, [measured(search, "batches", MOST, MANY, alone(search, MANY), False)]


def main() -> None:
    """Measure all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "scale.md")
    given = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        tables = list(processes.map(rows_of, SEARCHES))
    rows, faulty, many = ([row for each in tables for row in each[place]] for place in range(3))
    text = [
        "# Searches on many workers, simulated",
        "",
        f"`make scale`: {EXAMPLES:,} examples in batches of {BATCH}, {LAYERS} layers, {TOKENS} vision tokens. A "
        f"batch takes {SECONDS:g} s under the full model and down to {0.3 * SECONDS:g} s under a reduction, one in ten "
        f"up to twice as long; a call costs {1000 * ROUND_TRIP:g} ms. The searches and the dispatcher are the real "
        "ones, clock and evaluator are not. Speed-up is over one evaluator without workers, early stops included; "
        "prefix reuse is left out of both.",
        "",
        *table(rows),
        "",
        f"On {MANY:,} examples, of which each evaluation has {MANY // BATCH // MOST} batches for each worker in place "
        f"of {EXAMPLES // BATCH // MOST}:",
        "",
        *table(many),
        "",
        f"With each worker lost after {LIFE / 60:g} minutes, on average, and {START:g} s until another one is ready:",
        "",
        *table(faulty),
        "",
    ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(text), encoding="utf-8")
    print(f"Written: {given.out}")


if __name__ == "__main__":
    main()
