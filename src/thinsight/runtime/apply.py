"""Puts a reduction on a model, and takes it off again without a trace.

Forward pre-hooks on the decoder layers drop vision tokens on the way down; everything the caller sees
(logits, masks, positions, cache lengths) stays in the caller's own columns. Knows nothing about families of
models, nor about how tokens are scored: see families.py and ../ranking.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ThinsightError
from ..ranking import TEXT_ATTENTION, VISION_ATTENTION, Context, Ranker, choose, get_ranker
from ..schedule import Schedule
from .cache import Kept, append, expect, kept_before, thin
from .call import Call, encode_pixels, named_arguments, read_call
from .encoding import VisionTap
from .families import (
    attention_implementation,
    attention_of,
    base_model,
    check_recomputation,
    check_supported,
    decoder_layers,
)
from .layout import Columns, query_columns, shrink
from .masks import causal, gather_tokens, reduce_mask, scatter_tokens
from .scoring import Probe, TextRows

if TYPE_CHECKING:
    from ..reduction import Reduction

__all__ = ["Handle", "apply", "check_rankable"]

PER = ("image", "prompt")
_applied: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # base models with a reduction on
_applied_lock = threading.Lock()


def apply(model: Any, reduction: Reduction | Schedule, *, ranker: Any = None, per: str = "image") -> Handle:
    """Run a model under a reduction: its layers see fewer vision tokens, its interface stays the same.

    ``with apply(model, reduction): model.generate(**inputs)``, or ``handle = apply(...)`` and
    ``handle.remove()``. Works for `forward` and `generate` with a dynamic cache: greedy, sampling, beams,
    padded batches, several images in a prompt, prompts without an image, later turns on the same cache.
    Assisted and prompt-lookup decoding are not supported. Logits of dropped positions are zeros. With
    ``use_cache=False`` each step ranks anew, generated tokens included; `Handle.prompt` says which are the
    prompt.

    Args:
        model: a supported multimodal model (see `families.SUPPORTED`).
        reduction: a `Reduction`, or a `Schedule`.
        ranker: for a schedule only: a ranker, its name, or a dict; "text-attention" if not given.
        per: "image": the keep rate holds for each image of a prompt; "prompt": for all its vision tokens
            together.

    Returns:
        The handle, which is also a context manager.

    Raises:
        ThinsightError: unsupported model, a schedule of the wrong length, a ranker that cannot rank where it
            would have to, a reduction of another model family, or a model that has a reduction on already.
    """
    check_supported(model)
    schedule, chosen = _schedule_and_ranker(model, reduction, ranker)
    layers = decoder_layers(model)
    if schedule.num_layers != len(layers):
        raise ThinsightError(
            f"schedule has {schedule.num_layers} keep rates but the model has {len(layers)} decoder layers; "
            f"use schedule.resample({len(layers)})"
        )
    if per not in PER:
        raise ThinsightError(f"per is {per!r}; choose one of {', '.join(PER)}")
    check_rankable(schedule, chosen)
    with _applied_lock:
        if base_model(model) in _applied:
            raise ThinsightError("this model has a reduction on already; remove() that one first")
        handle = Handle(model, schedule, chosen, per)
        _applied.add(base_model(model))
    return handle


def check_rankable(schedule: Schedule, ranker: Ranker) -> None:
    """Refuse a schedule that drops tokens where the ranker has nothing to rank them by; needs no model.

    Raises:
        ThinsightError: tokens dropped at layer 0 by a ranker that reads the layer before.
    """
    if TEXT_ATTENTION in ranker.needs and schedule.keep_rates[0] < 1:
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


class _Run:
    """One forward pass under a reduction: where it stands between its layers."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.alive = None if call.layout is None else call.layout.valid  # (batch, tokens) bool
        self.columns: Columns | None = None  # of the pass's own tokens; None: all are there
        self.past: Kept | None = None  # of the cache's tokens, at this stage; None: all are there
        self.attention: Tensor | None = None  # (batch, heads, queries, tokens) float32, of the layer before
        self.queries: tuple[Tensor, Tensor] | None = None  # logical columns (batch, queries), which are real
        self.masks: dict[int, tuple[Tensor | None, Tensor | None]] = {}  # by id, this stage: given, reduced
        self.trace: list[tuple[int, Tensor]] = []  # from which layer on, alive


