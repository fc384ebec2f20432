"""Converts a checkpoint: checks all of it from its headers, then streams it into a folder that appears when complete.

Which tensor becomes which: the modelling code in github.com/OpenGVLab/InternVL, internvl_chat/internvl/model.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

from ..errors import BadInput, StorageError, ThinsightError
from ..progress import Watcher
from ..records import user_path
from .config import (
    IMAGE_TOKEN,
    architecture_of,
    check_original,
    convert_config,
    find_conversation,
    stop_token_id,
    vision_depths,
    write_processor,
)
from .source import Source, TensorSpec, open_source, write_shards
from .tokenizer import convert_tokenizer

_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_OUTPUT_EMBEDDINGS = ("language_model.lm_head.weight", "language_model.output.weight")


def convert(
    source: str | Path, out: str | Path, *, max_shard_bytes: int = _MAX_SHARD_BYTES, watcher: Watcher | None = None
) -> Path:
    """Convert an original InternVL checkpoint into one of `InternVLForConditionalGeneration`.

    Weights keep their dtype and are streamed, so that memory holds one tensor at a time. The text models
    InternLM2 (as Llama), Qwen2, Phi-3 and Llama are known. No code of the checkpoint is run, and nothing is
    unpickled.

    Args:
        source: a folder with the original checkpoint, or its hub id.
        out: the folder to make; it may exist if it is empty.
        max_shard_bytes: bound on the tensors of one written file.
        watcher: is told of the progress.

    Returns:
        ``out``, complete: weights, config, tokenizer, processor, chat template, generation settings.

    Raises:
        ThinsightError: a source that is not a supported original checkpoint; a tensor that is missing,
            unknown or misshapen; an ``out`` that is in use or cannot be written.
    """
    watcher = watcher or Watcher()
    target = _check_out(user_path(out, "out"))
    watcher.on_stage("Checking the checkpoint")
    with _one_line(source):
        # 1. The settings, from the original's own.
        opened = open_source(source)
        check_original(opened.config, opened.name)
        for part in ("vision_config", "llm_config"):  # the model alone could not be laid out
            depth = opened.config[part].get("num_hidden_layers", 1)
            if depth > len(opened.tensors):
                raise BadInput(
                    f"{part}.num_hidden_layers is {depth} in config.json, but the checkpoint has just "
                    f"{len(opened.tensors)} tensors: download it anew"
                )
        conversation = find_conversation(opened.config)
        tokenizer = convert_tokenizer(opened.folder, _embedding_rows(opened))
        stop = stop_token_id(conversation, tokenizer)
        stores_head = any(name in opened.tensors for name in _OUTPUT_EMBEDDINGS)
        bytes_of: Counter[str] = Counter()
        for stored in opened.tensors.values():
            bytes_of[stored.spec.dtype] += stored.spec.nbytes
        config = convert_config(
            opened.config,
            tied=not stores_head and bool(opened.config["llm_config"].get("tie_word_embeddings", False)),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            dtype=_DTYPES[bytes_of.most_common(1)[0][0]],
        )
        # 2. Every tensor, held to the model that will load it.
        conversions = _find_conversions(opened, config)
        specs = _check_shapes(opened, conversions, _expected_shapes(config))
    needed, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(
            f"out {target} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free: make room, or "
            "give a folder on another disk"
        )

    def converted() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(opened.read(), start=1):
            watcher.on_progress("tensors", done, len(conversions))
            yield from zip(conversions[name].targets, conversions[name].apply(tensor), strict=True)

    # 3. Written beside the target, in the order in which the tensors are read.
    with _appearing(target) as folder:
        watcher.on_stage("Converting the weights")
        write_shards(converted(), specs, folder, max_shard_bytes)
        write_processor(folder, opened.config, conversation, tokenizer, config.image_seq_length)
        GenerationConfig(
            eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
        ).save_pretrained(folder)
        config.save_pretrained(folder)
    return target


# -- checks ----------------------------------------------------------------------------------------------


@contextmanager
def _one_line(name: str | Path) -> Iterator[None]:
    """Configs and tokenizer files whose values are of other kinds than an original's fail in any way."""
    try:
        yield
    except ThinsightError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(
            f"model {str(name)!r} has a value in its config or tokenizer files that cannot be right "
            f"({type(error).__name__}: {error}): download the checkpoint anew"
        ) from error


