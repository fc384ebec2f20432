"""What the report's numbers allow one to say, in sentences.

Scores are fractions coming in and points of 100 going out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..certificate import ASSUMES, ESTIMATED, Certificate
from ..evaluation.result import Interval
from ..shown import NOTHING, count, fixed, percent, points, ratio

if TYPE_CHECKING:
    from .data import Changes, Headline, MethodRow, ReportData, SearchInfo

SILENT = "(no text)"  # an answer that is empty
_NOISE = 1e-9  # of a product of two floats


def interval(value: Interval | None) -> str:
    """'0.3 [-0.5, 1.1]' in points, with a real minus sign."""
    return NOTHING if value is None else f"{points(value.mean)} {ends(value)}"


def ends(value: Interval) -> str:
    """'[-0.5, 1.1]' in points, with a real minus sign."""
    low, high = outward(value)
    return f"[{fixed(low, 1)}, {fixed(high, 1)}]"


def outward(value: Interval, digits: int = 1) -> tuple[float, float]:
    """An interval's ends in points, rounded away from each other: none is printed narrower than it is."""
    scale = 10**digits
    low = math.floor(100 * scale * value.low + _NOISE) / scale
    return low, math.ceil(100 * scale * value.high - _NOISE) / scale


def fewer(value: float, what: str) -> str:
    """'2.63x fewer decoder FLOPs', or an honest '1.10x more' where the ratio is below 1."""
    return f"{ratio(value)} fewer {what}" if value >= 1 else f"{ratio(1 / value)} more {what}"


def faster(value: float, what: str) -> str:
    return f"{what} {ratio(value)} faster" if value >= 1 else f"{what} {ratio(1 / value)} slower"


def headline(value: Headline) -> str:
    """The one sentence: '2.63x fewer decoder FLOPs, drop 0.3 points [-0.5, 1.1]'."""
    return f"{fewer(value.flops_ratio, 'decoder FLOPs')}, drop {points(value.drop.mean)} points {ends(value.drop)}"


def scores(data: ReportData) -> str:
    """Where the headline's numbers come from, in one sentence."""
    value = data.headline
    if value is None:
        return ""
    where = f" on {count(data.dataset.test_size)} test questions" if data.dataset else ""
    text = (
        f"The full model scores {percent(value.full_score)}{where}; "
        f"with {percent(value.mean_keep_rate)} of the vision tokens, averaged over the layers, "
        f"it scores {percent(value.score)}."
    )
    measured = (value.prefill_ratio, "prefill ran"), (value.answer_ratio, "the whole answer")
    speeds = [faster(speed, what) for speed, what in measured if speed is not None]
    return f"{text} Measured: {' and '.join(speeds)}." if speeds else text


def meaning(data: ReportData) -> str:
    """What the headline's drop allows one to say, and whether more is promised."""
    value, certificate = data.headline, data.certificate
    if value is None:
        return ""
    agreement = data.dataset is not None and data.dataset.metric == "agreement"
    if value.full_score == 0:
        text = "The full model scores 0 here: nothing could be lost, so the drop says nothing."
    elif value.mean_keep_rate == 1:
        text = "Every layer sees every vision token: this is the full model, and nothing is lost."
    else:  # a certified search keeps its promise by the certificate, not on the calibration set
        text = drop_meaning(value.drop, data.search if certificate is None else None, agreement)
    if certificate is None:
        return f"{text} What is lost is {ESTIMATED}."
    if data.dataset is not None and data.dataset.fingerprint == certificate.fingerprint:
        chosen = "these questions had a part in choosing this one, which only the certificate allows for"
        return f"{text} The interval is that of a schedule chosen beforehand; {chosen}."
    return f"{text} The certificate is of other questions than these."


def changes(found: Changes) -> str:
    """How many answers score differently, in one sentence."""
    if not found.worse + found.better:
        return f"None of the {count(found.examples)} test questions scores differently."
    changed = f"{count(found.worse + found.better)} of the {count(found.examples)} test questions"
    return f"{changed} score differently: {count(found.worse)} worse, {count(found.better)} better."


def certified(certificate: Certificate) -> list[str]:
    """What is promised, on what grounds, and what it takes, a sentence each."""
    return [certificate.promise, certificate.evidence, *certificate.caveats, ASSUMES]


def drop_meaning(drop: Interval, search: SearchInfo | None, agreement: bool = False) -> str:
    """What a 95 % interval of the drop allows one to say: what it holds is not ruled out, and no more. Of
    ``agreement`` with the full model, the drop is the share of answers that change."""
    low, high = outward(drop, 2)
    if agreement:
        ruled_out = f"up to {fixed(high, 2)} % are not ruled out (95 %)"
        text = f"{percent(drop.mean)} of the answers here are not the full model's; {ruled_out}."
    elif drop.low > 0:
        text = f"A loss beyond chance: even the low end of the 95 % interval is {fixed(low, 2)} points."
    elif drop.high < 0:
        by = f"by {fixed(-high, 2)} points at the near end of the 95 % interval."
        text = f"The reduced model does better here, beyond chance: {by}"
    else:
        ruled_out = f"and none of up to {fixed(high, 2)} points is ruled out (95 %)."
        text = f"The interval contains 0: on these questions no loss could be told from chance, {ruled_out}"
    if search is None or search.max_drop is None:
        return text
    allowed = f"{points(search.max_drop)} points"
    if drop.high <= search.max_drop:
        return f"{text} The whole interval is within the {allowed} that were allowed."
    beyond = "on the test set the interval reaches beyond that."
    return f"{text} The search held the drop to {allowed} on the calibration set; {beyond}"


def ranking(methods: tuple[MethodRow, ...]) -> str:
    """Who wins among the reduced methods, said whoever it is."""
    reduced = [row for row in methods if row.kind != "full"]
    if len(reduced) < 2:
        return ""
    order = sorted(reduced, key=lambda row: -row.score)
    best, second = order[0], order[1]
    gap = best.score - second.score
    if points(gap) == points(0.0):
        return f"{best.name} and {second.name} score highest, level at {percent(best.score)}."
    return f"{best.name} scores highest, {percent(best.score)}; {second.name} follows {points(gap)} points behind."


def same_cost(methods: tuple[MethodRow, ...], tolerance: float = 0.02) -> bool:
    """Whether all reduced methods cost the same decoder FLOPs, within `tolerance`."""
    costs = [row.flops for row in methods if row.kind != "full"]
    return bool(costs) and max(costs) <= (1 + tolerance) * min(costs)
