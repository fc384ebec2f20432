"""The evaluator: maps a reduction to the exact score of greedy decoding on a set of examples.

What makes it cheap changes no score: the vision tower runs once per image, the full model reads an image once
for all questions about it, its answer is drafted so that one forward pass decides whether a reduced model
says the same, and answers once computed are kept.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import zlib
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import cached_property, partial
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import transformers
from numpy.typing import NDArray

from .. import cost, notebook
from ..budget import Budget, check_budget_value, make_budget
from ..errors import BadInput, Unsupported, whole
from ..loading import base_name
from ..ranking import get_ranker
from ..reduction import Reduction
from ..runtime import EncodedImages, Handle, apply, first_attending, num_layers
from ..runtime.anatomy import check_supported
from ..schedule import Schedule
from ..texts import brief
from ..version import __version__
from .base import SearchEvaluator
from .bounds import LossTest, Order, check_confidence
from .decoding import DecodingRules, GreedyAnswer, PromptScope, decode
from .examples import Example, Progress, check_examples
from .features import hash_image, hash_json, hash_model, hash_processor, hash_reading
from .full_model import BatchSize, FullModel
from .metrics import Metric, metric_for
from .prefix_cache import PrefixCache
from .prompts import PromptReader, chunks, pad_batch, tokenizer_of
from .result import Evaluation, Part, score_to_expect
from .store import DEFAULT_CACHE_GIB, Store

_FINGERPRINT_FORMAT = 2
_SHOWN = 80  # characters of an answer in a message
_MIN_NEW_TOKENS = 4
_NEW_TOKENS_MARGIN = 4  # the stop token, and room for a few tokens more than the longest right answer
_NEW_TOKENS_UNLABELED = 32


class FullAnswer(NamedTuple):
    """The full model's greedy answer: token ids with the stop token, and the text without it."""

    tokens: tuple[int, ...]
    text: str