def _embedding_rows(source: Source) -> int:
    for name in ("embed_tokens", "tok_embeddings"):
        stored = source.tensors.get(f"language_model.model.{name}.weight")
        if stored is not None and stored.spec.shape:
            return stored.spec.shape[0]
    raise BadInput(
        f"model {source.name!r} has no language_model.model.embed_tokens.weight (InternLM2: tok_embeddings): "
        "it is not an original InternVL checkpoint, or a file of it is missing"
    )


def _expected_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
    except Exception as error:  # torch and transformers have several kinds for sizes that do not fit
        raise BadInput(
            f"config.json does not make a model ({error or type(error).__name__}): download the checkpoint anew"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _check_shapes(
    source: Source, conversions: Mapping[str, Conversion], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSpec]:
    """Hold every converted tensor to the model that will load it; returns what they will be."""
    specs: dict[str, TensorSpec] = {}
    for name, conversion in conversions.items():
        stored = source.tensors[name].spec
        try:
            parts = conversion.apply(torch.empty(stored.shape, device="meta"))
        except RuntimeError as error:
            raise BadInput(
                f"{name} has shape {stored.shape}, which does not divide into the heads that config.json gives: "
                "download the checkpoint anew"
            ) from error
        for target, shape in zip(conversion.targets, (tuple(part.shape) for part in parts), strict=True):
            if target not in expected:
                raise _misfit(source, [name], "unknown tensors that the model has no place for")
            if shape != expected[target]:
                raise BadInput(
                    f"model {source.name!r}: {name} has shape {stored.shape}, which gives {target} the shape "
                    f"{shape}, but config.json asks for {expected[target]}: download the checkpoint anew"
                )
            specs[target] = TensorSpec(shape, stored.dtype)
    missing = sorted(expected.keys() - specs.keys())
    if missing:
        raise _misfit(source, missing, "missing tensors that the model needs")
    return specs


def _misfit(source: Source, names: list[str], what: str) -> BadInput:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return BadInput(
        f"model {source.name!r} has {what}: {names[0]}{more}; the checkpoint does not fit its "
        "config.json, or is not an original one"
    )


# -- which tensor becomes which --------------------------------------------------------------------------

Split = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Conversion:
    """What becomes of an original tensor: its new names, none if it is not needed, and how it is taken apart where it
    is packed: on weights (rows, columns) and on biases (rows,), only the rows matter."""

    targets: tuple[str, ...] = ()
    split: Split | None = None

    def apply(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The target tensors, in the order of ``targets``; views where the tensor is packed."""
        return self.split(tensor) if self.split is not None else (tensor,) * len(self.targets)


Rules = Mapping[str, Conversion | str]  # a bare new name: nothing is taken apart
"""By a pattern that must match a whole original name, whose groups the targets may use; the first that matches."""


def _find_conversions(source: Source, config: InternVLConfig) -> dict[str, Conversion]:
    text_rules = _text_rules(architecture_of(source.config), config.text_config)
    rules = {**_vision_rules(*vision_depths(source.config)), **text_rules}
    found: dict[str, Conversion] = {}
    for name in source.tensors:
        for pattern, rule in rules.items():
            if match := re.fullmatch(pattern, name):
                made = Conversion((rule,)) if isinstance(rule, str) else rule
                found[name] = Conversion(tuple(match.expand(target) for target in made.targets), made.split)
                break
    if unknown := [name for name in source.tensors if name not in found]:
        raise _misfit(source, unknown, "unknown tensors that no rule knows")
    return found


def _split_grouped(packed: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """InternLM2's ``wqkv``: per key-value head, the query heads that share it in their order, its key, and its value:
    ((heads + 2 * kv_heads) * head_dim, ...) -> (heads * head_dim, ...) and twice (kv_heads * head_dim, ...)."""
    groups = packed.unflatten(0, (kv_heads, -1, head_dim))  # (kv_heads, heads per kv head + 2, head_dim, ...)
    queries, keys, values = groups[:, :-2], groups[:, -2], groups[:, -1]
    return queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)


_OLD_TOWER, _NEW_TOWER = r"vision_model\.", "model.vision_tower."
_OLD_LAYER, _NEW_LAYER = _OLD_TOWER + r"encoder\.layers\.(\d+)\.", _NEW_TOWER + r"encoder.layer.\1."
_OLD_PROJECTOR, _NEW_PROJECTOR = r"mlp1\.", "model.multi_modal_projector."
_OLD_TEXT, _NEW_TEXT = r"language_model\.model\.", "model.language_model."
_OLD_TEXT_LAYER, _NEW_TEXT_LAYER = _OLD_TEXT + r"layers\.(\d+)\.", _NEW_TEXT + r"layers.\1."
_END = r"\.(weight|bias)"

_LAYER_NAMES = {
    r"attn\.proj": "attention.projection_layer",
    r"attn\.q_norm": "attention.q_norm",
    r"attn\.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    r"mlp\.fc1": "mlp.fc1",
    r"mlp\.fc2": "mlp.fc2",
}
_PROJECTOR_NAMES = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_INTERNLM2_LAYER_NAMES = {
    r"attention\.wo": "self_attn.o_proj",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _vision_rules(depth: int, stored_depth: int) -> Rules:
    """Of InternViT and the projector. Of the ``stored_depth`` layers only the first ``depth`` are needed."""
    unneeded = "|".join(str(layer) for layer in range(depth, stored_depth))
    qkv = tuple(_NEW_LAYER + rf"attention.{part}_proj.\2" for part in "qkv")
    embeddings = _OLD_TOWER + r"embeddings\."
    return {
        **({_OLD_TOWER + rf"encoder\.layers\.(?:{unneeded})\..+": Conversion()} if unneeded else {}),
        embeddings + "class_embedding": _NEW_TOWER + "embeddings.cls_token",
        embeddings + "position_embedding": _NEW_TOWER + "embeddings.position_embeddings",
        embeddings + "patch_embedding" + _END: _NEW_TOWER + r"embeddings.patch_embeddings.projection.\1",
        # all queries, then all keys, then all values: (3 * width, ...)
        _OLD_LAYER + r"attn\.qkv" + _END: Conversion(qkv, partial(torch.chunk, chunks=3)),
        _OLD_LAYER + r"ls([12])": _NEW_LAYER + r"lambda_\2",
        **{_OLD_LAYER + old + _END: _NEW_LAYER + new + r".\2" for old, new in _LAYER_NAMES.items()},
        **{_OLD_PROJECTOR + old + _END: _NEW_PROJECTOR + new + r".\1" for old, new in _PROJECTOR_NAMES.items()},
    }


def _text_rules(architecture: str, text_config: Any) -> Rules:
    """Of a text model with this converted config. InternLM2 becomes Llama; the others keep their names below the
    prefix, and Phi-3 its packed projections, since the transformers classes have the same ones."""
    rotary: Rules = {r"language_model\..+\.rotary_emb\.inv_freq": Conversion()}  # computed from the config
    if architecture != "InternLM2ForCausalLM":
        return {**rotary, _OLD_TEXT + "(.+)": _NEW_TEXT + r"\1", r"language_model\.(lm_head\.weight)": r"\1"}
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    split = partial(_split_grouped, kv_heads=text_config.num_key_value_heads, head_dim=head_dim)
    qkv = tuple(_NEW_TEXT_LAYER + rf"self_attn.{part}_proj.\2" for part in "qkv")
    names = _INTERNLM2_LAYER_NAMES.items()
    return {
        **rotary,
        _OLD_TEXT + r"tok_embeddings\.weight": _NEW_TEXT + "embed_tokens.weight",
        _OLD_TEXT + r"norm\.weight": _NEW_TEXT + "norm.weight",
        r"language_model\.output\.weight": "lm_head.weight",
        _OLD_TEXT_LAYER + r"attention\.wqkv" + _END: Conversion(qkv, split),
        **{_OLD_TEXT_LAYER + old + _END: _NEW_TEXT_LAYER + new + r".\2" for old, new in names},
    }


# -- writing ---------------------------------------------------------------------------------------------


def _check_out(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise BadInput(f"out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"out {out} is not empty: give another folder, or empty it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"out {out} cannot be made ({error.strerror}): give a folder you may write") from error
    if not os.access(out.parent, os.W_OK):
        raise StorageError(f"out {out} cannot be made: its parent folder may not be written")
    return out


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name at the end, or goes if anything stops the work."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp's own is for this user alone
            if out.is_dir():
                out.rmdir()
            folder.rename(out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(
            f"out {out} cannot be written ({error.strerror or error}): make room, or give another folder"
        ) from error
