"""Runs a transformers model under a reduction. The only room that knows transformers' insides.

`apply.py` puts a reduction on a model; `prefix.py` lets reductions share the layers in which they agree;
`captured.py` replays recorded prefills, `recording.py` records;
`layout.py` holds the two token spaces, `cache.py` and `masks.py` keep cache and masks right between them,
`scoring.py` reads attention, `encoding.py` the vision tower, `families.py` knows models. Knows nothing about
searching, evaluating or reporting.
"""

from __future__ import annotations

from .apply import Handle, apply, check_rankable
from .captured import CapturedPrefill
from .encoding import EncodedImages, encode_images
from .families import decoder_layers, num_layers, vision_token_mask
from .observe import LayerScores, layer_scores
from .prefix import Snapshot, can_share, recording, resuming

__all__ = [
    "CapturedPrefill",
    "EncodedImages",
    "Handle",
    "LayerScores",
    "Snapshot",
    "apply",
    "can_share",
    "check_rankable",
    "decoder_layers",
    "encode_images",
    "layer_scores",
    "num_layers",
    "recording",
    "resuming",
    "vision_token_mask",
]
