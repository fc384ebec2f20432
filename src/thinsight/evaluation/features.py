"""Vision features of the examples' images: the encoder runs once per distinct set of images, and is kept by hashes of
all that features depend on.

An example's images are encoded together, because some families treat one image otherwise than several. Which examples
share a run of the encoder is fixed: the last bits of its numbers may depend on the company.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import BadInput
from ..ranking import VISION_ATTENTION, autocasts, get_ranker
from ..runtime import EncodedImages, encode_images
from ..runtime.anatomy import decoder
from ..version import __version__
from .example import Example
from .images import READING, ImageSource, image_key
from .prompts import PromptReader, chunks, counts_patches, tokenizer_of
from .store import Store, separate_tensors

_SAMPLED_WEIGHTS = 1024  # of each tensor


def hash_json(digest: Any, value: Any) -> None:
    """Values of JSON; anything else enters by its ``repr``."""
    digest.update(json.dumps(value, sort_keys=True, default=repr).encode())


def hash_model(digest: Any, model: Any, without: Collection[Any] = ()) -> None:
    """A model's class, config, dtype and weights, of which an even sample of each tensor enters, but for modules in
    ``without``; which of its adapters are active, and how; and what autocast would make of its numbers."""
    config = {**model.config.to_dict(), "_name_or_path": None}  # a model may move
    hash_json(digest, [type(model).__name__, config, str(model.dtype)])
    if autocasts(model.device):
        hash_json(digest, ["autocast", str(torch.get_autocast_dtype(model.device.type))])
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module is one for one in without):
            skipped += (f"{name}.",)
        prefix = f"{name}." if name else ""
        if not prefix.startswith(skipped):
            _hash_weights(digest, prefix, module)
            if isinstance(module, _adapter_layers()):
                # besides tensors: which are active, disabled or merged, their scaling and rank; all of it, for
                # kinds of adapters differ in what they go by
                stock = vars(torch.nn.Module())
                settings = {name: _plain(value) for name, value in vars(module).items() if name not in stock}
                hash_json(digest, ["adapter", name, settings])


def _hash_weights(digest: Any, prefix: str, module: torch.nn.Module) -> None:
    """The tensors that a module itself has: a model's `state_dict` would be a copy of every weight, made anew each
    time, and none of those that wait on a disk."""
    own: dict[str, Any] = {}
    with align_module_device(module):
        module._save_to_state_dict(own, prefix, keep_vars=False)
        for name, tensor in own.items():
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.tobytes())


def _adapter_layers() -> tuple[type, ...]:
    """PEFT's layers that hold adapters; none where it was not imported, for then no model has any."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def _plain(value: Any) -> Any:
    """Numbers, texts, and lists and dicts of them; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    return None


def hash_image(digest: Any, image: ImageSource) -> None:
    """An image file's bytes, or a PIL image's pixels, and the rules by which it is opened."""
    data = image.read_bytes() if isinstance(image, Path) else image_key(image).encode()
    hash_json(digest, ["file" if isinstance(image, Path) else "pixels", READING, len(data)])
    digest.update(data)


def hash_processor(digest: Any, processor: Any) -> None:
    """A processor's settings, its image processor's among them; the tokenizer is left out. One that does not tell
    them is refused."""
    if not callable(getattr(processor, "to_dict", None)):
        raise BadInput(
            f"cache_dir is given, but the processor {type(processor).__name__} has no to_dict() to tell its "
            "settings by: pass the model's own processor, or leave cache_dir out"
        )
    hash_json(digest, [_kinds(processor), processor.to_dict()])


def hash_reading(digest: Any, model: Any, processor: Any) -> None:
    """How pixels become inputs and tokens become text, and the attention implementation: what a score depends on
    besides weights and prompts. Of a processor or tokenizer not of transformers only its class enters."""
    tokenizer = tokenizer_of(processor)
    told: list[Any] = [_kinds(processor), type(tokenizer).__name__, _kernels(model)]
    if isinstance(processor, ProcessorMixin):
        told.append(processor.to_dict())
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        told += [tokenizer.get_vocab(), tokenizer.all_special_tokens, tokenizer.clean_up_tokenization_spaces]
    hash_json(digest, told)


def _kinds(processor: Any) -> list[str]:
    """A dict of settings names one class for two implementations, on PIL and on torchvision."""
    return [type(each).__name__ for each in (processor, getattr(processor, "image_processor", None))]


def _kernels(model: Any) -> list[str]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    return sorted({str(getattr(config, "_attn_implementation", None)) for config in configs})


def hash_machine(digest: Any, model: Any) -> None:
    """What decides the last bits of a model's numbers besides the model: versions, device, kernels."""
    device = model.device
    versions = [module.__version__ for module in (torch, transformers, PIL)]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    precision = torch.get_float32_matmul_precision()
    hash_json(digest, [versions, __version__, kind, threads, precision, _kernels(model)])


