"""The full model on one set of prompts: its greedy answers, and the batches in which they fit into memory.

What makes the answers cheap changes none of them: an image is read once for all questions about it, the right
answer is tried as a draft, and answers are kept across runs. Knows nothing about reductions or scores.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .. import cost
from ..errors import BadInput
from ..runtime import EncodedImages, apply, can_share, num_layers, vision_token_mask
from ..runtime.anatomy import reads_prompt_both_ways
from ..runtime.cache import CACHE
from ..schedule import Schedule
from .decoding import Beginning, DecodingRules, GreedyAnswer, decode
from .examples import Example
from .features import VisionCache, hash_json
from .prompts import Prompt, PromptBatch, PromptReader, batch_inputs, chunks, pad_batch
from .store import Store

T = TypeVar("T")

AUTO = "auto"
_WORTH_A_DOUBLING = 1.05  # times the tokens per second
_RUNS = 2  # of each size; the first one warms up
_FORMAT = 1  # of the answers kept on disk


# -- how many prompts go through the model at once -----------------------------------------------------------


def check_batch_size(wanted: Any) -> None:
    """Refuse a batch size that is neither a whole number of at least 1 nor "auto"."""
    whole = isinstance(wanted, int) and not isinstance(wanted, bool)
    if wanted != AUTO and (not whole or wanted < 1):
        raise BadInput(f"batch_size is {wanted!r}: it must be a whole number of at least 1, or 'auto'")


class BatchSize:
    """The batch size of all that must run in the same batches: a number, the fastest one ("auto"), or half of
    what did not fit; its ``size`` is None as long as it is still to be found."""

    def __init__(self, wanted: int | str) -> None:
        check_batch_size(wanted)
        self.size = None if isinstance(wanted, str) else wanted

    def settle(self, find: Callable[[], int]) -> int:
        """The size, by ``find`` if it is still open."""
        if self.size is None:
            self.size = find()
        return self.size

    def first_pass(self, run: Callable[[], T], halved: Callable[[int], object]) -> T:
        """What ``run`` returns, which goes through all prompts in batches of the settled size. As long as it runs out
        of the device's memory the size is halved, with a warning, ``halved`` is told, and it is run again from the
        start, so that the outcome is that of the size it ends with. Single prompts that do not fit are an error."""
        assert self.size is not None
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise BadInput(
                        "batch_size is 1, and the device's memory does not hold the pass of one prompt: load the "
                        "model with dtype bfloat16, spread it with device_map, or use smaller images"
                    ) from None
            half = self.size // 2
            warnings.warn(f"batch_size {self.size} does not fit into memory, now it is {half}", stacklevel=2)
            self.size = half
            halved(half)
            _release()  # here the error is gone, and with it the tensors of its frames


def fastest(
    tokens: Sequence[int],
    run: Callable[[int], object],
    fits: Callable[[int], bool] = lambda size: True,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The batch size, a power of two, that takes the most tokens per second: sizes are doubled until that
    brings less than 5 %, the prompts end, or memory does.

    Args:
        tokens: how long each prompt is, in the order in which ``run`` takes them.
        run: one pass over the first so many prompts; may raise ``torch.OutOfMemoryError``.
        fits: whether a pass of this size may be tried.
        clock: seconds.
    """
    best, rate, size = 1, 0.0, 1
    while size <= len(tokens) and fits(size):
        try:
            seconds = min(_timed(run, size, clock) for _ in range(_RUNS))
        except torch.OutOfMemoryError:
            break
        found = sum(tokens[:size]) / seconds
        if found > rate:
            best = size
        if found < _WORTH_A_DOUBLING * rate:
            break
        rate, size = found, 2 * size
    _release()
    return best


def _timed(run: Callable[[int], object], size: int, clock: Callable[[], float]) -> float:
    start = clock()
    run(size)
    return clock() - start


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pass_bytes(shape: cost.DecoderShape, rows: int, tokens: int, answer: int, dtype_bytes: int) -> float:
    """About what one pass of ``rows`` prompts of ``tokens`` positions adds to the memory in use: keys and values
    of all layers, one layer's activations and the logits of the answer; twice, for the copies and the attention
    weights that some implementations make."""
    cached = sum(shape.kv_bytes_per_token(dtype_bytes, layer) for layer in range(shape.num_layers))
    activations = (4 * shape.hidden + 3 * shape.intermediate) * dtype_bytes
    return 2.0 * rows * (tokens * (cached + activations) + answer * shape.vocab * dtype_bytes)


