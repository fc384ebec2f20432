"""Runs a transformers model under a reduction. The only room that knows transformers' insides.

`handle.py` puts a reduction on a model and gives its caller a handle. `reducer.py` is the mechanism: a pass
from top to bottom, by hooks (`hooks.py`) that drop vision tokens before layers; `call.py` reads its inputs.

`layout.py` holds the two token spaces, `cache.py` and `masks.py` keep cache and masks right between them;
`scoring.py` reads attention, `encoding.py` the vision tower, `anatomy.py` knows a model's parts. On top of it all,
`prefix.py` lets reductions share the layers in which they agree, `captured.py` records prefills and replays
them, and `observe.py` ranks where nothing is dropped.

Knows nothing about searching, evaluating or reporting.
"""

from __future__ import annotations

from .anatomy import decoder_layers, num_layers, vision_token_mask
from .captured import CapturedPrefill
from .encoding import EncodedImages, encode_images
from .handle import Handle, apply, check_rankable, remove
from .observe import LayerScores, layer_scores
from .prefix import Snapshot, can_share, resuming, snapshotting

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
    "remove",
    "resuming",
    "snapshotting",
    "vision_token_mask",
]
