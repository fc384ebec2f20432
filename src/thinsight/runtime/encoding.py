"""Vision features computed once: the tower's output for a set of images, kept and passed in again.

Also carries what the tower's attention says of each token, for rankers that want it. Knows nothing about the
decoder, schedules or hooks there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import ThinsightError
from ..ranking import VISION_ATTENTION, get_ranker
from .backport import accept_outputs
from .families import base_model, vision_source
from .scoring import Probe, VisionReceived

__all__ = ["EncodedImages", "VisionTap", "encode_images", "image_outputs", "received_of"]

_RECEIVED = "thinsight_received"  # attribute of the tower's output: attention received, per image


@dataclass(frozen=True)
class EncodedImages:
    """Features of some images, in order, ready for the decoder.

    Pass them instead of pixels: ``model.generate(input_ids=..., attention_mask=...,
    **encoded.model_inputs())``.
    """

    features: tuple[Tensor, ...]  # one per image: (tokens, hidden), the model's dtype
    received: tuple[Tensor, ...] | None = None  # one per image: (tokens,) float32, attention inside the tower

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, images: int | slice | Sequence[int]) -> EncodedImages:
        """Some of the images, by number, slice or list of numbers."""
        if isinstance(images, slice):
            images = range(len(self))[images]
        elif isinstance(images, int):
            images = [images]
        received = self.received
        return EncodedImages(
            tuple(self.features[i] for i in images),
            None if received is None else tuple(received[i] for i in images),
        )

    @staticmethod
    def concat(parts: Iterable[EncodedImages]) -> EncodedImages:
        """All images of several, in order. Attention is kept only if all have it."""
        listed = list(parts)
        received = [part.received for part in listed if part.received is not None]
        return EncodedImages(
            tuple(feature for part in listed for feature in part.features),
            tuple(row for rows in received for row in rows) if len(received) == len(listed) else None,
        )

    def to(self, device: torch.device | str) -> EncodedImages:
        """The same on another device."""
        return EncodedImages(
            tuple(feature.to(device) for feature in self.features),
            None if self.received is None else tuple(row.to(device) for row in self.received),
        )

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(t.numel() * t.element_size() for t in (*self.features, *(self.received or ())))

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's `forward` or `generate`, in place of `pixel_values`."""
        if not self.features:
            return {}
        output = BaseModelOutputWithPooling(pooler_output=list(self.features))
        if self.received is not None:
            setattr(output, _RECEIVED, list(self.received))
        return {"mm_encoder_outputs": {"image": output}}


class VisionTap:
    """Reads the vision tower's attention on every call and leaves it on the tower's output."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.source = vision_source(model)
        self.probe = Probe(self.source.attention)
        tower = self.source.tower
        self.hooks = [
            tower.register_forward_pre_hook(self._before),
            tower.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.probe.restore()

    def _before(self, module: nn.Module, args: Any) -> None:
        self.probe.arm(VisionReceived(self.source.has_class_token))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        request = self.probe.disarm()
        if request is not None and request.result is not None and output is not None:
            received = request.result  # (images, rows)
            setattr(output, _RECEIVED, list(received[:, 1:] if self.source.drops_first else received))


def received_of(output: Any) -> list[Tensor] | None:
    """The attention that a `VisionTap` left on the tower's output: one (tokens,) float32 per image."""
    return getattr(output, _RECEIVED, None)


def image_outputs(model: PreTrainedModel, call: Mapping[str, Any]) -> Any:
    """Run the vision tower on a call's pixels, as the model itself would.

    Returns:
        The tower's output; `pooler_output` is a list of (tokens, hidden), one per image.
    """
    accept_outputs(model)  # what is made here is for this model
    encoder = base_model(model).get_image_features
    wanted = [name for name in inspect.signature(encoder).parameters if name != "kwargs"]
    given = {name: call[name] for name in wanted if call.get(name) is not None}
    return encoder(**{**given, "return_dict": True})


def encode_images(model: PreTrainedModel, inputs: Mapping[str, Any], reduction: Any = None) -> EncodedImages:
    """Run the vision tower and projector once on the images of a processor's output.

    Args:
        model: the multimodal model.
        inputs: a processor's output, or anything with `pixel_values`.
        reduction: the reduction (or ranker, or ranker name) that will run on the features, if it ranks by the
            tower's attention.

    Returns:
        Features on the model's device, without gradient; empty when `inputs` has no `pixel_values`.

    Raises:
        ThinsightError: unknown ranker, or a tower whose attention cannot be read.
    """
    if inputs.get("pixel_values") is None:
        return EncodedImages((), ())
    ranker = None if reduction is None else get_ranker(getattr(reduction, "ranker", reduction))
    with torch.no_grad(), _tapped(model, ranker is not None and VISION_ATTENTION in ranker.needs):
        pixels = inputs["pixel_values"].to(model.device, model.dtype)
        output = image_outputs(model, {**inputs, "pixel_values": pixels})
    features = tuple(feature.clone() for feature in output.pooler_output)
    received = received_of(output)
    if received is not None and [len(r) for r in received] != [len(f) for f in features]:
        raise ThinsightError(
            "the vision tower's tokens do not match the projector's; rank with text-attention instead"
        )
    return EncodedImages(features, None if received is None else tuple(row.clone() for row in received))


@contextmanager
def _tapped(model: PreTrainedModel, wanted: bool) -> Any:
    tap = VisionTap(model) if wanted else None
    try:
        yield
    finally:
        if tap is not None:
            tap.remove()
