"""What `thinsight search` is told, and every check of it that needs no data and no weights.

Knows nothing about how a search runs, nor what comes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..budget import check_budget_value
from ..errors import BadInput
from ..ranking import Ranker, get_ranker
from ..reduction import Reduction
from ..schedule import Schedule
from ..search.rankers import AUTO, FIRST_CHOICE
from ..search.search import CHOOSE_RANKER, DEFAULT_MAX_DROP, WARM_START, choose_method
from ..search.solvers import Solver, check_early_stop, get_solver
from .prepared import RunOptions
from .session import layers_of

__all__ = ["TITLES", "SearchOptions"]

TITLES = {
    "gsearch": "G-Search",
    "adaptive": "Sensitivity search, adaptive",
    "psigmoid": "P-Sigmoid",
    "random": "Random search",
    "sensitivity": "Sensitivity search",
}


@dataclass(frozen=True)
class SearchOptions(RunOptions):
    """What `thinsight search` is told."""

    max_drop: float | None = None
    budget: float | None = None
    budget_unit: str = "keep"
    method: str | None = None
    frontier: bool = False
    ranker: str | dict[str, Any] | None = None
    solver: str = "bisect"
    first_layer: int | None = None
    step: int = 1
    trade_off: float = 0.1
    n_trials: int | None = None
    start: str | None = None
    confidence: float | None = None
    seed: int = 0
    timing_runs: int = 5
    new_tokens: int = 16
    pictures: int = 6
    command: str = ""

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        self._check_method()
        self._check_numbers()
        self._check_layer_search()
        super().check()
        if self.start is not None:
            self.start_schedule(layers_of(self.model.check()))
        if self.first_layer is not None or self.searches_layers:
            _check_first_layer(
                self.gsearch_layer, get_ranker(self.first_ranker), layers_of(self.model.check())
            )

    def _check_method(self) -> None:
        """The search that is chosen can do what it is asked."""
        choose_method(self.method, self.max_drop, self.budget)
        if self.frontier and (self.method is not None or self.budget_unit != "keep"):
            raise BadInput(
                "frontier has its own search and counts mean keep rates: leave out method and budget_unit"
            )
        if self.frontier and self.chooses_ranker:
            raise BadInput("ranker 'auto' is chosen for one budget: name a ranker for a frontier")
        if self.chooses_ranker and self.chosen not in CHOOSE_RANKER:
            raise BadInput(
                f"ranker 'auto' needs a budget and a search that chooses it: {' or '.join(CHOOSE_RANKER)}"
            )
        if self.start is not None and self.chosen not in WARM_START:
            raise BadInput(f"start needs a budget and a search that takes it: {', '.join(WARM_START)}")

    def _check_numbers(self) -> None:
        if self.budget is not None:
            check_budget_value(self.budget, self.budget_unit)
        if not math.isfinite(self.tolerance) or self.tolerance < 0:
            raise BadInput(f"max_drop is {self.max_drop}: it must be a number of at least 0, such as 0.01")
        least = {"timing_runs": 1, "new_tokens": 1, "pictures": 0, "seed": 0, "n_trials": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise BadInput(f"{name} is {value}: it must be a whole number of at least {low}")

    def _check_layer_search(self) -> None:
        """The solver, and the confidence that only a search with it takes."""
        check_early_stop(self.layer_solver, self.confidence)
        if self.confidence is not None and not self.searches_layers:
            raise BadInput(
                f"confidence is {self.confidence}, which only G-Search takes: leave it out, or search with "
                "max_drop and without a frontier"
            )

    def start_schedule(self, num_layers: int | None) -> Schedule | None:
        """The schedule that the search starts from, at the model's depth.

        Raises:
            ThinsightError: ``start`` holds no reduction.
        """
        if self.start is None:
            return None
        schedule = Reduction.from_pretrained(self.start).schedule
        return schedule if num_layers is None else schedule.resample(num_layers)

    @property
    def chosen(self) -> str:
        """The method that runs."""
        return choose_method(self.method, self.max_drop, self.budget)

    @property
    def chooses_ranker(self) -> bool:
        """Whether the search is to choose the ranker: where that was asked for, and where it can and none
        was named."""
        if self.ranker is None:
            return self.chosen in CHOOSE_RANKER and not self.frontier
        return (self.ranker if isinstance(self.ranker, str) else self.ranker.get("name")) == AUTO

    @property
    def first_ranker(self) -> str | dict[str, Any]:
        """The ranker that was asked for, or the first of those to choose from."""
        return FIRST_CHOICE if self.ranker is None or self.chooses_ranker else self.ranker

    @property
    def searches_layers(self) -> bool:
        """Whether the search goes layer by layer, under a tolerance."""
        return self.chosen == "gsearch" and not self.frontier

    @property
    def title(self) -> str:
        """The search in words."""
        return "Frontier" if self.frontier else TITLES[self.chosen]

    @property
    def tolerance(self) -> float:
        """The drop that a search without a budget allows."""
        return DEFAULT_MAX_DROP if self.max_drop is None else self.max_drop

    @property
    def gsearch_layer(self) -> int:
        """The first layer that may see fewer tokens; the paper's where none is given."""
        return 2 if self.first_layer is None else self.first_layer

    @property
    def layer_solver(self) -> Solver:
        """How one layer is searched.

        Raises:
            ThinsightError: an unknown solver, or one of its settings out of range.
        """
        return get_solver(self.solver, step=self.step, trade_off=self.trade_off, n_trials=self.solver_trials)

    @property
    def solver_trials(self) -> int:
        """Trials per layer of the bayes solver."""
        return 8 if self.n_trials is None else self.n_trials


def _check_first_layer(first_layer: int, ranker: Ranker, layers: int) -> None:
    """Refuse, before weights are loaded, a first layer that is not there or that the ranker cannot rank."""
    if first_layer >= layers:
        raise BadInput(
            f"first_layer is {first_layer} but the model has layers 0 to {layers - 1}: choose one of them"
        )
    if first_layer == 0 and not ranker.ranks_at_layer_0:
        raise BadInput(
            f"first_layer is 0, but ranker {ranker.name!r} reads the layer before, which layer 0 has not: "
            "choose 1 or more, or rank by vision-attention, random or uniform"
        )