def free_bytes() -> float:
    """Main memory that no process uses; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS not this name
        return float("inf")


# -- prompts about the same images ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Siblings:
    """Prompts with the same images and the same first tokens."""

    members: tuple[int, ...]  # their numbers, at least two
    shared: int  # how many tokens they begin with alike, all vision tokens among them


def siblings_of(model: Any, prompts: Sequence[Prompt], images: Sequence[Hashable]) -> list[Siblings]:
    """The siblings among all prompts, those with the longest beginnings last; none where a model cannot share.
    ``images`` tell each prompt's images from others."""
    if not can_share(model) or reads_prompt_both_ways(model):
        return []
    by_images: dict[Hashable, list[int]] = {}
    for number, key in enumerate(images):
        by_images.setdefault(key, []).append(number)
    found = []
    for members in by_images.values():
        together = [prompts[number] for number in members]
        length = min(map(len, together)) - 1  # each keeps a token of its own, for a pass needs one
        first = together[0].input_ids[:length]
        alike = torch.stack([prompt.input_ids[:length] == first for prompt in together]).all(0)
        shared = int(alike.long().cumprod(0).sum())
        seen = int(vision_token_mask(model, first[None, :shared]).sum())
        if len(members) > 1 and seen == together[0].n_vision:
            found.append(Siblings(tuple(members), shared))
    return sorted(found, key=lambda each: (each.shared, each.members))


@torch.no_grad()
def read_once(
    model: Any,
    prompts: Sequence[Prompt],
    siblings: Sequence[Siblings],
    vision: Callable[[Sequence[int]], dict[str, Any]],
    pad_token: int,
    batch_size: int,
) -> Iterator[tuple[list[int], PromptBatch, Beginning]]:
    """Read what siblings begin with in one pass, then hand out their prompts in batches that are read so far.

    Of several prompts' numbers, ``vision`` gives the keyword arguments that carry their images.

    Yields:
        The numbers of at most ``batch_size`` prompts, these as one batch, and what was read of it.
    """
    heads = [_cut(prompts[each.members[0]], 0, each.shared) for each in siblings]
    batch = pad_batch(heads, pad_token)
    width = batch.input_ids.shape[1]
    images = vision([each.members[0] for each in siblings])
    cache = model(**batch_inputs(model, batch, use_cache=True, logits_to_keep=1, **images))[CACHE]
    rows = sorted((len(prompts[i]) - each.shared, i, row) for row, each in enumerate(siblings) for i in each.members)
    for chosen in chunks(rows, batch_size):
        sources = [row for _, _, row in chosen]
        left = pad_batch([heads[row] for row in sources], pad_token, width)
        right = pad_batch([_cut(prompts[i], siblings[row].shared, None) for _, i, row in chosen], pad_token)
        joined = PromptBatch(
            torch.cat([left.input_ids, right.input_ids], 1),
            torch.cat([left.attention_mask, right.attention_mask], 1),
            {name: torch.cat([types, right.per_token[name]], 1) for name, types in left.per_token.items()},
            left.per_image,
        )
        yield [i for _, i, _ in chosen], joined, Beginning(_rows_of(cache, sources), width)


def _cut(prompt: Prompt, start: int, end: int | None) -> Prompt:
    """Some tokens of a prompt; its images stay with the first ones."""
    types = {name: types[start:end] for name, types in prompt.per_token.items()}
    n_vision, per_image = (prompt.n_vision, prompt.per_image) if start == 0 else (0, {})
    return Prompt(prompt.input_ids[start:end], n_vision, types, per_image)


