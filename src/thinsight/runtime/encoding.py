"""Vision features computed once: the encoder's output for some images and videos, kept and passed in again, with what
the tower's attention says of each token for rankers that want it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import Unsupported
from ..families import family_of
from ..ranking import VISION_ATTENTION, get_ranker
from ..reduction import Reduction
from .anatomy import MODALITIES, base_model, unwrapped, vision_source
from .scoring import Probe, VisionReceived
from .tensors import Mapped

_MARKERS = "visual_indicator_features"  # attribute of Ovis2's encoder output
_ROUTED = "router_logits"  # attribute of Granite Docling's encoder output, of which only its loss knows
_RECEIVED = "thinsight_received"  # attribute of an encoder's output: attention received, per entry
# Seconds per frame of a video, from which Qwen's positions are counted; a coarser dtype would move them.
_SECONDS = frozenset({"second_per_grid_ts", "video_second_per_grid"})


@dataclass(frozen=True)
class EncodedImages(Mapped):
    """Features of some images (and videos), ready for the decoder.

    Pass them instead of pixels: ``model.generate(input_ids=..., attention_mask=...,
    **encoded.model_inputs())``. An entry is what the family's encoder lists: an image, a tile, or (Idefics3,
    SmolVLM) all images of a prompt; images come before videos.
    """

    features: tuple[Tensor, ...]  # one per entry: (tokens, hidden), the model's dtype
    received: tuple[Tensor, ...] | None = None  # one per entry: (tokens,) float32, attention inside the tower
    deepstack: tuple[tuple[Tensor, ...], ...] = ()  # per entry, (tokens, hidden) of each deepstack layer
    modalities: tuple[str, ...] = ()  # of each entry; empty: all are images
    stacked: frozenset[str] = frozenset()  # modalities whose features the family takes as one tensor
    markers: Tensor | None = None  # (markers, hidden), what Ovis2 puts at the tokens around every image
    into: tuple[int, ...] = ()  # the decoder layer that each deepstack layer enters, where the encoder says it

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, images: int | slice | Sequence[int]) -> EncodedImages:
        """Some of the entries, by number, slice or list of numbers."""
        if isinstance(images, slice):
            images = range(len(self))[images]
        chosen = [images] if isinstance(images, int) else images
        return replace(
            self,
            features=tuple(self.features[i] for i in chosen),
            received=None if self.received is None else tuple(self.received[i] for i in chosen),
            deepstack=tuple(self.deepstack[i] for i in chosen) if self.deepstack else (),
            modalities=tuple(self.modalities[i] for i in chosen) if self.modalities else (),
        )

    @staticmethod
    def concat(parts: Iterable[EncodedImages]) -> EncodedImages:
        """All entries of several parts of one model, in order. Attention is kept only if all have it."""
        listed = list(parts)
        received = [part.received for part in listed if part.received is not None]
        return EncodedImages(
            tuple(feature for part in listed for feature in part.features),
            tuple(row for rows in received for row in rows) if len(received) == len(listed) else None,
            tuple(layers for part in listed for layers in part.deepstack),
            tuple(name for part in listed for name in part._names),
            frozenset(name for part in listed for name in part.stacked),
            next((part.markers for part in listed if part.markers is not None), None),
            next((part.into for part in listed if part.into), ()),
        )

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's `forward` or `generate`, in place of `pixel_values`."""
        outputs = {}
        for modality in dict.fromkeys(self._names):
            entries = [i for i, name in enumerate(self._names) if name == modality]
            features: Any = [self.features[i] for i in entries]
            if modality in self.stacked:
                if len({len(feature) for feature in features}) > 1:
                    raise Unsupported(
                        "the model takes all images or videos as one tensor, but their token counts differ: give "
                        "each the same number of tiles or frames"
                    )
                features = torch.stack(features)
            outputs[modality] = output = BaseModelOutputWithPooling(pooler_output=features)
            setattr(output, _ROUTED, None)
            if modality in self.stacked:
                output.last_hidden_state = features  # where Llama 4 takes them from
            if self.deepstack:
                layers: Any = [list(each) for each in zip(*(self.deepstack[i] for i in entries), strict=True)]
                layers = list(zip(self.into, layers, strict=True)) if self.into else layers
                setattr(output, "deepstack_features", layers)  # noqa: B010
            if self.markers is not None:
                setattr(output, _MARKERS, self.markers)
            if self.received is not None:
                setattr(output, _RECEIVED, [self.received[i] for i in entries])
        return {"mm_encoder_outputs": outputs} if outputs else {}

    @property
    def _names(self) -> tuple[str, ...]:
        return self.modalities or ("image",) * len(self)


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


@contextmanager
def tapped(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """The tower's attention is read for as long as it lasts, if it is wanted."""
    tap = VisionTap(model) if wanted else None
    try:
        yield
    finally:
        if tap is not None:
            tap.remove()


def received_of(output: Any) -> list[Tensor] | None:
    """The attention that a `VisionTap` left on an encoder's output: one (tokens,) float32 per entry."""
    return getattr(output, _RECEIVED, None)


def vision_outputs(model: PreTrainedModel, call: Mapping[str, Any], modality: str) -> Any:
    """Run the vision encoder on a call's images or videos ("image" or "video"), as the model itself would: its
    `pooler_output` holds entries of (tokens, hidden), and attention that a `VisionTap` read is for their tokens."""
    encoder = _encoder(model, modality)
    given = {name: call[name] for name in encoder_inputs(model, modality) if call.get(name) is not None}
    if _reads_as_images(model, modality):
        given = {MODALITIES["image"]: given[MODALITIES[modality]]}
    output = projected(encoder(**{**given, "return_dict": True}))
    received = received_of(output)
    if received is not None:
        if hasattr(base_model(model), "image_newline"):
            raise _no_fit("its projector cuts padding away and adds line ends")
        setattr(output, _RECEIVED, fit_received(received, [len(entry) for entry in output.pooler_output]))
    return output


def settle(output: Any) -> None:
    """Have attention that a `VisionTap` left per row of the tower stand per token; what does so already stays."""
    received, pooled = received_of(projected(output)), getattr(output, "pooler_output", None)
    if received and pooled is not None and len(pooled) and len(received[0]) != len(pooled[0]):
        alone = len(pooled) % len(received) == 0  # an image per entry, perhaps once for each beam
        tokens = len(pooled[0]) if alone else sum(map(len, pooled)) // len(received)
        setattr(output, _RECEIVED, fit_received(received, [tokens] * len(received)))


def projected(output: Any) -> Any:
    """An encoder's output, whose entries stand in `pooler_output`: Llama 4 projects later, and has them elsewhere;
    Granite Vision has them for decoder layers that it names."""
    layers: Any = getattr(output, "deepstack_features", None)
    if _names_layers(layers):
        output.pooler_output = list(layers[0][1])  # anew each time: `generate` repeats these for beams, and no others
    elif getattr(output, "pooler_output", None) is None:
        output.pooler_output = output.last_hidden_state
    return output


def _names_layers(deepstack: Any) -> bool:
    """Whether DeepStack's features are pairs of a decoder layer and its features (Granite Vision), not features."""
    return bool(deepstack) and isinstance(deepstack[0], tuple) and isinstance(deepstack[0][0], int)


def _encoder(model: PreTrainedModel, modality: str) -> Any:
    """What encodes a modality; None where the model has nothing for it."""
    name = "image" if _reads_as_images(model, modality) else modality
    return getattr(base_model(model), f"get_{name}_features", None)


def _reads_as_images(model: PreTrainedModel, modality: str) -> bool:
    """Whether a video's frames go through the encoder of images, for want of one for videos (PerceptionLM)."""
    has_own = hasattr(base_model(model), f"get_{modality}_features")
    return modality == "video" and not has_own and modality in family_of(model.config).modalities


def encoder_inputs(model: PreTrainedModel, modality: str) -> list[str]:
    """The keyword arguments that the encoder of a modality takes; none where the family has none."""
    if _reads_as_images(model, modality):
        return [MODALITIES[modality]]
    encoder = _encoder(model, modality)
    names = () if encoder is None else inspect.signature(encoder).parameters
    return [name for name in names if name != "kwargs"]


def has_pixels(model: PreTrainedModel, call: Mapping[str, Any], modality: str) -> bool:
    """Whether a call brings images or videos for the encoder."""
    names = [name for name in encoder_inputs(model, modality) if name.startswith("pixel_values")]
    return any(call.get(name) is not None for name in names)


def encode_images(model: Any, inputs: Mapping[str, Any], reduction: Any = None) -> EncodedImages:
    """Run the vision encoder and projector once on the images and videos of a processor's output.

    Args:
        model: the multimodal model.
        inputs: a processor's output, or anything with `pixel_values` or `pixel_values_videos` and what else
            the encoder takes.
        reduction: the reduction (or ranker, or ranker name) that will run on the features, if it ranks by the
            tower's attention.

    Returns:
        Features on the model's device, without gradient; empty when `inputs` has no pixels.

    Raises:
        ThinsightError: unknown ranker, or a tower whose attention cannot be read.
    """
    model = unwrapped(model)
    present = [name for name in MODALITIES if has_pixels(model, inputs, name)]
    if not present:
        return EncodedImages((), ())
    given = reduction.ranker if isinstance(reduction, Reduction) else reduction
    ranker = None if given is None else get_ranker(given)
    taken = {name for modality in present for name in encoder_inputs(model, modality)}
    moved = on_device(model, {name: inputs[name] for name in taken if name in inputs})
    with torch.no_grad(), tapped(model, ranker is not None and VISION_ATTENTION in ranker.needs):
        parts = [_kept(vision_outputs(model, moved, name), name) for name in present]
    return EncodedImages.concat(parts)


def _kept(output: Any, modality: str) -> EncodedImages:
    """An encoder's output as entries that hold no memory but their own."""
    pooled = output.pooler_output
    received = received_of(output)
    layers: Any = getattr(output, "deepstack_features", None) or ()
    named = _names_layers(layers)
    into = tuple(layer for layer, _ in layers) if named else ()
    deepstack = zip(*([each for _, each in layers] if named else layers), strict=True)  # per entry
    return EncodedImages(
        tuple(entry.clone() for entry in pooled),
        None if received is None else tuple(row.clone() for row in received),
        tuple(tuple(layer.clone() for layer in entry) for entry in deepstack),
        (modality,) * len(pooled),
        frozenset([modality] if isinstance(pooled, Tensor) else ()),
        getattr(output, _MARKERS, None),
        into,
    )


def on_device(model: Any, inputs: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A processor's output on the model's device (or another), all that is floating but times in the model's dtype."""

    def moved(value: Any, dtype: torch.dtype | None) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return [moved(item, dtype) for item in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(device or model.device, dtype if value.is_floating_point() else None)

    return {name: moved(each, None if name in _SECONDS else model.dtype) for name, each in inputs.items()}


def fit_received(received: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Attention per row of the tower, (rows,) float32 for each image, -> per token of the projector, (tokens,) for each
    of its entries, which hold whole images and are so long. A token for a block of rows gets their mean."""
    rows, tokens = len(received[0]), sum(lengths) // len(received)
    block = math.isqrt(rows // tokens) if tokens else 0
    side = math.isqrt(rows)
    whole = block > 0 and not any(length % tokens for length in lengths)
    grid = block == 1 or (side**2 == rows and block > 0 and side % block == 0)
    if not (whole and grid and tokens * len(received) == sum(lengths) and tokens * block**2 == rows):
        raise _no_fit(f"{len(received)} images of {rows} rows against {sum(lengths)} tokens")
    pooled = torch.stack(list(received))  # (images, rows)
    if block > 1:
        blocks = pooled.view(len(received), side // block, block, side // block, block)
        pooled = blocks.mean(dim=(2, 4)).flatten(1)  # (images, tokens)
    return list(pooled.flatten().split(list(lengths)))


def _no_fit(why: str) -> Unsupported:
    return Unsupported(
        f"the vision tower's tokens do not match the projector's ({why}); rank with text-attention instead"
    )
