"""Runs a transformers model under a reduction. The only room that knows transformers' insides.

`apply.py` puts a reduction on a model; `handle.py` is what its caller then has in hand. `reducer.py` is the
mechanism: hooks (`hooks.py`) that drop vision tokens before layers, in a pass (`passes.py`) whose inputs
`call.py` has read. `quotas.py` says how many stay, `selecting.py` which, `arguments.py` what a layer gets.

`layout.py` holds the two token spaces, `cache.py` and `masks.py` keep cache and masks right between them;
`scoring.py` reads attention, `encoding.py` the vision tower, `families.py` knows models. On top of it all,
`prefix.py` lets reductions share the layers in which they agree, `captured.py` replays prefills that
`recording.py` records, and `observe.py` ranks where nothing is dropped.

Knows nothing about searching, evaluating or reporting.
"""

from __future__ import annotations

from .apply import apply, check_rankable
from .captured import CapturedPrefill
from .encoding import EncodedImages, encode_images
from .families import decoder_layers, num_layers, vision_token_mask
from .handle import Handle, remove
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
    "remove",
    "resuming",
    "vision_token_mask",
]
