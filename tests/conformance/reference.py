"""The reference (`thinsight.checking.reference`) on a family's small random model."""

from __future__ import annotations

from typing import Any

from thinsight.checking import reference
from thinsight.checking.reference import hide as hide
from thinsight.schedule import Schedule

from .family import Family


class Reference(reference.Reference):
    """One prompt of a family, whose model runs with eager attention; `seed` is of its weights."""

    def __init__(self, family: Family, schedule: Schedule, *, seed: int = 0, **settings: Any) -> None:
        super().__init__(family.model("eager", seed), family.batch, schedule, **settings)