def _rows_of(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache of its own for the given rows, repeats allowed."""
    chosen = DynamicCache()
    for number, held in enumerate(cache.layers):
        assert type(held) is DynamicLayer
        index = torch.tensor(rows, device=held.keys.device)
        chosen.update(held.keys[index], held.values[index], number)
    return chosen


@dataclass(eq=False)
class FullModel:
    """Answers of a supported model in eval mode without a reduction, computed when they are first asked for."""

    reader: PromptReader  # of the model and its processor
    examples: Sequence[Example]
    prompts: Sequence[Prompt]  # of the examples, as the reader has read them
    rules: DecodingRules
    store: Store[EncodedImages]  # of vision features, and if it is persistent, of answers
    sizes: BatchSize
    reuse: bool  # whether prompts about the same images share what they begin with
    report: Callable[[int], None]  # told how many answers there are, after each batch

    def __post_init__(self) -> None:
        self.model = self.reader.model
        self._answers: list[GreedyAnswer] | None = None
        self._arrangement: tuple[int, list[tuple[list[int], list[Siblings]]]] | None = None
        self.vision = self._new_vision(self.examples, self.sizes.size)  # replaced where the batch size changes

    @property
    def batch_size(self) -> int:
        """Prompts per forward pass; "auto" is measured when first asked for."""
        return self.sizes.settle(self._fastest_batch)

    def fix_batch_size(self, size: int) -> None:
        """Take the size that an earlier run found, before anything is computed."""
        if self.sizes.size != size:
            check_batch_size(size)
            self.sizes.size = size
            self._rearrange(size)

    def answers(self, fingerprint: Callable[[], str]) -> list[GreedyAnswer]:
        """The answers; ``fingerprint`` names the model and the set among those that share a folder."""
        if self.known(fingerprint) is None:
            self.sizes.settle(self._fastest_batch)
            self._answers = self.sizes.first_pass(self._answer_all, self._rearrange)
            if self.store.persistent:  # the name anew: the batch size may have been halved
                self.store.keep_value(self._name(fingerprint()), [asdict(answer) for answer in self._answers])
        assert self._answers is not None
        return self._answers

    def known(self, fingerprint: Callable[[], str]) -> list[GreedyAnswer] | None:
        """The answers, where they need not be computed."""
        if self._answers is None and self.store.persistent:
            kept = self.store.value(self._name(fingerprint()))
            if kept is not None:
                self._answers = [GreedyAnswer(**{**each, "tokens": tuple(each["tokens"])}) for each in kept]
        return self._answers

    def take(self, answers: list[GreedyAnswer], fingerprint: Callable[[], str]) -> None:
        """Know the answers, which others have computed in parts."""
        self._answers = list(answers)
        if self.store.persistent:
            self.store.keep_value(self._name(fingerprint()), [asdict(answer) for answer in self._answers])

    @property
    def parts(self) -> int:
        """How many parts `answer_part` can compute in any order, on any machine."""
        return len(self._arranged())

    def answer_part(self, number: int) -> dict[int, GreedyAnswer] | None:
        """The answers of one part by example, the same as in a pass over all; None where the device's memory does not
        hold it."""
        found: dict[int, GreedyAnswer] = {}
        try:
            with apply(self.model, Schedule.full(num_layers(self.model))):
                for batch, answers in self._pass(*self._arranged()[number]):
                    found.update(zip(batch, answers, strict=True))
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise
        else:
            return found
        _release()
        return None

    def _name(self, fingerprint: str) -> str:
        """What the answers are called on disk: answers that may differ have another name."""
        passes = [self.batch_size, self.reuse]  # which prompts share a pass
        digest = hashlib.sha256()
        hash_json(digest, [_FORMAT, fingerprint, self.vision.fingerprint, self.rules.to_dict(), passes])
        return f"answers-{digest.hexdigest()}"

    # -- passes ----------------------------------------------------------------------------------------------

    def _answer_all(self) -> list[GreedyAnswer]:
        answers: dict[int, GreedyAnswer] = {}
        # a full schedule leaves the model as it is, and makes sure that no other reduction is on it
        with apply(self.model, Schedule.full(num_layers(self.model))):
            for batch, found in self._passes():
                answers.update(zip(batch, found, strict=True))
                self.report(len(answers))
        return [answers[index] for index in range(len(self.examples))]

    def _passes(self) -> Iterator[tuple[list[int], list[GreedyAnswer]]]:
        """Batches with their answers; prompts about the same images share what they begin with."""
        for unit in self._units():
            yield from self._pass(*unit)

    def _arranged(self) -> list[tuple[list[int], list[Siblings]]]:
        """The units at this batch size, arranged once."""
        if self._arrangement is None or self._arrangement[0] != self.batch_size:
            self._arrangement = (self.batch_size, self._units())
        return self._arrangement[1]

    def _units(self) -> list[tuple[list[int], list[Siblings]]]:
        """What is read together: prompts alone, or siblings."""
        keys = [example.image_keys for example in self.examples]
        siblings = siblings_of(self.model, self.prompts, keys) if self.reuse else []
        rest = set(range(len(self.examples))).difference(*(each.members for each in siblings))
        by_length = sorted(rest, key=lambda index: (*self.prompts[index].size, index))
        alone: list[tuple[list[int], list[Siblings]]] = [(batch, []) for batch in chunks(by_length, self.batch_size)]
        return [*alone, *(([], together) for together in chunks(siblings, self.batch_size))]

    def _pass(self, batch: list[int], together: list[Siblings]) -> Iterator[tuple[list[int], list[GreedyAnswer]]]:
        pad_token = self.rules.pad_token
        if batch:
            prompts = pad_batch([self.prompts[index] for index in batch], pad_token)
            yield batch, self._answer(batch, prompts, self._images(batch))
        if together:
            read = read_once(self.model, self.prompts, together, self._images, pad_token, self.batch_size)
            for part, prompts, beginning in read:
                yield part, self._answer(part, prompts, {}, beginning)

    def _answer(
        self, batch: Sequence[int], prompts: PromptBatch, vision: dict[str, Any], beginning: Beginning | None = None
    ) -> list[GreedyAnswer]:
        """The model's answers, on the guess that they are right: what is guessed needs no steps."""
        guesses = [self._right[index] for index in batch]
        return decode(self.model, prompts, vision, self.rules, drafts=guesses, guessed=True, beginning=beginning)

    @cached_property
    def _right(self) -> list[tuple[int, ...]]:
        """Per example, the tokens of its first right answer as the model may write it; () if it has none."""
        tokenizer = getattr(self.reader.processor, "tokenizer", self.reader.processor)
        texts = [example.answers[0] if example.answers else "" for example in self.examples]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stop = getattr(tokenizer, "eos_token_id", None)
        return [self.rules.cut(tokens, stop) if text else () for text, tokens in zip(texts, found, strict=True)]

    def _images(self, batch: Sequence[int]) -> dict[str, Any]:
        return self.vision.inputs([self.examples[index] for index in batch])

    # -- batches ---------------------------------------------------------------------------------------------

    def _new_vision(self, examples: Sequence[Example], together: int | None) -> VisionCache:
        """Nothing encoded yet; images in the groups of a model that was given this batch size."""
        self.store.clear()
        vision = VisionCache(self.reader, self.store)
        if together is not None:
            vision.arrange(examples, together)
        return vision

    def _rearrange(self, batch_size: int) -> None:
        self.vision = self._new_vision(self.examples, batch_size)

    def _fastest_batch(self) -> int:
        """The batch size that takes the most tokens of the longest prompts per second."""
        order = sorted(range(len(self.examples)), key=lambda index: (-len(self.prompts[index]), index))
        prompts = [self.prompts[index] for index in order]
        examples = [self.examples[index] for index in order]
        tokens = [len(prompt) for prompt in prompts]
        vision = self._new_vision(examples, 1)
        rules = replace(self.rules, max_new_tokens=1)
        shape = cost.decoder_shape(self.model.config)

        def run(size: int) -> None:
            batch = pad_batch(prompts[:size], rules.pad_token)
            decode(self.model, batch, vision.inputs(examples[:size]), rules)

        def fits(size: int) -> bool:
            if self.model.device.type != "cpu":  # it tells when it is full
                return True
            answer = self.rules.max_new_tokens
            needed = pass_bytes(shape, size, tokens[0] + answer, answer, self.model.dtype.itemsize)
            return needed <= free_bytes()

        with apply(self.model, Schedule.full(num_layers(self.model))):
            found = fastest(tokens, run, fits)
        self._rearrange(found)
        return found
