"""The full model on one set of prompts: its greedy answers, and the batches in which they fit into memory.

What makes the answers cheap changes none of them: an image is read once for all questions about it, the right
answer is tried as a draft, and answers are kept across runs. Knows nothing about reductions or scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .. import cost
from ..runtime import apply, can_share, num_layers, vision_token_mask
from ..runtime.cache import CACHE
from ..runtime.families import reads_prompt_both_ways
from ..schedule import Schedule
from .batch_size import BatchSize, check_batch_size, chunks, fastest, free_bytes, pass_bytes
from .decoding import Beginning, DecodingRules, GreedyAnswer, decode
from .examples import Example
from .features import VisionCache, hash_json
from .prompts import Prompt, PromptBatch, PromptReader, pad_batch, pass_inputs, prompt_positions
from .store import DiskStore


@dataclass(frozen=True)
class Siblings:
    """Prompts with the same images and the same first tokens.

    Attributes:
        members: their numbers, at least two.
        shared: how many tokens they begin with alike, all vision tokens among them.
    """

    members: tuple[int, ...]
    shared: int


def siblings_of(model: Any, prompts: Sequence[Prompt], images: Sequence[Hashable]) -> list[Siblings]:
    """The siblings among prompts, those with the longest beginnings last; none where a model cannot share.

    Args:
        model: a supported model.
        prompts: all prompts.
        images: what tells each prompt's images from others.
    """
    if not can_share(model) or reads_prompt_both_ways(model):
        return []
    by_images: dict[Hashable, list[int]] = {}
    for number, key in enumerate(images):
        by_images.setdefault(key, []).append(number)
    found = []
    for members in by_images.values():
        shared = _shared([prompts[number] for number in members])
        first = prompts[members[0]]
        seen = int(vision_token_mask(model, first.input_ids[None, :shared]).sum())
        if len(members) > 1 and seen == first.n_vision:
            found.append(Siblings(tuple(members), shared))
    return sorted(found, key=lambda each: (each.shared, each.members))


def _shared(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own, for a pass needs one."""
    length = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0].input_ids[:length]
    alike = torch.stack([prompt.input_ids[:length] == first for prompt in prompts]).all(0)
    return int(alike.long().cumprod(0).sum())


@torch.no_grad()
def read_once(
    model: Any,
    prompts: Sequence[Prompt],
    siblings: Sequence[Siblings],
    vision: Callable[[Sequence[int]], dict[str, Any]],
    pad_token: int,
    batch_size: int,
) -> Iterator[tuple[list[int], PromptBatch, Beginning]]:
    """Read what siblings begin with, then hand out its prompts in batches that are read so far.

    Args:
        model: as for `siblings_of`.
        prompts: all prompts.
        siblings: to be read in one pass.
        vision: the keyword arguments that carry the images of some prompts, by number.
        pad_token: fills up shorter rows.
        batch_size: the most prompts in a batch handed out.

    Yields:
        The prompts' numbers, the prompts as one batch, and what was read of it.
    """
    heads = [_cut(prompts[each.members[0]], 0, each.shared) for each in siblings]
    batch = pad_batch(heads, pad_token)
    inputs = pass_inputs(
        model,
        batch.input_ids.to(model.device),
        batch.attention_mask.to(model.device),
        prompt_positions(model, batch),
        token_types={name: types.to(model.device) for name, types in batch.per_token.items()},
        use_cache=True,
        logits_to_keep=1,
        **vision([each.members[0] for each in siblings]),
    )
    cache = model(**inputs)[CACHE]
    rows = [(len(prompts[i]) - f.shared, i, row) for row, f in enumerate(siblings) for i in f.members]
    rows.sort()
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        sources = [row for _, _, row in chosen]
        tails = [_cut(prompts[i], siblings[row].shared, None) for _, i, row in chosen]
        joined = _beside([heads[row] for row in sources], tails, batch.width, pad_token)
        yield [i for _, i, _ in chosen], joined, Beginning(_rows_of(cache, sources), batch.width)


