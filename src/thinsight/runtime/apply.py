"""Puts a reduction on a model, and takes it off again without a trace.

Forward pre-hooks on the decoder layers drop vision tokens on the way down; everything the caller sees
(logits, masks, positions, cache lengths) stays in the caller's own columns. Knows nothing about families of
models, nor about how tokens are scored: see families.py and ../ranking.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ThinsightError
from ..ranking import (
    STATES,
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Context,
    Ranker,
    best,
    choose,
    get_ranker,
    get_statistic,
    row_weights,
)
from ..reduction import check_rerank
from ..schedule import Schedule
from .cache import Kept, Thinned, append, filled, kept_before, thin, thinned
from .call import Plan, Said, encode_pixels, named_arguments, read_call, same_shape
from .encoding import VisionTap
from .families import (
    attention_implementation,
    attention_of,
    base_model,
    check_attention,
    check_recomputation,
    check_supported,
    decoder_layers,
    sliding_layers,
    writes_vision_after,
)
from .layout import Columns, Layout, last_of_prompt, query_columns, shrink
from .masks import causal, gather_tokens, reduce_mask, replace_tokens, scatter_tokens
from .scoring import Probe, TextRows

if TYPE_CHECKING:
    from ..adaptive import Adaptive
    from ..reduction import Reduction

__all__ = ["Handle", "PassState", "applied", "apply", "check_rankable"]

PER = ("image", "prompt")
_compiling = torch.compiler.is_compiling  # a hook asks for every layer and token
_applied: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # base models with a reduction on
_applied_lock = threading.Lock()


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
        model: a supported multimodal model (see `families.SUPPORTED`).
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
    check_supported(model)
    schedule, chosen = _schedule_and_ranker(model, reduction, ranker)
    rerank = check_rerank(getattr(reduction, "rerank", True) if rerank is None else rerank)
    layers = decoder_layers(model)
    if schedule.num_layers != len(layers):
        raise ThinsightError(
            f"schedule has {schedule.num_layers} keep rates but the model has {len(layers)} decoder layers; "
            f"use schedule.resample({len(layers)})"
        )
    if per not in PER:
        raise ThinsightError(f"per is {per!r}; choose one of {', '.join(PER)}")
    check_rankable(schedule, chosen)
    _check_windows(model, schedule)
    with _applied_lock:
        if base_model(model) in _applied:
            raise ThinsightError("this model has a reduction on already; remove() that one first")
        handle = Handle(model, schedule, chosen, per, rerank, getattr(reduction, "adaptive", None))
        _applied.add(base_model(model))
    return handle


def applied(model: PreTrainedModel) -> bool:
    """Whether a reduction is on a model."""
    return base_model(model) in _applied


def _check_windows(model: PreTrainedModel, schedule: Schedule) -> None:
    """Flash attention counts a window in the tokens that are there, not in those that were dropped."""
    implementation = attention_implementation(model)
    reduced = [layer for layer in sorted(sliding_layers(model)) if schedule.keep_rates[layer] < 1]
    if reduced and implementation.startswith("flash"):
        raise ThinsightError(
            f"decoder layer {reduced[0]} has a sliding window, which {implementation} would count in kept "
            "tokens; load the model with attn_implementation='sdpa'"
        )


def check_rankable(schedule: Schedule, ranker: Ranker) -> None:
    """Refuse a schedule that drops tokens where the ranker has nothing to rank them by; needs no model.

    Raises:
        ThinsightError: tokens dropped at layer 0 by a ranker that reads the layer before.
    """
    if schedule.keep_rates[0] < 1 and not ranker.ranks_at_layer_0:
        raise ThinsightError(
            f"keep_rates[0] is {schedule.keep_rates[0]}, but ranker {ranker.name!r} needs attention of the "
            "layer before and layer 0 has none; keep all at layer 0, or rank by vision-attention, random "
            "or uniform"
        )


def _schedule_and_ranker(model: Any, reduction: Any, ranker: Any) -> tuple[Schedule, Ranker]:
    if isinstance(reduction, Schedule):
        return reduction, get_ranker("text-attention" if ranker is None else ranker)
    schedule = getattr(reduction, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise ThinsightError(f"reduction is a {type(reduction).__name__}; pass a Reduction or a Schedule")
    if ranker is not None:
        raise ThinsightError(
            "ranker is given twice; a Reduction brings its own, pass reduction.schedule to change it"
        )
    family = getattr(reduction, "model_type", None)
    if family is not None and family != model.config.model_type:
        raise ThinsightError(
            f"reduction is for model_type {family!r} but the model is {model.config.model_type!r}; "
            "apply reduction.schedule to try it all the same"
        )
    return schedule, get_ranker(reduction.ranker)


@dataclass(frozen=True)
class PassState:
    """What a pass knows of its vision tokens on the way into a layer; see the fields of `_Run`."""

    alive: Tensor
    columns: Columns | None
    take: Tensor | None
    kept: Kept | None
    spread: bool
    attention: Tensor | None
    scores: Tensor | None
    ranked: tuple[int | None, ...]
    levels: tuple[int, ...]
    trace: tuple[tuple[int, Tensor], ...]


class _Run:
    """One forward pass with vision tokens: where it stands between its layers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.call = plan.call
        self.alive = plan.call.layout.valid  # (batch, tokens) bool
        self.columns: Columns | None = None  # of the pass's own tokens; None: all are there
        self.take: Tensor | None = None  # (batch, physical) int64, columns of the states that go on
        self.kept: Kept | None = None  # the cache's record after this pass, at this stage
        self.spread = False  # whether hidden states are in logical columns although tokens were dropped
        # (batch, heads, queries, tokens) float32, of the layer before, or pooled: (batch, tokens)
        self.attention: Tensor | None = None
        self.armed: Probe | None = None  # of the layer that runs
        self.scores: Tensor | None = None  # (batch, tokens) float32, of each row's last ranking
        # per row, how many tokens that ranking kept
        self.ranked: list[int | None] = [None] * len(plan.call.layout.sizes)
        self.weights: Tensor | None = None  # (batch, queries) float32, of rows of attention that are pooled
        self.queries = plan.queries  # logical columns (batch, queries), which are real
        self.trace: list[tuple[int, Tensor]] = [(0, self.alive)]  # from which layer on, alive
        self.last = plan.last  # (batch, tokens) bool
        self.levels = [0] * len(plan.call.layout.sizes)  # per row, which of an adaptive reduction's schedules
        self.quota = plan.quota  # (stages, batch, groups) int64 for these levels; None: not made yet
        self.first = 0  # layers before it do not run: see prefix.py

    def state(self) -> PassState:
        """Where the pass stands, on the way into a layer."""
        read = None if self.armed is None else self.armed.answer()
        return PassState(
            self.alive,
            self.columns,
            self.take,
            self.kept,
            self.spread,
            self.attention if read is None else read,
            self.scores,
            tuple(self.ranked),
            tuple(self.levels),
            tuple(self.trace),
        )

    def restore(self, state: PassState) -> None:
        """Go on from there."""
        self.alive, self.columns, self.take, self.kept = state.alive, state.columns, state.take, state.kept
        self.spread, self.attention, self.scores = state.spread, state.attention, state.scores
        if self.levels != list(state.levels):
            self.levels, self.quota = list(state.levels), None
        self.ranked, self.trace = list(state.ranked), list(state.trace)


