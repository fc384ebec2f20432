"""What a budget is counted on, kept with a run: the median prompt, and the device's latency for one in ms.

A latency is measured once, so that a resumed run spends the same budget. Knows nothing about who spends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low
from typing import Any

from ..budget import Budget, LatencyModel, TimeBudget, make_budget
from ..evaluation.evaluator import Evaluator
from ..searches.budgeted import budget_of

__all__ = ["Limits", "limits_of"]


@dataclass(frozen=True)
class Limits:
    """The prompt of a budget, and the device's latency where budgets are in ms."""

    n_vision: int
    n_text: int
    latency: LatencyModel | None

    def budget(self, config: Any, value: float, unit: str) -> Budget:
        """The budget of ``value`` for a model of this config.

        Raises:
            ThinsightError: an unknown unit, or a value out of range.
        """
        return make_budget(
            value,
            unit,
            config=config,
            n_vision=self.n_vision,
            n_text=self.n_text,
            latency=self.latency,
        )


def limits_of(evaluator: Evaluator, value: float, unit: str) -> Limits:
    """The limits of an evaluator's median prompt; "ms" is profiled on the spot.

    Raises:
        ThinsightError: an unknown unit, or a value out of range.
    """
    budget = budget_of(evaluator, value, unit)
    latency = budget.latency if isinstance(budget, TimeBudget) else None
    n_text = median_low(text for _, text in evaluator.prompt_sizes)
    return Limits(evaluator.num_vision_tokens, n_text, latency)
