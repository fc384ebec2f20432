"""Vision features of the examples' images: the encoder runs once per distinct set of images, and is kept.

An example's images are encoded together, because some families treat one image otherwise than several.
Knows the processor's public call and `encode_images`. Knows nothing about schedules, answers or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ThinsightError
from ..ranking import VISION_ATTENTION, get_ranker
from ..runtime import EncodedImages, encode_images, vision_token_mask
from .encoding import process
from .examples import Example
from .feature_store import DEFAULT_CACHE_GIB, FeatureStore

__all__ = ["VisionCache"]

_ENCODE_BATCH = 8  # examples per run of the encoder


class VisionCache:
    """Encoded images by identity, handed out as a batch of prompts needs them.

    Attention inside the tower is read only once a ranker asks for it; what was encoded before is then encoded
    again, and replaced.

    Args:
        model: a transformers vision-language model.
        processor: its own processor.
        cache_gib: how much is kept in main memory, in GiB; more goes into temporary files.

    Raises:
        ThinsightError: ``cache_gib`` is no number of at least 0.
    """

    def __init__(self, model: Any, processor: Any, cache_gib: float = DEFAULT_CACHE_GIB) -> None:
        self._model = model
        self._processor = processor
        self._kept: FeatureStore[EncodedImages] = FeatureStore(cache_gib)

    def inputs(self, examples: Sequence[Example], ranker: Any = None) -> dict[str, Any]:
        """Keyword arguments for a forward pass over these examples' prompts, in place of their pixels.

        ``ranker`` is the one that will rank their tokens, None if none will.

        Raises:
            ThinsightError: the encoder makes other token counts than the processor writes into the prompts,
                or a temporary file cannot be written.
        """
        ranked = ranker is not None and VISION_ATTENTION in get_ranker(ranker).needs
        by_images = {tuple(example.image_keys): example for example in examples}
        missing = [example for key, example in by_images.items() if not self._has(key, ranked)]
        for start in range(0, len(missing), _ENCODE_BATCH):
            self._encode(missing[start : start + _ENCODE_BATCH], ranker if ranked else None)
        wanted = [self._entry(example) for example in examples]
        return EncodedImages.concat(wanted).to(self._model.device).model_inputs()

    def _has(self, key: tuple[str, ...], received: bool) -> bool:
        """Whether images are encoded, and if asked for, with attention."""
        entry = self._kept.outline(key)
        return entry is not None and (entry.received is not None or not received)

    def _entry(self, example: Example) -> EncodedImages:
        entry = self._kept.get(tuple(example.image_keys))
        assert entry is not None
        return entry

    def _encode(self, examples: Sequence[Example], ranker: Any) -> None:
        inputs = process(self._processor, examples)
        encoded = encode_images(self._model, inputs, ranker).to("cpu")
        counts = vision_token_mask(self._model, inputs["input_ids"]).sum(1).tolist()
        for example, entries in zip(examples, _split(encoded, counts), strict=True):
            self._kept.put(tuple(example.image_keys), encoded.rows(entries))


def _split(encoded: EncodedImages, counts: Sequence[int]) -> list[list[int]]:
    """Which entries belong to each prompt, from how many vision tokens the prompts have."""
    sizes = [len(feature) for feature in encoded.features]
    result: list[list[int]] = []
    entry = 0
    for count in counts:
        mine: list[int] = []
        while entry < len(sizes) and sum(sizes[i] for i in mine) < count:
            mine.append(entry)
            entry += 1
        if sum(sizes[i] for i in mine) != count:
            raise ThinsightError(
                f"the vision encoder makes entries of {sizes} tokens, which do not fit prompts with {counts} "
                "image tokens: pass the processor that belongs to the model"
            )
        result.append(mine)
    return result