_ENCODE_BATCH = 8  # examples per run of the encoder
_FORMAT = 1  # of the files kept on disk


@dataclass(eq=False)
class VisionCache:
    """Encoded images by identity, handed out as a batch of prompts needs them.

    Attention inside the tower is read only once a ranker asks for it; what was encoded before is then encoded
    again, and replaced. Where the store is persistent, later runs find what was encoded.
    """

    reader: PromptReader  # has read the examples, or reads them when their features are asked for
    store: Store[EncodedImages] = field(default_factory=Store)

    def __post_init__(self) -> None:
        self._model = self.reader.model
        self._groups: list[list[Example]] = []  # examples that share a run of the encoder
        self._group_of: dict[tuple[str, ...], int] = {}  # by images

    def arrange(self, examples: Sequence[Example], together: int = _ENCODE_BATCH) -> None:
        """Fix which examples share a run of the encoder: at most ``together``, in their order. Images that are asked
        for without it are arranged as they come."""
        by_images = {example.image_keys: example for example in examples}
        fresh = [key for key in by_images if key not in self._group_of]
        most = 1 if counts_patches(self._model) else min(together, _ENCODE_BATCH)
        for keys in chunks(fresh, most):
            self._group_of.update(dict.fromkeys(keys, len(self._groups)))
            self._groups.append([by_images[key] for key in keys])

    @property
    def fingerprint(self) -> str:
        """A hash of all that the features of the images arranged so far depend on."""
        return " ".join(self._name(group, received=False) for group in self._groups)

    def inputs(self, examples: Sequence[Example], ranker: Any = None) -> dict[str, Any]:
        """Keyword arguments for a forward pass over these examples' prompts, in place of their pixels; ``ranker`` is
        the one that will rank their tokens, None if none will."""
        ranked = ranker is not None and VISION_ATTENTION in get_ranker(ranker).needs
        self.arrange(examples)
        missing = []
        for example in examples:
            entry = self.store.outline(example.image_keys)
            if entry is None or (ranked and entry.received is None):
                missing.append(self._group_of[example.image_keys])
        for number in dict.fromkeys(missing):
            self._fill(self._groups[number], ranker if ranked else None)
        wanted = [entry for example in examples if (entry := self.store.get(example.image_keys)) is not None]
        assert len(wanted) == len(examples)
        return EncodedImages.concat(wanted).to(self._model.device).model_inputs()

    def _fill(self, group: Sequence[Example], ranker: Any) -> None:
        """Put a group's features into the store: as an earlier run left them, or else encoded now."""
        name = self._name(group, received=ranker is not None) if self.store.persistent else ""
        found = self.store.tensors(name)
        if found is not None:
            encoded, shares = _unpacked(*found)
        else:
            pixels, counts = self.reader.pixels(group)
            encoded = encode_images(self._model, pixels, ranker).to("cpu")
            shares = _split(encoded, counts)
            about: dict[str, Any] = {"shares": shares, "modalities": encoded.modalities}
            about["stacked"] = sorted(encoded.stacked)
            if encoded.into:
                about["into"] = list(encoded.into)
            if self.store.persistent:
                self.store.keep_tensors(name, separate_tensors(encoded), about)
        for example, entries in zip(group, shares, strict=True):
            self.store.put(example.image_keys, encoded.rows(entries))

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
        hash_processor(digest, self.reader.processor)
        hash_model(digest, self._model, without=[decoder(self._model), self._model.get_output_embeddings()])
        return digest.hexdigest()


def _unpacked(tensors: dict[str, Tensor], about: Any) -> tuple[EncodedImages, list[list[int]]]:
    """Features and shares as they were packed for later runs."""
    entries = range(len(about["modalities"]))
    layers = range(sum(name.startswith("deepstack.0.") for name in tensors))
    encoded = EncodedImages(
        tuple(tensors[f"features.{i}"] for i in entries),
        tuple(tensors[f"received.{i}"] for i in entries) if "received.0" in tensors else None,
        tuple(tuple(tensors[f"deepstack.{i}.{j}"] for j in layers) for i in entries) if layers else (),
        tuple(about["modalities"]),
        frozenset(about["stacked"]),
        tensors.get("markers"),
        tuple(about.get("into", ())),
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
