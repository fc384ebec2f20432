"""The full model on one set of prompts: its greedy answers, and the batches in which they fit into memory.

What makes the answers cheap changes none of them: an image is read once for all questions about it, the right
answer is tried as a draft, and answers are kept across runs. Knows nothing about reductions or scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

from .. import cost
from ..runtime import apply, num_layers
from ..schedule import Schedule
from .batch_size import BatchSize, check_batch_size, chunks, fastest, free_bytes, pass_bytes
from .decoding import Beginning, DecodingRules, GreedyAnswer, decode
from .disk_store import DiskStore
from .encoding import Prompt, PromptBatch, PromptReader, pad_batch
from .examples import Example
from .hashing import hash_json
from .same_images import read_once, siblings_of
from .vision_cache import VisionCache

__all__ = ["FullModel"]

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
        self,
        batch: Sequence[int],
        prompts: PromptBatch,
        vision: dict[str, Any],
        beginning: Beginning | None = None,
    ) -> list[GreedyAnswer]:
        """The model's answers, on the guess that they are right: what is guessed needs no steps."""
        guesses = [self._right[index] for index in batch]
        return decode(
            self._model, prompts, vision, self._rules, drafts=guesses, guessed=True, beginning=beginning
        )

    @cached_property
    def _right(self) -> list[tuple[int, ...]]:
        """Per example, the tokens of its first right answer as the model may write it; () if it has none."""
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        texts = [example.answers[0] if example.answers else "" for example in self._examples]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stop = getattr(tokenizer, "eos_token_id", None)
        return [
            self._rules.cut(tokens, stop) if text else () for text, tokens in zip(texts, found, strict=True)
        ]

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
