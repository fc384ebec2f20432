"""The mechanism: hooks on a model by which its decoder layers get fewer and fewer vision tokens.

Before a layer at which the schedule falls, tokens are dropped by what the layer before attended to; after the
last one, states are back in the caller's own columns. Says what happens when. How many tokens (quotas.py),
which (selecting.py) and with what arguments a layer then runs (arguments.py) it asks others.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..ranking import (
    STATES,
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Ranker,
    full_precision,
    get_statistic,
    row_weights,
)
from ..schedule import Schedule
from .arguments import LayerArguments
from .cache import append, cache_of, filled, is_paged, kept_before
from .call import Plan, encode_pixels, named_arguments, read_call, same_shape
from .encoding import VisionTap
from .families import (
    attention_of,
    base_model,
    check_attention,
    check_recomputation,
    check_replica,
    decoder_layers,
    writes_vision_after,
)
from .hooks import Hooks, forget_compiled
from .layout import last_of_prompt, query_columns
from .masks import scatter_tokens
from .passes import Pass, ThreadState
from .quotas import Quotas
from .scoring import Probe, TextRows
from .selecting import Selector

if TYPE_CHECKING:
    from ..adaptive import Adaptive

__all__ = ["Reducer"]


class Reducer:
    """Runs the passes of a model under a reduction, once it is installed."""

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: Schedule,
        ranker: Ranker,
        adaptive: Adaptive | None,
        quotas: Quotas,
        local: ThreadState,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.ranker = ranker
        self.adaptive = adaptive
        self.quotas = quotas
        self.local = local
        self._selector = Selector(ranker, quotas)
        self._arguments = LayerArguments(model, schedule, local)
        self._statistic = None if adaptive is None else get_statistic(adaptive.statistic)
        self._base = base_model(model)
        self._written = writes_vision_after(model)
        self._hooks = Hooks()
        self._probes: dict[int, Probe] = {}
        self._tap: VisionTap | None = None
        self._lock = threading.Lock()
        self._passes: dict[int, threading.Thread] = {}  # with a pass under way that was begun here
        self.on = False

    # --- on and off

    def install(self) -> None:
        """Put the hooks on; all of them, or none."""
        try:
            self._install()
            self.on = True
        except BaseException:
            self._take_off()
            raise

    def _install(self) -> None:
        starts = self.quotas.starts
        if not starts:
            return  # a full schedule leaves the stock model as it is
        base, layers = self._base, decoder_layers(self.model)
        if base is not self.model:
            self._hooks.before(self.model, self._ask)
        self._hooks.before(base, self._enter)
        self._hooks.after(base, self._leave, always=True)
        if VISION_ATTENTION in self.ranker.needs:
            self._tap = VisionTap(self.model)
        read = {start - 1 for start in starts if start and TEXT_ATTENTION in self.ranker.needs}
        if self.adaptive is not None:
            read.add(self.adaptive.layer - 1)
        self._probes = {layer: Probe(attention_of(layers[layer])) for layer in sorted(read)}
        for index, layer in enumerate(layers):
            decides = self.adaptive is not None and index == self.adaptive.layer
            if index >= starts[0] or index in self._probes or decides:
                self._hooks.before(layer, self._reduce, index, decode=self._arguments.whole)
            if index in self._written or index == len(layers) - 1:
                self._hooks.after(layer, self._spread_out)
        forget_compiled()

    def remove(self) -> None:
        """Take everything off again: at once, or as the last pass ends that other threads have under way.

        Such a pass is reduced to its end, for half of it cannot be undone; none is that begins later. What
        this thread has under way was broken off, by an interrupt that left no time to end it.
        """
        with self._lock:
            self.on = False
            self._end()

    @property
    def ending(self) -> bool:
        """Whether it was taken off, but passes of other threads are still under way."""
        return not self.on and bool(self._passes)

    def _begin(self) -> bool:
        """This thread begins a pass; whether it is to be reduced."""
        with self._lock:
            if self.on:
                self._passes[threading.get_ident()] = threading.current_thread()
            else:
                self._end()
            return self.on

    def _end(self) -> None:
        """This thread has no pass under way any more, and threads that are gone have none; under the lock."""
        self._passes.pop(threading.get_ident(), None)
        if not self.on:
            self._passes = {ident: each for ident, each in self._passes.items() if each.is_alive()}
            if not self._passes:
                self._take_off()

    def _take_off(self) -> None:
        self._hooks.remove()
        for probe in self._probes.values():
            probe.restore()
        self._probes.clear()
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    # --- hooks, in the order in which they fire

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn from the whole model's call how many of its last tokens an assistant proposed."""
        keep, cache = kwargs.get("logits_to_keep"), cache_of(kwargs)
        first = cache is not None and not cache.get_seq_length()
        self.local.candidates = max(0, keep - 1) if first and isinstance(keep, int) else 0

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Begin a pass: read what of its input is vision."""
        local = self.local
        local.run, local.masks = None, {}
        local.reduced = self._begin()
        if not local.reduced:
            return None
        check_replica(module, self._base)
        arguments = encode_pixels(self.model, named_arguments(module, args, kwargs))
        candidates, local.candidates = local.candidates, 0
        made = local.plan
        if made is None:
            plan = self.read(arguments, candidates)
        else:
            plan = made if same_shape(made, arguments) else None
        if plan is not None:
            # generate_batch() changes the implementation on its way, or passes a cache of its own
            check_attention(self.model, paged=is_paged(arguments))
            check_recomputation(self.model)
            local.run = Pass(plan, local.first)
        return (), arguments

    def read(self, arguments: dict[str, Any], candidates: int = 0) -> Plan | None:
        """All that a pass needs to know of its inputs; None where there is no vision token."""
        call = read_call(self.model, arguments, replace(self.local.said, candidates=candidates))
        if call is None:
            return None
        layout, queries, ends = call.layout, None, None
        if self.ranker.needs & {TEXT_ATTENTION, STATES} or self.adaptive is not None:
            queries = query_columns(layout, call.prompt, self.ranker.queries, self.ranker.rows)
        last = last_of_prompt(layout, call.prompt)
        if last is not None:
            ends = tuple(torch.where(last, self.quotas.group_of(layout), -1).amax(1).tolist())
        quota = None if self.adaptive is not None else self.quotas.of_stages(layout, [0] * len(layout.sizes))
        return Plan(call, queries, last, ends, quota)

    def _reduce(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: drop what it does not get, and have read what the next one needs."""
        run = self.local.run
        if run is None:
            mine = self.on or self.local.reduced
            return self._arguments.whole(layer, module, args, kwargs) if mine else None
        if layer < run.first:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        run.disarm()
        if self.adaptive is not None and layer == self.adaptive.layer:
            self._decide(run, self.adaptive)
        if layer in self.quotas.starts:
            states = self._start_stage(run, layer, cache_of(kwargs), states)
        if run.columns is None:
            reduced = self._arguments.whole(layer, module, args, kwargs)
        else:
            reduced = self._arguments.reduced(run, run.columns, layer, states, args, kwargs)
        if layer in self._probes:  # now rows and columns are those that the layer sees
            self._arm(run, layer, kwargs)
        return reduced

    def _decide(self, run: Pass, adaptive: Adaptive) -> None:
        """Give each row one of an adaptive reduction's schedules."""
        assert run.attention is not None
        assert run.queries is not None
        assert self._statistic is not None
        attention = run.attention
        with full_precision(attention.device):
            values = self._statistic(attention, run.queries[1].to(attention.device), run.alive).tolist()
        self.local.statistic = values
        run.follow([adaptive.level(value) for value in values])

    def _start_stage(self, run: Pass, layer: int, cache: Any, states: Tensor) -> Tensor:
        """Drop what this layer does not get; the states, which a ranker that merges has changed."""
        before = kept_before(cache, layer, self.schedule)
        if self.quotas.falls(run, layer):
            with full_precision(states.device):
                states = self._selector.drop(run, layer, states)
            run.trace.append((layer, run.alive))
        if run.columns is not None and cache is not None:
            run.kept = append(before, run.call.past, run.columns, run.call.seq)
        return states

    def _arm(self, run: Pass, layer: int, kwargs: dict[str, Any]) -> None:
        """Have the layer's attention read for the next one's ranking."""
        decides = self.adaptive is not None and layer + 1 == self.adaptive.layer
        if run.queries is None or not (decides or any(self.quotas.ranking(run, layer + 1))):
            return
        rows, columns = run.places(run.queries[0], run.call.layout.column)
        if run.weights is None and self.ranker.pools and self.adaptive is None:
            run.weights = row_weights(run.queries[1])
        run.armed = self._probes[layer]
        cached = filled(cache_of(kwargs), layer)
        run.armed.arm(TextRows(rows, columns, run.alive, cached, run.weights))

    def _spread_out(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A layer's output in logical columns: the last one's, so that logits and labels line up with the
        input, and those after which the decoder itself writes to vision positions."""
        run = self.local.run
        if run is None or run.columns is None:
            return None
        run.spread = True
        states = output[0] if isinstance(output, tuple) else output
        states = scatter_tokens(states, run.columns, run.call.seq)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the pass."""
        run, self.local.run = self.local.run, None
        self.local.masks = {}
        if run is not None:
            run.disarm()  # an exception may have come before the next layer did
            self.local.trace = run.trace
        self.local.reduced = False
        with self._lock:
            self._end()
