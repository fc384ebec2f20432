"""What a ranker would say at every layer of the full model, where nothing is dropped: for rank consistency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, Unsupported
from ..ranking import TEXT_ATTENTION, VISION_ATTENTION, full_precision, get_ranker
from .anatomy import (
    attention_of,
    check_supported,
    decoder_layers,
    first_attending,
    model_device,
    shared_keys,
    state_layers,
)
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

    Entry i holds the scores from layer i's attention, or from that of the last layer before that attends: what ranks
    before layer i + 1.

    Args:
        model: a supported multimodal model, without a reduction on it.
        inputs: a processor's output, or input_ids and attention_mask with `EncodedImages.model_inputs()`.
        ranker: a ranker, its name, or a dict.

    Raises:
        ThinsightError: unsupported model, unknown ranker, no image in any prompt, or a model whose first layers do not
            attend.
    """
    model = check_supported(model)
    chosen = get_ranker(ranker)
    first = first_attending(model)
    if first and TEXT_ATTENTION in chosen.needs:
        raise Unsupported(
            f"ranker {chosen.name!r} reads attention, and layers 0 to {first - 1} of this model carry a state instead: "
            "its rankings cannot be compared over all layers; choose vision-attention, random or uniform"
        )
    with tapped(model, VISION_ATTENTION in chosen.needs):
        arguments = encode_pixels(model, on_device(model, inputs, model_device(model)))
    call = read_call(model, arguments)
    if call is None:
        raise BadInput("no prompt has an image; layer_scores needs vision tokens to score")
    layout = call.layout
    rows, real = query_columns(layout, call.prompt, chosen.queries, chosen.rows)
    layers, states = decoder_layers(model), state_layers(model)
    probes = {i: Probe(attention_of(layer)) for i, layer in enumerate(layers) if i not in states}
    requests = {i: TextRows(rows, layout.column, layout.valid) for i in probes}
    try:
        for layer, probe in probes.items():
            probe.arm(requests[layer])
        # Gemma 4 runs its last layers on what it is asked for alone, and all rows are to be read there
        model(**arguments, use_cache=False, logits_to_keep=0 if shared_keys(model) else 1)
    finally:
        for probe in probes.values():
            probe.restore()
    scores, attention = [], None
    for layer in range(len(layers)):
        attention = requests[layer].result if layer in requests else attention
        context = call.context(layer=layer + 1, valid=layout.valid, attention=attention, queries=real)
        with full_precision(model_device(model)):
            scores.append(chosen.score(context).float())
    return LayerScores(torch.stack(scores), layout.valid)
