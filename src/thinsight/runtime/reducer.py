"""One forward pass under a reduction, from top to bottom.

`Quotas` knows how many tokens each layer gets. A `Pass` is what is known of the pass under way. `Reducer` is
the mechanism, hung onto the stock model as hooks; its methods stand in the order in which a pass comes to them:
the call is read, before each layer tokens are dropped and its arguments shrink, and at the end the states are
put back where the caller expects them. How inputs are read is in call.py, how attention is in scoring.py.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import GenerationMixin, PreTrainedModel

from ..errors import BadInput, Unsupported
from ..ranking import (
    STATES,
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Context,
    Ranker,
    best,
    choose,
    full_precision,
    get_statistic,
    row_weights,
)
from ..schedule import Schedule
from .anatomy import (
    attending_before,
    attention_implementation,
    attention_of,
    base_model,
    check_attention,
    check_positions,
    check_recomputation,
    check_replica,
    decoder_layers,
    scales_by_position,
    shared_keys,
    state_layers,
    writes_vision_after,
)
from .cache import Kept, Thinned, ThinnedKeys, append, cache_of, filled, is_paged, thin, thinned
from .call import (
    Layout,
    Plan,
    Said,
    encode_pixels,
    last_of_prompt,
    named_arguments,
    query_columns,
    read_call,
    same_shape,
)
from .encoding import VisionTap
from .scoring import Probe, TextRows
from .tensors import Columns, causal, gather_tokens, reduce_mask, replace_tokens, scatter_tokens

if TYPE_CHECKING:
    from ..schedule import Adaptive


class Quotas:
    """How many tokens of which group enter which layer; arguments as `Handle` has them. A pass's levels number
    the schedules of an adaptive reduction."""

    def __init__(
        self, schedule: Schedule, adaptive: Adaptive | None, per: str, rerank: bool | float, own: int | None = None
    ) -> None:
        # layers that read another's keys cannot leave tokens out: each has those of the last one before them
        self.own = schedule.num_layers if own is None else own
        self.falls = any(rate < 1 for rate in schedule.keep_rates)
        rates = schedule.keep_rates[: self.own]
        # a stage is a run of layers with one keep rate below 1
        self.starts = [i for i, rate in enumerate(rates) if rate < (rates[i - 1] if i else 1.0)]
        self._schedules = (schedule,) if adaptive is None else adaptive.schedules
        self._counts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._per = per
        self._share = float(rerank)  # True is 1: a row that falls gets less than ever; False is 0

    def groups(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the sets of tokens that compete: each image, or the whole prompt."""
        return sizes if self._per == "image" else (sum(sizes),)

    def group_of(self, layout: Layout) -> Tensor:
        """The group of each token, (batch, tokens) int64."""
        return layout.image if self._per == "image" else torch.zeros_like(layout.image)

    def count(self, n: int, layer: int, level: int) -> int:
        """How many of a group's n tokens enter a layer."""
        if (n, level) not in self._counts:
            self._counts[n, level] = self._schedules[level].counts(n)
        return self._counts[n, level][min(layer, self.own - 1)]

    def rows(self, run: Pass, layer: int) -> list[tuple[int, ...]]:
        """Per row, how many tokens of each group enter a layer; -1: the pass."""
        if layer not in run.counts:
            rows = [self.groups(sizes) for sizes in run.call.layout.sizes]
            if layer >= 0:
                levels = zip(rows, run.levels, strict=True)
                rows = [tuple(self.count(n, layer, level) for n in groups) for groups, level in levels]
            run.counts[layer] = rows
        return run.counts[layer]

    def ranking(self, run: Pass, layer: int) -> list[bool]:
        """Which rows rank anew before this layer. Each row decides by its own counts, so that a prompt is
        ranked alike alone and in a batch."""
        rows = zip(self.rows(run, layer), self.rows(run, layer - 1), run.ranked, strict=True)
        share = self._share
        return [now != before and (last is None or sum(now) < share * last) for now, before, last in rows]

    def of_stages(self, layout: Layout, levels: tuple[int, ...]) -> Tensor:
        """How many of each group every stage may keep: (stages, batch, groups) int64, 0 where a row has
        fewer groups."""
        rows = [(self.groups(sizes), level) for sizes, level in zip(layout.sizes, levels, strict=True)]
        most = max(1, *(len(groups) for groups, _ in rows))
        counts = [
            [[self.count(n, layer, level) for n in groups] + [0] * (most - len(groups)) for groups, level in rows]
            for layer in self.starts
        ]
        return torch.tensor(counts, device=layout.image.device)


