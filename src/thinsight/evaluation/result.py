"""What was found out about a model, as plain numbers: scores, times, rank consistency.

Knows nothing about models, metrics or how the numbers came about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import GetPydanticSchema
from pydantic_core.core_schema import no_info_after_validator_function as then

from .. import tables, words
from ..errors import BadInput
from ..records import Undefined

PREFILL = "prefill"
PREFILL_WITH_IMAGES = "prefill with images"
ANSWER = "whole answer"
LOW_TAU = 0.2  # the paper's models have 0.68 and more after the first layer
FAIR_TAU = 0.4

# as records hold them: (nested) lists of numbers, null where one is not defined
Vector = Annotated[
    NDArray[np.float64], GetPydanticSchema(lambda _, schema: then(np.array, schema(tuple[Undefined, ...])))
]
Matrix = Annotated[
    NDArray[np.float64], GetPydanticSchema(lambda _, schema: then(np.array, schema(tuple[tuple[Undefined, ...], ...])))
]


@dataclass(frozen=True)
class Evaluation(tables.Shown):
    """The score of one schedule on one set of examples.

    Attributes:
        score: mean metric over the examples, in the metric's own unit (higher is better).
            When ``complete`` is False it is only an upper bound of that mean.
        per_example: float64, shape (examples,), read-only; NaN where an example was not run. None if unknown.
        complete: False when the run was stopped early because the score could not reach the floor asked for.
        full_score: the full model's score on the same examples, if known.
        cost: decoder FLOPs spent to obtain this evaluation, if known.
        agreement: mean over the examples run of the probability that is given to the full model's answer, in
            [0, 1]: a smooth signal where scores are equal. None if unknown.
        share: of the examples, how many the score is about; below 1 for a sample.

    Raises:
        ThinsightError: a score that is not a finite number, or ``per_example`` that is not one-dimensional.
    """

    score: float
    per_example: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    complete: bool = True
    full_score: float | None = None
    cost: float | None = None
    agreement: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", _finite(self.score, "score"))
        if self.full_score is not None:
            object.__setattr__(self, "full_score", _finite(self.full_score, "full_score"))
        if self.per_example is not None:
            object.__setattr__(self, "per_example", _read_only_vector(self.per_example))

    @property
    def drop(self) -> float:
        """Full model's score minus this score, in the metric's own unit.

        Raises:
            ThinsightError: the full model's score is not known.
        """
        if self.full_score is None:
            raise BadInput("full_score is None; a drop needs the full model's score on the same examples")
        return self.full_score - self.score

    def _tables(self) -> Iterable[tables.Table]:
        part = "" if self.complete else ", stopped early: an upper bound"
        known = {
            "score": f"{words.plain(self.score, 4)}{part}",
            "full model": "" if self.full_score is None else words.plain(self.full_score, 4),
            "drop": "" if self.full_score is None else words.plain(self.drop, 4),
            "examples": "" if self.per_example is None else words.count(len(self.per_example)),
            "share of them": "" if self.share == 1 else words.percent(self.share),
            "agreement": "" if self.agreement is None else words.percent(self.agreement),
            "cost": "" if self.cost is None else words.flops(self.cost),
        }
        return [tables.facts_table("Evaluation", known.items())]


@dataclass(frozen=True)
class Timing(tables.Shown):
    """Wall times of one thing, full and reduced, in milliseconds, one entry per run in the order they were run.

    Raises:
        ThinsightError: no runs, or not as many of each.
    """

    what: str
    full: tuple[float, ...]
    reduced: tuple[float, ...]
    batch: int

    def __post_init__(self) -> None:
        if not 0 < len(self.full) == len(self.reduced):
            raise BadInput(f"timing {self.what!r} has {len(self.full)} full runs, {len(self.reduced)} reduced ones")

    def __repr__(self) -> str:
        medians = f"{self.full_ms:.4g} ms full, {self.reduced_ms:.4g} ms reduced"
        return f"Timing({self.what!r}, {medians}, {self.runs} runs)"

    @property
    def runs(self) -> int:
        return len(self.full)

    @property
    def full_ms(self) -> float:
        """Median of the full model's runs."""
        return statistics.median(self.full)

    @property
    def reduced_ms(self) -> float:
        """Median of the reduced model's runs."""
        return statistics.median(self.reduced)

    @property
    def ratio(self) -> float:
        """Median full time divided by median reduced time: above 1 is faster."""
        return self.full_ms / self.reduced_ms if self.reduced_ms else math.nan

    def _tables(self) -> Iterable[tables.Table]:
        return [tables.timing_table([self])]


@dataclass(frozen=True)
class Measurement(tables.Shown):
    """Times and the KV cache's measured size after prefill (bytes, whole batch), full and reduced."""

    timings: tuple[Timing, ...]
    kv_full: int
    kv_reduced: int
    batch: int
    new_tokens: int
    device: str
    dtype: str
    threads: int

    def __repr__(self) -> str:
        times = ", ".join(f"{timing.what} {timing.ratio:.2f}x" for timing in self.timings)
        return f"Measurement({times}, KV cache {self.kv_ratio:.2f}x, batch {self.batch}, {self.device})"

    @property
    def kv_ratio(self) -> float:
        return self.kv_full / self.kv_reduced

    def timing(self, what: str) -> Timing:
        """The timing of that name."""
        return next(timing for timing in self.timings if timing.what == what)

    @property
    def named(self) -> tuple[Timing, ...]:
        """The timings, that of the answer under a name with its length."""
        answer = f"{ANSWER} ({self.new_tokens} tokens)"
        return tuple(replace(each, what=answer) if each.what == ANSWER else each for each in self.timings)

    def _tables(self) -> Iterable[tables.Table]:
        sizes = f"{self.kv_full / 1e6:.2f} MB full, {self.kv_reduced / 1e6:.2f} MB reduced"
        known = {
            "KV cache": f"{sizes}, {words.ratio(self.kv_ratio)}",
            "on": f"{self.device}, {self.dtype}, {self.threads} CPU threads",
        }
        return [tables.timing_table(self.named), tables.facts_table("Measured with it", known.items())]


