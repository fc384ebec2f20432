"""One forward pass under a reduction, from top to bottom: how many tokens stay, which, and what a layer gets.

In the order in which it happens. `Quotas` knows how many tokens each group may keep at each layer, and so
where the count falls. A `Pass` is what is known of the pass under way, of this thread. A `Selector` ranks the
tokens before such a layer and drops the rest; the arguments of every layer then shrink with the hidden
states. `Reducer` hangs all of it onto the stock model as hooks, and takes it off again.

Knows nothing about how a call's inputs are read (call.py), how attention is read (scoring.py), or what a
caller may ask (apply.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
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
from .cache import Kept, Thinned, append, cache_of, filled, is_paged, kept_before, thin, thinned
from .call import Plan, Said, encode_pixels, named_arguments, read_call, same_shape
from .encoding import VisionTap
from .families import (
    attention_implementation,
    attention_of,
    base_model,
    check_attention,
    check_recomputation,
    check_replica,
    decoder_layers,
    writes_vision_after,
)
from .hooks import Hooks, forget_compiled
from .layout import Columns, Layout, last_of_prompt, query_columns, shrink, text_marks
from .masks import causal, gather_tokens, reduce_mask, replace_tokens, scatter_tokens
from .scoring import Probe, TextRows

if TYPE_CHECKING:
    from ..schedule import Adaptive
if TYPE_CHECKING:
    from ..schedule import Adaptive


class Quotas:
    """The counts of a reduction.

    Args:
        schedule: of an adaptive reduction: the mean, which falls wherever one of them does.
        adaptive: the schedules that a pass's levels number, if there are several.
        per: "image" or "prompt", what the keep rate holds for.
        rerank: as for `apply`.
    """

    def __init__(self, schedule: Schedule, adaptive: Adaptive | None, per: str, rerank: bool | float) -> None:
        rates = schedule.keep_rates
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

    def count(self, n: int, layer: int, level: int = 0) -> int:
        """How many of a group's n tokens enter a layer."""
        if (n, level) not in self._counts:
            self._counts[n, level] = self._schedules[level].counts(n)
        return self._counts[n, level][layer]

    def rows(self, run: Pass, layer: int) -> list[tuple[int, ...]]:
        """Per row, how many tokens of each group enter a layer; -1: the pass."""
        known = run.counts.get(layer)
        if known is None:
            known = run.counts[layer] = self._rows(run, layer)
        return known

    def _rows(self, run: Pass, layer: int) -> list[tuple[int, ...]]:
        groups = [self.groups(sizes) for sizes in run.call.layout.sizes]
        if layer < 0:
            return groups
        rows = zip(groups, run.levels, strict=True)
        return [tuple(self.count(n, layer, level) for n in sizes) for sizes, level in rows]

    def falls(self, run: Pass, layer: int) -> bool:
        """Whether any group has fewer tokens in this layer than in the one before."""
        return self.rows(run, layer) != self.rows(run, layer - 1)

    def ranking(self, run: Pass, layer: int) -> list[bool]:
        """Which rows rank anew before this layer. Each row decides by its own counts, so that a prompt is
        ranked alike alone and in a batch."""
        rows = zip(self.rows(run, layer), self.rows(run, layer - 1), run.ranked, strict=True)
        share = self._share
        return [now != before and (last is None or sum(now) < share * last) for now, before, last in rows]

    def of_tokens(self, run: Pass, layer: int) -> tuple[Tensor, Tensor]:
        """The group of each token and how many its group may keep, (batch, tokens) int64 both."""
        layout = run.call.layout
        if run.quota is None:
            run.quota = self.of_stages(layout, run.levels)
        group = self.group_of(layout)
        return group, run.quota[self.starts.index(layer)].gather(1, group)

    def of_stages(self, layout: Layout, levels: list[int]) -> Tensor:
        """How many of each group every stage may keep: (stages, batch, groups) int64, 0 where a row has
        fewer groups."""
        rows = [(self.groups(sizes), level) for sizes, level in zip(layout.sizes, levels, strict=True)]
        most = max(1, *(len(groups) for groups, _ in rows))
        counts = [
            [[self.count(n, layer, level) for n in groups] + [0] * (most - len(groups)) for groups, level in rows]
            for layer in self.starts
        ]
        return torch.tensor(counts, device=layout.image.device)


