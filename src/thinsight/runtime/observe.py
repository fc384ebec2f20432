"""What a ranker would say at every layer of the full model: for the rank-consistency finding.

Nothing is dropped. Knows nothing about schedules or statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..ranking import VISION_ATTENTION, Context, full_precision, get_ranker
from .anatomy import attention_of, check_supported, decoder_layers, model_device
from .call import Call, encode_pixels, read_call
from .encoding import VisionTap, on_device
from .layout import query_columns
from .scoring import Probe, TextRows


@dataclass(frozen=True)
class LayerScores:
    """A ranker's scores of all vision tokens after each decoder layer of the full model."""

    scores: Tensor  # (layers, batch, tokens) float32
    valid: Tensor  # (batch, tokens) bool: False at the padding of rows with fewer vision tokens

    def row(self, row: int) -> Tensor:
        """(layers, N) float32 of one batch row."""
        return self.scores[:, row, self.valid[row]]


@torch.no_grad()
def layer_scores(model: Any, inputs: Mapping[str, Any], ranker: Any = "text-attention") -> LayerScores:
    """Run the full model once over prompts, and score their vision tokens from every layer's attention.

    Entry i holds the scores from layer i's attention: what ranks before layer i + 1.

    Args:
        model: a supported multimodal model, without a reduction on it.
        inputs: a processor's output, or input_ids and attention_mask with `EncodedImages.model_inputs()`.
        ranker: a ranker, its name, or a dict.

    Raises:
        ThinsightError: unsupported model, unknown ranker, or no image in any prompt.
    """
    model = check_supported(model)
    chosen = get_ranker(ranker)
    layers = decoder_layers(model)
    tap = VisionTap(model) if VISION_ATTENTION in chosen.needs else None
    try:
        arguments = encode_pixels(model, on_device(model, inputs, model_device(model)))
    finally:
        if tap is not None:
            tap.remove()
    call = read_call(model, arguments)
    if call is None:
        raise BadInput("no prompt has an image; layer_scores needs vision tokens to score")
    rows, real = query_columns(call.layout, call.prompt, chosen.queries, chosen.rows)
    probes = [Probe(attention_of(layer)) for layer in layers]
    requests = [TextRows(rows, call.layout.column, call.layout.valid) for _ in layers]
    try:
        for probe, request in zip(probes, requests, strict=True):
            probe.arm(request)
        model(**arguments, use_cache=False, logits_to_keep=1)
    finally:
        for probe in probes:
            probe.restore()
    scores = [_score(chosen, call, layer + 1, request.result, real) for layer, request in enumerate(requests)]
    return LayerScores(torch.stack(scores), call.layout.valid)


def _score(ranker: Any, call: Call, layer: int, attention: Tensor | None, queries: Tensor) -> Tensor:
    layout = call.layout
    context = Context(
        layer=layer,
        valid=layout.valid,
        image=layout.image,
        index=layout.index,
        size=layout.size,
        attention=attention,
        queries=queries,
        vision_attention=call.received,
    )
    with full_precision(layout.valid.device):
        return ranker.score(context).float()
