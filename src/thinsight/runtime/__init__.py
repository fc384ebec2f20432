"""Runs a transformers model under a reduction. The only room that knows transformers' insides.

`handle.py` puts a reduction on a model; `reducer.py` is the mechanism, a pass from top to bottom. Under it:
`call.py` reads a call, `encoding.py` the vision tower, `scoring.py` attention; `tensors.py` and `cache.py` keep
the two token spaces apart; `anatomy.py` knows models. On top, `prefix.py` lets reductions share layers in which
they agree, and `observe.py` ranks where nothing is dropped. Knows nothing about searching or evaluating.
"""

from __future__ import annotations

from .anatomy import decoder_layers as decoder_layers
from .anatomy import first_attending as first_attending
from .anatomy import num_layers as num_layers
from .anatomy import vision_token_mask as vision_token_mask
from .encoding import EncodedImages as EncodedImages
from .encoding import encode_images as encode_images
from .handle import Handle as Handle
from .handle import apply as apply
from .handle import check_rankable as check_rankable
from .handle import remove as remove
from .observe import LayerScores as LayerScores
from .observe import layer_scores as layer_scores
from .prefix import Snapshot as Snapshot
from .prefix import can_share as can_share
from .prefix import resuming as resuming
from .prefix import snapshotting as snapshotting
from .weights import weights_of as weights_of
