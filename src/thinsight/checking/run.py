"""`thinsight.check`: does a reduction run rightly on this very model?

Everything is held to the stock model's own forward: bit for bit where nothing is dropped, and where something is, to
the `reference` that runs whole prompts without a cache. What rounding alone does to this model, in its dtype, is
measured first, on the stock model; what a reduction changes must stand out from that, or nothing could be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import notebook
from ..checked import FAILS, NOT_CHECKED, PASSES, CheckLine, CheckResult
from ..errors import Unsupported
from ..progress import Watcher
from ..runtime.anatomy import (
    admitted,
    check_parts,
    check_version,
    identity_of,
    impossible,
    model_device,
    num_layers,
    remember,
    scales_by_position,
    unwrapped,
)
from ..runtime.cache import CACHE, fresh_cache
from ..runtime.call import encode_pixels, read_call
from ..runtime.encoding import on_device
from ..runtime.handle import applied
from ..runtime.weights import is_quantised
from ..schedule import Schedule
from .comparing import Case, Compared, compare_steps, generate
from .prompts import IS_TEXT, Batch, Row, Spec, answer
from .subject import Loaded, loaded

STEPS = 3  # tokens of each answer
_ROWS: tuple[Spec, ...] = ([3, 5], [2, 3, 9], [7], [1, 1])  # one image, two, text only, short
_NOISE = 3.0  # times what rounding does to the stock model, a reduction may differ from its reference
_SEEN = 2.0  # times what is allowed, a reduction must change the logits


class _Differs(Exception):
    """What is checked is not as it should be."""


class _NotThere(Exception):
    """The model, or the stock class, does not have what would be checked."""


def check(model: Any, processor: Any = None, *, watcher: Watcher | None = None) -> CheckResult:
    """Check that reductions run rightly on a loaded model, of whatever type, size, dtype, quantisation and device map.

    The stock model's own forward is the yardstick (see `checking.reference`). It is run some hundred times on prompts
    of a few images. Prompts are random words and pictures, through the processor if there is one; otherwise random
    pixels in a shape that the model's encoder takes, as its config tells.

    Args:
        model: a loaded model, as for `thinsight.apply`; its type need not be listed. It is left as it was.
        processor: the model's own; None: inputs are made from the config.
        watcher: is told what is being checked.

    Returns:
        What passed and what failed. `CheckResult.passed` lets models of this class run with ``unlisted=True`` in this
        process; `CheckResult.store` and `save` keep it for later ones.

    Raises:
        ThinsightError: no transformers model, one with a reduction on, or one that can never run under one
            (encoder-decoders, cross-attention).
    """
    check_version()
    model = unwrapped(model)
    never = impossible(model.config)
    if never is not None:
        raise Unsupported(f"{type(model).__name__}: {never}")
    if applied(model):
        raise Unsupported("this model has a reduction on: take it off first, thinsight.remove(model)")
    training = model.training
    with admitted(model), torch.no_grad():
        try:
            result = _checked(model.eval(), processor, watcher or notebook.watcher())
        finally:
            model.train(training)
    remember(result)
    return result


def _checked(model: PreTrainedModel, processor: Any, watcher: Watcher) -> CheckResult:
    dtype = str(model.dtype).removeprefix("torch.")
    try:
        check_parts(model)
        subject, how = loaded(model, processor)
    except Unsupported as reason:
        line = CheckLine("its parts are found, and inputs can be made", FAILS, str(reason))
        return CheckResult(identity_of(model, parts=False), dtype, str(model.device), "", None, (line,))
    with subject.lent():
        run = _Check(subject)
        for name, look in run.looks():
            watcher.on_stage(f"Checking: {name}")
            run.look(name, look)
    return CheckResult(identity_of(model), dtype, str(model_device(model)), how, run.noise, tuple(run.lines))


class _Check:
    """One run over everything that is checked, in an order in which each builds on those before."""

    def __init__(self, subject: Loaded) -> None:
        self.subject = subject
        self.layers = num_layers(subject.stock)
        self.eps = _resolution(subject.stock)
        self.lines: list[CheckLine] = []
        self.noise: float | None = None
        self.changed = 0.0  # the largest change of logits by a reduction that was seen
        self.rows = subject.prompts.rows(_ROWS)
        self.options: dict[str, Any] = {"suppress_tokens": subject.suppressed} if subject.suppressed else {}

    def looks(self) -> Iterator[tuple[str, Callable[[], CheckLine | None]]]:
        """Everything that is checked, by name."""
        falling, early = self._schedule([1, 0.8, 0.5, 0.1]), self._schedule([0.6, 0.6, 0.4, 0.2])
        nothing, rows = self._schedule([1, 0.6, 0, 0]), self.rows
        yield "vision tokens are counted once", self._counted
        yield "the reference is the stock model", self._stock
        yield "nothing dropped: bit-identical", self._keep_all
        yield "no image: bit-identical", self._text_only
        yield "one prompt", lambda: self._reduced(Case(falling, fixed=True), [rows[0]])
        yield "several images", lambda: self._reduced(Case(falling, fixed=True), [rows[1]])
        yield "a padded batch", lambda: self._reduced(Case(falling, fixed=True), rows)
        yield "padding on the right", lambda: self._right(Case(falling, fixed=True))
        yield "dropped at layer 0", lambda: self._reduced(Case(early, fixed=True), rows[:2])
        yield "dropped to none", lambda: self._reduced(Case(nothing, fixed=True), rows[:2])
        yield "a quota per prompt", lambda: self._reduced(Case(falling, fixed=True, per="prompt"), [rows[1]])
        yield "ranked by text attention", lambda: self._ranked(Case(falling))
        yield "the cache holds what was kept", lambda: self._cache(Case(falling, fixed=True))
        yield "a second turn, text", lambda: self._second(Case(falling, fixed=True), [6])
        yield "a second turn, an image", lambda: self._second(Case(falling, fixed=True), [2, 5])
        yield "videos", lambda: self._video(Case(falling, fixed=True))
        yield "what is dropped can be seen", self._seen

    def look(self, name: str, look: Callable[[], CheckLine | None]) -> None:
        """Check one thing, and write down what came of it."""
        try:
            line = look() or CheckLine(name, PASSES)
        except _NotThere as reason:
            line = CheckLine(name, NOT_CHECKED, str(reason))
        except _Differs as what:
            line = CheckLine(name, FAILS, str(what))
        except Exception as error:  # models of any make are run here: whatever they raise is the finding
            line = CheckLine(name, FAILS, f"{type(error).__name__}: {error}".split("\n")[0][:300])
        self.lines.append(replace(line, name=name))

    # --- what differences mean

    @property
    def allowed(self) -> float:
        """How far the reduced model may be from its reference: a multiple of the stock model's own rounding, and never
        less than what two ways to add up the same numbers may differ by in this dtype."""
        if self.noise is None:
            raise _Differs("nothing can be told, for the reference is not the stock model")
        return max(_NOISE * self.noise, 2 * self.eps, 1e-4)

    def _held(self, pairs: Iterable[tuple[Tensor, Tensor]], allowed: float | None = None) -> CheckLine:
        """Hold logits to what they should be."""
        return self._within(max(_distance(got, wanted) for got, wanted in pairs), allowed)

    def _within(self, difference: float, allowed: float | None = None) -> CheckLine:
        allowed = self.allowed if allowed is None else allowed
        return CheckLine("", PASSES if difference <= allowed else FAILS, "", difference, allowed)

    def _schedule(self, rates: list[float]) -> Schedule:
        """Four rates over the depth of the decoder. The first is layer 0's, whatever the depth."""
        count = self.layers
        return Schedule(rates[:count] if count < 4 else [rates[4 * layer // count] for layer in range(count)])

    def _placed(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's inputs for a plain forward, in which each token has the position that `generate` gives it, where
        layers read positions as such: stock models count padding."""
        if not scales_by_position(self.subject.model()):
            return batch.inputs
        return {**batch.inputs, "position_ids": (batch.inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}

    def _batch(self, rows: Sequence[Row], padding: str = "left") -> Batch:
        return self.subject.batch(list(rows), padding)

    # --- nothing dropped

    def _counted(self) -> None:
        """The library sees the vision tokens where they were put, each once."""
        model, rows = self.subject.stock, [row for row in self.rows if row.vision]
        batch = self._batch(rows)
        call = read_call(model, encode_pixels(model, batch.inputs))
        if call is None:
            raise _Differs("it sees no vision token")
        width = batch.inputs["input_ids"].shape[1]
        for number, row in enumerate(rows):
            counted, there = sum(call.layout.sizes[number]), len(row.vision)
            if counted != there:
                raise _Differs(f"it counts {counted} vision tokens where there are {there}")
            found = call.layout.column[number][call.layout.valid[number]].tolist()
            if found != [place + width - len(row.ids) for place in row.vision]:
                raise _Differs("it sees vision tokens at other places than they are")

    def _stock(self) -> CheckLine:
        """Measure what rounding does to the stock model: in a padded batch with a cache, and alone without one."""
        model, batch = self.subject.model(), self._batch(self.rows)
        out, whole = generate(model, batch.inputs, STEPS, **self.options), model(**self._placed(batch)).logits
        case, noise = Case(Schedule.full(self.layers), fixed=True), 0.0
        for number, row in enumerate(self.rows):
            reference = case.reference(self.subject, row, self.subject.masked)
            prompt = reference.read(row)
            got, logits = whole[number][batch.inputs["attention_mask"][number].bool()], prompt[-1]
            noise = max(noise, *(_distance(got[place], prompt[place]) for place in _text(row)))
            for step, token in enumerate(out.sequences[number, -STEPS:].tolist()):
                noise = max(noise, _distance(out.logits[step][number], logits))
                if step < STEPS - 1:
                    logits = reference.answer(token)
        most = max(32 * self.eps, 1e-3)
        if noise > most:
            note = "a padded batch with a cache, and a prompt alone without one, differ with nothing dropped"
            return CheckLine("", FAILS, note, noise, most)
        self.noise = noise
        return CheckLine("", PASSES, "", noise, most)

    def _everything(self, batch: Batch) -> list[Tensor]:
        """Logits of a pass and of an answer, and the answer."""
        model = self.subject.model()
        out = generate(model, batch.inputs, STEPS, **self.options)
        return [model(**self._placed(batch)).logits, torch.stack(out.logits), out.sequences]

    def _identical(self, schedules: list[Schedule], batch: Batch) -> CheckLine:
        stock = self._everything(batch)
        steady = all(map(torch.equal, stock, self._everything(batch)))  # some kernels add up in any order
        difference = 0.0
        for schedule in schedules:
            with Case(schedule, fixed=True).apply(self.subject.model()):
                ours = self._everything(batch)
            if steady and not all(map(torch.equal, ours, stock)):
                pairs = zip(ours[1].flatten(0, 1), stock[1].flatten(0, 1), strict=True)
                note = "not the stock model's bits"
                return CheckLine("", FAILS, note, max(_distance(*pair) for pair in pairs), 0.0)
            first = zip(ours[1][0], stock[1][0], strict=True)
            difference = max(difference, *(_distance(*pair) for pair in first))
        if steady:
            return CheckLine("", PASSES, "", 0.0, 0.0)
        state = PASSES if difference <= self.allowed else FAILS
        return CheckLine("", state, "the stock model's own bits change from run to run", difference, self.allowed)

    def _keep_all(self) -> CheckLine:
        most = max(sum(map(len, row.groups)) for row in self.rows)
        nearly = Schedule([1.0] + [1 - 0.5 / most] * (self.layers - 1))  # every hook is on, every count the whole
        return self._identical([Schedule.full(self.layers), nearly], self._batch(self.rows))

    def _text_only(self) -> CheckLine:
        return self._identical([self._schedule([1, 0.5, 0.1, 0])], self._batch(self.subject.prompts.rows(([7], [3]))))

    # --- reduced

    def _reduced(self, case: Case, rows: Sequence[Row]) -> CheckLine:
        """Kept tokens, the prefill and the cached steps of a batch equal the reference of each of its rows alone."""
        compared = list(self._compare(case, self._batch(rows)))
        for each in compared:
            _same_kept(each.kept, each.wanted)
        self._note_change(case, compared)
        return self._held(pair for each in compared for pair in each.steps)

    def _compare(self, case: Case, batch: Batch) -> Iterator[Compared]:
        return compare_steps(self.subject, case, batch, steps=STEPS, slow=self.subject.masked, **self.options)

    def _note_change(self, case: Case, compared: Sequence[Compared]) -> None:
        """How far a reduction moves the first token's logits from the full model's."""
        for each in compared:
            if each.row.vision:
                full = Case(Schedule.full(self.layers), fixed=True)
                logits = full.reference(self.subject, each.row, self.subject.masked).read(each.row)[-1]
                self.changed = max(self.changed, _distance(each.steps[0][1], logits))

    def _right(self, case: Case) -> CheckLine:
        """Logits stand where the input has their tokens, whichever side is padded; those of dropped ones are zeros."""
        difference = 0.0
        for padding in ("right", "left"):
            batch = self._batch(self.rows, padding)
            with case.apply(self.subject.model()) as handle:
                logits = self.subject.model()(**self._placed(batch)).logits
                kept = [handle.kept(layer) for layer in range(self.layers)]
            for number, row in enumerate(self.rows):
                reference = case.reference(self.subject, row, self.subject.masked)
                wanted = reference.read(row)
                _same_kept([layer[number].tolist() for layer in kept], reference.kept)
                got = logits[number][batch.inputs["attention_mask"][number].bool()]
                gone = set(range(len(row.vision))) - set(reference.kept[-1])
                dropped = {row.vision[each] for each in gone}
                if dropped and bool((got[sorted(dropped)] != 0).any()):
                    raise _Differs("logits of dropped tokens are not zeros")
                difference = max(difference, *(_distance(got[place], wanted[place]) for place in _text(row)))
        return self._within(difference)

    def _ranked(self, case: Case) -> CheckLine:
        """What is kept is what received most attention in the plain weights of the layer before, but for near ties."""
        rows, misses, pairs = [row for row in self.rows if row.vision], [0.0], []
        allowed = max(self.allowed, _NOISE * max(map(self._eager_noise, rows)))
        for padding in ("left", "right"):  # what is padding must not rank
            batch = self._batch(rows, padding)
            with case.apply(self.subject.model()) as handle:
                logits = self.subject.model()(**self._placed(batch)).logits
                kept = [[each.tolist() for each in handle.kept(layer)] for layer in range(self.layers)]
            for number, row in enumerate(rows):
                ours = [layer[number] for layer in kept]
                reference = case.reference(self.subject, row)
                groups = [case.schedule.counts(len(group)) for group in row.groups]
                counts = [sum(layer) for layer in zip(*groups, strict=True)]
                for layer in reference.keys_of:  # it reads another layer's keys, of which none can go
                    counts[layer] = counts[layer - 1]
                if [len(layer) for layer in ours] != counts:
                    raise _Differs(f"it keeps {[len(layer) for layer in ours]} tokens where {counts} are to stay")
                wanted = reference.read(row, ours)[-1]
                misses += reference.misses
                pairs.append((logits[number][batch.inputs["attention_mask"][number].bool()][-1], wanted))
        if len(misses) == 1:
            raise _Differs("the model's layers give no attention weights, eager, to hold the ranking to")
        near = max(16 * self.eps, 1e-3)
        if max(misses) > near:
            note = "a token went that received more attention than one that stayed, as a share of the most"
            return CheckLine("", FAILS, note, max(misses), near)
        return self._held(pairs, allowed)

    def _eager_noise(self, row: Row) -> float:
        """How far the stock model's logits go by eager attention, whose weights can be read, instead of its own."""
        full = Case(Schedule.full(self.layers), fixed=True)
        eager = full.reference(self.subject, row).read(row)
        own = full.reference(self.subject, row, self.subject.masked).read(row)  # the same model, from now on otherwise
        return _distance(eager[-1], own[-1])

    def _cache(self, case: Case) -> CheckLine | None:
        """Each layer of the cache holds as many keys as tokens entered it, and counts as many as the prompt has."""
        row = self.rows[0]
        model, length = self.subject.model(), len(row.ids)
        with case.apply(model) as handle:
            cache = model(**self._batch([row]).inputs, **fresh_cache(model), use_cache=True)[CACHE]
            kept = [len(handle.kept(layer)[0]) for layer in range(self.layers)]
        compared = 0
        for layer, (count, held) in enumerate(zip(kept, cache.layers, strict=False)):
            wanted, keys = length - len(row.vision) + count, getattr(held, "keys", None)
            if not isinstance(held, DynamicLayer) or not isinstance(keys, Tensor) or keys.ndim < 3:
                continue  # a recurrent state has no length
            if int(cache.get_seq_length(layer)) != length:
                raise _Differs(f"layer {layer} counts {int(cache.get_seq_length(layer))} of {length} tokens")
            window = held.sliding_window if isinstance(held, DynamicSlidingWindowLayer) else None
            if keys.shape[-2] != wanted and (window is None or keys.shape[-2] > wanted):
                raise _Differs(f"layer {layer} holds {keys.shape[-2]} keys where {wanted} tokens entered it")
            compared += 1
        if not compared:
            raise _NotThere("no layer's cache has keys that could be counted")
        return None

    def _second(self, case: Case, spec: Spec) -> CheckLine:
        """A later turn on the same cache, where the stock model reads one as it does from the start."""
        try:
            stock = max(self._turns(Case(Schedule.full(self.layers), fixed=True), spec))
        except Exception as error:  # of a stock model, which may have no later turns
            raise _NotThere(f"the stock model has none: {type(error).__name__}: {error}".split("\n")[0][:200]) from None
        if stock > max(32 * self.eps, 1e-3):
            raise _NotThere("the stock model itself reads it otherwise than from the start")
        return self._within(max(self._turns(case, spec)))

    def _turns(self, case: Case, spec: Spec) -> Iterator[float]:
        """How far the logits of a second turn, behind a cached first one, are from the reference."""
        subject = self.subject
        rows, turn = subject.prompts.rows(([3, 5], [2, 1, 4])), subject.prompts.later_turn(spec)
        model = subject.model()
        with case.apply(model):
            first = generate(model, self._batch(rows).inputs, STEPS, **self.options)
            said = [Row([answer(tokens)]) for tokens in first.sequences[:, -STEPS:].tolist()]
            wholes = [row + each + turn for row, each in zip(rows, said, strict=True)]
            inputs = on_device(model, subject.prompts.later_inputs(model, wholes, [turn] * len(rows)))
            second = generate(model, inputs, STEPS, **{CACHE: first[CACHE]}, **self.options)
        for number, row in enumerate(rows):
            reference = case.reference(subject, row, subject.masked)
            reference.read(row)
            for token in said[number].ids:
                reference.answer(token)
            if turn.vision:  # fixed scores of this turn's tokens
                reference.scores = case.reference(subject, turn, subject.masked).scores
            logits = reference.read(turn)[-1]
            for step, token in enumerate(second.sequences[number, -STEPS:].tolist()):
                yield _distance(second.logits[step][number], logits)
                if step < STEPS - 1:
                    logits = reference.answer(token)

    def _video(self, case: Case) -> CheckLine:
        prompts = self.subject.prompts
        if prompts.video is None:
            raise _NotThere("no videos can be made for this model")
        return self._reduced(case, prompts.rows(([3, "video", 5], [2, "video", 1, "video", 4])))

    def _seen(self) -> CheckLine:
        """A reduction moves the logits by more than is allowed, so that a fault would have been seen."""
        least = _SEEN * self.allowed
        if self.changed >= least:
            return CheckLine("", PASSES, f"a reduction moves the logits by {self.changed:.1e}", None, None)
        remedy = "the model before it was quantised" if is_quantised(self.subject.stock) else "in float32"
        raise _Differs(f"a reduction moves the logits by {self.changed:.1e} only, which rounding hides: check {remedy}")


def _resolution(model: PreTrainedModel) -> float:
    """Of the model's dtype; with quantised layers at least bfloat16's, for those may round what comes in as well, by
    what else is in the batch, whatever the dtype around them."""
    eps = torch.finfo(model.dtype).eps
    return max(eps, torch.finfo(torch.bfloat16).eps) if is_quantised(model) else eps


def _text(row: Row) -> list[int]:
    """Where a row's text stands."""
    return [place for place, kind in enumerate(row.kinds) if kind == IS_TEXT]


def _distance(got: Tensor, wanted: Tensor) -> float:
    """The length of the difference of two vectors by the length of the second."""
    ours, theirs = got.double().cpu(), wanted.double().cpu()
    # a mask of the vocabulary is not a number to compare
    there = theirs.isfinite() & (theirs > torch.finfo(torch.float32).min / 2)
    if not bool((ours.isfinite() | ~there).all()):
        raise _Differs("logits are not finite")
    ours, theirs = ours[there], theirs[there]
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def _same_kept(got: list[list[int]] | None, wanted: list[list[int]]) -> None:
    """Every layer gets the very tokens that it should."""
    for layer, (ours, theirs) in enumerate(zip(got or wanted, wanted, strict=True)):
        if ours != theirs:
            extra, missing = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
            raise _Differs(
                f"layer {layer} gets {len(ours)} vision tokens where {len(theirs)} should enter"
                f"{f', among them {extra[0]}' if extra else ''}{f', without {missing[0]}' if missing else ''}"
            )
