"""Vision features of the examples' images: the encoder runs once per distinct set of images, and is kept.

An example's images are encoded together, because some families treat one image otherwise than several. Which
examples share a run of the encoder is fixed: the last bits of its numbers may depend on the company.
Knows the pixels that a `PromptReader` hands out and `encode_images`. Knows nothing about schedules, answers
or scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import BadInput
from ..ranking import VISION_ATTENTION, get_ranker
from ..runtime import EncodedImages, encode_images
from ..runtime.families import decoder
from .disk_store import DiskStore
from .encoding import PromptReader
from .examples import Example
from .feature_store import DEFAULT_CACHE_GIB, FeatureStore, separate_tensors
from .hashing import hash_image, hash_json, hash_machine, hash_model, hash_processor

__all__ = ["VisionCache"]

_ENCODE_BATCH = 8  # examples per run of the encoder
_FORMAT = 1  # of the files kept on disk


class VisionCache:
    """Encoded images by identity, handed out as a batch of prompts needs them.

    Attention inside the tower is read only once a ranker asks for it; what was encoded before is then encoded
    again, and replaced.

    Args:
        model: a transformers vision-language model.
        processor: its own processor.
        cache_gib: how much is kept in main memory, in GiB; more goes into temporary files.
        disk: where features are kept for later runs, if anywhere.
        reader: what has read the examples, or reads them when their features are asked for; None: a new one.

    Raises:
        ThinsightError: ``cache_gib`` is no number of at least 0, or ``disk`` is given but the processor does
            not tell its settings.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        cache_gib: float = DEFAULT_CACHE_GIB,
        disk: DiskStore | None = None,
        reader: PromptReader | None = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._kept: FeatureStore[EncodedImages] = FeatureStore(cache_gib)
        self._disk = disk
        self._reader = reader or PromptReader(model, processor, cache_gib)
        self._groups: list[list[Example]] = []  # examples that share a run of the encoder
        self._group_of: dict[tuple[str, ...], int] = {}  # by images
        if disk is not None:
            hash_processor(hashlib.sha256(), processor)

    def arrange(self, examples: Sequence[Example], together: int = _ENCODE_BATCH) -> None:
        """Fix which examples share a run of the encoder: at most ``together``, in their order.

        Images that are asked for without it are arranged as they come.
        """
        by_images = {tuple(example.image_keys): example for example in examples}
        fresh = [key for key in by_images if key not in self._group_of]
        size = min(together, _ENCODE_BATCH)
        for start in range(0, len(fresh), size):
            keys = fresh[start : start + size]
            self._group_of.update(dict.fromkeys(keys, len(self._groups)))
            self._groups.append([by_images[key] for key in keys])

    @property
    def fingerprint(self) -> str:
        """A hash of all that the features of the images arranged so far depend on.

        Raises:
            ThinsightError: the processor does not tell its settings.
        """
        return " ".join(self._name(group, received=False) for group in self._groups)

    def inputs(self, examples: Sequence[Example], ranker: Any = None) -> dict[str, Any]:
        """Keyword arguments for a forward pass over these examples' prompts, in place of their pixels.

        ``ranker`` is the one that will rank their tokens, None if none will.

        Raises:
            ThinsightError: the encoder makes other token counts than the processor writes into the prompts,
                or a temporary file cannot be written.
        """
        ranked = ranker is not None and VISION_ATTENTION in get_ranker(ranker).needs
        self.arrange(examples)
        missing = [
            key for key in (tuple(example.image_keys) for example in examples) if not self._has(key, ranked)
        ]
        for number in dict.fromkeys(self._group_of[key] for key in missing):
            self._fill(self._groups[number], ranker if ranked else None)
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

    def _fill(self, group: Sequence[Example], ranker: Any) -> None:
        """Put a group's features into memory."""
        if self._disk is None:
            encoded, shares = self._encode(group, ranker)
        else:
            encoded, shares = self._read_or_encode(self._disk, group, ranker)
        for example, entries in zip(group, shares, strict=True):
            self._kept.put(tuple(example.image_keys), encoded.rows(entries))

    def _read_or_encode(
        self, disk: DiskStore, group: Sequence[Example], ranker: Any
    ) -> tuple[EncodedImages, list[list[int]]]:
        name = self._name(group, received=ranker is not None)
        found = disk.tensors(name)
        if found is not None:
            return _unpacked(*found)
        encoded, shares = self._encode(group, ranker)
        disk.keep_tensors(name, *_packed(encoded, shares))
        return encoded, shares

    def _encode(self, group: Sequence[Example], ranker: Any) -> tuple[EncodedImages, list[list[int]]]:
        """A group's features on the CPU, and which entries belong to each example."""
        pixels, counts = self._reader.pixels(group)
        encoded = encode_images(self._model, pixels, ranker).to("cpu")
        return encoded, _split(encoded, counts)

    def _name(self, group: Sequence[Example], received: bool) -> str:
        """What a group's features are called on disk: other features have another name."""
        digest = hashlib.sha256(self._encoder.encode())
        hash_json(digest, [received, [len(example.images) for example in group]])
        for example in group:
            for image in example.images:
                hash_image(digest, image)
        return f"vision-{digest.hexdigest()}"

    @cached_property
    def _encoder(self) -> str:
        """A hash of what turns images into features; the decoder has no part in it."""
        digest = hashlib.sha256()
        hash_json(digest, _FORMAT)
        hash_machine(digest, self._model)
        hash_processor(digest, self._processor)
        hash_model(digest, self._model, without=[decoder(self._model), self._model.get_output_embeddings()])
        return digest.hexdigest()


def _packed(encoded: EncodedImages, shares: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `DiskStore` takes it."""
    about = {"shares": shares, "modalities": encoded.modalities, "stacked": sorted(encoded.stacked)}
    return separate_tensors(encoded), about


def _unpacked(tensors: Mapping[str, Tensor], about: Any) -> tuple[EncodedImages, list[list[int]]]:
    entries = range(len(about["modalities"]))
    layers = range(sum(name.startswith("deepstack.0.") for name in tensors))
    encoded = EncodedImages(
        tuple(tensors[f"features.{i}"] for i in entries),
        tuple(tensors[f"received.{i}"] for i in entries) if "received.0" in tensors else None,
        tuple(tuple(tensors[f"deepstack.{i}.{j}"] for j in layers) for i in entries) if layers else (),
        tuple(about["modalities"]),
        frozenset(about["stacked"]),
        tensors.get("markers"),
    )
    return encoded, about["shares"]


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
            raise BadInput(
                f"the vision encoder makes entries of {sizes} tokens, which do not fit prompts with {counts} "
                "image tokens: pass the processor that belongs to the model"
            )
        result.append(mine)
    return result