@dataclass(eq=False)
class PassState:
    """What a pass knows of its vision tokens on the way into a layer. Values are replaced, never changed."""

    alive: Tensor  # (batch, tokens) bool
    columns: Columns | None = None  # of the pass's own tokens; None: all are there
    take: Tensor | None = None  # (batch, physical) int64, columns of the states that go on
    kept: Kept | None = None  # the cache's record after this pass, at this stage
    spread: bool = False  # whether hidden states are in logical columns although tokens were dropped
    cut: bool = False  # whether the model has cut them to the last columns, behind the layers with keys of their own
    stored: tuple[tuple[int, Columns], ...] = ()  # by layer whose keys others read, the columns of those keys
    # (batch, heads, queries, tokens) float32, of the last layer that attends, or pooled: (batch, tokens)
    attention: Tensor | None = None
    scores: Tensor | None = None  # (batch, tokens) float32, of each row's last ranking
    ranked: tuple[int | None, ...] = ()  # per row, how many tokens that ranking kept
    levels: tuple[int, ...] = ()  # per row, which of an adaptive reduction's schedules
    trace: tuple[tuple[int, Tensor], ...] = ()  # from which layer on, alive


class Pass(PassState):
    """One forward pass with vision tokens; layers before `first` do not run (see prefix.py)."""

    def __init__(self, plan: Plan, first: int = 0) -> None:
        rows, alive = len(plan.call.layout.sizes), plan.call.layout.valid
        super().__init__(alive, ranked=(None,) * rows, levels=(0,) * rows, trace=((0, alive),))
        self.plan = plan
        self.call = plan.call
        self.first = first
        self.armed: Probe | None = None  # of the layer that runs
        self.weights: Tensor | None = None  # (batch, queries) float32, of rows of attention that are pooled
        self.quota = plan.quota  # (stages, batch, groups) int64 for these levels; None: not made yet
        self.counts: dict[int, list[tuple[int, ...]]] = {}  # likewise, by layer: see `Quotas.rows`

    def places(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Where logical columns (batch, any) stand in the states that come next; dropped ones: anywhere."""
        if self.columns is None or self.spread:
            return columns
        return self.columns.physical(self.call.seq, *columns)

    def follow(self, levels: tuple[int, ...]) -> None:
        """From here on, each row goes by this one of an adaptive reduction's schedules."""
        if levels != self.levels:
            self.levels, self.quota, self.counts = levels, None, {}

    def disarm(self) -> None:
        """Take over what the layer before was to read."""
        probe, self.armed = self.armed, None
        request = None if probe is None else probe.disarm()
        if request is not None:
            self.attention = request.result

    def state(self) -> PassState:
        """Where the pass stands, on the way into a layer."""
        self.disarm()
        return PassState(**{field.name: getattr(self, field.name) for field in fields(PassState)})

    def restore(self, state: PassState) -> None:
        """Go on from there."""
        self.follow(state.levels)
        vars(self).update(vars(state))


class ThreadState(threading.local):
    """What a thread has said of its passes to come, and knows of the one under way and the last."""

    said = Said()
    plan: Plan | None = None  # that its passes follow
    first = 0  # layer at which its passes begin
    candidates = 0  # last tokens of the next pass that an assistant proposed
    run: Pass | None = None  # under way; None where no vision token passes, as in decoding
    reduced = False  # whether a pass that the reduction has begun is under way, vision tokens or not
    trace: tuple[tuple[int, Tensor], ...] | None = None  # of the last pass, see `PassState`
    statistic: list[float] | None = None  # per row of the last pass, of an adaptive reduction

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}  # masks and rotary tables that layers of the pass share

    @contextmanager
    def having(self, **what: Any) -> Iterator[None]:
        """These attributes for as long as it lasts."""
        before = {name: getattr(self, name) for name in what}
        vars(self).update(what)
        try:
            yield
        finally:
            vars(self).update(before)


