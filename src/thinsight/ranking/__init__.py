"""Rankers: which vision tokens are worth keeping. One file per ranker; `base.py` holds the contract.

Knows nothing about how many are kept, nor about models.
"""

from __future__ import annotations

from .base import (
    STATES,
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Context,
    Ranker,
    autocasts,
    best,
    choose,
    full_precision,
    get_ranker,
    list_rankers,
    mean_rows,
    register,
    row_weights,
    weighted_rows,
)
from .cdpruner import CDPruner
from .dart import Dart
from .divprune import DivPrune
from .downsample import Downsample
from .random import Random
from .sparsevlm import SparseVLM
from .staged import Staged
from .statistics import STATISTICS, get_statistic
from .text_attention import TextAttention
from .uniform import Uniform
from .vision_attention import VisionAttention
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "STATES",
    "STATISTICS",
    "TEXT_ATTENTION",
    "VISION_ATTENTION",
    "CDPruner",
    "Context",
    "Dart",
    "DivPrune",
    "Downsample",
    "Random",
    "Ranker",
    "SparseVLM",
    "Staged",
    "TextAttention",
    "Uniform",
    "VisPruner",
    "VisionAttention",
    "VisionZip",
    "autocasts",
    "best",
    "choose",
    "full_precision",
    "get_ranker",
    "get_statistic",
    "list_rankers",
    "mean_rows",
    "register",
    "row_weights",
    "weighted_rows",
]