def _cut(prompt: Prompt, start: int, end: int | None) -> Prompt:
    """Some tokens of a prompt; its images stay with the first ones."""
    return Prompt(
        prompt.input_ids[start:end],
        prompt.n_vision if start == 0 else 0,
        {name: types[start:end] for name, types in prompt.per_token.items()},
        prompt.per_image if start == 0 else {},
    )


def _beside(heads: Sequence[Prompt], tails: Sequence[Prompt], width: int, pad_token: int) -> PromptBatch:
    """Heads padded to a width, and tails padded behind them."""
    left, right = pad_batch(heads, pad_token), pad_batch(tails, pad_token)
    pad = width - left.width

    def widened(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (pad, 0), value=value)

    return PromptBatch(
        torch.cat([widened(left.input_ids, pad_token), right.input_ids], 1),
        torch.cat([widened(left.attention_mask, 0), right.attention_mask], 1),
        {name: torch.cat([widened(types, 0), right.per_token[name]], 1) for name, types in left.per_token.items()},
        left.per_image,
    )


def _rows_of(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache of its own for the given rows, repeats allowed."""
    chosen = DynamicCache()
    for number, held in enumerate(cache.layers):
        assert type(held) is DynamicLayer
        index = torch.tensor(rows, device=held.keys.device)
        chosen.update(held.keys[index], held.values[index], number)
    return chosen


_FORMAT = 1  # of the answers kept on disk


class FullModel:
    """Answers of a model without a reduction, computed when they are first asked for.

    Args:
        model: a supported model in eval mode.
        processor: its own.
        examples: what is asked.
        prompts: of each example.
        reader: what has read them.
        rules: of decoding.
        batch_size: prompts per pass, or "auto".
        cache_gib: main memory for vision features, in GiB.
        reuse: whether prompts about the same images share what they begin with.
        disk: where features and answers are kept for later runs, or None.
        report: told how many answers there are, after each batch.

    Attributes:
        vision: the images' features; replaced where the batch size changes.

    Raises:
        ThinsightError: ``batch_size`` is neither a whole number of at least 1 nor "auto".
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        examples: Sequence[Example],
        prompts: Sequence[Prompt],
        reader: PromptReader,
        rules: DecodingRules,
        *,
        batch_size: int | str,
        cache_gib: float,
        reuse: bool,
        disk: DiskStore | None,
        report: Callable[[int], None],
    ) -> None:
        self._batch_size = BatchSize(batch_size)
        self._model = model
        self._processor = processor
        self._examples = examples
        self._prompts = prompts
        self._rules = rules
        self._reuse = reuse
        self._disk = disk
        self._report = report
        self._new_vision = partial(VisionCache, model, processor, cache_gib, disk, reader)
        self.vision: VisionCache = self._new_vision()
        if isinstance(batch_size, int):
            self.vision.arrange(examples, batch_size)

    @property
    def batch_size(self) -> int:
        """Prompts per forward pass; "auto" is measured when first asked for."""
        return self._batch_size.settle(self._fastest_batch)

    def fix_batch_size(self, size: int) -> None:
        """Take the size that an earlier run found, before anything is computed.

        Raises:
            ThinsightError: it is not a whole number of at least 1.
        """
        if self._batch_size.size != size:
            check_batch_size(size)
            self._batch_size.size = size
            self._rearrange(size)

    def answers(self, fingerprint: Callable[[], str]) -> list[GreedyAnswer]:
        """The answers, in the order of the examples.

        Args:
            fingerprint: names the model and the set among those that share a disk.
        """
        if self._disk is None:
            return self._answers
        kept = self._disk.value(self._name(fingerprint()))
        if kept is not None:
            return [GreedyAnswer(**{**each, "tokens": tuple(each["tokens"])}) for each in kept]
        answers = self._answers
        # anew: the batch size may have been halved
        self._disk.keep_value(self._name(fingerprint()), [asdict(answer) for answer in answers])
        return answers

    def _name(self, fingerprint: str) -> str:
        """What the answers are called on disk: answers that may differ have another name."""
        passes = [self.batch_size, self._reuse]  # which prompts share a pass
        digest = hashlib.sha256()
        hash_json(digest, [_FORMAT, fingerprint, self.vision.fingerprint, self._rules.to_dict(), passes])
        return f"answers-{digest.hexdigest()}"

    # -- passes ----------------------------------------------------------------------------------------------

    @cached_property
    def _answers(self) -> list[GreedyAnswer]:
        """The answers, in batches that fit into memory."""
        self._batch_size.settle(self._fastest_batch)
        return self._batch_size.first_pass(self._answer_all, self._rearrange)

    def _answer_all(self) -> list[GreedyAnswer]:
        answers: dict[int, GreedyAnswer] = {}
        # a full schedule leaves the model as it is, and makes sure that no other reduction is on it
        with apply(self._model, Schedule.full(num_layers(self._model))):
            for batch, found in self._passes():
                answers.update(zip(batch, found, strict=True))
                self._report(len(answers))
        return [answers[index] for index in range(len(self._examples))]

    def _passes(self) -> Iterator[tuple[list[int], list[GreedyAnswer]]]:
        """Batches with their answers; prompts about the same images share what they begin with."""
        keys = [tuple(example.image_keys) for example in self._examples]
        siblings = siblings_of(self._model, self._prompts, keys) if self._reuse else []
        rest = set(range(len(self._examples))).difference(*(each.members for each in siblings))
        pad_token = self._rules.pad_token
        by_length = sorted(rest, key=lambda index: (*self._prompts[index].size, index))
        for batch in chunks(by_length, self.batch_size):
            prompts = pad_batch([self._prompts[index] for index in batch], pad_token)
            yield batch, self._answer(batch, prompts, self._images(batch))
        for together in chunks(siblings, self.batch_size):
            read = read_once(self._model, self._prompts, together, self._images, pad_token, self.batch_size)
            for batch, prompts, beginning in read:
                yield batch, self._answer(batch, prompts, {}, beginning)

    def _answer(
        self, batch: Sequence[int], prompts: PromptBatch, vision: dict[str, Any], beginning: Beginning | None = None
    ) -> list[GreedyAnswer]:
        """The model's answers, on the guess that they are right: what is guessed needs no steps."""
        guesses = [self._right[index] for index in batch]
        return decode(self._model, prompts, vision, self._rules, drafts=guesses, guessed=True, beginning=beginning)

    @cached_property
    def _right(self) -> list[tuple[int, ...]]:
        """Per example, the tokens of its first right answer as the model may write it; () if it has none."""
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        texts = [example.answers[0] if example.answers else "" for example in self._examples]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stop = getattr(tokenizer, "eos_token_id", None)
        return [self._rules.cut(tokens, stop) if text else () for text, tokens in zip(texts, found, strict=True)]

    def _images(self, batch: Sequence[int]) -> dict[str, Any]:
        return self.vision.inputs([self._examples[index] for index in batch])

    # -- batches ---------------------------------------------------------------------------------------------

    def _rearrange(self, batch_size: int) -> None:
        """Encode images anew, in the groups of a model that was given this batch size."""
        self.vision = self._new_vision()
        self.vision.arrange(self._examples, batch_size)

    def _fastest_batch(self) -> int:
        """The batch size that takes the most tokens of the longest prompts per second."""
        order = sorted(range(len(self._examples)), key=lambda index: (-len(self._prompts[index]), index))
        prompts = [self._prompts[index] for index in order]
        examples = [self._examples[index] for index in order]
        tokens = [len(prompt) for prompt in prompts]
        vision = self._new_vision()
        vision.arrange(examples, 1)
        rules = replace(self._rules, max_new_tokens=1)
        shape = cost.decoder_shape(self._model.config)

        def run(size: int) -> None:
            batch = pad_batch(prompts[:size], rules.pad_token)
            decode(self._model, batch, vision.inputs(examples[:size]), rules)

        def fits(size: int) -> bool:
            if self._model.device.type != "cpu":  # it tells when it is full
                return True
            answer = self._rules.max_new_tokens
            needed = pass_bytes(shape, size, tokens[0] + answer, answer, self._model.dtype.itemsize)
            return needed <= free_bytes()

        with apply(self._model, Schedule.full(num_layers(self._model))):
            found = fastest(tokens, run, fits)
        self._rearrange(found)
        return found
