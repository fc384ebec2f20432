"""Puts a reduction on a model, and takes it off: the checks, and the handle that a caller then has in hand.

What the caller sees (logits, masks, positions, cache lengths) stays in his own columns. A pass itself: reducer.py.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput, Unsupported
from ..ranking import Ranker, get_ranker
from ..reduction import Reduction, check_rerank
from ..schedule import Schedule
from ..texts import brief
from .anatomy import (
    attending_before,
    attention_implementation,
    base_model,
    check_supported,
    decoder_layers,
    first_attending,
    shared_keys,
    sliding_layers,
    unwrapped,
)
from .call import Plan, encode_pixels
from .reducer import Quotas, Reducer
from .weights import difference

if TYPE_CHECKING:
    from ..schedule import Adaptive

PER = ("image", "prompt")

# by base model; hooks hold on to what reduces, so that it lives as long as it is on
_applied: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Reducer]] = weakref.WeakKeyDictionary()
_applied_lock = threading.Lock()


def _reducer_of(model: PreTrainedModel) -> Reducer | None:
    """What reduced a model last, if it still is there."""
    return _applied.get(base_model(model), lambda: None)()


def applied(model: PreTrainedModel) -> bool:
    """Whether a reduction is on a model."""
    reducer = _reducer_of(model)
    return reducer is not None and reducer.on


def remove(model: Any) -> None:
    """Take off the reduction that is on a model, if any, also where its handle was not kept; see `Handle.remove`.

    Args:
        model: as for `apply`.

    Raises:
        ThinsightError: no transformers model.
    """
    reducer = _reducer_of(unwrapped(model))
    if reducer is not None:
        reducer.remove()


class Handle:
    """A reduction that is on a model. `remove()`, or leaving the `with` block, restores the model exactly."""

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: Schedule,
        ranker: Ranker,
        per: str,
        rerank: bool | float = True,
        adaptive: Adaptive | None = None,
    ) -> None:
        self.model = model
        self.schedule = schedule  # of an adaptive reduction: the mean, which falls wherever one of them does
        self.adaptive = adaptive
        self.ranker = ranker
        self.per = per
        self.rerank = rerank
        with _applied_lock:
            _check_free(model)
            quotas = Quotas(schedule, adaptive, per, rerank, schedule.num_layers - len(shared_keys(model)))
            self._reducer = Reducer(model, schedule, ranker, quotas, adaptive)
            self._reducer.install()
            _applied[base_model(model)] = weakref.ref(self._reducer)
        self.local = self._reducer.local  # for those who run a pass in parts, or in another way

    def __repr__(self) -> str:
        where = "" if self.on else ", removed"
        return brief(f"Handle({type(self.model).__name__}, {self.schedule!r}, {self.ranker!r}{where})")

    def remove(self) -> None:
        """Take the reduction off. Safe to call twice, and from any thread.

        Passes that other threads have under way are reduced to their end, and the last of them leaves the
        model as it was; what they then decode on a cache of this reduction is refused, as everywhere.
        """
        self._reducer.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    @property
    def on(self) -> bool:
        """Whether the reduction is on the model still."""
        return self._reducer.on

    # --- what the caller says

    @contextmanager
    def prompt(self, mask: Tensor) -> Iterator[None]:
        """Say which tokens of the inputs are the prompt, where they also hold its continuation.

        For teacher forcing: only the prompt ranks, so the same tokens are kept as when the continuation is
        generated.

        Args:
            mask: (batch, seq) bool, the shape of `input_ids`; False at the continuation. Padding may be either.
        """
        with self.local.having(said=replace(self.local.said, prompt=mask)):
            yield

    @contextmanager
    def vision(self, mask: Tensor) -> Iterator[None]:
        """Say which positions of `inputs_embeds` are vision tokens, where there are no `input_ids` to tell.

        Args:
            mask: (batch, seq) bool, True at vision tokens; an image is an unbroken run of them. Where other
                tokens stand among an image's, int64: the number of each token's image, from 1 in each row
                and ascending, and 0 at text.
        """
        with self.local.having(said=replace(self.local.said, vision=mask)):
            yield

    def plan(self, **inputs: Any) -> Plan | None:
        """Read a pass's inputs once, for passes of the same shape that ask the device for nothing.

        Args:
            **inputs: as for the model's forward; what `prompt` and `vision` say counts here. Pixels are encoded
                for their token counts: pass features (`EncodedImages.model_inputs`) to have them encoded once.

        Returns:
            What to pass to `planned`; None where there is no vision token, or nothing to drop.

        Raises:
            ThinsightError: vision tokens cannot be told from the inputs.
        """
        if not self._reducer.quotas.falls:
            return None
        return self._reducer.read(encode_pixels(self.model, inputs))

    @contextmanager
    def planned(self, plan: Plan | None) -> Iterator[None]:
        """This thread's passes of more than one token follow a plan instead of reading their inputs.

        Which positions are vision is the plan's word and is not looked at again: inputs must have them where
        those of the plan had. `plan` may be None, as `plan()` returns it: then each pass reads its own.
        """
        with self.local.having(plan=plan):
            yield

    # --- what the caller asks

    def kept(self, layer: int) -> list[Tensor]:
        """Which vision tokens entered a layer, in this thread's last pass that had an image: per batch row (a beam
        is a row), (count,) int64 ascending, numbers in 0..N-1 over the row's vision tokens.

        Raises:
            ThinsightError: no such layer, or no pass yet (a full schedule records none).
        """
        if not 0 <= layer < self.schedule.num_layers:
            raise BadInput(f"layer is {layer}; it must be from 0 to {self.schedule.num_layers - 1}")
        if self.local.trace is None:
            drops = self._reducer.quotas.falls
            why = "run a prompt with an image first" if drops else "the schedule keeps every token"
            raise BadInput(f"no kept tokens are recorded: {why}")
        alive = [alive for start, alive in self.local.trace if start <= layer][-1]
        return [row.nonzero().flatten().cpu() for row in alive]

    def statistic(self) -> list[float]:
        """An adaptive reduction's statistic of each batch row, in this thread's last pass that had an image.

        Raises:
            ThinsightError: the reduction is not adaptive, or no such pass yet.
        """
        if self.local.statistic is None:
            raise BadInput("no statistic is recorded: run a prompt under an adaptive reduction first")
        return self.local.statistic


def apply(
    model: Any,
    reduction: Reduction | Schedule,
    *,
    ranker: Any = None,
    per: str = "image",
    rerank: bool | float | None = None,
    unlisted: bool | str | os.PathLike[str] = False,
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
        model: a supported multimodal model (see `thinsight.models`), or one of PEFT's, torch.compile's or
            a data-parallel wrapper of one: the reduction goes onto the model inside, and calls of either run
            under it.
        reduction: a `Reduction`, or a `Schedule`.
        ranker: for a schedule only: a ranker, its name, or a dict; "text-attention" if not given.
        per: "image": the keep rate holds for each image of a prompt; "prompt": for all its vision tokens
            together.
        rerank: True: rank anew at every reduction; a number in (0, 1): only once fewer than this share of the
            tokens are to be kept that the prompt's last ranking kept, until then that one serves; False: the
            first ranking serves all that follow. None: as the reduction says; True for a schedule.
        unlisted: of a model whose type is not listed, which runs only where `thinsight.check` has passed on its
            class. False: `thinsight check` has stored that in the cache folder; True: it has, or `thinsight.check`
            has passed in this process; a path: of a result that was saved. A model that was let in stays so.

    Returns:
        The handle, which is also a context manager.

    Raises:
        ThinsightError: unsupported model, or one that is not listed and not checked; a schedule of the wrong
            length, a ranker that cannot rank where it would have to, a reduction of another model family, a model
            that has a reduction on already, or a `rerank` that is none of the above.

    Warns:
        UserWarning: the reduction was searched on other weights, with a number of each.
    """
    model = check_supported(model, unlisted)
    adaptive: Adaptive | None = None
    again: bool | float = True
    if isinstance(reduction, Schedule):
        schedule, chosen = reduction, get_ranker("text-attention" if ranker is None else ranker)
    else:
        if not isinstance(reduction, Reduction):
            raise BadInput(f"reduction is a {type(reduction).__name__}; pass a Reduction or a Schedule")
        if ranker is not None:
            raise BadInput("ranker is given twice; a Reduction brings its own, pass reduction.schedule to change it")
        if reduction.model_type not in (None, model.config.model_type):
            raise BadInput(
                f"reduction is for model_type {reduction.model_type!r} but the model is {model.config.model_type!r}; "
                "apply reduction.schedule to try it all the same"
            )
        schedule, chosen = reduction.schedule, get_ranker(reduction.ranker)
        adaptive, again = reduction.adaptive, reduction.rerank
        if reduction.weights is not None and (why := difference(model, reduction.weights)) is not None:
            warnings.warn(
                f"reduction was searched on other weights ({_weights_of(reduction)}) than the model's "
                f"({model.name_or_path or 'unnamed'}): {why}; what was measured and promised need not hold here",
                stacklevel=2,
            )
    rerank = again if rerank is None else check_rerank(rerank)
    layers = len(decoder_layers(model))
    if schedule.num_layers != layers:
        raise BadInput(
            f"schedule has {schedule.num_layers} keep rates but the model has {layers} decoder layers; "
            f"use schedule.resample({layers})"
        )
    if per not in PER:
        raise BadInput(f"per is {per!r}; choose one of {', '.join(PER)}")
    check_rankable(schedule, chosen)
    _check_attended(model, schedule, chosen, adaptive)
    implementation = attention_implementation(model)
    windows = [layer for layer in sorted(sliding_layers(model)) if schedule.keep_rates[layer] < 1]
    if windows and implementation.startswith("flash"):
        raise Unsupported(
            f"decoder layer {windows[0]} has a sliding window, which {implementation} would count in kept "
            "tokens; load the model with attn_implementation='sdpa'"
        )
    if adaptive is not None and adaptive.layer in shared_keys(model):
        raise Unsupported(
            f"decoder layer {adaptive.layer}, at which this reduction gives each prompt its schedule, reads the keys "
            f"of layer {shared_keys(model)[adaptive.layer]}; choose a layer before the first that does"
        )
    return Handle(model, schedule, chosen, per, rerank, adaptive)


