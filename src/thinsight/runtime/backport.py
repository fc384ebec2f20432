"""Lets a model of transformers before 5.18 take the vision tower's output in place of pixels.

Later versions have the keyword `mm_encoder_outputs`; earlier ones take it in `forward` and ignore it. Here
the classes of LLaVA learn it, and nothing else about them changes; other families are refused. Delete this
file once pyproject.toml asks for a later version. Knows nothing about reductions.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import Unsupported
from .families import base_model, vision_token_mask

__all__ = ["accept_outputs", "check_version"]

_KEYWORD = "mm_encoder_outputs"
_TAUGHT = frozenset({"llava"})  # families that `_forward` below fits


def check_version(model: PreTrainedModel) -> None:
    """Refuse a family whose class in the installed transformers cannot take the vision encoder's output.

    Raises:
        ThinsightError: as said, with the version that can.
    """
    family = model.config.model_type
    if family not in _TAUGHT and not _takes_outputs(type(base_model(model))):
        raise Unsupported(
            f"model_type {family!r} needs transformers 5.18 or later, and {transformers.__version__} is "
            "installed: pip install -U transformers"
        )


def _takes_outputs(base: type) -> bool:
    forward: Callable[..., Any] = getattr(base, "forward")  # noqa: B009
    return _KEYWORD in inspect.signature(forward).parameters


def accept_outputs(model: PreTrainedModel) -> None:
    """From now on, the model's class and its base take `mm_encoder_outputs`. Nothing to do where they do.

    Raises:
        ThinsightError: as `check_version` does.
    """
    whole, base = type(model), type(base_model(model))
    if _takes_outputs(base):
        return
    check_version(model)
    setattr(base, "forward", _with_keyword(base.forward, _forward))  # noqa: B010
    if whole is not base:
        prepare = _with_keyword(whole.prepare_inputs_for_generation, _prepare)
        setattr(whole, "prepare_inputs_for_generation", prepare)  # noqa: B010


def _with_keyword(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours(stock, self, outputs, *args, **kwargs)` with the signature of `stock` and the keyword."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, mm_encoder_outputs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return ours(stock, self, mm_encoder_outputs or {}, *args, **kwargs)

    # generate() looks up in the signature what a model takes
    signature = inspect.signature(stock)
    *named, rest = signature.parameters.values()
    keyword = inspect.Parameter(_KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=None)
    method.__signature__ = signature.replace(parameters=[*named, keyword, rest])  # type: ignore[attr-defined]
    return method


def _forward(stock: Callable[..., Any], base: Any, outputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The base model's forward: features take the place of the vision tokens' embeddings."""
    if outputs.get("image") is None:
        return stock(base, *args, **kwargs)
    call = {**inspect.signature(stock).bind_partial(base, *args).arguments, **kwargs}
    if call.get("pixel_values") is not None:
        raise ValueError(f"You cannot specify both pixel_values and {_KEYWORD} at the same time")
    ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
    if embeds is None:
        embeds = base.get_input_embeddings()(ids)
    features = torch.cat(list(outputs["image"].pooler_output)).to(embeds.device, embeds.dtype)
    places = base.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=features)
    return stock(**call, inputs_embeds=embeds.masked_scatter(places, features))


def _prepare(
    stock: Callable[..., Any],
    model: Any,
    outputs: dict[str, Any],
    input_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """What generate() passes on in one step: the features go with the prompt, as pixels do."""
    inputs: dict[str, Any] = stock(model, input_ids, *args, **kwargs)
    image = outputs.get("image")
    if image is not None and (kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True)):
        counts = vision_token_mask(model, input_ids).sum(1).tolist()
        image = copy.copy(image)  # with what a `VisionTap` left on it
        image.pooler_output = _for_rows(counts, image.pooler_output)
        inputs[_KEYWORD] = {"image": image}
    return inputs


def _for_rows(counts: Sequence[int], features: Sequence[Tensor]) -> list[Tensor]:
    """Features of the prompts' images -> of the rows' images: the beams of a prompt follow each other."""
    queue = list(features)
    beams = max(1, sum(counts) // max(1, sum(map(len, queue))))
    result: list[Tensor] = []
    for count in counts[::beams]:
        mine: list[Tensor] = []
        while queue and sum(map(len, mine)) < count:
            mine.append(queue.pop(0))
        result += mine * beams
    return [*result, *queue]
