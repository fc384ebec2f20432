"""What was found out about a model, as plain numbers: scores and how sure a drop is, times, rank consistency.

Knows nothing about models, metrics or how the numbers came about: it sees columns of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import GetPydanticSchema
from pydantic_core.core_schema import no_info_after_validator_function as then

from .. import shown, texts
from ..errors import BadInput, whole
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

NEAR_CHANCE = 0.03  # a score that is no further above guessing says nothing
_HALVINGS = 60  # of [-1, 1], to the last bit
_CELLS_AT_ONCE = 4_000_000  # drawn indices held in memory at a time (32 MB)


@dataclass(frozen=True)
class Part:
    """What came of one batch of examples under a candidate, an entry per example in the batch's order.

    Attributes:
        scores: of the metric.
        likelihoods: log probabilities of the full model's answers.
        costs: decoder FLOPs of each prompt's pass.
    """

    scores: tuple[float, ...]
    likelihoods: tuple[float, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation(shown.Shown):
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
            # a copy, so that later writes elsewhere do not reach it
            vector = np.array(self.per_example, dtype=np.float64)
            if vector.ndim != 1:
                raise BadInput(f"per_example has shape {vector.shape}; it must be one score per example")
            vector.flags.writeable = False
            object.__setattr__(self, "per_example", vector)

    @property
    def drop(self) -> float:
        """Full model's score minus this score, in the metric's own unit.

        Raises:
            ThinsightError: the full model's score is not known.
        """
        if self.full_score is None:
            raise BadInput("full_score is None; a drop needs the full model's score on the same examples")
        return self.full_score - self.score

    def _tables(self) -> Iterable[shown.Table]:
        part = "" if self.complete else ", stopped early: an upper bound"
        known = {
            "score": f"{shown.plain(self.score, 4)}{part}",
            "full model": "" if self.full_score is None else shown.plain(self.full_score, 4),
            "drop": "" if self.full_score is None else shown.plain(self.drop, 4),
            "examples": "" if self.per_example is None else shown.count(len(self.per_example)),
            "share of them": "" if self.share == 1 else shown.percent(self.share),
            "agreement": "" if self.agreement is None else shown.percent(self.agreement),
            "cost": "" if self.cost is None else shown.flops(self.cost),
        }
        return [shown.facts_table("Evaluation", known.items())]


@dataclass(frozen=True)
class Timing(shown.Shown):
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
        """How many of each side."""
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

    def _tables(self) -> Iterable[shown.Table]:
        return [timing_table([self])]


@dataclass(frozen=True)
class Measurement(shown.Shown):
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
        """How many times smaller the cache is."""
        return self.kv_full / self.kv_reduced

    def timing(self, what: str) -> Timing:
        """The timing of that name."""
        return next(timing for timing in self.timings if timing.what == what)

    @property
    def named(self) -> tuple[Timing, ...]:
        """The timings, that of the answer under a name with its length."""
        answer = f"{ANSWER} ({self.new_tokens} tokens)"
        return tuple(replace(each, what=answer) if each.what == ANSWER else each for each in self.timings)

    def _tables(self) -> Iterable[shown.Table]:
        sizes = f"{self.kv_full / 1e6:.2f} MB full, {self.kv_reduced / 1e6:.2f} MB reduced"
        known = {
            "KV cache": f"{sizes}, {shown.ratio(self.kv_ratio)}",
            "on": f"{self.device}, {self.dtype}, {self.threads} CPU threads",
        }
        return [timing_table(self.named), shown.facts_table("Measured with it", known.items())]


@dataclass(frozen=True, eq=False)
class RankConsistency(shown.Shown):
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
        if self.is_low:
            verdict = (
                "Warning: the layers hardly agree on which vision tokens matter, so ranking by attention may "
                "be no better than random on this model: compare with the random ranker before trusting it."
            )
        elif self.typical_tau < FAIR_TAU:
            verdict = "The layers agree moderately on which vision tokens matter; ranking by attention should help."
        else:
            verdict = "The layers agree on which vision tokens matter: what an early layer ranks low stays low."
        noted = ""
        if (ties := self.tied_share.max()) >= 0.05:
            noted = (
                f" Up to {ties:.0%} of the scores of layer {self.tied_share.argmax()} are tied: "
                "the order of those tokens is arbitrary."
            )
        typical, first = shown.plain(self.typical_tau), shown.plain(float(self.tau[0]))
        return (
            f"{verdict} Kendall's tau between neighboring layers is {typical} (median after the first layer, which has "
            f"{first}), and they share {self.typical_overlap:.0%} of their best {self.top_rate:.0%} of the vision "
            f"tokens ({self.top_rate:.0%} by chance), over {texts.counted(self.examples, 'example')}.{noted}"
        )

    def _tables(self) -> Iterable[shown.Table]:
        return [consistency_table(self)]


def _finite(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadInput(f"{name} is {value!r}; an evaluation needs a finite number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadInput(f"{name} is {number}; an evaluation needs a finite number")
    return number


def timing_table(timings: Sequence[Timing]) -> shown.Table:
    """Measured times; says that the gain is in prefill."""
    return shown.Table(
        "Measured time (the gain is in prefill)",
        timings,
        shown.Column("Measured", lambda row: row.what, "", text=True),
        shown.Column("Batch", lambda row: shown.count(row.batch), "batch"),
        shown.Column("Runs", lambda row: shown.count(row.runs), "runs"),
        shown.Column("Full", lambda row: shown.milliseconds(row.full_ms), "full"),
        shown.Column("Reduced", lambda row: shown.milliseconds(row.reduced_ms), "reduced"),
        shown.Column("Full / reduced", lambda row: shown.ratio(row.ratio), "full / reduced"),
    )


def consistency_table(found: RankConsistency) -> shown.Table:
    """How alike each layer and the one before rank the vision tokens."""

    def before(values: Any, show: Callable[[float], str], first: str = shown.NOTHING) -> Callable[[int], str]:
        return lambda layer: show(float(values[layer - 1])) if layer else first

    return shown.Table(
        "Rank consistency by layer",
        range(len(found.tied_share)),
        shown.Column("Layer", str, "layer", text=True),
        shown.Column("Tau with the layer before", before(found.tau, shown.plain), "tau"),
        shown.Column("", before(found.tau, shown.bar, ""), text=True, places=("terminal",)),
        shown.Column("Top-token overlap", before(found.topk_overlap, shown.percent), "top overlap"),
        shown.Column("Tied tokens", lambda layer: shown.percent(float(found.tied_share[layer])), "ties"),
        notes=[found.summary()],
    )


# -- how sure a drop is -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, in the metric's own unit."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    full: ArrayLike,
    reduced: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean drop ``full - reduced`` (Efron & Tibshirani 1993, ch. 13).

    The two columns stay paired: an example is drawn with both of its scores. With ``groups`` whole groups are
    drawn (questions on one image are not independent), and a resample's mean is over the examples it holds.
    It is too short where few answers change, and has no width where none does, however few examples there
    are: to say how large a drop may be, use `drop_interval`.

    Args:
        full: shape (examples,), the full model's score of each example.
        reduced: shape (examples,), the reduced model's score of the same examples in the same order.
        groups: one label per example, for example the image; None draws single examples.
        resamples: number of bootstrap resamples.
        level: confidence level in (0, 1).
        seed: of the random numbers; the same seed gives the same interval.

    Raises:
        ThinsightError: columns of different or zero length, values that are not finite, bad settings.
    """
    drops = _drops(full, reduced)
    _check_settings(resamples, level)
    sums, sizes = _group_totals(drops, groups)
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // len(sums))
    means = []  # the mean drop of each resample
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, resamples - start), len(sums)))  # (rows, groups)
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Interval(mean=float(drops.mean()), low=float(low), high=float(high))


