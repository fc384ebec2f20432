"""Certificate: a promise about a schedule's loss, and every number it rests on.

Knows nothing about how schedules are tested (searches/certify.py), nor about models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from . import shown
from .errors import BadInput
from .records import decode, encode
from .schedule import Schedule, real
from .texts import counted

ASSUMES = (
    "It is about data like these examples, images drawn independently of each other; none of them had a part in laying "
    "the path, and they serve one certificate (docs/guarantee.md)."
)
ESTIMATED = "estimated, not certified"
CLUSTERED = 1.1  # design effects above it are more than chance
_POWER_Z = 0.8416  # of the normal distribution at 80 %
NUISANCE = 0.001  # of alpha, spent on where the share of wins can be (Berger & Boos, JASA 89:1012, 1994)


@dataclass(frozen=True)
class Step:
    """One schedule of a path, tested.

    Attributes:
        score: mean metric on the set, with ``complete`` False an upper bound.
        losses: examples that only the full model gets right; None where the run was stopped.
        wins: examples that only the schedule gets right; None likewise.
        p_value: chance of so few losses (and so many wins) if the true drop were at least ``max_drop``; None
            likewise.
        design_effect: how many times one image's questions make the drop vary more than as many questions of
            different images would; counts are divided by it where it is above 1.1.
        certified: whether the promise holds for it.
        complete: False where the run was stopped because the schedule could not be certified any more.
    """

    score: float
    losses: int | None
    wins: int | None
    p_value: float | None
    design_effect: float
    certified: bool
    complete: bool = True

    @property
    def told(self) -> str:
        """What came of it, in words: "1 loss, 0 wins, p 0.004: certified"."""
        if self.losses is None or self.wins is None or self.p_value is None:
            return "stopped: it could not be certified any more"
        verdict = "certified" if self.certified else "not certified"
        changes = f"{counted(self.losses, 'loss')}, {counted(self.wins, 'win')}"
        return f"{changes}, p {shown_p(self.p_value)}: {verdict}"


@dataclass(frozen=True)
class Certificate(shown.Shown):
    """What was promised, on which data, and for which schedule of a path.

    "With this confidence, the mean score on data like these is less than ``max_drop`` below the full model's."
    It holds if the examples were drawn independently from what the model will see, image by image, had no part
    in the choice of the path, and are used for one certificate.

    Attributes:
        path: the schedules in the order in which they were to be tested, costly ones first.
        steps: what the tests gave; the last one may have failed, and nothing behind it was tested.
        n: examples that were tested.
        images: how many images (groups) they are about.
        max_drop: the largest drop promised, in the metric's own unit.
        confidence: the promise's, 0.95 as a rule.
        full_score: the full model's score on the same examples.
        fingerprint: of the examples; the promise is used up once for each.
        strict: whether one example per image was tested.
        used_before: whether the examples had already been used for a certificate: then this one is a further
            draw, and all of them together break their promises more often than 1 - confidence.
        metric: names of the metrics that the scores are of; empty where the evaluator does not tell.
        subject: a hash of what the certified schedule was run with (ranker and the like), once a reduction holds
            the certificate; empty before.

    Raises:
        ThinsightError: parts that do not fit each other.
    """

    path: tuple[Schedule, ...]
    steps: tuple[Step, ...]
    n: int
    images: int
    max_drop: float
    confidence: float
    full_score: float
    fingerprint: str
    strict: bool = False
    used_before: bool = False
    metric: str = ""
    subject: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", tuple(self.path))
        object.__setattr__(self, "steps", tuple(self.steps))
        if not 1 <= self.images <= self.n:
            raise BadInput(f"certificate: images is {self.images}; it must be from 1 to n, {self.n}")
        if not 0 < self.max_drop <= 1 or not 0 < self.confidence < 1 or not 0 <= self.full_score <= 1:
            raise BadInput("certificate: max_drop, confidence or full_score is outside of its range")
        if len(self.steps) > len(self.path) or len({schedule.num_layers for schedule in self.path}) > 1:
            raise BadInput("certificate: more steps than schedules in the path, or schedules of several depths")
        if not all(step.certified for step in self.steps[:-1]):
            raise BadInput("certificate: a step was tested behind one that failed")
        for step in self.steps:
            self._check(step)

    def _check(self, step: Step) -> None:
        if not step.complete:
            if step.certified or (step.losses, step.wins, step.p_value) != (None, None, None):
                raise BadInput("certificate: a step that was stopped has results")
            return
        if step.losses is None or step.wins is None or step.p_value is None:
            raise BadInput("certificate: a complete step has no results")
        if min(step.losses, step.wins) < 0 or step.losses + step.wins > self.n or not 0 <= step.p_value <= 1:
            raise BadInput(f"certificate: {step.losses} losses, {step.wins} wins, p {step.p_value} of {self.n}")
        if not 0 <= step.score <= 1 or not 1 <= step.design_effect <= self.n:
            raise BadInput("certificate: a step's score or design_effect is outside of its range")
        if step.certified and step.p_value > 1 - self.confidence:
            raise BadInput(f"certificate: a step is certified with p {step.p_value} at {self.confidence}")

    def __repr__(self) -> str:
        if self.schedule is None:
            return f"Certificate(the full model: {self.reason})"
        return (
            f"Certificate({self.confidence:.0%} sure of less than {in_points(self.max_drop)}, {self.counts}, "
            f"p {self.p_value:.2g}, {self.schedule!r})"
        )

    @property
    def place(self) -> int | None:
        """Where in the path the last certified schedule stands; None where none is certified."""
        passed = sum(step.certified for step in self.steps)
        return passed - 1 if passed else None

    @property
    def schedule(self) -> Schedule | None:
        """The cheapest schedule that the promise holds for; None: only the full model."""
        return None if self.place is None else self.path[self.place]

    @property
    def certified(self) -> Step | None:
        """The test of that schedule."""
        return None if self.place is None else self.steps[self.place]

    @property
    def failed(self) -> Step | None:
        """The test that ended the path; None where all of it was certified."""
        return self.steps[-1] if self.steps and not self.steps[-1].certified else None

    @property
    def losses(self) -> int:
        """Examples that the full model gets right and the certified schedule does not."""
        return 0 if self.certified is None else self.certified.losses or 0

    @property
    def wins(self) -> int:
        """Examples that the certified schedule gets right and the full model does not."""
        return 0 if self.certified is None else self.certified.wins or 0

    @property
    def p_value(self) -> float | None:
        """Of the certified schedule's test; None for the full model, which needs none."""
        return None if self.certified is None else self.certified.p_value

    @property
    def design_effect(self) -> float:
        """Of the certified schedule's test, else of the failed one's; 1: questions of one image are as good as
        independent."""
        step = self.certified or self.failed
        return 1.0 if step is None else step.design_effect

    @property
    def score(self) -> float:
        """The certified schedule's score on the set."""
        return self.full_score if self.certified is None else self.certified.score

    @property
    def drop(self) -> float:
        """The full model's score minus that."""
        return self.full_score - self.score

    @property
    def counts(self) -> str:
        """Losses and wins in words, "7 losses and 8 wins in 1,152 examples"."""
        return _counts(self.losses, self.wins, self.n)

    @property
    def promise(self) -> str:
        """What is promised, in a sentence."""
        sure = f"with {_number(self.confidence)} % confidence"
        if self.schedule is None:
            return f"Nothing is promised but the full model: no schedule of the path could be certified {sure}."
        size = _number(self.max_drop)
        if self.metric == "agreement":
            return f"At most {size} % of the answers change on data like these, {sure}."
        points = "1 point of the score is" if size == "1" else f"{size} points of the score are"
        return f"At most {points} lost on data like these, {sure}."

    @property
    def evidence(self) -> str:
        """What it rests on, in a sentence."""
        about = f"{counted(self.n, 'example')} about {counted(self.images, 'image')}"
        if self.p_value is None:
            return f"Tested on {about}."
        changes = _counts(self.losses, self.wins, self.n).split(" in ")[0]
        return f"{changes} in {about}, p = {shown_p(self.p_value)}."

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader has to know beside it, a sentence each."""
        said = []
        if self.full_score == 0:
            said.append(
                "The full model scores 0 on these examples: nothing could be lost on them, so this says nothing about "
                "a model that works."
            )
        if self.used_before:
            said.append(
                "These examples had been used for a certificate before: this is a further draw, and of all promises "
                f"made on them more than {_number(1 - self.confidence)} % may be broken."
            )
        if self.strict:
            said.append("One example per image was tested.")
        elif self.design_effect > CLUSTERED:
            said.append(
                "Questions about one image go together here: losses, wins and examples were divided by the design "
                f"effect, {self.design_effect:.2f}."
            )
        return tuple(said)

    @property
    def agreement(self) -> float | None:
        """The share of examples whose score is the full model's under the certified schedule, else under the failed
        one; None where neither was run to its end."""
        step = self.certified or self.failed
        if step is None or step.losses is None or step.wins is None:
            return None
        return 1 - (step.losses + step.wins) / self.n

    @property
    def needed(self) -> int | None:
        """About how many examples would certify the schedule that failed in 4 of 5 draws, if it is as these
        examples say; None where none failed or no number would do."""
        step = self.failed
        if step is None or step.losses is None or step.wins is None:
            return None
        changed = min(1.0, (step.losses + step.wins + 1) / self.n)  # one more than seen: none seen is not none
        drop = (step.losses - step.wins) / self.n
        found = examples_needed(self.max_drop, 1 - changed, drop, confidence=self.confidence)
        return None if found is None else math.ceil(found * max(1.0, step.design_effect))

    @property
    def reason(self) -> str:
        """Why the path ended where it did, in one line; empty where all of it was certified."""
        step = self.failed
        if step is None:
            return ""
        points = "not certified at " + in_points(self.max_drop)
        if step.losses is None or step.wins is None:
            return f"{points}: stopped as soon as the {self.n:,} examples could not show it any more"
        changes = f"{points}: {_counts(step.losses, step.wins, self.n)}"
        lost = 100 * (step.losses - step.wins) / self.n
        if self.needed is None:
            return f"{changes}; this schedule loses {lost:.1f}"
        return f"{changes}: about {_rounded(self.needed):,} examples would be needed"

    def _tables(self) -> Iterable[shown.Table]:
        known = {
            "promise": self.promise,
            "evidence": self.evidence,
            "on": f"a set with fingerprint {self.fingerprint}" + (f", metric {self.metric}" if self.metric else ""),
        }
        return [shown.facts_table("Certificate", known.items()), steps_table(self)]

    def _drawings(self) -> Iterable[Markup]:
        return [] if self.schedule is None else self.schedule._drawings()

    def outcome(self, schedule: Schedule) -> str:
        """What came of a schedule, in words: "certified", "not tested" ...; empty where the path does not hold it."""
        if schedule not in self.path:
            return ""
        place = self.path.index(schedule)
        if place >= len(self.steps):
            return "not tested"
        step = self.steps[place]
        return "certified" if step.certified else "not certified" if step.complete else "stopped, not certified"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rates = [schedule.keep_rates for schedule in self.path]
        stored: dict[str, Any] = encode({**{name: getattr(self, name) for name in _KEYS}, "path": rates})
        return stored

    @classmethod
    def from_dict(cls, stored: Any, where: str = "certificate") -> Certificate:
        """Back from `to_dict`; ``where`` names it in messages.

        Raises:
            ThinsightError: missing, unknown or damaged entries, or ones that contradict each other.
        """
        if not isinstance(stored, Mapping):
            raise BadInput(f"{where} is {stored!r}; it must be an object")
        read: _Stored = decode(_Stored, dict(stored), where, "search again or restore the file")
        path = tuple(Schedule(rates) for rates in read.path)
        return cls(path, **{name: getattr(read, name) for name in _KEYS if name != "path"})


@dataclass(frozen=True)
class _Stored:
    """A certificate as it is written."""

    path: tuple[tuple[float, ...], ...]
    steps: tuple[Step, ...]
    n: int
    images: int
    max_drop: float
    confidence: float
    full_score: float
    fingerprint: str
    strict: bool
    used_before: bool
    metric: str = ""
    subject: str = ""


_KEYS = tuple(_Stored.__dataclass_fields__)


def steps_table(certificate: Certificate, flops_ratios: Sequence[float] = ()) -> shown.Table:
    """The path, a row for each schedule, what its test gave and what came of it; the certified one stands out.

    ``flops_ratios`` is the full model's decoder FLOPs over each schedule's, if known.
    """

    def figure(name: str, show: Callable[[Any], str]) -> Callable[[int], str]:
        def cell(row: int) -> str:
            value = None if row >= len(certificate.steps) else getattr(certificate.steps[row], name)
            return shown.NOTHING if value is None else show(value)

        return cell

    ratios = [shown.Column("FLOPs", lambda row: shown.ratio(flops_ratios[row]), "full / this")] if flops_ratios else []
    return shown.Table(
        "The path, costly schedules first",
        range(len(certificate.path)),
        shown.Column(
            "Mean keep rate", lambda row: shown.percent(certificate.path[row].mean_keep_rate), "mean keep rate"
        ),
        *ratios,
        shown.Column("Losses", figure("losses", shown.count), "losses"),
        shown.Column("Wins", figure("wins", shown.count), "wins"),
        shown.Column("p", figure("p_value", shown_p)),
        shown.Column("Outcome", lambda row: certificate.outcome(certificate.path[row]), "outcome", text=True),
        strong=lambda row: row == certificate.place,
        notes=[certificate.reason and f"{certificate.reason[0].upper()}{certificate.reason[1:]}."],
    )


def shown_p(value: float) -> str:
    """A p-value with three decimals, never smaller than it is."""
    return f"{math.ceil(1000 * value - 1e-6) / 1000:.3f}"


def examples_needed(max_drop: float, agreement: float, drop: float = 0.0, *, confidence: float = 0.95) -> int | None:
    """About how many examples certify a schedule in 4 of 5 draws; None: no number does.

    ``ln(1 / alpha) / m + (z_alpha + z_power)^2 (1 - agreement) / (m - drop)^2``, 3 / m + 6.2 (...) at 95 %: the
    rule of three (Hanley & Lippman-Hand, JAMA 249:1743, 1983) for what no change shows, and the sample size of
    a paired difference of shares (Connor, Biometrics 43:207, 1987) for the changes' own noise.

    Args:
        max_drop: m, in the metric's own unit.
        agreement: share of examples whose score does not change.
        drop: the schedule's true drop.
        confidence: 1 - alpha.
    """
    from statistics import NormalDist

    if drop >= max_drop:
        return None
    z = NormalDist().inv_cdf(confidence) + _POWER_Z
    variance = max(0.0, 1 - agreement - drop**2)
    return math.ceil(-math.log(1 - confidence) / max_drop + z * z * variance / (max_drop - drop) ** 2)


def certifiable(n: int, agreement: float, drop: float = 0.0, *, confidence: float = 0.95) -> float:
    """The smallest ``max_drop`` that ``n`` examples certify in about 4 of 5 draws: `examples_needed`, solved."""
    low, high = max(0.0, drop), 1.0
    for _ in range(50):
        middle = (low + high) / 2
        needed = examples_needed(middle, agreement, drop, confidence=confidence)
        low, high = (low, middle) if needed is not None and needed <= n else (middle, high)
    return high


def least_examples(max_drop: float, *, confidence: float = 0.95) -> int:
    """How many examples it takes to certify a schedule under which no score changes, 300 for one point."""
    return math.ceil(math.log(1 - confidence - NUISANCE) / math.log1p(-max_drop)) if max_drop < 1 else 1


def least_drop(n: int, *, confidence: float = 0.95) -> float:
    """The smallest ``max_drop`` that ``n`` examples certify of a schedule under which no score changes."""
    return -math.expm1(math.log(1 - confidence - NUISANCE) / n)


def too_few(n: int, max_drop: float, confidence: float = 0.95) -> str:
    """Why ``n`` examples cannot certify ``max_drop``, and what would help; empty where they can."""
    least = least_examples(max_drop, confidence=confidence)
    if n >= least:
        return ""
    best = math.ceil(1e4 * least_drop(n, confidence=confidence)) / 100
    return (
        f"{counted(n, 'example')} to certify on show a drop of less than {in_points(best / 100)} at best, where not "
        f"one answer changes; less than {in_points(max_drop)} takes at least {least:,} at {_number(confidence)} % "
        "confidence: give more examples, allow more with --max-drop (max_drop), or only estimate with --no-certify "
        "(certify=False)"
    )


def outlook(max_drop: float, agreement: float, n: int | None = None, *, confidence: float = 0.95) -> str:
    """How many examples certify ``max_drop`` where this share of scores stays the same, and what ``n`` of them do, in a
    sentence; of the rest as many are taken to be won as lost."""
    needed = examples_needed(max_drop, agreement, confidence=confidence) or 0
    about = f"about {_rounded(needed):,} examples certify {in_points(max_drop)}"
    said = f"With {100 * agreement:.1f} % of scores unchanged, {about}"
    if n is None:
        return said
    return f"{said}; {n:,} certify about {math.ceil(1e4 * certifiable(n, agreement, confidence=confidence)) / 100:g}"


PLANNED = (100, 200, 300, 500, 1000, 1500, 2000, 3000, 5000, 10_000)
_SAME = (1.0, 0.995, 0.99, 0.98, 0.97, 0.95)


@dataclass(frozen=True)
class Plan(shown.Shown):
    """How many examples certify what.

    Attributes:
        max_drop: the drop that is to be promised.
        confidence: of the promise.
        agreement: the share of examples whose score stays as it is; None: not known.
        n: examples that there are; None: not known.
    """

    max_drop: float = 0.01
    confidence: float = 0.95
    agreement: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if self.agreement is not None and not 0 <= real(self.agreement) <= 1:
            raise BadInput(f"agreement is {self.agreement!r}; it must be a share of examples from 0 to 1, such as 0.98")

    @property
    def lines(self) -> list[str]:
        """What the table means for this drop, in sentences."""
        sure = {"confidence": self.confidence}
        least = least_examples(self.max_drop, **sure)
        said = [
            f"Less than {in_points(self.max_drop)}, with {_number(self.confidence)} % confidence, takes at least "
            f"{counted(least, 'example')}, even where no score changes."
        ]
        if self.agreement is not None:
            said.append(f"{outlook(self.max_drop, self.agreement, self.n, **sure)}.")
        if self.n is not None and (doubts := too_few(self.n, self.max_drop, self.confidence)):
            said.append(f"{doubts}.")
        return said

    def smallest(self, n: int, agreement: float) -> float:
        """The smallest drop that ``n`` examples certify in about 4 of 5 draws; 1: none."""
        sure = {"confidence": self.confidence}
        return min(1.0, max(certifiable(n, agreement, **sure), least_drop(n, **sure)))

    def _tables(self) -> Iterable[shown.Table]:
        own = () if self.agreement is None else (self.agreement,)
        counts = () if self.n is None else (self.n,)

        def column(same: float) -> shown.Column:
            return shown.Column(
                f"{100 * same:.6g} % same",
                short=f"{100 * same:.6g} %",
                cell=lambda n: f"{100 * self.smallest(n, same):.2f}",
            )

        yield shown.Table(
            "The smallest drop, in points, that so many examples certify, by the share of scores that stay the same",
            sorted({*PLANNED, *counts}),
            shown.Column("Examples", shown.count, "examples"),
            *map(column, sorted({*_SAME, *own}, reverse=True)),
            strong=lambda n: n == self.n,
            notes=["In about 4 of 5 draws, where of the scores that change as many are won as lost.", *self.lines],
        )


def in_points(share: float) -> str:
    """A drop in points of 100, "1 point"."""
    return counted(round(100 * share, 9), "point")


def _counts(losses: int, wins: int, n: int) -> str:
    return f"{counted(losses, 'loss')} and {counted(wins, 'win')} in {counted(n, 'example')}"


def _number(share: float) -> str:
    """A share in points of 100: 0.005 as "0.5"."""
    return f"{100 * share:.6g}"


def _rounded(number: int) -> int:
    """To two digits, upwards."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit
