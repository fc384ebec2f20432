"""Vision features of the examples' images: the tower runs once per distinct image, its output is kept.

Knows the processor's public call and the runtime's `encode_images`. Knows nothing about schedules, answers
or scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ranking import VISION_ATTENTION, get_ranker
from ..runtime import EncodedImages, encode_images
from .encoding import image_token
from .examples import Example, ImageSource, open_image

__all__ = ["VisionCache"]

_ENCODE_BATCH = 8  # images per run of the tower


class VisionCache:
    """Encoded images by identity, in main memory, handed out as a batch of prompts needs them.

    Attention inside the tower is read only once a ranker asks for it; what was encoded before is then encoded
    again, and replaced.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor
        self._kept: dict[str, EncodedImages] = {}

    def inputs(self, examples: Sequence[Example], ranker: Any = None) -> dict[str, Any]:
        """Keyword arguments for a forward pass over these examples' prompts, in place of their pixels.

        ``ranker`` is the one that will rank their tokens, None if none will.
        """
        ranked = ranker is not None and VISION_ATTENTION in get_ranker(ranker).needs
        images = {
            key: image
            for example in examples
            for key, image in zip(example.image_keys, example.images, strict=True)
        }
        missing = [key for key in images if not self._has(key, ranked)]
        for start in range(0, len(missing), _ENCODE_BATCH):
            chosen = {key: images[key] for key in missing[start : start + _ENCODE_BATCH]}
            self._encode(chosen, ranker if ranked else None)
        wanted = [self._kept[key] for example in examples for key in example.image_keys]
        return EncodedImages.concat(wanted).to(self._model.device).model_inputs()

    def _has(self, key: str, ranked: bool) -> bool:
        kept = self._kept.get(key)
        return kept is not None and (not ranked or kept.received is not None)

    def _encode(self, images: Mapping[str, ImageSource], ranker: Any) -> None:
        inputs = self._processor(
            text=[image_token(self._processor)] * len(images),
            images=[open_image(image) for image in images.values()],
            return_tensors="pt",
            padding=True,
        )
        encoded = encode_images(self._model, inputs, ranker).to("cpu")
        for row, key in enumerate(images):
            self._kept[key] = encoded.rows(row)
