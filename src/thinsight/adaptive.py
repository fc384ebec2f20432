"""Adaptive: schedules among which each prompt gets its own, by a number that its text's attention gives.

All prompts share the layers above one layer; there a statistic of the attention just paid says how the prompt
goes on. Knows nothing about how the statistic is computed, nor about models, rankers or searches.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BadInput
from .schedule import Schedule, real
from .texts import brief

_KEYS = ("statistic", "layer", "edges", "keep_rates", "shares")
_SLACK = 1e-6  # shares are written with all their digits, yet are sums of fractions


@dataclass(frozen=True)
class Adaptive:
    """A family of schedules and the rule that picks one for each prompt.

    Attributes:
        statistic: the name of a statistic, see `thinsight.ranking.STATISTICS`.
        layer: the first layer in which prompts may differ, at least 1; the statistic reads the attention of
            the layer before.
        edges: where one schedule ends and the next begins, rising; a value at an edge belongs above it.
        schedules: one more than there are edges, for rising values; all alike before ``layer``.
        shares: what part of the calibration prompts got each schedule; they sum to 1.

    Raises:
        ThinsightError: parts that do not fit each other.
    """

    statistic: str
    layer: int
    edges: tuple[float, ...]
    schedules: tuple[Schedule, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("edges", "schedules", "shares"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.statistic, str) or not self.statistic:
            raise BadInput(f"adaptive.statistic is {self.statistic!r}; it must be a name")
        depths = {schedule.num_layers for schedule in self.schedules}
        if len(depths) != 1:
            raise BadInput(f"adaptive.schedules have {sorted(depths)} layers; give schedules of one depth")
        whole = isinstance(self.layer, int) and not isinstance(self.layer, bool)
        if not whole or not 1 <= self.layer < self.num_layers:
            raise BadInput(
                f"adaptive.layer is {self.layer!r}; it must be a whole number from 1 to {self.num_layers - 1}"
            )
        if not len(self.schedules) == len(self.shares) == len(self.edges) + 1:
            raise BadInput(
                f"adaptive has {len(self.schedules)} schedules, {len(self.edges)} edges and "
                f"{len(self.shares)} shares; there must be one schedule and one share more than edges"
            )
        if not all(map(_finite, self.edges)) or any(b <= a for a, b in itertools.pairwise(self.edges)):
            raise BadInput(f"adaptive.edges is {self.edges!r}; they must be finite numbers that rise")
        if not all(_finite(share) and 0 <= share <= 1 for share in self.shares) or not math.isclose(
            math.fsum(self.shares), 1, abs_tol=_SLACK
        ):
            raise BadInput(f"adaptive.shares is {self.shares!r}; they must be from 0 to 1 and sum to 1")
        if len({schedule.keep_rates[: self.layer] for schedule in self.schedules}) != 1:
            raise BadInput(f"adaptive.schedules differ before layer {self.layer}, where the statistic is not known")

    def __repr__(self) -> str:
        means = ", ".join(f"{schedule.mean_keep_rate:.4g}" for schedule in self.schedules)
        return brief(
            f"Adaptive({self.statistic!r} at layer {self.layer} of {self.num_layers}, "
            f"{len(self.schedules)} schedules, means {means})"
        )

    @property
    def num_layers(self) -> int:
        """L of all its schedules."""
        return self.schedules[0].num_layers

    def level(self, value: float) -> int:
        """Which of the schedules a prompt with this statistic gets."""
        return bisect.bisect_right(self.edges, value)

    def mean(self) -> Schedule:
        """The keep rates of the average calibration prompt."""
        rates = [self.average(lambda schedule, at=i: schedule.keep_rates[at]) for i in range(self.num_layers)]
        # where all agree, rounding may not make a difference; nor may it make a rate rise
        head = self.schedules[0].keep_rates[: self.layer]
        return Schedule(list(itertools.accumulate([*head, *(min(1.0, rate) for rate in rates[self.layer :])], min)))

    def average(self, of: Callable[..., float]) -> float:
        """The mean over calibration prompts of a function of their schedule, such as its cost."""
        return math.fsum(
            share * of(schedule) for share, schedule in zip(self.shares, self.schedules, strict=True) if share
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "statistic": self.statistic,
            "layer": self.layer,
            "edges": list(self.edges),
            "keep_rates": [list(schedule.keep_rates) for schedule in self.schedules],
            "shares": list(self.shares),
        }

    @classmethod
    def from_dict(cls, stored: Any) -> Adaptive:
        """Back from `to_dict`.

        Raises:
            ThinsightError: missing, unknown or damaged entries.
        """
        if not isinstance(stored, Mapping) or set(stored) != set(_KEYS):
            raise BadInput(f"adaptive is {stored!r}; it must be an object with {', '.join(_KEYS)}")
        for key in ("edges", "keep_rates", "shares"):
            if not isinstance(stored[key], Sequence) or isinstance(stored[key], str):
                raise BadInput(f"adaptive.{key} is {stored[key]!r}; it must be a list")
        return cls(
            stored["statistic"],
            stored["layer"],
            tuple(stored["edges"]),
            tuple(Schedule(rates) for rates in stored["keep_rates"]),
            tuple(stored["shares"]),
        )


def _finite(value: Any) -> bool:
    return math.isfinite(real(value))
