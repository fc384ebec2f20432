"""Puts a reduction on a model, and takes it off: the checks, and the handle that a caller then has in hand.

Everything the caller sees (logits, masks, positions, cache lengths) stays in the caller's own columns. Knows
nothing about what happens in a pass: see reducer.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
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
from .call import Plan, encode_pixels
from .families import attention_implementation, base_model, check_supported, decoder_layers, sliding_layers, unwrapped
from .reducer import Pass, PassState, Quotas, Reducer, ThreadState

if TYPE_CHECKING:
    from ..schedule import Adaptive

# by base model; hooks hold on to what reduces, so that it lives as long as it is on
_applied: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Reducer]] = weakref.WeakKeyDictionary()
_applied_lock = threading.Lock()


def applied(model: PreTrainedModel) -> bool:
    """Whether a reduction is on a model."""
    reducer = _reducer_of(model)
    return reducer is not None and reducer.on


def remove(model: Any) -> None:
    """Take off the reduction that is on a model, also where its handle was not kept. Nothing happens where
    none is on.

    As `Handle.remove` does: passes that other threads have under way are reduced to their end.

    Args:
        model: as for `apply`.

    Raises:
        ThinsightError: no transformers model.
    """
    reducer = _reducer_of(unwrapped(model))
    if reducer is not None:
        reducer.remove()


def _reducer_of(model: PreTrainedModel) -> Reducer | None:
    """What reduced a model last, if it still is there."""
    known = _applied.get(base_model(model))
    return None if known is None else known()


def _check_free(model: PreTrainedModel) -> None:
    """Refuse a second reduction on a model.

    Raises:
        ThinsightError: with what to do.
    """
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


class Handle:
    """A reduction that is on a model. `remove()`, or leaving the `with` block, restores the model exactly."""

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        ranker: Ranker,
        per: str,
        rerank: bool | float = True,
        adaptive: Adaptive | None = None,
    ) -> None:
        self.model: PreTrainedModel = model
        self.schedule = schedule  # of an adaptive reduction: the mean, which falls wherever one of them does
        self.adaptive = adaptive
        self.ranker = ranker
        self.per = per
        self.rerank = rerank
        self._local = ThreadState()
        self._quotas = Quotas(schedule, adaptive, per, rerank)
        with _applied_lock:
            _check_free(self.model)
            self._reducer = Reducer(self.model, schedule, ranker, adaptive, self._quotas, self._local)
            self._reducer.install()
            _applied[base_model(model)] = weakref.ref(self._reducer)

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
            mask: (batch, seq) bool, the shape of `input_ids`; False at the continuation. Padding may be
                either.
        """
        with self._saying(prompt=mask):
            yield

    @contextmanager
    def vision(self, mask: Tensor) -> Iterator[None]:
        """Say which positions of `inputs_embeds` are vision tokens, where there are no `input_ids` to tell.

        Args:
            mask: (batch, seq) bool, True at vision tokens; an image is an unbroken run of them. Where other
                tokens stand among an image's, int64: the number of each token's image, from 1 in each row
                and ascending, and 0 at text.
        """
        with self._saying(vision=mask):
            yield

    @contextmanager
    def _saying(self, **what: Tensor) -> Iterator[None]:
        before = self._local.said
        self._local.said = replace(before, **what)
        try:
            yield
        finally:
            self._local.said = before

    def plan(self, **inputs: Any) -> Plan | None:
        """Read a pass's inputs once, for passes of the same shape that ask the device for nothing.

        What `prompt` and `vision` say counts here, where the plan is made.

        Args:
            **inputs: as for the model's forward. Pixels are encoded here, for their token counts: pass
                features (`EncodedImages.model_inputs`) to have them encoded once.

        Returns:
            What to pass to `planned`; None where there is no vision token, or nothing to drop.

        Raises:
            ThinsightError: vision tokens cannot be told from the inputs.
        """
        if not self._quotas.starts:
            return None
        return self._reducer.read(encode_pixels(self.model, inputs))

    @contextmanager
    def planned(self, plan: Plan | None) -> Iterator[None]:
        """This thread's passes of more than one token follow a plan instead of reading their inputs.

        Which positions are vision is the plan's word and is not looked at again: inputs must have them where
        those of the plan had. `plan` may be None, as `plan()` returns it: then each pass reads its own.
        """
        before, self._local.plan = self._local.plan, plan
        try:
            yield
        finally:
            self._local.plan = before

    # --- for those who run a pass in parts, or in another way

    def reading(self) -> Plan | None:
        """What this thread's pass has read of its inputs; None where no vision token passes."""
        run = self._local.run
        return None if run is None or run.first else run.plan

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """The decoder's layers, called by themselves, reduce as in a pass of this plan."""
        before, masks = self._local.run, self._local.masks
        run = Pass(plan)
        self._local.run, self._local.masks = run, {}
        try:
            yield
        finally:
            run.disarm()
            self._local.run, self._local.masks = before, masks

    def trace(self, trace: Sequence[tuple[int, Tensor]]) -> None:
        """Say what this thread's pass kept where its layers ran elsewhere: from which layer on, (batch,
        tokens) bool."""
        run = self._local.run
        if run is not None:
            run.trace = list(trace)

    def state(self) -> PassState | None:
        """Where this thread's pass stands, on the way into a layer; None where no vision token passes."""
        run = self._local.run
        return None if run is None else run.state()

    def restore(self, state: PassState) -> bool:
        """Have this thread's pass go on from there; False where no vision token passes."""
        run = self._local.run
        if run is not None:
            run.restore(state)
        return run is not None

    @contextmanager
    def starting_at(self, layer: int) -> Iterator[None]:
        """This thread's passes begin at a layer: those before it do nothing."""
        before, self._local.first = self._local.first, layer
        try:
            yield
        finally:
            self._local.first = before

    # --- what the caller asks

    def kept(self, layer: int) -> list[Tensor]:
        """Which vision tokens entered a layer, in this thread's last pass that had an image.

        Returns:
            Per batch row (a beam is a row), (count,) int64 ascending, numbers in 0..N-1 over the row's vision
            tokens.

        Raises:
            ThinsightError: no such layer, or no pass yet (a full schedule records none).
        """
        if not 0 <= layer < self.schedule.num_layers:
            raise BadInput(f"layer is {layer}; it must be from 0 to {self.schedule.num_layers - 1}")
        trace = self._local.trace
        if trace is None:
            drops = bool(self._quotas.starts)
            why = "run a prompt with an image first" if drops else "the schedule keeps every token"
            raise BadInput(f"no kept tokens are recorded: {why}")
        alive = [alive for start, alive in trace if start <= layer][-1]
        return [row.nonzero().flatten().cpu() for row in alive]

    def statistic(self) -> list[float]:
        """An adaptive reduction's statistic of each batch row, in this thread's last pass that had an image.

        Raises:
            ThinsightError: the reduction is not adaptive, or no such pass yet.
        """
        values = self._local.statistic
        if values is None:
            raise BadInput("no statistic is recorded: run a prompt under an adaptive reduction first")
        return values


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
        raise BadInput("ranker is given twice; a Reduction brings its own, pass reduction.schedule to change it")
    family = reduction.model_type
    if family is not None and family != model.config.model_type:
        raise BadInput(
            f"reduction is for model_type {family!r} but the model is {model.config.model_type!r}; "
            "apply reduction.schedule to try it all the same"
        )
    return reduction.schedule, get_ranker(reduction.ranker)