def _weights_of(reduction: Reduction) -> str:
    revision = (reduction.weights or {}).get("revision")
    name = reduction.base_model_name_or_path or "unnamed"
    return name if revision is None else f"{name} at {revision}"


def check_rankable(schedule: Schedule, ranker: Ranker) -> None:
    """Refuse tokens dropped at layer 0 by a ranker that reads the layer before; needs no model."""
    if schedule.keep_rates[0] < 1 and not ranker.ranks_at_layer_0:
        raise BadInput(
            f"keep_rates[0] is {schedule.keep_rates[0]}, but ranker {ranker.name!r} needs attention of the "
            "layer before and layer 0 has none; keep all at layer 0, or rank by vision-attention, random "
            "or uniform"
        )


def _check_attended(model: PreTrainedModel, schedule: Schedule, ranker: Ranker, adaptive: Adaptive | None) -> None:
    """Refuse what reads attention where no decoder layer before has any."""
    rates = schedule.keep_rates
    falls = [] if ranker.ranks_at_layer_0 else [i for i, rate in enumerate(rates) if i and rate < rates[i - 1]][:1]
    read = [(f"keep_rates fall at layer {layer}", f"ranker {ranker.name!r} reads") for layer in falls]
    if adaptive is not None:
        falls.append(adaptive.layer)
        read.append((f"adaptive.layer is {adaptive.layer}", "its statistic reads"))
    for layer, (what, who) in zip(falls, read, strict=True):
        if attending_before(model, layer) is None:
            first = first_attending(model)
            raise BadInput(
                f"{what}, but {who} the attention of a layer before, and layers 0 to {first - 1} of this model carry "
                f"a state instead; begin at layer {first + 1}, or rank by vision-attention, random or uniform"
            )


def _check_free(model: PreTrainedModel) -> None:
    """Refuse a second reduction on a model."""
    before = _reducer_of(model)
    if before is None:
        return
    if before.on:
        raise BadInput(
            "this model has a reduction on already; take that one off first: handle.remove(), or "
            "thinsight.remove(model) where the handle was not kept"
        )
    before.remove()  # threads may be gone
    if before.ending:
        raise BadInput(
            "a pass in another thread is still under the reduction that was taken off this model; apply the "
            "next one when it has ended"
        )