def drop_interval(
    full: ArrayLike,
    reduced: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of the mean drop ``full - reduced`` that reports print, never narrower than so few
    examples allow.

    For scores of 0 and 1 it is Tango's score interval (`tango_interval`) of the examples lost and won, which
    keeps a width where none is lost. Scores between count as the share of an example that they lose or win,
    which is what rounding both scores at one random threshold comes to on average; there the paired
    bootstrap widens the interval where it is wider. Where examples come in groups, all counts are divided by
    the measured design effect if that is above 1 (Rao & Scott, Biometrics 48:577, 1992); with a single group
    nothing can be measured, and it counts as one example. The ends are at least ln(2 / (1 - level)) / n from
    the mean, 3.7 / n at 95 %: the rule of three, two-sided.

    Arguments and errors as of `paired_bootstrap`; scores outside of [0, 1] are refused too.
    """
    drops = _drops(full, reduced)
    _check_settings(resamples, level)
    sides = np.concatenate([np.asarray(full, dtype=np.float64), np.asarray(reduced, dtype=np.float64)])
    if sides.min() < 0.0 or sides.max() > 1.0:
        raise BadInput("full or reduced holds a score outside of [0, 1]; a metric's scores lie within")
    mean, effect = float(drops.mean()), design_effect(drops, groups)
    count = len(drops) / effect
    losses, wins = (float(np.clip(side, 0.0, None).sum()) / effect for side in (drops, -drops))
    found = [tango_interval(losses, wins, count, level=level)]
    if not np.isin(sides, (0.0, 1.0)).all():
        found.append(paired_bootstrap(full, reduced, groups=groups, resamples=resamples, level=level, seed=seed))
    least = math.ceil(10 * math.log(2 / (1 - level))) / (10 * count)
    low, high = min(each.low for each in found), max(each.high for each in found)
    return Interval(mean, low=max(-1.0, min(mean - least, low)), high=min(1.0, max(mean + least, high)))


def tango_interval(losses: float, wins: float, count: float, *, level: float = 0.95) -> Interval:
    """Tango's score interval of a difference of paired shares, ``(losses - wins) / count`` (Tango, Statistics
    in Medicine 17:891, 1998): all differences that the score test does not reject. Of ``count`` pairs, which need
    not be a whole number, only the first one gets ``losses`` right, only the second one ``wins``."""
    _check_settings(1, level)
    if not (0 < count < math.inf and losses >= 0 and wins >= 0 and losses + wins <= count * (1 + 1e-9)):
        raise BadInput(f"{losses} losses and {wins} wins of {count} pairs: they must be parts of the pairs")
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)

    def rejected(difference: float) -> float:
        """How far beyond the test's limit a difference is, on either side: the square of the statistic
        less z squared, times its denominator, which may be 0."""
        linear = -losses - wins + (2 * count - losses + wins) * difference
        free = wins * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear * linear + 8 * count * free))
        won = max(0.0, root - linear) / (4 * count)  # likeliest share of wins at that difference
        spread = max(0.0, 2 * won + difference * (1 - difference))
        return (losses - wins - count * difference) ** 2 - z * z * count * spread

    def edge(inside: float, outside: float) -> float:
        """Where a difference begins to be rejected on the way from one that is not to the last one there is."""
        if rejected(outside) <= 0:
            return outside
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) > 0 else (middle, outside)
        return outside

    mean = (losses - wins) / count
    return Interval(mean, edge(mean, -1.0), edge(mean, 1.0))


def design_effect(drops: NDArray[np.float64], groups: Sequence[Hashable] | None) -> float:
    """How many times wider than of as many single examples the variance of the mean is, at least 1."""
    sums, sizes = _group_totals(drops, groups)
    many, members = len(sums), len(drops)
    if many == 1:
        return float(members)
    alone = float(((drops - drops.mean()) ** 2).sum()) / (members * (members - 1))
    if alone == 0.0:  # no two drops differ: nothing to measure it by
        return 1.0
    together = many / (many - 1) * float(((sums - drops.mean() * sizes) ** 2).sum()) / members**2
    return max(1.0, together / alone)


def score_to_expect(chances: ArrayLike) -> float:
    """The score below which a model cannot be told from one that guesses, which scores ``chances`` (examples,): two
    standard errors above what guessing gets on average, and at least 3 points above it."""
    shares = np.asarray(chances, dtype=np.float64)
    error = math.sqrt(float((shares * (1.0 - shares)).sum())) / len(shares)
    return float(shares.mean()) + max(NEAR_CHANCE, 2.0 * error)


def _drops(full: ArrayLike, reduced: ArrayLike) -> NDArray[np.float64]:
    left, right = np.asarray(full, dtype=np.float64), np.asarray(reduced, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape or left.size == 0:
        raise BadInput(
            f"full has shape {left.shape} and reduced {right.shape}; "
            "both need one score per example, for the same examples"
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise BadInput("full or reduced holds a value that is not finite; run every example first")
    return left - right


def _check_settings(resamples: int, level: float) -> None:
    whole(resamples, "resamples")
    if not (isinstance(level, float) and math.isfinite(level) and 0.0 < level < 1.0):
        raise BadInput(f"level is {level!r}; it must be a number between 0 and 1, such as 0.95")


def _group_totals(
    drops: NDArray[np.float64], groups: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of drops and number of examples of each group, both of shape (groups,)."""
    if groups is None:
        return drops, np.ones_like(drops)
    if len(groups) != len(drops):
        raise BadInput(f"groups has {len(groups)} labels for {len(drops)} examples; pass one for each")
    number_of: dict[Hashable, int] = {}
    member = np.array([number_of.setdefault(label, len(number_of)) for label in groups])
    sums = np.bincount(member, weights=drops).astype(np.float64)
    return sums, np.bincount(member).astype(np.float64)
