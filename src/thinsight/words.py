"""Numbers and findings in words, the same on a page, in a terminal and in a table.

Knows nothing about markup. Scores are fractions coming in and points of 100 going out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluation.result import Interval
    from .report.data import Headline, MethodRow, ReportData, SearchInfo

MISSING = "n/a"
NOTHING = "\N{EN DASH}"  # where there can be no number
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
_LEVELS = "·▁▂▃▄▅▆▇█"
_NOISE = 1e-9  # of a product of two floats


def _fixed(value: float, digits: int) -> str:
    """Fixed decimals with a real minus sign and never a negative zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def points(value: float | None, digits: int = 1) -> str:
    """A score or a drop in points of 100: 0.0034 -> '0.3'."""
    return MISSING if value is None or math.isnan(value) else _fixed(100 * value, digits)


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None or math.isnan(value) else f"{_fixed(100 * value, digits)} %"


def ratio(value: float | None) -> str:
    """A ratio: 2.634 -> '2.63x'. Two decimals, so that 1.96 does not read as 2."""
    return MISSING if value is None or math.isnan(value) else f"{_fixed(value, 2)}{TIMES}"


def plain(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None or math.isnan(value) else _fixed(value, digits)


def interval(value: Interval | None) -> str:
    """'0.3 [-0.5, 1.1]' in points, with a real minus sign."""
    return NOTHING if value is None else f"{points(value.mean)} {ends(value)}"


def ends(value: Interval) -> str:
    """'[-0.5, 1.1]' in points, with a real minus sign."""
    low, high = outward(value)
    return f"[{_fixed(low, 1)}, {_fixed(high, 1)}]"


def outward(value: Interval, digits: int = 1) -> tuple[float, float]:
    """An interval's ends in points, rounded away from each other: none is printed narrower than it is."""
    scale = 10**digits
    low = math.floor(100 * scale * value.low + _NOISE) / scale
    return low, math.ceil(100 * scale * value.high - _NOISE) / scale


def flops(value: float | None) -> str:
    """FLOPs with their unit: 3.95e12 -> '3.95 TFLOPs'."""
    if value is None or math.isnan(value):
        return MISSING
    scale, unit = flops_unit(value)
    return f"{_significant(value / scale)} {unit}"


def flops_unit(largest: float) -> tuple[float, str]:
    """The divisor and the unit in which numbers up to `largest` read well."""
    for scale, unit in ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")):
        if largest >= scale:
            return scale, unit
    return 1.0, "FLOPs"


def milliseconds(value: float) -> str:
    return f"{_significant(value / 1000)} s" if value >= 10_000 else f"{_significant(value)} ms"


def duration(seconds: float) -> str:
    """'48 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{_significant(seconds)} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def tokens(value: int) -> str:
    return "1 token" if value == 1 else f"{value:,} tokens"


def parameters(value: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{_significant(value / scale)}{unit}"
    return str(value)


def bars(values: Sequence[float]) -> str:
    """One block character per value of 0 to 1; a dot is 0, and only 0."""
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[max(1 if v > 0 else 0, min(top, round(v * top)))] if v == v else "?" for v in values)


def bar(value: float) -> str:
    """A bar of up to 20 blocks for a value of 0 to 1, none where it is not known."""
    return "█" * round(20 * max(value, 0)) if value == value else ""


def _significant(value: float) -> str:
    """Three significant digits, without exponent."""
    size = abs(value)
    return _fixed(value, 0 if size >= 100 else 1 if size >= 10 else 2)


def fewer(value: float, what: str) -> str:
    """'2.63x fewer decoder FLOPs', or an honest '1.10x more' where the ratio is below 1."""
    return f"{ratio(value)} fewer {what}" if value >= 1 else f"{ratio(1 / value)} more {what}"


def faster(value: float, what: str) -> str:
    return f"{what} {ratio(value)} faster" if value >= 1 else f"{what} {ratio(1 / value)} slower"


def headline(value: Headline) -> str:
    """The one sentence: '2.63x fewer decoder FLOPs, drop 0.3 points [-0.5, 1.1]'."""
    drop = value.drop
    return f"{fewer(value.flops_ratio, 'decoder FLOPs')}, drop {points(drop.mean)} points {ends(drop)}"


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
    speeds = [
        faster(speed, what)
        for speed, what in ((value.prefill_ratio, "prefill ran"), (value.answer_ratio, "the whole answer"))
        if speed is not None
    ]
    return f"{text} Measured: {' and '.join(speeds)}." if speeds else text


def meaning(value: Headline, search: SearchInfo | None) -> str:
    """What the headline's drop allows one to say."""
    if value.full_score == 0:
        return "The full model scores 0 here: nothing could be lost, so the drop says nothing."
    return drop_meaning(value.drop, search)


def drop_meaning(drop: Interval, search: SearchInfo | None) -> str:
    """What a 95 % interval of the drop allows one to say: what it holds is not ruled out, and no more."""
    low, high = outward(drop, 2)
    if drop.low > 0:
        text = f"A loss beyond chance: even the low end of the 95 % interval is {_fixed(low, 2)} points."
    elif drop.high < 0:
        text = (
            "The reduced model does better here, beyond chance: by "
            f"{_fixed(-high, 2)} points at the near end of the 95 % interval."
        )
    else:
        text = (
            "The interval contains 0: on these questions no loss could be told from chance, "
            f"and none of up to {_fixed(high, 2)} points is ruled out (95 %)."
        )
    if search is not None and search.max_drop is not None:
        allowed = points(search.max_drop)
        inside = drop.high <= search.max_drop
        text += (
            f" The whole interval is within the {allowed} points that were allowed."
            if inside
            else f" The search held the drop to {allowed} points on the calibration set; "
            "on the test set the interval reaches beyond that."
        )
    return text


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