@dataclass(frozen=True)
class PassState:
    """What a pass knows of its vision tokens on the way into a layer; see the fields of `Pass`."""

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


class Pass:
    """One forward pass with vision tokens."""

    def __init__(self, plan: Plan, first: int = 0) -> None:
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
        self.text: Tensor | None = None  # (batch, seq) int64, see `text_marks`; None until a token is dropped
        self.weights: Tensor | None = None  # (batch, queries) float32, of rows of attention that are pooled
        self.queries = plan.queries  # logical columns (batch, queries), which are real
        self.trace: list[tuple[int, Tensor]] = [(0, self.alive)]  # from which layer on, alive
        self.last = plan.last  # (batch, tokens) bool
        self.levels = [0] * len(plan.call.layout.sizes)  # per row, which of an adaptive reduction's schedules
        self.quota = plan.quota  # (stages, batch, groups) int64 for these levels; None: not made yet
        self.counts: dict[int, list[tuple[int, ...]]] = {}  # likewise, by layer: see `Quotas.rows`
        self.first = first  # layers before it do not run: see prefix.py

    def places(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Where logical columns (batch, any) stand in the states that come next; dropped ones: anywhere."""
        if self.columns is None or self.spread:
            return columns
        return self.columns.physical(self.call.seq, *columns)

    def follow(self, levels: list[int]) -> None:
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
        self.follow(list(state.levels))
        self.ranked, self.trace = list(state.ranked), list(state.trace)


class ThreadState(threading.local):
    """What a thread has said of its passes to come, and knows of the one under way and the last."""

    said = Said()
    plan: Plan | None = None  # that its passes follow
    first = 0  # layer at which its passes begin
    candidates = 0  # last tokens of the next pass that an assistant proposed
    run: Pass | None = None  # under way; None where no vision token passes, as in decoding
    reduced = False  # whether a pass that the reduction has begun is under way, vision tokens or not
    trace: list[tuple[int, Tensor]] | None = None  # of the last pass, see `Pass`
    statistic: list[float] | None = None  # per row of the last pass, of an adaptive reduction

    def __init__(self) -> None:
        self.masks: dict[Any, Any] = {}  # masks and rotary tables that layers of the pass share


class Selector:
    """Keeps the best tokens of a pass, as many as the quotas say."""

    def __init__(self, ranker: Ranker, quotas: Quotas) -> None:
        self.ranker = ranker
        self.quotas = quotas
        self.merges = type(ranker).merge is not Ranker.merge

    def drop(self, run: Pass, layer: int, states: Tensor) -> Tensor:
        """Keep the best of what is alive, as `run.take` and `run.columns` say; the states, which a ranker
        that merges has changed."""
        counts, ranking = self.quotas.rows(run, layer), self.quotas.ranking(run, layer)
        with torch.no_grad():
            context = self._context(run, layer, states) if any(ranking) or self.merges else None
            if context is not None and any(ranking):
                self._rank(run, context, ranking, [sum(row) for row in counts])
            run.attention = None
            assert run.scores is not None
            scores = run.scores if run.last is None else run.scores.masked_fill(run.last, torch.inf)
            if len(set(counts)) == 1 and len(counts[0]) == 1:
                run.alive = best(scores, run.alive, counts[0][0])
            else:
                run.alive = choose(scores, run.alive, *self.quotas.of_tokens(run, layer))
            self._check_ends(run, layer)
            places = run.places(run.call.layout.column)[0] if self.merges else None
            if run.text is None:
                run.text = text_marks(run.call.layout)
            kept = [sum(row) for row in counts]
            run.take, run.columns = shrink(run.call.layout, run.text, run.alive, kept, run.columns)
        if context is None or places is None:
            return states
        merged = self.ranker.merge(context, run.alive)
        return states if merged is None else replace_tokens(states, places, run.alive, merged)

    def _rank(self, run: Pass, context: Context, ranking: list[bool], counts: list[int]) -> None:
        """Score the rows that rank anew; the others keep their last scores."""
        scores = self.ranker.score(context).to(run.alive.device)
        keeping = [not ranks and last is not None for ranks, last in zip(ranking, run.ranked, strict=True)]
        if run.scores is not None and any(keeping):
            rows = zip(keeping, run.scores, scores, strict=True)
            scores = torch.stack([old if keeps else new for keeps, old, new in rows])
        run.scores = scores
        rows_now = zip(ranking, counts, run.ranked, strict=True)
        run.ranked = [count if ranks else last for ranks, count, last in rows_now]

    def _context(self, run: Pass, layer: int, states: Tensor) -> Context:
        layout = run.call.layout
        pooled = run.attention is not None and run.attention.ndim == 2
        seen = text = None
        if STATES in self.ranker.needs:
            assert run.queries is not None
            places = run.places(layout.column, run.queries[0])
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


class LayerArguments:
    """Turns what a layer is called with into what it is to get; None where it may stay as it is."""

    def __init__(self, model: PreTrainedModel, schedule: Schedule, local: ThreadState) -> None:
        self.model = model
        self.schedule = schedule
        self.local = local

    def reduced(
        self, run: Pass, columns: Columns, layer: int, states: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The arguments in a pass some of whose vision tokens are dropped, so that `columns` are left."""
        take = columns.index if run.spread else run.take
        run.take, run.spread = None, False
        states = states if take is None else gather_tokens(states, take)
        reduced, cache = dict(kwargs), cache_of(kwargs)
        seq, total = run.call.seq, run.call.past + run.call.seq
        held = None
        if cache is not None:
            held = thin(cache, layer, self.schedule)
            held.expect(states.shape[0], seq, columns, run.kept)
        reduced["attention_mask"] = self._mask(kwargs, held, columns, seq, total, states.device)
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            reduced["position_embeddings"] = tuple(self._rotary(part, columns) for part in embeddings)
        return _replaced(states, args, reduced)

    def whole(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments in a pass that is all there, as in decoding, behind what may be a thinned cache."""
        held = thinned(cache_of(kwargs), layer)
        if held is None:
            return None
        held.check(self.schedule)
        states = args[0] if args else kwargs["hidden_states"]
        batch, seq = states.shape[:2]
        mask = kwargs.get("attention_mask")
        ragged = held.ragged
        total = int(held.get_seq_length()) + seq if mask is None and ragged else 0
        held.expect(batch, seq)
        if held.kept is None:
            return None
        reduced = dict(kwargs)
        if mask is not None or ragged:
            reduced["attention_mask"] = self._mask(kwargs, held, None, seq, total, states.device)
        return _replaced(states, args, reduced)

    def _rotary(self, table: Tensor, columns: Columns) -> Tensor:
        """A rotary table at the columns that are there, made once for the layers of a stage."""
        if torch.compiler.is_compiling():  # as in `_mask`
            return gather_tokens(table, columns.index)
        made = self.local.masks
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
        if mask is None and not _ragged(held, columns):
            return None
        if torch.compiler.is_compiling():  # ids of tensors would tie the graph to these very tensors
            return self._reduced_mask(mask, held, columns, seq, total, device)
        made = self.local.masks
        kept = None if held is None else held.kept
        key = (id(mask), type(held), id(kept), id(columns))
        if key not in made:
            # what the ids belong to is held on to, so that they stay its own
            made[key] = self._reduced_mask(mask, held, columns, seq, total, device), mask, kept, columns
        return made[key][0]

    def _reduced_mask(
        self, mask: Any, held: Thinned | None, columns: Columns | None, seq: int, total: int, device: torch.device
    ) -> Any:
        keys = columns if held is None else held.columns()
        assert keys is not None
        if mask is None:
            mask = causal(seq, total, attention_implementation(self.model), device)
        return reduce_mask(mask, keys, columns, 0 if held is None else held.offset)


def _ragged(held: Thinned | None, columns: Columns | None) -> bool:
    """Whether some of the keys that a layer sees are filling."""
    if held is not None:
        return held.ragged
    return columns is not None and columns.valid is not None


def _replaced(states: Tensor, args: tuple[Any, ...], reduced: dict[str, Any]) -> Any:
    """What a pre-hook returns: positional and keyword arguments, with these states."""
    if "position_ids" in reduced:
        # flash attention would read gaps in them as packed sequences; rotary tables say it all
        reduced["position_ids"] = None
    if args:
        return (states, *args[1:]), reduced
    return args, {**reduced, "hidden_states": states}


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
        plan = self.read(arguments, candidates) if made is None else made if same_shape(made, arguments) else None
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
