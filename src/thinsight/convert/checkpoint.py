"""Converts a checkpoint: checks all of it from its headers, then streams it into a new folder.

The order of things is this file's subject; each step is another file's. Nothing is written before everything
has been checked, and the folder appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from ..errors import BadInput, StorageError, ThinsightError
from ..progress import Watcher
from ..records import user_path
from .config import (
    IMAGE_TOKEN,
    Conversation,
    architecture_of,
    check_original,
    convert_config,
    find_conversation,
    stop_token_id,
    vision_depths,
    write_generation_config,
    write_processor,
)
from .keys import Conversion, find_conversion, text_rules, vision_rules
from .source import Source, TensorSpec, open_source, write_shards
from .tokenizer import convert_tokenizer

_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_OUTPUT_EMBEDDINGS = ("language_model.lm_head.weight", "language_model.output.weight")


@dataclass(frozen=True)
class _Plan:
    """Everything that is settled before the first byte is written."""

    source: Source
    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast
    conversation: Conversation
    stop_token_id: int
    conversions: dict[str, Conversion]  # of every original tensor, in reading order
    specs: dict[str, TensorSpec]  # of every converted tensor, in writing order


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
        plan = _make_plan(open_source(source))
    _check_space(target, sum(spec.nbytes for spec in plan.specs.values()))
    with _appearing(target) as folder:
        watcher.on_stage("Converting the weights")
        write_shards(_converted(plan, watcher), plan.specs, folder, max_shard_bytes)
        write_processor(folder, plan.source.config, plan.conversation, plan.tokenizer, plan.config.image_seq_length)
        write_generation_config(folder, plan.stop_token_id, plan.tokenizer)
        plan.config.save_pretrained(folder)
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


def _make_plan(source: Source) -> _Plan:
    check_original(source.config, source.name)
    _check_depths(source)
    conversation = find_conversation(source.config)
    vocab_size = _embedding_rows(source)
    tokenizer = convert_tokenizer(source.folder, vocab_size)
    config = convert_config(
        source.config,
        tied=_is_tied(source),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype=_main_dtype(source),
    )
    conversions = _find_conversions(source, config)
    specs = _check_shapes(source, conversions, _expected_shapes(config))
    stop = stop_token_id(conversation, tokenizer)
    return _Plan(source, config, tokenizer, conversation, stop, conversions, specs)


def _check_depths(source: Source) -> None:
    """Refuse a config of so many layers that the model alone could not be laid out."""
    for part in ("vision_config", "llm_config"):
        depth = source.config[part].get("num_hidden_layers", 1)
        if depth > len(source.tensors):
            raise BadInput(
                f"{part}.num_hidden_layers is {depth} in config.json, but the checkpoint has just "
                f"{len(source.tensors)} tensors: download it anew"
            )


def _embedding_rows(source: Source) -> int:
    for name in ("embed_tokens", "tok_embeddings"):
        stored = source.tensors.get(f"language_model.model.{name}.weight")
        if stored is not None and stored.spec.shape:
            return stored.spec.shape[0]
    raise BadInput(
        f"model {source.name!r} has no language_model.model.embed_tokens.weight (InternLM2: tok_embeddings): "
        "it is not an original InternVL checkpoint, or a file of it is missing"
    )


def _is_tied(source: Source) -> bool:
    """Whether the output embeddings are the input ones: the config says so, and none are stored."""
    stored = any(name in source.tensors for name in _OUTPUT_EMBEDDINGS)
    return not stored and bool(source.config["llm_config"].get("tie_word_embeddings", False))


def _main_dtype(source: Source) -> str:
    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.spec.dtype] += tensor.spec.nbytes
    return _DTYPES[sizes.most_common(1)[0][0]]


def _find_conversions(source: Source, config: InternVLConfig) -> dict[str, Conversion]:
    rules = vision_rules(*vision_depths(source.config))
    rules += text_rules(architecture_of(source.config), config.text_config)
    found = {name: find_conversion(name, rules) for name in source.tensors}
    unknown = [name for name, conversion in found.items() if conversion is None]
    if unknown:
        raise BadInput(_about(source, unknown, "that no rule knows", "unknown"))
    return {name: conversion for name, conversion in found.items() if conversion is not None}


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
        for target, shape in zip(conversion.targets, _shapes_after(name, stored.shape, conversion), strict=True):
            if target not in expected:
                raise BadInput(_about(source, [name], "that the model has no place for", "unknown"))
            if shape != expected[target]:
                raise BadInput(
                    f"model {source.name!r}: {name} has shape {stored.shape}, which gives {target} the shape "
                    f"{shape}, but config.json asks for {expected[target]}: download the checkpoint anew"
                )
            specs[target] = TensorSpec(shape, stored.dtype)
    missing = sorted(expected.keys() - specs.keys())
    if missing:
        raise BadInput(_about(source, missing, "that the model needs", "missing"))
    return specs


def _shapes_after(name: str, shape: tuple[int, ...], conversion: Conversion) -> list[tuple[int, ...]]:
    try:
        parts = conversion.apply(torch.empty(shape, device="meta"))
    except RuntimeError as error:
        raise BadInput(
            f"{name} has shape {shape}, which does not divide into the heads that config.json gives: "
            "download the checkpoint anew"
        ) from error
    return [tuple(part.shape) for part in parts]


def _about(source: Source, names: list[str], what: str, kind: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"model {source.name!r} has {kind} tensors {what}: {names[0]}{more}; the checkpoint does not fit its "
        "config.json, or is not an original one"
    )


# -- writing ---------------------------------------------------------------------------------------------


def _converted(plan: _Plan, watcher: Watcher) -> Iterator[tuple[str, Tensor]]:
    for done, (name, tensor) in enumerate(plan.source.read(), start=1):
        watcher.on_progress("tensors", done, len(plan.conversions))
        conversion = plan.conversions[name]
        yield from zip(conversion.targets, conversion.apply(tensor), strict=True)


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


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise StorageError(
            f"out {out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free: make room, or "
            "give a folder on another disk"
        )


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
