"""What results depend on, as the bytes of a hash: a model, an image, a processor, the machine.

Two equal hashes mean that the same numbers would come out. Knows nothing about what is computed or kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from accelerate.utils import align_module_device
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import BadInput
from ..packing import packed_layers
from ..ranking import autocasts
from ..version import __version__
from .images import READING, ImageSource, image_key

__all__ = ["hash_image", "hash_json", "hash_machine", "hash_model", "hash_processor", "hash_reading"]

_SAMPLED_WEIGHTS = 1024  # of each tensor


def hash_json(digest: Any, value: Any) -> None:
    """Values of JSON; anything else enters by its ``repr``."""
    digest.update(json.dumps(value, sort_keys=True, default=repr).encode())


def hash_model(digest: Any, model: Any, without: Collection[Any] = ()) -> None:
    """A model's class, config, dtype and weights, of which an even sample of each tensor enters; which of its
    adapters are active, and how; and what autocast would make of its numbers.

    ``without`` are modules whose weights do not matter.
    """
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
                hash_json(digest, ["adapter", name, _settings(module)])


def _hash_weights(digest: Any, prefix: str, module: torch.nn.Module) -> None:
    """The tensors that a module itself has, as its model's `state_dict` gives them: of all modules at once
    that would be a copy of every weight that is packed, and none of those that wait on a disk."""
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


def _settings(module: Any) -> dict[str, Any]:
    """What a layer with adapters holds besides tensors: which are active, disabled or merged, their scaling
    and rank. All of it, for kinds of adapters differ in what they go by."""
    stock = vars(torch.nn.Module())
    return {name: _plain(value) for name, value in vars(module).items() if name not in stock}


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
    """A processor's settings, its image processor's among them; the tokenizer is left out.

    Raises:
        ThinsightError: a processor that does not tell its settings.
    """
    if not callable(getattr(processor, "to_dict", None)):
        raise BadInput(
            f"cache_dir is given, but the processor {type(processor).__name__} has no to_dict() to tell its "
            "settings by: pass the model's own processor, or leave cache_dir out"
        )
    hash_json(digest, [_kinds(processor), processor.to_dict()])


def hash_reading(digest: Any, model: Any, processor: Any) -> None:
    """How pixels become inputs and tokens become text, and the attention implementation: what a score depends
    on besides weights and prompts.

    Of a processor or tokenizer that is not transformers' own only its class enters.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
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
    hash_json(
        digest,
        [
            [module.__version__ for module in (torch, transformers, PIL)],
            __version__,
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
            torch.get_float32_matmul_precision(),
            _kernels(model),
            len(packed_layers(model)),
        ],
    )
