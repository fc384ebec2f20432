"""Rankers: which vision tokens are worth keeping. One file per ranker; `base.py` holds the contract.

Knows nothing about how many are kept, nor about models.
"""

from __future__ import annotations

from .base import (
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Context,
    Ranker,
    choose,
    get_ranker,
    list_rankers,
    register,
)
from .random import Random
from .text_attention import TextAttention
from .uniform import Uniform
from .vision_attention import VisionAttention

__all__ = [
    "TEXT_ATTENTION",
    "VISION_ATTENTION",
    "Context",
    "Random",
    "Ranker",
    "TextAttention",
    "Uniform",
    "VisionAttention",
    "choose",
    "get_ranker",
    "list_rankers",
    "register",
]
