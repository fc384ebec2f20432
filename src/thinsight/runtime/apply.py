"""Puts a reduction on a model: checks that the two go together and hands back the handle.

Knows nothing about what then happens in a pass: see reducer.py.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import BadInput, Unsupported
from ..ranking import Ranker, get_ranker
from ..reduction import Reduction, check_rerank
from ..schedule import Schedule
from .families import attention_implementation, check_supported, decoder_layers, sliding_layers
from .handle import Handle

__all__ = ["apply", "check_rankable"]

PER = ("image", "prompt")


def apply(
    model: Any,
    reduction: Reduction | Schedule,
    *,
    ranker: Any = None,
    per: str = "image",
    rerank: bool | float | None = None,
) -> Handle:
    """Run a model under a reduction: its layers see fewer vision tokens, its interface stays the same.

    ``with apply(model, reduction): model.generate(**inputs)``, or ``handle = apply(...)`` and
    ``handle.remove()``. Works for `forward` and for everything that `generate` does: sampling, beams,
    assisted and prompt-lookup decoding, padded batches, several images or videos in a prompt, prompts without
    one, later turns on the same cache, dynamic and static caches. Logits of dropped positions are zeros. With
    ``use_cache=False`` each step ranks anew, generated tokens included; `Handle.prompt` says which are the
    prompt. A copy of the model, pickled or deep, is a plain model without the reduction.

    Where a prompt ends in an image, its last vision token is kept, for it is what the answer is read from.

    Each part of a prompt that ``generate(prefill_chunk_size=...)`` reads at once is ranked as a turn of its
    own, by its own last words: keep an image and its question in one part, or leave that option out.

    A pass with an empty cache of the caller's own and ``logits_to_keep=K``, K above 1, is read as assisted
    decoding does it: its last K - 1 tokens are proposals, not prompt, and do not rank.

    Args:
        model: a supported multimodal model (see `families.SUPPORTED`), or one of PEFT's, torch.compile's or
            a data-parallel wrapper of one: the reduction goes onto the model inside, and calls of either run
            under it.
        reduction: a `Reduction`, or a `Schedule`.
        ranker: for a schedule only: a ranker, its name, or a dict; "text-attention" if not given.
        per: "image": the keep rate holds for each image of a prompt; "prompt": for all its vision tokens
            together.
        rerank: True: rank anew at every reduction; a number in (0, 1): only once fewer than this share of the
            tokens are to be kept that the prompt's last ranking kept, until then that one serves; False: the
            first ranking serves all that follow. None: as the reduction says; True for a schedule.

    Returns:
        The handle, which is also a context manager.

    Raises:
        ThinsightError: unsupported model, a schedule of the wrong length, a ranker that cannot rank where it
            would have to, a reduction of another model family, a model that has a reduction on already, or a
            `rerank` that is none of the above.
    """
    model = check_supported(model)
    schedule, chosen = _schedule_and_ranker(model, reduction, ranker)
    own = reduction if isinstance(reduction, Reduction) else None
    if rerank is None:
        rerank = True if own is None else own.rerank
    rerank = check_rerank(rerank)
    layers = decoder_layers(model)
    if schedule.num_layers != len(layers):
        raise BadInput(
            f"schedule has {schedule.num_layers} keep rates but the model has {len(layers)} decoder layers; "
            f"use schedule.resample({len(layers)})"
        )
    if per not in PER:
        raise BadInput(f"per is {per!r}; choose one of {', '.join(PER)}")
    check_rankable(schedule, chosen)
    _check_windows(model, schedule)
    return Handle(model, schedule, chosen, per, rerank, None if own is None else own.adaptive)


def _check_windows(model: PreTrainedModel, schedule: Schedule) -> None:
    """Flash attention counts a window in the tokens that are there, not in those that were dropped."""
    implementation = attention_implementation(model)
    reduced = [layer for layer in sorted(sliding_layers(model)) if schedule.keep_rates[layer] < 1]
    if reduced and implementation.startswith("flash"):
        raise Unsupported(
            f"decoder layer {reduced[0]} has a sliding window, which {implementation} would count in kept "
            "tokens; load the model with attn_implementation='sdpa'"
        )


def check_rankable(schedule: Schedule, ranker: Ranker) -> None:
    """Refuse a schedule that drops tokens where the ranker has nothing to rank them by; needs no model.

    Raises:
        ThinsightError: tokens dropped at layer 0 by a ranker that reads the layer before.
    """
    if schedule.keep_rates[0] < 1 and not ranker.ranks_at_layer_0:
        raise BadInput(
            f"keep_rates[0] is {schedule.keep_rates[0]}, but ranker {ranker.name!r} needs attention of the "
            "layer before and layer 0 has none; keep all at layer 0, or rank by vision-attention, random "
            "or uniform"
        )


def _schedule_and_ranker(model: Any, reduction: Any, ranker: Any) -> tuple[Schedule, Ranker]:
    if isinstance(reduction, Schedule):
        return reduction, get_ranker("text-attention" if ranker is None else ranker)
    if not isinstance(reduction, Reduction):
        raise BadInput(f"reduction is a {type(reduction).__name__}; pass a Reduction or a Schedule")
    if ranker is not None:
        raise BadInput(
            "ranker is given twice; a Reduction brings its own, pass reduction.schedule to change it"
        )
    family = reduction.model_type
    if family is not None and family != model.config.model_type:
        raise BadInput(
            f"reduction is for model_type {family!r} but the model is {model.config.model_type!r}; "
            "apply reduction.schedule to try it all the same"
        )
    return reduction.schedule, get_ranker(reduction.ranker)