@dataclass(frozen=True, eq=False)
class RankConsistency(tables.Shown):
    """How alike the rankings of L decoder layers are, averaged over examples.

    Attributes:
        tau: Kendall's tau-b of neighboring layers, shape (L - 1,): ``tau[i]`` compares layers i and i + 1.
        tau_matrix: of every pair of layers, shape (L, L).
        topk_overlap: share of the best quarter of the tokens that neighboring layers have in common,
            shape (L - 1,); unrelated rankings have ``top_rate`` in common.
        tied_share: share of the tokens whose score another has too, shape (L,); their order means nothing.
        top_rate: which share of the tokens ``topk_overlap`` looks at.
        examples: how many examples were averaged.

    A value that is not defined is NaN.

    Raises:
        ThinsightError: shapes that do not go together.
    """

    tau: Vector
    tau_matrix: Matrix
    topk_overlap: Vector
    tied_share: Vector
    top_rate: float
    examples: int

    def __post_init__(self) -> None:
        for name in ("tau", "tau_matrix", "topk_overlap", "tied_share"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        layers = len(self.tau) + 1
        if self.tau_matrix.shape != (layers, layers):
            raise BadInput(f"tau_matrix must be {layers} x {layers} to go with {layers - 1} values of tau")
        for name, wanted in (("topk_overlap", f"{layers - 1}, as tau"), ("tied_share", f"{layers}, one per layer")):
            if len(getattr(self, name)) != int(wanted.split(",")[0]):
                raise BadInput(f"{name} has {len(getattr(self, name))} values; it needs {wanted}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankConsistency) and all(
            np.array_equal(getattr(self, each.name), getattr(other, each.name), equal_nan=True) for each in fields(self)
        )

    def __repr__(self) -> str:
        return (
            f"RankConsistency({len(self.tau) + 1} layers, {self.examples} examples, typical tau "
            f"{self.typical_tau:.2f}, typical overlap {self.typical_overlap:.2f})"
        )

    @property
    def typical_tau(self) -> float:
        """Median tau of neighboring layers from layer 1 on; the first often ranks differently."""
        return float(np.median(self.tau[1:] if len(self.tau) > 1 else self.tau))

    @property
    def typical_overlap(self) -> float:
        """Median top-k overlap of neighboring layers from layer 1 on."""
        return float(np.median(self.topk_overlap[1:] if len(self.topk_overlap) > 1 else self.topk_overlap))

    @property
    def is_low(self) -> bool:
        """Whether tau is so near 0 that one layer's ranking says little about the next one's."""
        return self.typical_tau < LOW_TAU

    def summary(self) -> str:
        """What the numbers mean, in words; starts with "Warning" when ranking by this model is doubtful."""
        by_chance = f"{self.top_rate:.0%} by chance"
        typical, first = words.plain(self.typical_tau), words.plain(float(self.tau[0]))
        facts = (
            f"Kendall's tau between neighboring layers is {typical} (median after the first "
            f"layer, which has {first}), and they share {self.typical_overlap:.0%} of their best "
            f"{self.top_rate:.0%} of the vision tokens ({by_chance}), over {self.examples} examples."
        )
        ties = self.tied_share.max()
        noted = ""
        if ties >= 0.05:
            noted = (
                f" Up to {ties:.0%} of the scores of layer {self.tied_share.argmax()} are tied: "
                "the order of those tokens is arbitrary."
            )
        return f"{self._verdict()} {facts}{noted}"

    def _verdict(self) -> str:
        if self.is_low:
            return (
                "Warning: the layers hardly agree on which vision tokens matter, so ranking by attention may "
                "be no better than random on this model: compare with the random ranker before trusting it."
            )
        if self.typical_tau < FAIR_TAU:
            return "The layers agree moderately on which vision tokens matter; ranking by attention should help."
        return "The layers agree on which vision tokens matter: what an early layer ranks low stays low."

    def _tables(self) -> Iterable[tables.Table]:
        return [tables.consistency_table(self)]


def _finite(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadInput(f"{name} is {value!r}; an evaluation needs a finite number") from None
    except OverflowError:
        raise BadInput(f"{name} is too large a number; an evaluation needs a finite one") from None
    if not math.isfinite(number):
        raise BadInput(f"{name} is {number}; an evaluation needs a finite number")
    return number


def _read_only_vector(values: object) -> NDArray[np.float64]:
    vector = np.array(values, dtype=np.float64)  # a copy, so that later writes elsewhere do not reach it
    if vector.ndim != 1:
        raise BadInput(f"per_example has shape {vector.shape}; it must be one score per example")
    vector.flags.writeable = False
    return vector