class Handle:
    """A reduction that is on a model. `remove()`, or leaving the `with` block, restores the model exactly."""

    def __init__(self, model: Any, schedule: Schedule, ranker: Ranker, per: str) -> None:
        self.model: PreTrainedModel = model
        self.schedule = schedule
        self.ranker = ranker
        self.per = per
        self._local = threading.local()  # .run, .prompt, .trace: of this thread
        self._counts: dict[int, tuple[int, ...]] = {}
        self._hooks: list[Any] = []
        self._probes: dict[int, Probe] = {}
        self._tap: VisionTap | None = None
        self._on = True
        rates = schedule.keep_rates
        # a stage is a run of layers with one keep rate below 1
        self._starts = [i for i, rate in enumerate(rates) if rate < (rates[i - 1] if i else 1.0)]
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
        self._hooks.append(base.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._hooks.append(base.register_forward_hook(self._leave, always_call=True))
        if VISION_ATTENTION in self.ranker.needs:
            self._tap = VisionTap(self.model)
        for start in self._starts:
            if TEXT_ATTENTION in self.ranker.needs:
                self._probes[start - 1] = Probe(attention_of(layers[start - 1]))
        for index, layer in enumerate(layers):
            if index >= self._starts[0]:
                self._hooks.append(layer.register_forward_pre_hook(self._before(index), with_kwargs=True))
            if index in self._probes:
                # after the reducing hook, so that rows and columns are those that the layer sees
                self._hooks.append(layer.register_forward_pre_hook(self._arm(index)))
                self._hooks.append(layer.register_forward_hook(self._disarm(index), always_call=True))
        self._hooks.append(layers[-1].register_forward_hook(self._spread_out))

    def _uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
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
        before = getattr(self._local, "prompt", None)
        self._local.prompt = mask
        try:
            yield
        finally:
            self._local.prompt = before

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

    # --- hooks, in the order in which they fire

    def _enter(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        self._local.run = None
        arguments = encode_pixels(self.model, named_arguments(module, args, kwargs))
        prompt = getattr(self._local, "prompt", None)
        call = read_call(self.model, arguments, prompt, attention_implementation(self.model))
        run = _Run(call)
        if call.layout is not None:
            check_recomputation(self.model)
        if call.layout is not None and self._probes:
            assert call.prompt is not None
            run.queries = query_columns(call.layout, call.prompt, self.ranker.queries)
        if run.alive is not None:
            run.trace.append((0, run.alive))
        self._local.run = run
        return (), arguments

    def _before(self, layer: int) -> Any:
        start = max(s for s in self._starts if s <= layer)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run: _Run | None = getattr(self._local, "run", None)
            if run is None:
                return None
            cache = kwargs.get("past_key_values")
            if layer == start:
                args, kwargs = self._start_stage(run, layer, args, kwargs)
            if run.columns is not None and cache is not None:
                held = thin(cache, layer, self.schedule, run.call.seq - run.columns.length)
                if layer == start:
                    held.kept = append(run.past, run.call.past, run.columns, run.call.seq)
            elif run.past is not None:
                expect(cache, layer)
            if run.columns is None and run.past is None:
                return None
            return args, self._reduced_arguments(run, args, kwargs)

        return hook

    def _start_stage(
        self, run: _Run, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        run.masks.clear()
        run.past = kept_before(kwargs.get("past_key_values"), layer, self.schedule)
        if run.call.layout is None or not self._falls(run.call, layer):
            return args, kwargs
        take = self._drop(run, layer)
        assert run.alive is not None
        run.trace.append((layer, run.alive))
        if args:
            return (gather_tokens(args[0], take), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": gather_tokens(kwargs["hidden_states"], take)}

    @torch.no_grad()
    def _drop(self, run: _Run, layer: int) -> Tensor:
        """Rank what is alive, keep the best; (batch, physical) int64, the columns that go on."""
        layout = run.call.layout
        assert layout is not None
        assert run.alive is not None
        context = Context(
            layer=layer,
            valid=run.alive,
            image=layout.image,
            index=layout.index,
            size=layout.size,
            attention=run.attention,
            queries=None if run.queries is None else run.queries[1],
            vision_attention=run.call.received,
        )
        scores = self.ranker.score(context).to(run.alive.device)
        run.attention = None
        kept = [sum(self._count(n, layer) for n in self._groups(sizes)) for sizes in layout.sizes]
        run.alive = choose(scores, run.alive, *self._quota(run.call, layer))
        take, run.columns = shrink(layout, run.alive, kept, run.columns)
        return take

    def _reduced_arguments(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        reduced = dict(kwargs)
        reduced["attention_mask"] = self._reduced_mask(run, args, kwargs)
        if "position_ids" in kwargs:
            # flash attention would read gaps in them as packed sequences; rotary tables say it all
            reduced["position_ids"] = None
        embeddings = kwargs.get("position_embeddings")
        if run.columns is not None and embeddings is not None:
            index = run.columns.index
            reduced["position_embeddings"] = tuple(gather_tokens(part, index) for part in embeddings)
        return reduced

    def _reduced_mask(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        given: Tensor | None = kwargs.get("attention_mask")
        if id(given) in run.masks:
            return run.masks[id(given)][1]
        mask = given
        columns = (run.columns, None if run.past is None else run.past.columns)
        ragged = any(held is not None and held.valid is not None for held in columns)
        if mask is None and ragged:
            device = (args[0] if args else kwargs["hidden_states"]).device
            mask = causal(run.call.seq, run.call.past + run.call.seq, run.call.implementation, device)
        if mask is not None:
            mask = reduce_mask(mask, run.call.past, run.past, run.columns)
        run.masks[id(given)] = (given, mask)  # the given one is kept so that its id stays its own
        return mask

    def _arm(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            run: _Run | None = getattr(self._local, "run", None)
            if run is None or run.queries is None or not self._falls(run.call, layer + 1):
                return
            layout = run.call.layout
            assert layout is not None
            assert run.alive is not None
            rows, columns = run.queries[0], layout.column
            if run.columns is not None:
                rows = run.columns.physical(rows, run.call.seq)
                columns = run.columns.physical(columns, run.call.seq)
            self._probes[layer].arm(TextRows(rows, columns, run.alive))

        return hook

    def _disarm(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            probe = self._probes.get(layer)
            request = None if probe is None else probe.disarm()
            run: _Run | None = getattr(self._local, "run", None)
            if request is not None and run is not None:
                run.attention = request.result

        return hook

    def _spread_out(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The last layer's output in logical columns, so that logits and labels line up with the input."""
        run: _Run | None = getattr(self._local, "run", None)
        if run is None or run.columns is None:
            return None
        if isinstance(output, tuple):
            return (scatter_tokens(output[0], run.columns, run.call.seq), *output[1:])
        return scatter_tokens(output, run.columns, run.call.seq)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        run: _Run | None = getattr(self._local, "run", None)
        self._local.run = None
        if run is not None and run.trace:
            self._local.trace = run.trace

    # --- how many

    def _groups(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the sets of tokens that compete: each image, or the whole prompt."""
        return sizes if self.per == "image" else (sum(sizes),)

    def _count(self, n: int, layer: int) -> int:
        if n not in self._counts:
            self._counts[n] = self.schedule.counts(n)
        return self._counts[n][layer]

    def _falls(self, call: Call, layer: int) -> bool:
        """Whether any group has fewer tokens in this layer than in the one before."""
        assert call.layout is not None
        sizes = {n for row in call.layout.sizes for n in self._groups(row)}
        return any(self._count(n, layer) < (self._count(n, layer - 1) if layer else n) for n in sizes)

    def _quota(self, call: Call, layer: int) -> tuple[Tensor, Tensor]:
        """The group of each token and how many its group may keep, (batch, tokens) int64 both."""
        layout = call.layout
        assert layout is not None
        if self.per == "prompt":
            totals = torch.tensor(
                [self._count(sum(row), layer) for row in layout.sizes], device=layout.image.device
            )
            return torch.zeros_like(layout.image), totals[:, None].expand_as(layout.image)
        count = torch.zeros_like(layout.size)
        for n in {n for row in layout.sizes for n in row}:
            count = torch.where(layout.size == n, self._count(n, layer), count)
        return layout.image, count