class Evaluator(SearchEvaluator):
    """Scores schedules and reductions of one model on one set of examples.

    The score is the mean over the examples of a metric of the greedily decoded answer, exactly as
    ``model.generate()`` under ``apply`` gives it (up to rounding of logits that differ by less than floating
    point resolves). Batches are the same in every call, so a complete score never depends on what was
    evaluated before.

    Args:
        model: a transformers vision-language model in eval mode, or a wrapper of one (see `apply`), as it is:
            nothing of it is changed between calls, nor are its adapters or autocast.
        processor: the model's own processor.
        examples: what ``load_examples`` returns, or any list of ``Example``.
        metric: one metric for all, a name or a `Metric`; None takes each example's own, else "exact_match" where it
            has answers and "agreement" where it has none. "agreement" is 1 where the reduced model's answer has the
            very tokens of the full model's.
        batch_size: prompts per forward pass. "auto": the fastest power of two, measured once on the longest
            prompts before the first pass. Where the full model's first pass runs out of the device's memory,
            it is halved, with a warning.
        ranker: which tokens a bare schedule keeps: a ranker's name, dict or object.
        max_new_tokens: cuts every answer, the full model's too. None: the longest right answer's tokens + 4,
            at least 4; 32 if no example has an answer.
        progress: called as ``progress(what, done, total)`` while images are read, and after each batch, in
            examples. None: a notebook draws it.
        cache_gib: how much of the images' vision features is kept in main memory, in GiB, as much again of
            what candidates share, and a quarter of it of pixels; more goes into temporary files. No score
            depends on it.
        reuse: whether candidates share the layers in which a search says that they agree (see `share`), and
            the full model reads images once for all questions about them. No score depends on it.
        cache_dir: a folder in which vision features and the full model's answers are kept for later runs of
            the same model on the same data; None: nowhere. No score depends on it.

    Attributes:
        num_layers: L, the number of decoder layers.
        num_vision_tokens: N, the median number of vision tokens of a prompt.
        prompt_sizes: per example, how many vision tokens and how many other tokens its prompt has.

    Raises:
        ThinsightError: bad examples (see ``load_examples``), unknown metric or ranker, a prompt without
            image token, a model that is not supported or is in training mode, generation settings that
            exact scoring does not support, or a ``cache_dir`` that cannot be written.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        examples: Sequence[Example],
        metric: str | Metric | None = None,
        batch_size: int | str = 8,
        ranker: Any = "text-attention",
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        cache_gib: float = DEFAULT_CACHE_GIB,
        reuse: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        sizes = BatchSize(batch_size)
        model = check_supported(model)
        if model.training:
            raise BadInput("the model is in training mode, where answers may be random: call model.eval() first")
        if not callable(processor):
            raise BadInput(f"processor is {processor!r}: pass the model's own processor")
        store: Store[EncodedImages] = Store(cache_gib, cache_dir=cache_dir)
        check_examples(examples)
        self.model = model
        self.processor = processor
        self.examples = tuple(examples)
        self.ranker = get_ranker(ranker)
        self.progress = progress = progress or notebook.progress()
        self._metrics = check_metric(self.examples, metric)
        most = _max_new_tokens(max_new_tokens, processor, self.examples)
        self.rules = DecodingRules.of(model.generation_config, most)
        if store.persistent:
            hash_processor(hashlib.sha256(), processor)  # refused before images are read
        self.reader = PromptReader(model, processor, cache_gib)
        self._prompts = self.reader.prompts(self.examples, progress)
        self.num_layers = num_layers(model)
        self.num_vision_tokens = median_low(prompt.n_vision for prompt in self._prompts)
        self.prompt_sizes = [(prompt.n_vision, prompt.n_text) for prompt in self._prompts]
        report = partial(self._report, "full model")
        self._full_model = FullModel(self.reader, self.examples, self._prompts, self.rules, store, sizes, reuse, report)
        self._prefixes = PrefixCache(model, cache_gib) if reuse else None
        self._began: dict[int, int] = {}  # the layer at which each example's last pass began
        self._shape = cost.decoder_shape(model.config)
        self._name = base_name(model.name_or_path) if model.name_or_path else None
        self._memo: dict[tuple[Any, ...], dict[int, GreedyAnswer]] = {}
        self._failures = np.zeros(len(self.examples))

    def __repr__(self) -> str:
        return brief(
            f"{type(self).__name__}({type(self.model).__name__}, {len(self.examples)} examples, "
            f"{self.num_layers} layers, {self.num_vision_tokens} vision tokens, {self.ranker!r})"
        )

    # -- what a search sees ----------------------------------------------------------------------------------

    samples = True
    score_range = 0.0, 1.0  # as every metric's

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Prompts per forward pass; "auto" is measured when first asked for."""
        return self._full_model.batch_size

    def fix_batch_size(self, size: int | None = None) -> int:
        """The batch size for good: ``size``, which an earlier run found, before anything is evaluated; or (None) the
        one with which the full model's answers, computed now if they are not known, fit into memory.

        Raises:
            ThinsightError: ``size`` is not a whole number of at least 1.
        """
        if size is None:
            _ = self._full
        else:
            self._full_model.fix_batch_size(size)
        return self.batch_size

    @property
    def first_layer(self) -> int:  # type: ignore[override]
        """The first layer at which the ranker can rank."""
        return self.first_layer_of(self.ranker)

    def first_layer_of(self, ranker: Any) -> int:
        """The first layer at which another ranker can rank: its name, dict or object."""
        return 0 if get_ranker(ranker).ranks_at_layer_0 else first_attending(self.model) + 1

    def can_rank(self, ranker: Any) -> bool:
        """Whether the model has what a ranker reads: its name, dict or object. Tried on the first example's
        images, for some towers show only then that their attention cannot be told per token."""
        schedule = Schedule.step(self.num_layers, min(self.first_layer_of(ranker), self.num_layers - 1), 0.5)
        try:
            apply(self.model, schedule, ranker=ranker).remove()
            self._full_model.vision.inputs(self.examples[:1], ranker)
        except Unsupported:
            return False
        return True

    @property
    def metric_names(self) -> str:  # type: ignore[override]
        """The metrics that the scores are of, such as "anls, exact_match"."""
        return ", ".join(sorted({metric.name for metric in self._metrics}))

    @property
    def full_cost(self) -> float:  # type: ignore[override]
        """Decoder prefill FLOPs of one full evaluation of the full model."""
        return float(self.full.cost or 0.0)

    @cached_property
    def full(self) -> Evaluation:
        """The full model's evaluation; its answers are computed when first asked for."""
        scores = np.array([self._score(index, answer) for index, answer in enumerate(self._full)])
        score, likely = float(np.mean(scores)), _agreement(self._full)
        spent = self._flops(range(len(self.examples)), None, drafted=False)
        return Evaluation(score, scores, full_score=score, cost=spent, agreement=likely)

    @cached_property
    def doubt(self) -> str:  # type: ignore[override]
        """Why the full model's score is too low to tell a good schedule from a bad one, in one line with an answer
        beside its label; empty where it is not. It is where it is 0 or near what guessing gets, see `score_to_expect`.
        """
        asked = zip(self._metrics, self.examples, strict=True)
        chances = [metric.chance(example.answers, example.question) for metric, example in asked]
        if self.full_score >= score_to_expect(chances):
            return ""
        why = "nothing can be lost, whatever is dropped"
        if self.full_score > 0:
            why = f"guessing gets {100 * float(np.mean(chances)):.1f} %, so hardly any loss can show"
        # an answer that scores least, beside its label
        assert self.full.per_example is not None
        index = int(np.argmin(self.full.per_example))
        example = self.examples[index]
        said, *label = (
            repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
            for text in (self._text(self._full[index].tokens), *example.answers[:1])
        )
        return (
            f"the full model scores {100 * self.full_score:.1f} % (number of examples: {len(chances)}): {why}. "
            f"To example {example.id!r} it says {said}{f', the label is {label[0]}' if label else ''} "
            f"({self._metrics[index].name}); check labels and metric (metric='agreement' needs no labels)"
        )

    @cached_property
    def full_answers(self) -> list[FullAnswer]:
        """The full model's greedy answers, in the order of the examples."""
        return [FullAnswer(answer.tokens, self._text(answer.tokens)) for answer in self._full]

    def __call__(self, schedule: Schedule | Reduction) -> Evaluation:
        """The exact score under a schedule (with the evaluator's ranker) or a reduction (with its own).

        Raises:
            ThinsightError: the schedule has another number of layers than the model, or cannot be run on it.
        """
        reduction = self._bind(schedule)
        return self.full if reduction.schedule.is_full else self._evaluate(reduction, self._batches)

    def at_least(
        self, schedule: Schedule | Reduction, floor: float, confidence: float | None = None, seed: int = 0
    ) -> Evaluation:
        """Like a call, but gives up as soon as the score cannot reach ``floor`` any more.

        Batches that lost most in earlier calls come first. Given up means: even with the highest possible
        score on all examples not yet run, the mean stays below ``floor``. The result then has
        ``complete=False``, an upper bound of the score, and NaN for the examples not run. A result with
        ``complete=True`` is the very one of a call.

        With ``confidence`` it also gives up once the examples run show with that confidence that the score is
        below ``floor``, which then stands for the upper bound: a schedule that reaches ``floor`` is given up
        with a probability of at most ``1 - confidence``, however often that is looked at (see
        `bounds.LossTest`). For that to hold, batches come in a random order of ``seed`` and schedule, those
        that the full model is least sure of likely first.

        Raises:
            ThinsightError: ``confidence`` is not between 0 and 1, or as for a call.
        """
        if confidence is not None:
            check_confidence(confidence)
        reduction = self._bind(schedule)
        if reduction.schedule.is_full:
            return self.full
        if confidence is None:
            return self._evaluate(reduction, self._order.hardest_first(), float(floor))
        batches, test = self._draw(reduction, floor, confidence, seed)
        return self._evaluate(reduction, batches, float(floor), test)

    def sample(self, schedule: Schedule | Reduction, share: float) -> Evaluation:
        """The exact score on a share of the examples, the same ones every time; a larger share holds a smaller one.
        Whole batches are run, evenly spread over lengths and over how sure the full model is.

        Raises:
            ThinsightError: ``share`` is not in (0, 1], or as for a call.
        """
        if not 0 < share <= 1:
            raise BadInput(f"share is {share!r}: it must be above 0 and at most 1")
        return self._evaluate(self._bind(schedule), self._order.sample(share))

    def share(self, schedule: Schedule, layer: int) -> None:
        """Say that the candidates to come have this schedule's rates before ``layer``, and differ from there: what
        enters the layer is then kept, and they begin there. Whatever is asked for next, scores are the same."""
        if self._prefixes is not None:
            self._prefixes.share(schedule, layer)

    def statistics(self, reduction: Reduction) -> NDArray[np.float64]:
        """Each prompt's statistic under an adaptive reduction, (examples,) float64, in their order.

        Raises:
            ThinsightError: the reduction is not adaptive, or as for a call.
        """
        if reduction.adaptive is None:
            raise BadInput("the reduction is not adaptive: it has no statistic of a prompt")
        values = np.full(len(self.examples), np.nan)
        known, batches = self._known(self._bind(reduction)), self._batches  # the full model's answers come first
        with apply(self.model, reduction) as handle:
            for batch in batches:
                known.update(zip(batch, self._decode(batch, handle, reduction), strict=True))
                values[batch] = handle.statistic()
                self._report("statistics", int(np.isfinite(values).sum()))
        return values

    def with_ranker(self, ranker: Any) -> Evaluator:
        """This evaluator with another ranker for bare schedules; what was computed is shared."""
        other = copy.copy(self)
        other.ranker = get_ranker(ranker)
        other.__dict__.pop("fingerprint", None)
        return other

    def predictions(self, schedule: Schedule | Reduction, places: Sequence[int] | None = None) -> list[str]:
        """The greedy answers as texts, in the order of the examples; or of those at ``places``, for which only the
        batches that hold them run."""
        reduction = self._bind(schedule)
        wanted = range(len(self.examples)) if places is None else places
        if reduction.schedule.is_full:
            return [self._text(self._full[index].tokens) for index in wanted]
        batches = [batch for batch in self._batches if not set(wanted).isdisjoint(batch)]
        texts: dict[int, str] = {}
        with closing(self._answers(reduction, batches, whole=True)) as stream:
            for batch, answers in stream:
                texts.update(zip(batch, (self._text(answer.tokens) for answer in answers), strict=True))
        return [texts[index] for index in wanted]

    def reduction(self, schedule: Schedule) -> Reduction:
        """The schedule bound to this evaluator's ranker and model."""
        return Reduction(
            schedule, self.ranker, base_model_name_or_path=self._name, model_type=self.model.config.model_type
        )

    def cost(self, schedule: Schedule | Reduction) -> float:
        """Decoder prefill FLOPs of all prompts, as a share of the full model's."""

        def flops(schedule: Schedule | None = None) -> float:
            return sum(self._shape.prefill_flops(*sizes, schedule) for sizes in self.prompt_sizes)

        return self._bind(schedule).average(flops) / flops()

    def budget(self, value: float, unit: str = "keep") -> Budget:
        """A budget of ``value`` for the median prompt; for "ms" the device is profiled now."""
        if unit not in ("flops", "ms"):
            return super().budget(value, unit)
        check_budget_value(value, unit)
        latency = None
        if unit == "ms":
            from ..timing import profile

            latency = profile(self.model, self.reader.typical_batch(self.examples, self.batch_size))
        n_text = median_low(n_text for _, n_text in self.prompt_sizes)
        n_vision, config = self.num_vision_tokens, self.model.config
        return make_budget(float(value), unit, config=config, n_vision=n_vision, n_text=n_text, latency=latency)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """A hash of all that a score depends on: model, dtypes and attention implementation, all generation
        rules, images, prompts, how the processor reads and writes them, answers, metrics and ranker; behind
        it the versions of what computes it.

        Weights enter by an even sample of each tensor. What scores depend on by rounding alone is left out,
        such as device and batch size: a search may be continued on another machine.
        """
        versions = f"thinsight {__version__}, transformers {transformers.__version__}"
        return f"{self._hash(self.ranker.to_dict())} ({versions})"

    def _hash(self, ranker: dict[str, Any] | None) -> str:
        digest = hashlib.sha256()
        hash_model(digest, self.model)
        hash_reading(digest, self.model, self.processor)
        hash_json(digest, [_FINGERPRINT_FORMAT, ranker, self.rules.to_dict()])
        for example, prompt, metric in zip(self.examples, self._prompts, self._metrics, strict=True):
            asked = [example.id, prompt.input_ids.tolist(), example.question]
            hash_json(digest, [*asked, example.answers, metric.name])
            for image in example.images:
                hash_image(digest, image)
        return digest.hexdigest()

    # -- parts, for workers that share an evaluation -----------------------------------------------------------

    def plan(self) -> Order:
        """The batches, in which order they are scored, and when that can end: what `part` is asked for."""
        return self._order

    def part(self, candidate: Schedule | Reduction, batch: Sequence[int]) -> Part:
        """One batch of `plan` under a candidate; the scores are those of a call."""
        reduction, indices = self._bind(candidate), list(batch)
        with closing(self._answers(reduction, [indices])) as stream:
            ((_, answers),) = stream
        return Part(
            tuple(self._score(index, answer) for index, answer in zip(indices, answers, strict=True)),
            tuple(answer.log_likelihood for answer in answers),
            tuple(reduction.average(partial(self._flops, [index])) for index in indices),
        )

    def key_of(self, candidate: Schedule | Reduction) -> str:
        """Candidates with one key keep the same tokens of every prompt here."""
        return repr(self._key(self._bind(candidate)))

    def known_full(self) -> list[GreedyAnswer] | None:
        """The full model's answers, where they are known or kept in ``cache_dir``."""
        return self._full_model.known(lambda: self._hash(None))

    def full_parts(self) -> int:
        """In how many parts the full model's answers may be computed; the batch size is settled."""
        return self._full_model.parts

    def full_part(self, number: int) -> dict[int, GreedyAnswer] | None:
        """One of these parts, by example; None where its batches do not fit into memory."""
        return self._full_model.answer_part(number)

    def take_full(self, answers: list[GreedyAnswer]) -> None:
        """Know the full model's answers, computed in parts, of which one may be from another machine."""
        self._full_model.take(answers, lambda: self._hash(None))

    # -- the full model --------------------------------------------------------------------------------------

    @property
    def _full(self) -> list[GreedyAnswer]:
        return self._full_model.answers(lambda: self._hash(None))

    @cached_property
    def _batches(self) -> list[list[int]]:
        """Example indices in batches of like length, those the full model is least sure of together."""
        scores, full = self.full.per_example, self._full
        assert scores is not None
        asked = enumerate(zip(self._prompts, scores.tolist(), full, strict=True))
        order = sorted((*prompt.size, score, answer.margin, index) for index, (prompt, score, answer) in asked)
        return list(chunks([index for *_, index in order], self.batch_size))

    @cached_property
    def _order(self) -> Order:
        assert self.full.per_example is not None
        ceilings = [metric.ceiling(right) for metric, right in zip(self._metrics, self._right, strict=True)]
        margins = np.array([answer.margin for answer in self._full])
        return Order(self._batches, np.array(ceilings), self.full.per_example, margins, self._failures)

    # -- reduced models --------------------------------------------------------------------------------------

    def _bind(self, schedule: Schedule | Reduction) -> Reduction:
        reduction = self.bind(schedule)
        if reduction.schedule.num_layers != self.num_layers:
            raise BadInput(
                f"the schedule has {reduction.schedule.num_layers} layers but the model has "
                f"{self.num_layers}: use schedule.resample({self.num_layers})"
            )
        return reduction

    def _evaluate(
        self,
        reduction: Reduction,
        batches: Sequence[list[int]],
        floor: float | None = None,
        test: LossTest | None = None,
    ) -> Evaluation:
        """On the given batches; with a floor, only as long as the score may reach it."""
        scores = np.full(len(self.examples), np.nan)
        likely: list[GreedyAnswer] = []
        known = set(self._known(reduction))
        with closing(self._answers(reduction, batches)) as stream:
            for batch, answers in stream:
                likely += answers
                for index, answer in zip(batch, answers, strict=True):
                    scores[index] = self._score(index, answer)
                if floor is not None and self._order.is_lost(scores, batch, floor, test):
                    break
        self._order.note(scores)
        run = np.flatnonzero(~np.isnan(scores))
        fresh = [index for index in run.tolist() if index not in known]
        complete = floor is None or len(run) == len(scores)
        bound = self._order.upper_bound(scores)
        return Evaluation(
            score=float(np.mean(scores[run]) if floor is None or complete else min(bound, floor)),
            per_example=scores,
            complete=complete,
            full_score=self.full_score,
            cost=reduction.average(lambda schedule: self._flops(fresh, schedule)),
            agreement=_agreement(likely),
            share=len(run) / len(scores) if complete else 1.0,
        )

    def _draw(
        self, reduction: Reduction, floor: float, confidence: float, seed: int
    ) -> tuple[list[list[int]], LossTest]:
        """An order of its own for every reduction, so that no choice among them depends on this one."""
        return self._order.drawn(floor, confidence, [seed, zlib.crc32(repr(self._key(reduction)).encode())])

    def _answers(
        self, reduction: Reduction, batches: Sequence[list[int]], whole: bool = False
    ) -> Generator[tuple[list[int], list[GreedyAnswer]], None, None]:
        """The answers of one batch after the other; only what is not yet known is run. The reduction is in force in
        the model until the generator is closed."""
        known = self._known(reduction)
        done = 0
        with ExitStack() as stack:
            handle: Handle | None = None
            for batch in batches:
                if not all(self._settled(index, known.get(index), whole) for index in batch):
                    handle = handle or stack.enter_context(apply(self.model, reduction))
                    known.update(zip(batch, self._decode(batch, handle, reduction, whole), strict=True))
                done += len(batch)
                self._report("reduced model", done)
                yield batch, [known[index] for index in batch]

    def _known(self, reduction: Reduction) -> dict[int, GreedyAnswer]:
        """The answers under a reduction so far, by example; more are put there."""
        if reduction.schedule.is_full:
            return self._memo.setdefault(self._key(reduction), dict(enumerate(self._full)))
        return self._memo.setdefault(self._key(reduction), {})

    def _settled(self, index: int, answer: GreedyAnswer | None, whole: bool) -> bool:
        """Whether an example's score, or the whole answer, is known."""
        if answer is None or answer.finished:
            return answer is not None
        return not whole and (self._metrics[index].by_tokens or self._lost(index, answer.tokens))

    def _lost(self, index: int, tokens: Sequence[int]) -> bool:
        """Whether an answer that begins so scores nothing however it goes on."""
        return self._metrics[index].lost(self._text(tokens), self._right[index])

    def _decode(
        self, batch: Sequence[int], handle: Handle, reduction: Reduction, whole: bool = False
    ) -> list[GreedyAnswer]:
        """Answers under a reduction: whole ones, or as much of them as their scores take."""
        prompts = pad_batch([self._prompts[index] for index in batch], self.rules.pad_token)
        vision = self._full_model.vision.inputs([self.examples[index] for index in batch], reduction.ranker)
        drafts = [self._full[index].tokens for index in batch]
        finish = [whole or not self._metrics[index].by_tokens for index in batch]
        scope: AbstractContextManager[PromptScope] = nullcontext(handle.prompt)
        if self._prefixes is not None:  # the pass over the prompts may begin behind layers that were run
            cached = any(finish)
            self._began.update(dict.fromkeys(batch, self._prefixes.start(reduction, batch, cached)))
            scope = self._prefixes.scope(handle, reduction, batch, cached)
        with scope as prompt_scope:
            return decode(
                self.model,
                prompts,
                vision,
                self.rules,
                drafts=drafts,
                finish=finish,
                lost=None if whole else lambda row, tokens: self._lost(batch[row], tokens),
                prompt_scope=prompt_scope,
            )

    def _key(self, reduction: Reduction) -> tuple[Any, ...]:
        """Reductions with one key keep the same tokens of every prompt here."""
        schedule = reduction.schedule
        ranker = json.dumps([reduction.ranker, reduction.rerank], sort_keys=True, default=repr)
        if reduction.adaptive is not None:
            return ranker, json.dumps(reduction.adaptive.to_dict())
        if any(len(example.images) > 1 for example in self.examples):  # counts may be per image
            return ranker, schedule.keep_rates
        return ranker, *(schedule.counts(n) for n in sorted({prompt.n_vision for prompt in self._prompts}))

    # -- scores ----------------------------------------------------------------------------------------------

    def _score(self, index: int, answer: GreedyAnswer) -> float:
        metric = self._metrics[index]
        if metric.by_tokens:
            return float(answer.tokens == self._full[index].tokens)
        return metric(self._text(answer.tokens), self._right[index], self.examples[index].question)

    @cached_property
    def _right(self) -> list[Sequence[str]]:
        """The answers that count as right, by example: its labels, or the full model's own."""
        asked = zip(self.examples, self._metrics, self._full, strict=True)
        return [each.answers if metric.needs_answers else [self._text(full.tokens)] for each, metric, full in asked]

    def _text(self, tokens: Sequence[int]) -> str:
        tokenizer = tokenizer_of(self.processor)
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def _flops(self, run: Sequence[int], schedule: Schedule | None, drafted: bool = True) -> float:
        """Decoder prefill FLOPs of passes over prompts and drafts, of layers that ran; later steps are left
        out."""
        total = 0.0
        for index in run:
            prompt = self._prompts[index]
            draft = max(len(self._full[index].tokens) - 1, 0) if drafted else 0
            first = self._began.get(index, 0) if drafted else 0
            total += self._shape.prefill_flops(prompt.n_vision, prompt.n_text + draft, schedule, first)
        return total

    def _report(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(what, done, len(self.examples))


def _agreement(answers: Sequence[GreedyAnswer]) -> float:
    """Mean probability of the full model's answers."""
    return float(np.mean(np.exp([answer.log_likelihood for answer in answers])))


def check_metric(examples: Sequence[Example], metric: str | Metric | None) -> list[Metric]:
    """The metric of each example, ``metric`` or (None) its own; needs no model.

    Raises:
        ThinsightError: an unknown metric, or one that needs answers on an example without.
    """
    return [
        metric_for(each.answers, each.metric if metric is None else metric, f"example {each.id!r}") for each in examples
    ]


def _max_new_tokens(given: int | None, processor: Any, examples: Sequence[Example]) -> int:
    if given is not None:
        return whole(given, "max_new_tokens")
    answers = sorted({answer for example in examples for answer in example.answers})
    if not answers:
        return _NEW_TOKENS_UNLABELED
    tokenizer = tokenizer_of(processor)
    longest = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
    return max(_MIN_NEW_TOKENS, longest + _NEW_TOKENS_MARGIN)
