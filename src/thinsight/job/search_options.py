"""What `thinsight search` is told, and every check of it that needs no data and no weights.

Knows nothing about how a search runs, nor what comes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..budget import check_budget_value
from ..errors import BadInput
from ..ranking import Ranker, get_ranker
from ..reduction import Reduction
from ..schedule import Schedule
from ..searches.frontier import LEAST_TRIALS as LEAST_OF_FRONTIER
from ..searches.frontier import SHARES, frontier
from ..searches.gsearch import Solver, check_early_stop, get_solver
from ..searches.search import (
    AUTO,
    DEFAULT_MAX_DROP,
    FIRST_CHOICE,
    SEARCHES,
    Search,
    check_score_drop,
    choose_method,
    choosing,
)
from .opening import RunOptions, layers_of

FRONTIER = Search("frontier", frontier, "Frontier", least_trials=LEAST_OF_FRONTIER)
"""Asked for by an option of its own, as it comes to many results."""
# Options that not every search takes, with the parameter that each becomes.
_PARAMETERS = {
    "confidence": "confidence",
    "first_layer": "first_layer",
    "n_trials": "n_trials",
    "solver": "solver",
    "start": "warm_start",
    "step": "step",
    "trade_off": "trade_off",
}
_LARGE_DROP = 0.2


@dataclass(frozen=True)
class SearchOptions(RunOptions):
    """What `thinsight search` is told."""

    max_drop: float | None = None
    budget: float | None = None
    budget_unit: str | None = None
    method: str | None = None
    frontier: bool = False
    ranker: str | dict[str, Any] | None = None
    solver: str | None = None
    first_layer: int | None = None
    step: int | None = None
    trade_off: float | None = None
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
        self._check_taken()
        self._check_numbers()
        check_early_stop(self.layer_solver, self.confidence)
        super().check()
        if self.start is not None:
            self.start_schedule(layers_of(self.model.check()))
        if self.first_layer is not None or self.searches_layers:
            _check_first_layer(self.gsearch_layer, get_ranker(self.first_ranker), layers_of(self.model.check()))

    def _check_method(self) -> None:
        """The search that is chosen can do what it is asked."""
        choose_method(self.method, self.max_drop, self.budget)
        if self.budget_unit is not None and self.budget is None:
            raise BadInput(f"budget_unit is {self.budget_unit!r} without a budget: leave it out, or give budget too")
        if self.frontier and (self.method is not None or self.unit != "keep"):
            raise BadInput("frontier has its own search and counts mean keep rates: leave out method and budget_unit")
        if self.frontier and self.chooses_ranker:
            raise BadInput("ranker 'auto' is chosen for one budget: name a ranker for a frontier")
        if self.chooses_ranker and not self.search.chooses_ranker:
            raise BadInput(f"ranker 'auto' needs a budget and a search that chooses it: {' or '.join(choosing())}")
        if self.chooses_ranker and isinstance(self.ranker, dict) and len(self.ranker) > 1:
            raise BadInput(f"ranker is {self.ranker!r}, but 'auto' has no settings: leave them out")
        get_ranker(self.first_ranker)

    def _check_taken(self) -> None:
        """The search takes every option that was given."""
        for option, parameter in _PARAMETERS.items():
            value = getattr(self, option)
            if value is not None and parameter not in self.search.parameters:
                takers = [each.title for each in (*SEARCHES.values(), FRONTIER) if parameter in each.parameters]
                raise BadInput(
                    f"{option} is {value!r}, which {self.search.title} does not take, but {', '.join(takers)}: "
                    "leave it out, or choose another search"
                )

    def _check_numbers(self) -> None:
        if self.budget is not None:
            check_budget_value(self.budget, self.unit)
            if self.frontier and self.budget < SHARES[0]:
                raise BadInput(f"budget is {self.budget}: a frontier begins at a mean keep rate of {SHARES[0]}")
        check_score_drop(self.tolerance)
        if self.n_trials is not None and self.n_trials < self.search.least_trials:
            raise BadInput(
                f"n_trials is {self.n_trials}: {self.search.title} needs at least {self.search.least_trials}"
            )
        for name, low in {"timing_runs": 1, "new_tokens": 1, "pictures": 0}.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be a whole number of at least {low}")
        get_ranker({"name": "random", "seed": self.seed})  # the yardstick of the report, which has bounds

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
    def warning(self) -> str:
        """What is odd about the options, though it can be meant; "" if nothing."""
        if self.max_drop is None or self.max_drop <= _LARGE_DROP:
            return ""
        return (
            f"max_drop {self.max_drop:g} lets the score fall by {100 * self.max_drop:g} points; "
            f"{self.max_drop / 100:g} is {self.max_drop:g} points"
        )

    @property
    def search(self) -> Search:
        """The search that runs: a method, or the frontier."""
        return FRONTIER if self.frontier else SEARCHES[self.chosen]

    @property
    def unit(self) -> str:
        """Of the budget."""
        return "keep" if self.budget_unit is None else self.budget_unit

    @property
    def chosen(self) -> str:
        """The method that runs."""
        return choose_method(self.method, self.max_drop, self.budget)

    @property
    def chooses_ranker(self) -> bool:
        """Whether the search is to choose the ranker: where that was asked for, and where it can and none
        was named."""
        if self.ranker is None:
            return self.search.chooses_ranker
        return (self.ranker if isinstance(self.ranker, str) else self.ranker.get("name")) == AUTO

    @property
    def first_ranker(self) -> str | dict[str, Any]:
        """The ranker that was asked for, or the first of those to choose from."""
        return FIRST_CHOICE if self.ranker is None or self.chooses_ranker else self.ranker

    @property
    def searches_layers(self) -> bool:
        """Whether the search goes layer by layer, under a tolerance."""
        return self.search.name == "gsearch"

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
        """How one layer is searched, where the search goes layer by layer.

        Raises:
            ThinsightError: an unknown solver, or one of its settings out of range or not its own.
        """
        return get_solver(self.solver_name, **self.solver_settings)

    @property
    def solver_name(self) -> str:
        """Of the solver of G-Search."""
        return "bisect" if self.solver is None else self.solver

    @property
    def solver_settings(self) -> dict[str, Any]:
        """Of the solver of G-Search, as arguments; None is its default."""
        if not self.searches_layers:
            return {}
        return {"step": self.step, "trade_off": self.trade_off, "n_trials": self.n_trials}


def _check_first_layer(first_layer: int, ranker: Ranker, layers: int) -> None:
    """Refuse, before weights are loaded, a first layer that is not there or that the ranker cannot rank."""
    if first_layer >= layers:
        raise BadInput(f"first_layer is {first_layer} but the model has layers 0 to {layers - 1}: choose one of them")
    if first_layer == 0 and not ranker.ranks_at_layer_0:
        raise BadInput(
            f"first_layer is 0, but ranker {ranker.name!r} reads the layer before, which layer 0 has not: "
            "choose 1 or more, or rank by vision-attention, random or uniform"
        )