class _Hook:
    """A hook that a copy of the model, pickled or deep, does not inherit.

    Where torch.compile traces a pass, a hook runs outside the graph (with `fullgraph=True` the compiler says
    so), but for passes of one new token per row, which is how tokens are decoded: those stay one graph.
    """

    def __init__(
        self, function: Callable[..., Any], leading: tuple[Any, ...], decode: Callable[..., Any] | None = None
    ) -> None:
        self.function = function
        self.leading = leading
        self.decode = decode  # what `function` comes to for one new token per row; None if to nothing
        self.outside = torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        if not _compiling():
            return self.function(*self.leading, *args)
        if _new_tokens(*args) > 1:
            return self.outside(*self.leading, *args)
        return None if self.decode is None else self.decode(*self.leading, *args)

    def __reduce__(self) -> Any:
        return _nothing, ()

    def __deepcopy__(self, memo: Any) -> Any:
        return _ignore


def _nothing() -> Any:
    return _ignore


def _ignore(*args: Any) -> None:
    """What a hook is in a copy."""


def _new_tokens(module: nn.Module, args: tuple[Any, ...], last: Any) -> int:
    """How many tokens per row pass a module: of its arguments, or of its output where `last` is that."""
    if type(last) is dict:
        named = (last.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        given = next((value for value in (*args[:1], *named) if value is not None), None)
    else:
        given = last if isinstance(last, Tensor) else last[0]
    return 1 if given is None else given.shape[1]


def _forget_compiled() -> None:
    """Have torch.compile look at the hooks again: what it compiled before does not ask whether they changed,
    unless it was told to, and would leave the reduction out."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", True):
        torch.compiler.reset()


class _Local(threading.local):
    """What a handle knows of this thread's pass."""

    run: _Run | None = None
    plan: Plan | None = None


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
        # .run, .plan, .masks, .said, .candidates, .trace, .statistic: of this thread
        self._local = _Local()
        self._counts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._schedules = (schedule,) if adaptive is None else adaptive.schedules
        self._statistic = None if adaptive is None else get_statistic(adaptive.statistic)
        self._hooks: list[Any] = []
        self._probes: dict[int, Probe] = {}
        self._tap: VisionTap | None = None
        self._on = True
        rates = schedule.keep_rates
        # a stage is a run of layers with one keep rate below 1
        self._starts = [i for i, rate in enumerate(rates) if rate < (rates[i - 1] if i else 1.0)]
        self._written = writes_vision_after(model)
        try:
            self._install()
        except BaseException:
            self._uninstall()
            raise

    # --- on and off

    def _install(self) -> None:
        if not self._starts:
            return  # a full schedule leaves the stock model as it is
        base, layers = base_model(self.model), decoder_layers(self.model)
        if base is not self.model:
            self._before(self.model, self._ask)
        self._before(base, self._enter)
        self._after(base, self._leave)
        if VISION_ATTENTION in self.ranker.needs:
            self._tap = VisionTap(self.model)
        read = {start - 1 for start in self._starts if start and TEXT_ATTENTION in self.ranker.needs}
        if self.adaptive is not None:
            read.add(self.adaptive.layer - 1)
        self._probes = {layer: Probe(attention_of(layers[layer])) for layer in sorted(read)}
        for index, layer in enumerate(layers):
            decides = self.adaptive is not None and index == self.adaptive.layer
            if index >= self._starts[0] or index in self._probes or decides:
                self._before(layer, self._reduce, index, decode=self._decode)
            if index in self._written or index == len(layers) - 1:
                self._after(layer, self._spread_out)
        _forget_compiled()

    def _before(
        self, module: nn.Module, function: Callable[..., Any], *leading: Any, decode: Any = None
    ) -> None:
        hook = _Hook(function, leading, decode)
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, function: Callable[..., Any], *leading: Any) -> None:
        always = function != self._spread_out
        self._hooks.append(module.register_forward_hook(_Hook(function, leading), always_call=always))

    def _uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            _forget_compiled()
        self._hooks.clear()
        for probe in self._probes.values():
            probe.restore()
        self._probes.clear()
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def remove(self) -> None:
        """Take the reduction off. Safe to call twice."""
        self._uninstall()
        with _applied_lock:
            if self._on:
                self._on = False
                _applied.discard(base_model(self.model))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    @property
    def on(self) -> bool:
        """Whether the reduction is on the model still."""
        return self._on

    # --- for the caller

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
        before: Said = getattr(self._local, "said", Said())
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
        if not self._starts:
            return None
        return self._read(encode_pixels(self.model, inputs))

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

    def reading(self) -> Plan | None:
        """What this thread's pass has read of its inputs; None where no vision token passes."""
        run = self._run()
        return None if run is None or run.first else run.plan

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """The decoder's layers, called by themselves, reduce as in a pass of this plan."""
        before, masks = self._local.run, getattr(self._local, "masks", {})
        self._local.run, self._local.masks = _Run(plan), {}
        try:
            yield
        finally:
            self._disarm(self._local.run)
            self._local.run, self._local.masks = before, masks

    def trace(self, trace: Sequence[tuple[int, Tensor]]) -> None:
        """Say what this thread's pass kept where its layers ran elsewhere: from which layer on, (batch,
        tokens) bool."""
        run = self._run()
        if run is not None:
            run.trace = list(trace)

    def state(self) -> PassState | None:
        """Where this thread's pass stands, on the way into a layer; None where no vision token passes."""
        run = self._run()
        return None if run is None else run.state()

    def restore(self, state: PassState) -> bool:
        """Have this thread's pass go on from there; False where no vision token passes."""
        run = self._run()
        if run is not None:
            run.restore(state)
        return run is not None

    @contextmanager
    def starting_at(self, layer: int) -> Iterator[None]:
        """This thread's passes begin at a layer: those before it do nothing."""
        self._local.first = layer
        try:
            yield
        finally:
            self._local.first = 0

    def kept(self, layer: int) -> list[Tensor]:
        """Which vision tokens entered a layer, in this thread's last pass that had an image.

        Returns:
            Per batch row (a beam is a row), (count,) int64 ascending, numbers in 0..N-1 over the row's vision
            tokens.

        Raises:
            ThinsightError: no such layer, or no pass yet (a full schedule records none).
        """
        if not 0 <= layer < self.schedule.num_layers:
            raise ThinsightError(f"layer is {layer}; it must be from 0 to {self.schedule.num_layers - 1}")
        trace = getattr(self._local, "trace", None)
        if trace is None:
            why = "run a prompt with an image first" if self._starts else "the schedule keeps every token"
            raise ThinsightError(f"no kept tokens are recorded: {why}")
        alive = [alive for start, alive in trace if start <= layer][-1]
        return [row.nonzero().flatten().cpu() for row in alive]

    def statistic(self) -> list[float]:
        """An adaptive reduction's statistic of each batch row, in this thread's last pass that had an image.

        Raises:
            ThinsightError: the reduction is not adaptive, or no such pass yet.
        """
        values: list[float] | None = getattr(self._local, "statistic", None)
        if values is None:
            raise ThinsightError("no statistic is recorded: run a prompt under an adaptive reduction first")
        return values

    # --- hooks, in the order in which they fire

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn from the whole model's call how many of its last tokens an assistant proposed."""
        keep, cache = kwargs.get("logits_to_keep"), kwargs.get("past_key_values")
        first = cache is not None and not cache.get_seq_length()
        self._local.candidates = max(0, keep - 1) if first and isinstance(keep, int) else 0

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._local.run = None
        self._local.masks = {}
        arguments = encode_pixels(self.model, named_arguments(module, args, kwargs))
        candidates = getattr(self._local, "candidates", 0)
        self._local.candidates = 0
        made = self._local.plan
        if made is None:
            plan = self._read(arguments, candidates)
        else:
            plan = made if same_shape(made, arguments) else None
        if plan is not None:
            # generate_batch() changes the implementation on its way, or passes a cache of its own
            check_attention(self.model, paged=arguments.get("cache") is not None)
            check_recomputation(self.model)
            run = _Run(plan)
            run.first = getattr(self._local, "first", 0)
            self._local.run = run
        return (), arguments

    def _read(self, arguments: dict[str, Any], candidates: int = 0) -> Plan | None:
        """All that a pass needs to know of its inputs; None where there is no vision token."""
        said: Said = getattr(self._local, "said", Said())
        call = read_call(self.model, arguments, replace(said, candidates=candidates))
        if call is None:
            return None
        layout, queries, ends = call.layout, None, None
        if self.ranker.needs & {TEXT_ATTENTION, STATES} or self.adaptive is not None:
            queries = query_columns(layout, call.prompt, self.ranker.queries)
        last = last_of_prompt(layout, call.prompt)
        if last is not None:
            groups = layout.image if self.per == "image" else torch.zeros_like(layout.image)
            ends = tuple(torch.where(last, groups, -1).amax(1).tolist())
        quota = None if self.adaptive is not None else self._quotas(layout, [0] * len(layout.sizes))
        return Plan(call, queries, last, ends, quota)

    def _run(self) -> _Run | None:
        """This thread's pass; None where no vision token passes, as in decoding."""
        run: _Run | None = self._local.run
        return run

    def _reduce(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run()
        if run is None:
            return self._decode(layer, module, args, kwargs)
        if layer < run.first:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        self._disarm(run)
        if self.adaptive is not None and layer == self.adaptive.layer:
            self._decide(run, self.adaptive)
        if layer in self._starts:
            states = self._start_stage(run, layer, kwargs.get("past_key_values"), states)
        if run.columns is None:
            reduced = self._decode(layer, module, args, kwargs)
        else:
            reduced = self._reduce_vision(run, run.columns, layer, states, args, kwargs)
        if layer in self._probes:  # now rows and columns are those that the layer sees
            self._arm(run, layer, kwargs)
        return reduced

    def _decode(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`_reduce` where no vision token passes."""
        held = thinned(kwargs.get("past_key_values"), layer)
        if held is None:
            return None
        return self._reduce_text(held, args[0] if args else kwargs["hidden_states"], args, kwargs)

    def _decide(self, run: _Run, adaptive: Adaptive) -> None:
        """Give each row one of an adaptive reduction's schedules."""
        assert run.attention is not None
        assert run.queries is not None
        assert self._statistic is not None
        values = self._statistic(run.attention, run.queries[1].to(run.attention.device), run.alive)
        self._local.statistic = values.tolist()
        run.levels, run.quota = [adaptive.level(value) for value in self._local.statistic], None

    def _start_stage(self, run: _Run, layer: int, cache: Any, states: Tensor) -> Tensor:
        """Drop what this layer does not get; the states, which a ranker that merges has changed."""
        before = kept_before(cache, layer, self.schedule)
        if self._falls(run, layer):
            states = self._drop(run, layer, states)
            run.trace.append((layer, run.alive))
        if run.columns is not None and cache is not None:
            run.kept = append(before, run.call.past, run.columns, run.call.seq)
        return states

    def _drop(self, run: _Run, layer: int, states: Tensor) -> Tensor:
        """Keep the best of what is alive, as `run.take` and `run.columns` say; the states as above."""
        counts, ranking = self._rows(run, layer), self._ranking(run, layer)
        merges = type(self.ranker).merge is not Ranker.merge
        with torch.no_grad():
            context = self._context(run, layer, states) if any(ranking) or merges else None
            if context is not None and any(ranking):
                self._rank(run, context, ranking, [sum(row) for row in counts])
            run.attention = None
            assert run.scores is not None
            scores = run.scores if run.last is None else run.scores.masked_fill(run.last, torch.inf)
            if len(set(counts)) == 1 and len(counts[0]) == 1:
                run.alive = best(scores, run.alive, counts[0][0])
            else:
                run.alive = choose(scores, run.alive, *self._quota(run, layer))
            self._check_ends(run, layer)
            places = self._places(run, run.call.layout.column)[0] if merges else None
            run.take, run.columns = shrink(
                run.call.layout, run.alive, [sum(row) for row in counts], run.columns
            )
        if context is None or places is None:
            return states
        merged = self.ranker.merge(context, run.alive)
        return states if merged is None else replace_tokens(states, places, run.alive, merged)

    def _rank(self, run: _Run, context: Context, ranking: list[bool], counts: list[int]) -> None:
        """Score the rows that rank anew; the others keep their last scores."""
        scores = self.ranker.score(context).to(run.alive.device)
        keeping = [not ranks and last is not None for ranks, last in zip(ranking, run.ranked, strict=True)]
        if run.scores is not None and any(keeping):
            rows = zip(keeping, run.scores, scores, strict=True)
            scores = torch.stack([old if keeps else new for keeps, old, new in rows])
        run.scores = scores
        rows_now = zip(ranking, counts, run.ranked, strict=True)
        run.ranked = [count if ranks else last for ranks, count, last in rows_now]

    def _context(self, run: _Run, layer: int, states: Tensor) -> Context:
        layout = run.call.layout
        pooled = run.attention is not None and run.attention.ndim == 2
        seen = text = None
        if STATES in self.ranker.needs:
            assert run.queries is not None
            places = self._places(run, layout.column, run.queries[0])
            seen, text = (gather_tokens(states, each) for each in places)
        return Context(
            layer=layer,
            valid=run.alive,
            image=layout.image,
            index=layout.index,
            size=layout.size,
            attention=None if pooled else run.attention,
            pooled=run.attention if pooled else None,
            queries=None if run.queries is None else run.queries[1],
            vision_attention=run.call.received,
            states=seen,
            text_states=text,
        )

    @staticmethod
    def _places(run: _Run, *columns: Tensor) -> tuple[Tensor, ...]:
        """Where logical columns (batch, any) stand in the states that come next; dropped ones: anywhere."""
        if run.columns is None or run.spread:
            return columns
        return run.columns.physical(run.call.seq, *columns)

    def _reduce_vision(
        self, run: _Run, columns: Columns, layer: int, states: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The arguments of a layer in a pass some of whose vision tokens are dropped."""
        take = columns.index if run.spread else run.take
        run.take, run.spread = None, False
        states = states if take is None else gather_tokens(states, take)
        reduced, cache = dict(kwargs), kwargs.get("past_key_values")
        seq, total = run.call.seq, run.call.past + run.call.seq
        held = None
        if cache is not None:
            held = thin(cache, layer, self.schedule)
            held.expect(states.shape[0], seq, columns, run.kept)
        reduced["attention_mask"] = self._mask(kwargs, held, columns, seq, total, states.device)
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            reduced["position_embeddings"] = tuple(self._rotary(part, columns) for part in embeddings)
        return self._arguments(states, args, reduced)

    def _reduce_text(self, held: Thinned, states: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer in a pass that is all there, behind a thinned cache."""
        held.check(self.schedule)
        batch, seq = states.shape[:2]
        mask = kwargs.get("attention_mask")
        ragged = held.kept is not None and held.kept.columns.valid is not None
        total = int(held.get_seq_length()) + seq if mask is None and ragged else 0
        held.expect(batch, seq)
        if held.kept is None:
            return None
        reduced = dict(kwargs)
        if mask is not None or ragged:
            reduced["attention_mask"] = self._mask(kwargs, held, None, seq, total, states.device)
        return self._arguments(states, args, reduced)

    @staticmethod
    def _arguments(states: Tensor, args: tuple[Any, ...], reduced: dict[str, Any]) -> Any:
        if "position_ids" in reduced:
            # flash attention would read gaps in them as packed sequences; rotary tables say it all
            reduced["position_ids"] = None
        if args:
            return (states, *args[1:]), reduced
        return args, {**reduced, "hidden_states": states}

    def _rotary(self, table: Tensor, columns: Columns) -> Tensor:
        """A rotary table at the columns that are there, made once for the layers of a stage."""
        if torch.compiler.is_compiling():  # as in `_mask`
            return gather_tokens(table, columns.index)
        made: dict[Any, Any] = self._local.masks
        key = (id(table), id(columns))
        if key not in made:
            made[key] = gather_tokens(table, columns.index), table, columns
        taken: Tensor = made[key][0]
        return taken

    def _mask(
        self,
        kwargs: dict[str, Any],
        held: Thinned | None,
        columns: Columns | None,
        seq: int,
        total: int,
        device: torch.device,
    ) -> Any:
        """A layer's mask in physical columns, made once for the layers of a stage."""
        mask = kwargs.get("attention_mask")
        if torch.compiler.is_compiling():  # ids of tensors would tie the graph to these very tensors
            return self._reduced_mask(mask, held, columns, seq, total, device)
        made: dict[Any, Any] = self._local.masks
        kept = None if held is None else held.kept
        key = (id(mask), type(held), id(kept), id(columns))
        if key not in made:
            # what the ids belong to is held on to, so that they stay its own
            made[key] = self._reduced_mask(mask, held, columns, seq, total, device), mask, kept, columns
        return made[key][0]

    def _reduced_mask(
        self,
        mask: Any,
        held: Thinned | None,
        columns: Columns | None,
        seq: int,
        total: int,
        device: torch.device,
    ) -> Any:
        keys = columns if held is None else held.columns()
        assert keys is not None
        if mask is None and keys.valid is not None:
            mask = causal(seq, total, attention_implementation(self.model), device)
        return None if mask is None else reduce_mask(mask, keys, columns, 0 if held is None else held.offset)

    def _arm(self, run: _Run, layer: int, kwargs: dict[str, Any]) -> None:
        """Have the layer's attention read for the next one's ranking."""
        decides = self.adaptive is not None and layer + 1 == self.adaptive.layer
        if run.queries is None or not (decides or any(self._ranking(run, layer + 1))):
            return
        rows, columns = self._places(run, run.queries[0], run.call.layout.column)
        if run.weights is None and self.ranker.pools and self.adaptive is None:
            run.weights = row_weights(run.queries[1])
        run.armed = self._probes[layer]
        cached = filled(kwargs.get("past_key_values"), layer)
        run.armed.arm(TextRows(rows, columns, run.alive, cached, run.weights))

    @staticmethod
    def _disarm(run: _Run) -> None:
        """Take over what the layer before was to read."""
        probe, run.armed = run.armed, None
        request = None if probe is None else probe.disarm()
        if request is not None:
            run.attention = request.result

    def _spread_out(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A layer's output in logical columns: the last one's, so that logits and labels line up with the
        input, and those after which the decoder itself writes to vision positions."""
        run = self._run()
        if run is None or run.columns is None:
            return None
        run.spread = True
        states = output[0] if isinstance(output, tuple) else output
        states = scatter_tokens(states, run.columns, run.call.seq)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        run, self._local.run = self._run(), None
        self._local.masks = {}
        if run is not None:
            self._disarm(run)  # an exception may have come before the next layer did
            self._local.trace = run.trace

    # --- how many

    def _groups(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the sets of tokens that compete: each image, or the whole prompt."""
        return sizes if self.per == "image" else (sum(sizes),)

    def _count(self, n: int, layer: int, level: int = 0) -> int:
        if (n, level) not in self._counts:
            self._counts[n, level] = self._schedules[level].counts(n)
        return self._counts[n, level][layer]

    def _rows(self, run: _Run, layer: int) -> list[tuple[int, ...]]:
        """Per row, how many tokens of each group enter a layer; -1: the pass."""
        groups = [self._groups(sizes) for sizes in run.call.layout.sizes]
        if layer < 0:
            return groups
        rows = zip(groups, run.levels, strict=True)
        return [tuple(self._count(n, layer, level) for n in sizes) for sizes, level in rows]

    def _falls(self, run: _Run, layer: int) -> bool:
        """Whether any group has fewer tokens in this layer than in the one before."""
        return self._rows(run, layer) != self._rows(run, layer - 1)

    def _ranking(self, run: _Run, layer: int) -> list[bool]:
        """Which rows rank anew before this layer. Each row decides by its own counts, so that a prompt is
        ranked alike alone and in a batch."""
        share = float(self.rerank)  # True is 1: a row that falls gets less than ever; False is 0
        rows = zip(self._rows(run, layer), self._rows(run, layer - 1), run.ranked, strict=True)
        return [now != before and (last is None or sum(now) < share * last) for now, before, last in rows]

    def _quota(self, run: _Run, layer: int) -> tuple[Tensor, Tensor]:
        """The group of each token and how many its group may keep, (batch, tokens) int64 both."""
        layout = run.call.layout
        if run.quota is None:
            run.quota = self._quotas(layout, run.levels)
        group = layout.image if self.per == "image" else torch.zeros_like(layout.image)
        return group, run.quota[self._starts.index(layer)].gather(1, group)

    def _quotas(self, layout: Layout, levels: list[int]) -> Tensor:
        """How many of each group every stage may keep: (stages, batch, groups) int64, 0 where a row has
        fewer groups."""
        rows = [(self._groups(sizes), level) for sizes, level in zip(layout.sizes, levels, strict=True)]
        most = max(1, *(len(groups) for groups, _ in rows))
        counts = [
            [
                [self._count(n, layer, level) for n in groups] + [0] * (most - len(groups))
                for groups, level in rows
            ]
            for layer in self._starts
        ]
        return torch.tensor(counts, device=layout.image.device)

    def _check_ends(self, run: _Run, layer: int) -> None:
        """Refuse to drop the image that a prompt ends in."""
        if run.plan.ends is None:
            return
        for group, sizes, level in zip(run.plan.ends, run.call.layout.sizes, run.levels, strict=True):
            if group >= 0 and not self._count(self._groups(sizes)[group], layer, level):
                raise ThinsightError(
                    f"a prompt ends in an image of which layer {layer} keeps no token, so nothing is left to "
                    "answer from; let text follow on the image"
                )
