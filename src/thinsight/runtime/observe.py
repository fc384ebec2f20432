"""What a ranker would say at every layer of the full model, where nothing is dropped: for rank consistency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..ranking import VISION_ATTENTION, full_precision, get_ranker
from .anatomy import attention_of, check_supported, decoder_layers, model_device, shared_keys
from .call import encode_pixels, query_columns, read_call
from .encoding import on_device, tapped
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
    with tapped(model, VISION_ATTENTION in chosen.needs):
        arguments = encode_pixels(model, on_device(model, inputs, model_device(model)))
    call = read_call(model, arguments)
    if call is None:
        raise BadInput("no prompt has an image; layer_scores needs vision tokens to score")
    layout = call.layout
    rows, real = query_columns(layout, call.prompt, chosen.queries, chosen.rows)
    probes = [Probe(attention_of(layer)) for layer in decoder_layers(model)]
    requests = [TextRows(rows, layout.column, layout.valid) for _ in probes]
    try:
        for probe, request in zip(probes, requests, strict=True):
            probe.arm(request)
        # Gemma 4 runs its last layers on what it is asked for alone, and all rows are to be read there
        model(**arguments, use_cache=False, logits_to_keep=0 if shared_keys(model) else 1)
    finally:
        for probe in probes:
            probe.restore()
    scores = []
    for layer, request in enumerate(requests):
        context = call.context(layer=layer + 1, valid=layout.valid, attention=request.result, queries=real)
        with full_precision(model_device(model)):
            scores.append(chosen.score(context).float())
    return LayerScores(torch.stack(scores), layout.valid)
