"""Which rankers a search chooses from when it is not told one.

Knows nothing about how any of them ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.evaluator import Evaluator

__all__ = ["AUTO", "FIRST_CHOICE", "rankers_for"]

AUTO = "auto"
FIRST_CHOICE: dict[str, Any] = {"name": "text-attention", "queries": "instruction"}
_CHOICES: tuple[dict[str, Any], ...] = (
    FIRST_CHOICE,
    {"name": "text-attention", "queries": "last"},
    {"name": "staged", "first": "vision-attention"},
    {"name": "staged", "first": "cdpruner"},
)


def rankers_for(evaluator: Evaluator) -> list[dict[str, Any]]:
    """The rankers to choose from on an evaluator's model, as whole dicts: those that can rank there.

    Text attention of the instruction or of the last token, and two that drop before layer 0 and rank by text
    attention behind it.
    """
    from ..ranking import get_ranker

    return [get_ranker(choice).to_dict() for choice in _CHOICES if evaluator.can_rank(choice)]