class Reducer:
    """Runs the passes of a model under a reduction, once it is installed."""

    def __init__(
        self, model: PreTrainedModel, schedule: Schedule, ranker: Ranker, quotas: Quotas, adaptive: Adaptive | None
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.ranker = ranker
        self.adaptive = adaptive
        self.quotas = quotas
        self._reads = shared_keys(model)  # by layer, the one whose keys it reads in place of its own
        self.local = ThreadState()
        self.on = False
        self._merges = type(ranker).merge is not Ranker.merge
        self._statistic: Any = None if adaptive is None else get_statistic(adaptive.statistic)
        self._base = base_model(model)
        self._states = state_layers(model)
        self._placed = scales_by_position(model)
        self._hooks: list[Any] = []
        self._probes: dict[int, Probe] = {}
        self._asks: dict[int, int | None] = {}  # layer that ranks -> the one before whose attention it reads
        self._tap: VisionTap | None = None
        self._lock = threading.Lock()
        self._passes: dict[int, threading.Thread] = {}  # with a pass under way that was begun here

    # --- on and off

    def install(self) -> None:
        """Put the hooks on; all of them, or none."""
        try:
            if self.quotas.falls:  # a full schedule leaves the stock model as it is
                self._install(self.quotas.starts)
            self.on = True
        except BaseException:
            self._take_off()
            raise

    def _install(self, starts: list[int]) -> None:
        layers = decoder_layers(self.model)
        # Behind the layers with keys of their own, Gemma 4 runs on the last columns alone where no other is asked for.
        spread = {*writes_vision_after(self.model), self.quotas.own - 1, len(layers) - 1}

        def before(module: nn.Module, *hook: Any) -> None:
            self._hooks.append(module.register_forward_pre_hook(Hook(*hook), with_kwargs=True))

        def after(module: nn.Module, hook: Any, always: bool = False) -> None:
            self._hooks.append(module.register_forward_hook(Hook(hook), always_call=always))

        before(self.model, self._ask)  # before the next one, where both are one module
        if isinstance(self.model, GenerationMixin) and not self.model._supports_logits_to_keep():
            # VideoLLaMA 3: without it `generate` would not say what `_ask` needs
            vars(self.model)["_supports_logits_to_keep"] = Hook(_yes)
        before(self._base, self._enter)
        after(self._base, self._leave, always=True)  # after an exception, too
        if VISION_ATTENTION in self.ranker.needs:
            self._tap = VisionTap(self.model)
        ranks = set(starts) if TEXT_ATTENTION in self.ranker.needs else set()
        if self.adaptive is not None:
            ranks.add(self.adaptive.layer)
        self._asks = {layer: attending_before(self.model, layer) for layer in sorted(ranks)}
        read = sorted({layer for layer in self._asks.values() if layer is not None})
        self._probes = {layer: Probe(attention_of(layers[layer])) for layer in read}
        for index, layer in enumerate(layers):
            decides = self.adaptive is not None and index == self.adaptive.layer
            if (starts and index >= starts[0]) or index in self._probes or decides:
                before(layer, self._reduce, (index,), self._whole)
            if index in spread:
                after(layer, self._spread_out)
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

    def _end(self) -> None:
        """This thread has no pass under way any more, and threads that are gone have none; under the lock."""
        self._passes.pop(threading.get_ident(), None)
        if not self.on:
            self._passes = {ident: each for ident, each in self._passes.items() if each.is_alive()}
            if not self._passes:
                self._take_off()

    def _take_off(self) -> None:
        vars(self.model).pop("_supports_logits_to_keep", None)
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            forget_compiled()
        self._hooks.clear()
        for probe in self._probes.values():
            probe.restore()
        self._probes.clear()
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    # --- 1) The whole model is called

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn from the whole model's call how many of its last tokens an assistant proposed."""
        # Assisted decoding reads the prompt and the first proposals in one pass, and only the logits that it
        # asks for tell them apart. Proposals must not rank: without an assistant they are not there.
        keep, cache = kwargs.get("logits_to_keep"), cache_of(kwargs)
        first = cache is not None and not cache.get_seq_length()
        self.local.candidates = max(0, keep - 1) if first and isinstance(keep, int) else 0

    # --- 2) It calls the model without its head, and the pass begins

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Begin a pass: read what of its input is vision."""
        # 1) Whatever an exception has left of the pass before goes. A pass is counted for as long as it runs,
        # so that a reduction which another thread takes off meanwhile stays to its end.
        local = self.local
        local.run, local.made = None, {}
        with self._lock:
            local.reduced = self.on
            if self.on:
                self._passes[threading.get_ident()] = threading.current_thread()
            else:
                self._end()
        if not local.reduced:
            return None
        check_replica(module, self._base)
        if torch.jit.is_tracing():
            raise Unsupported(_TRACED)

        # 2) Encode images here already, since their token counts decide what is dropped. The model gets the
        # features in place of the pixels, so the tower runs once.
        arguments = encode_pixels(self.model, named_arguments(module, args, kwargs))
        if "_supports_logits_to_keep" in vars(self.model):  # whose class does not know it
            arguments.pop("logits_to_keep", None)

        # 3) Read what is vision, what is prompt and which text ranks; or follow a plan, which has it read.
        candidates, local.candidates = local.candidates, 0
        plan = local.plan
        if plan is None:
            plan = self.read(arguments, candidates)
        elif not same_shape(plan, arguments):
            plan = None

        # 4) Refuse what runs only while nothing is dropped. Not when the reduction was put on: generate_batch()
        # changes the implementation on its way, or passes a cache of its own.
        if plan is not None:
            check_attention(self.model, paged=is_paged(arguments))
            check_recomputation(self.model)
            check_positions(self.model, plan.call.past + plan.call.seq)
            local.run = Pass(plan, local.first)
        return (), arguments

    def read(self, arguments: dict[str, Any], candidates: int = 0) -> Plan | None:
        """All that a pass needs to know of its inputs; None where there is no vision token."""
        call = read_call(self.model, arguments, replace(self.local.said, candidates=candidates))
        if call is None:
            return None
        layout, ranker, queries, ends = call.layout, self.ranker, None, None
        if ranker.needs & {TEXT_ATTENTION, STATES} or self.adaptive is not None:
            queries = query_columns(layout, call.prompt, ranker.queries, ranker.rows)
        last = last_of_prompt(layout, call.prompt)
        if last is not None:
            ends = tuple(torch.where(last, self.quotas.group_of(layout), -1).amax(1).tolist())
        quota = None if self.adaptive is not None else self.quotas.of_stages(layout, (0,) * len(layout.sizes))
        return Plan(call, queries, last, ends, quota)

    # --- 3) Its decoder calls layer after layer

    def _reduce(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: drop what it does not get, and have read what the next one needs."""
        run = self.local.run
        if run is None:
            # Text, or a token that is decoded. Nothing is dropped, but the cache may lack what was.
            mine = self.on or self.local.reduced
            return self._whole(layer, module, args, kwargs) if mine else None
        if layer < run.first:
            return None
        states = args[0] if args else kwargs["hidden_states"]

        # 1) Take over the rows of attention that the layer before has read.
        run.disarm()

        # 2) An adaptive reduction gives each prompt one of its schedules, by those rows.
        if self.adaptive is not None and layer == self.adaptive.layer:
            self._decide(run, self.adaptive)

        # 3) Where the count falls, drop. What the cache lacks from here on is recorded once: the layers up to
        # the next fall hold the same columns, behind what turns before this one have left.
        if layer in self.quotas.starts:
            if self.quotas.rows(run, layer) != self.quotas.rows(run, layer - 1):
                with full_precision(states.device):
                    states = self._drop(run, layer, states)
                self._check_states(run, layer)
                run.trace = (*run.trace, (layer, run.alive))
            cache = cache_of(kwargs)
            if run.columns is not None and cache is not None:
                held = thinned(cache, layer)
                run.kept = append(None if held is None else held.kept, run.call.past, run.columns, run.call.seq)

        # 4) The arguments shrink with the states.
        if run.columns is None:
            reduced = self._whole(layer, module, args, kwargs)
        else:
            reduced = self._shrunk(run, run.columns, layer, states, args, kwargs)
            if layer in self._reads.values():
                run.stored = (*run.stored, (layer, run.columns))

        # 5) Have this layer's attention read, if the next one's tokens are ranked by it. Only now are rows and
        # columns those that it sees.
        if layer in self._probes:
            self._arm(run, layer, kwargs)
        return reduced

    def _decide(self, run: Pass, adaptive: Adaptive) -> None:
        """Give each row one of an adaptive reduction's schedules."""
        attention, queries = run.attention, run.plan.queries
        assert attention is not None
        assert queries is not None
        with full_precision(attention.device):
            values = self._statistic(attention, queries[1].to(attention.device), run.alive).tolist()
        self.local.statistic = values
        run.follow(tuple(adaptive.level(value) for value in values))

    def _drop(self, run: Pass, layer: int, states: Tensor) -> Tensor:
        """Keep the best of what is alive, as many as the quotas say; the states, which a ranker that merges
        has changed."""
        layout, counts, ranking = run.call.layout, self.quotas.rows(run, layer), self.quotas.ranking(run, layer)
        kept = [sum(row) for row in counts]
        with torch.no_grad():
            # 1) Score. Rows that do not rank anew keep the scores of their last ranking.
            context = self._context(run, layer, states) if any(ranking) or self._merges else None
            if context is not None and any(ranking):
                scores = self.ranker.score(context).to(run.alive.device)
                keeping = [not ranks and last is not None for ranks, last in zip(ranking, run.ranked, strict=True)]
                if run.scores is not None and any(keeping):
                    rows = zip(keeping, run.scores, scores, strict=True)
                    scores = torch.stack([old if keeps else new for keeps, old, new in rows])
                run.scores = scores
                now = zip(ranking, kept, run.ranked, strict=True)
                run.ranked = tuple(count if ranks else last for ranks, count, last in now)
            # The next ranking reads its own, if a layer attends before it; if none does, this one serves again.
            if self._asks.get(layer) not in [read for later, read in self._asks.items() if later > layer]:
                run.attention = None

            # 2) Choose. The token that a prompt ends in stays: its answer is read from there.
            assert run.scores is not None
            scores = run.scores if run.plan.last is None else run.scores.masked_fill(run.plan.last, torch.inf)
            if len(set(counts)) == 1 and len(counts[0]) == 1:
                run.alive = best(scores, run.alive, counts[0][0])  # one count for all: a plain top-k
            else:
                if run.quota is None:
                    run.quota = self.quotas.of_stages(layout, run.levels)
                group = self.quotas.group_of(layout)
                most = run.quota[self.quotas.starts.index(layer)].gather(1, group)
                run.alive = choose(scores, run.alive, group, most)
            self._check_ends(run, layer)

            # 3) Say which columns go on. Places to merge into are those of the states as they are still.
            places = run.places(layout.column)[0] if self._merges else None
            run.take, run.columns = shrink(layout, run.alive, kept, run.columns, in_front=bool(self._states))

        # 4) Merge what goes into what stays; with its gradient, unlike the choice.
        if context is None or places is None:
            return states
        merged = self.ranker.merge(context, run.alive)
        if merged is None:
            return states
        changed = replace_tokens(main_stream(states), places, run.alive, merged)
        return changed if states.ndim == 3 else torch.cat([changed[None], states[1:]])

    def _context(self, run: Pass, layer: int, states: Tensor) -> Context:
        queries = run.plan.queries
        pooled = run.attention is not None and run.attention.ndim == 2
        seen = text = None
        if STATES in self.ranker.needs:
            assert queries is not None
            places = run.places(run.call.layout.column, queries[0])
            seen, text = (gather_tokens(main_stream(states), each) for each in places)
        return run.call.context(
            layer=layer,
            valid=run.alive,
            attention=None if pooled else run.attention,
            pooled=run.attention if pooled else None,
            queries=None if queries is None else queries[1],
            states=seen,
            text_states=text,
        )

    def _check_ends(self, run: Pass, layer: int) -> None:
        """Refuse to drop the image that a prompt ends in."""
        if run.plan.ends is None:
            return
        for group, sizes, level in zip(run.plan.ends, run.call.layout.sizes, run.levels, strict=True):
            if group >= 0 and not self.quotas.count(self.quotas.groups(sizes)[group], layer, level):
                raise BadInput(
                    f"a prompt ends in an image of which layer {layer} keeps no token, so nothing is left to "
                    "answer from; let text follow on the image"
                )

    def _check_states(self, run: Pass, layer: int) -> None:
        """Refuse rows of different length behind a cached state, which filling would change: at a prompt's start, where
        there is none, it stands in front and changes nothing."""
        ragged = run.columns is not None and run.columns.valid is not None
        if ragged and run.call.past and any(state >= layer for state in self._states):
            raise Unsupported(
                "the rows of this later turn keep different numbers of tokens, and decoder layers that carry a state "
                "would take in what fills the shorter ones; call with one prompt at a time"
            )

    def _shrunk(self, run: Pass, columns: Columns, layer: int, states: Tensor, args: Any, kwargs: Any) -> Any:
        """The arguments in a pass some of whose vision tokens are dropped, so that `columns` are left."""
        # 1) States. After a layer behind which the decoder writes to vision positions they are spread out; a model that
        # cuts them to the last columns there has cut all else, too, and goes on with these to the end.
        seq, total = run.call.seq, run.call.past + run.call.seq
        run.cut = run.cut or (run.spread and states.shape[-2] < seq)
        take = columns.index if run.spread else run.take
        run.take, run.spread = None, False
        queries = None if run.cut else columns
        states = states if take is None or queries is None else gather_tokens(states, take)

        # 2) The layer of the cache is told what comes, and its mask is cut to what is there.
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        if layer in self._reads:
            source = self._reads[layer]
            keys = dict(run.stored).get(source)
            length = states.shape[-2] if run.cut else seq
            mask = self._read_mask(mask, _keys(thinned(cache, source)), keys, queries, length, total, states)
        else:
            held = None
            if cache is not None:
                held = thin(cache, layer, self.schedule)
                held.expect(columns.index.shape[0], seq, columns, run.kept)
            if layer in self._states:  # it hides padding alone, of which none is left but what fills rows
                mask = None if columns.valid is None else columns.valid.to(states.device)
            else:
                mask = self._mask(mask, _keys(held), columns, seq, total, states.device)
        reduced = {**kwargs, "attention_mask": mask}

        # 3) The rotary tables, which keep each token where the full model has it: positions are not closed up over what
        # was dropped. And what else a layer is told of each token.
        if queries is None:
            return _replaced(states, args, reduced, self._placed)
        for name in _PER_TOKEN & kwargs.keys():
            reduced[name] = self._gathered(kwargs[name], queries)
        for name in (_TYPES | {"position_ids"} if self._placed else _TYPES) & kwargs.keys():
            if kwargs[name] is not None:
                index = queries.index.to(kwargs[name].device)
                reduced[name] = kwargs[name].expand(len(index), -1).gather(1, index)
        args = (*args[:1], *(self._gathered(each, queries) for each in args[1:]))
        return _replaced(states, args, reduced, self._placed)

    def _gathered(self, given: Any, columns: Columns) -> Any:
        """An argument of a layer that says something of each token, (..., seq, any) or a tuple of such, for those that
        are there; anything else as it is."""
        if isinstance(given, tuple):
            return tuple(self._gathered(each, columns) for each in given)
        if not isinstance(given, Tensor) or given.ndim < 3:
            return given
        return self._once((given, columns), partial(gather_tokens, given, columns.index))

    def _whole(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments in a pass that is all there, as in decoding, behind what may be a thinned cache; None
        where they may stay as they are."""
        source = self._reads.get(layer, layer)
        held = thinned(cache_of(kwargs), source)
        if held is None:
            return None
        held.check(self.schedule)
        states = args[0] if args else kwargs["hidden_states"]
        (batch, seq), mask = states.shape[-3:-1], kwargs.get("attention_mask")
        if not isinstance(held, ThinnedKeys):  # a state, in which nothing is missing
            held.expect(batch, seq)
            return None
        # a static cache's length is on the device: it is asked for only where a mask has to be written out
        total = int(held.get_seq_length()) + (seq if source == layer else 0) if mask is None and held.ragged else 0
        if source == layer:
            held.expect(batch, seq)
        if held.kept is None:
            return None
        reduced = {**kwargs, "attention_mask": self._mask(mask, held, None, seq, total, states.device)}
        return _replaced(states, args, reduced, self._placed)

    def _mask(
        self, mask: Any, held: ThinnedKeys | None, columns: Columns | None, seq: int, total: int, device: torch.device
    ) -> Any:
        """A layer's mask in physical columns."""
        ragged = held.ragged if held is not None else columns is not None and columns.valid is not None
        if mask is None and not ragged:
            return None  # a causal kernel goes by order alone, and the order stays

        def make() -> Any:
            keys = columns if held is None else held.columns()
            assert keys is not None
            whole = causal(seq, total, attention_implementation(self.model), device) if mask is None else mask
            return reduce_mask(whole, keys, columns, 0 if held is None else held.offset)

        return self._once((mask, type(held), None if held is None else held.kept, columns), make)

    def _read_mask(
        self,
        mask: Any,
        held: ThinnedKeys | None,
        stored: Columns | None,
        queries: Columns | None,
        seq: int,
        total: int,
        states: Tensor,
    ) -> Any:
        """The mask of a layer that reads another's keys, which may be more than its own tokens: those that `held`
        holds, or without a thinned cache the columns `stored`, or all."""

        def make() -> Any:
            implementation = attention_implementation(self.model)
            whole = causal(seq, total, implementation, states.device) if mask is None else mask
            keys = stored if held is None else held.columns()
            if keys is None:
                length = whole.seq_lengths[1] if isinstance(whole, BlockMask) else whole.shape[-1]
                index = torch.arange(length, device=states.device)
                keys = Columns(index.expand(states.shape[-3], -1), None)
            return reduce_mask(whole, keys, queries, 0 if held is None else held.offset)

        return self._once(("read", mask, held, stored, queries), make)

    def _once(self, of: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What layers of a stage share, made by the first of them."""
        if torch.compiler.is_compiling():  # ids of tensors would tie the graph to these very tensors
            return make()
        made, key = self.local.made, tuple(map(id, of))
        if key not in made:
            made[key] = make(), of  # what the ids belong to is held on to, so that they stay its own
        return made[key][0]

    def _arm(self, run: Pass, layer: int, kwargs: dict[str, Any]) -> None:
        """Have the layer's attention read for the rankings before the next layer that attends."""
        readers = [reader for reader, read in self._asks.items() if read == layer]
        decides = self.adaptive is not None and self.adaptive.layer in readers
        ranks = (any(self.quotas.ranking(run, reader)) for reader in readers if reader in self.quotas.starts)
        if run.plan.queries is None or not (decides or any(ranks)):
            return
        queries, real = run.plan.queries
        rows, columns = run.places(queries, run.call.layout.column)
        if run.weights is None and self.ranker.pools and self.adaptive is None:
            run.weights = row_weights(real)
        run.armed = self._probes[layer]
        run.armed.arm(TextRows(rows, columns, run.alive, filled(cache_of(kwargs), layer), run.weights))

    # --- 4) The last layer is through

    def _spread_out(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A layer's output in logical columns: the last one's, so that logits and labels line up with the
        input, and those after which the decoder itself writes to vision positions."""
        run = self.local.run
        if run is None or run.columns is None:
            return None
        run.spread = True
        states = output[0] if isinstance(output, tuple) else output
        if run.cut:
            there = torch.ones_like(run.columns.index)[..., None]
            states = states * scatter_tokens(there, run.columns, run.call.seq)[:, -states.shape[-2] :].to(states)
        else:
            states = scatter_tokens(states, run.columns, run.call.seq)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the pass."""
        run, self.local.run = self.local.run, None
        self.local.made = {}
        if run is not None:
            run.disarm()  # an exception may have come before the next layer did
            self.local.trace = run.trace
        self.local.reduced = False
        with self._lock:
            self._end()


def shrink(
    layout: Layout, alive: Tensor, kept: list[int], before: Columns | None, in_front: bool = False
) -> tuple[Tensor, Columns]:
    """Drop the vision tokens that are not `alive` (batch, tokens), and padding where the batch gets shorter for
    it. `kept`: how many are alive in each row, known without asking the device; `before`: the columns so far;
    `in_front`: what fills shorter rows stands in front, not where columns were.

    Returns:
        take: (batch, physical) int64, the physical columns so far that go on; and what they are now.
    """
    rows = [text + vision for text, vision in zip(layout.text, kept, strict=True)]
    length = max(1, *rows)
    wanted = layout.text_marks.scatter_add(1, layout.column, alive.long())  # (batch, seq), 0 or 1
    if before is not None:
        wanted = wanted.gather(1, before.index)  # filling was not wanted then, so it is not wanted now
    ragged = any(row < length for row in rows)
    if in_front:
        take = wanted.argsort(dim=1, stable=True)[:, -length:]  # (batch, length)
    else:
        take = wanted.argsort(dim=1, descending=True, stable=True)[:, :length]
        if ragged:
            take = take.sort(dim=1).values  # filling was behind
    index = take if before is None else before.index.gather(1, take)
    return take, Columns(index, wanted.gather(1, take) > 0 if ragged else None)


_PER_TOKEN = frozenset({"position_embeddings", "per_layer_input"})
"""Arguments of a decoder layer that say something of each token."""

_TYPES = frozenset({"moe_mm_token_type_ids"})
"""Those of one number per token, (batch, seq): which experts take it (ERNIE 4.5 VL)."""


def main_stream(states: Tensor) -> Tensor:
    """What a layer's attention reads of its input: (batch, seq, hidden) itself, or the first of several such side by
    side (Gemma 3n's AltUp, (streams, batch, seq, hidden))."""
    return states if states.ndim == 3 else states[0]


def _keys(held: Thinned | None) -> ThinnedKeys | None:
    """A thinned cache layer that holds keys; None for one that holds a state."""
    return held if isinstance(held, ThinnedKeys) else None


def _replaced(states: Tensor, args: tuple[Any, ...], reduced: dict[str, Any], placed: bool = False) -> Any:
    """What a pre-hook returns: positional and keyword arguments, with these states; `placed`: positions stay."""
    if "position_ids" in reduced and not placed:
        # flash attention would read gaps in them as packed sequences; rotary tables say it all
        reduced["position_ids"] = None
    return ((states, *args[1:]), reduced) if args else (args, {**reduced, "hidden_states": states})


# --- how a hook is put on a module, left out of copies, and seen by torch.compile

_compiling = torch.compiler.is_compiling  # a hook asks for every layer and token
_exporting = getattr(torch.compiler, "is_exporting", bool)  # from torch 2.7 on
_TRACED = (
    "torch.export and torch.jit.trace record one path through the model, but which tokens a reduction keeps differs by "
    "prompt: take the reduction off before, as with thinsight.remove(model)"
)


class Hook:
    """A hook that a copy of the model, pickled or deep, does not inherit.

    Where torch.compile traces a pass, a hook runs outside the graph (with `fullgraph=True` the compiler says
    so), but for passes of one new token per row, which is how tokens are decoded: those stay one graph.
    """

    def __init__(self, function: Callable[..., Any], leading: tuple[Any, ...] = (), decode: Any = None) -> None:
        self.function = function
        self.leading = leading
        self.decode = decode  # what `function` comes to for one new token per row; None if to nothing
        self.outside = torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        if not _compiling():
            return self.function(*self.leading, *args)
        if _exporting():
            raise Unsupported(_TRACED)
        if _new_tokens(*args) > 1:
            return self.outside(*self.leading, *args)
        return None if self.decode is None else self.decode(*self.leading, *args)

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> Any:
    return _ignore


def _yes() -> bool:
    return True


def _ignore(*args: Any) -> None:
    """What a hook is in a copy."""


def _new_tokens(module: nn.Module, args: tuple[Any, ...], last: Any) -> int:
    """How many tokens per row pass a module: of its arguments, or of its output where `last` is that."""
    if type(last) is dict:
        named = (last.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        given = next((value for value in (*args[:1], *named) if value is not None), None)
    else:
        given = last if isinstance(last, Tensor) else last[0]
    return 1 if given is None else given.shape[-2 if given.ndim > 2 else 1]


def forget_compiled() -> None:
    """Have torch.compile look at the hooks again: what it compiled before does not ask whether they changed,
    unless it was told to, and would leave the reduction out."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", True):
        torch.compiler.reset()
