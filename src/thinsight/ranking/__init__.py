"""Rankers: which vision tokens are worth keeping. `base.py` holds the contract, and how to add one."""

from .attention import TextAttention, VisionAttention
from .base import (
    RANKERS,
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
from .positions import Downsample, Random, Uniform
from .sparsevlm import SparseVLM
from .staged import Staged
from .statistics import STATISTICS, get_statistic
from .visionzip import VisionZip
from .vispruner import VisPruner
