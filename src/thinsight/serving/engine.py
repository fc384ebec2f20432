"""Answers requests with one model, one at a time, with its reduction on or off.

Every answer is what `generate` gives for the request alone, whoever else asks meanwhile.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..errors import BadInput, Unsupported
from ..evaluation.example import Example
from ..evaluation.prompts import processed, prompt_text
from ..reduction import Reduction
from ..runtime import Handle, apply, vision_token_mask
from ..runtime.anatomy import MODALITIES, base_model
from ..runtime.encoding import encoder_inputs, on_device
from .chat import Asked, Sampling
from .errors import BadRequest
from .metrics import Metrics

_PLACE = "<image>"  # of an image, as `Example.question` has it
_UNFINISHED = "\ufffd"  # what a character is decoded to whose other bytes are still to come


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Begun:
    """The prompt is read; from here on only the model itself can fail."""

    prompt_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer: its text, why it ended ("stop" or "length"), and lengths in tokens."""

    text: str
    finish: str
    prompt_tokens: int
    answer_tokens: int


Teller = Callable[[Begun | str], None]
"""Is told `Begun` once, then the answer's text piece by piece."""


class Engine:
    """A model with its reduction.

    Args:
        model: loaded; nobody else may use it meanwhile.
        processor: its own.
        reduction: what is on where a request asks for the reduced model.
        metrics: is told what is read and answered.

    Raises:
        ThinsightError: the reduction cannot be put on this model.
    """

    def __init__(self, model: Any, processor: Any, reduction: Reduction, metrics: Metrics) -> None:
        self.model = model
        self.processor = processor
        self.reduction = reduction
        self.metrics = metrics
        self._handle: Handle | None = apply(model, reduction)  # here, so that what is wrong is said at once
        rates = reduction.schedule.keep_rates
        starts = [layer for layer, rate in enumerate(rates) if rate < (rates[layer - 1] if layer else 1)]
        self._stages = {_span(start, end): start for start, end in pairwise([*starts, len(rates)])}
        known = inspect.signature(base_model(model).forward).parameters.keys()
        self._taken = {*known, *(name for each in MODALITIES for name in encoder_inputs(model, each))}
        tokenizer = processor.tokenizer
        self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def answer(self, asked: Asked, images: Sequence[Image.Image], tell: Teller, stop: threading.Event) -> Answer:
        """Answer one request; always called in the same thread.

        Args:
            images: RGB, as many as the messages have places for.
            tell: is told the answer as it grows.
            stop: set where nobody waits for it any more.

        Raises:
            Cancelled: ``stop`` was set.
            BadRequest: the request makes no prompt of this model's.
        """
        if stop.is_set():
            raise Cancelled
        started = time.monotonic()
        inputs = self._inputs(asked, images)
        prompt: Tensor = inputs["input_ids"]  # (1, seq)
        seen = int(vision_token_mask(self.model, prompt).sum())
        config = self._generation_config(asked.sampling, self._room(prompt.shape[1], asked.sampling))
        tell(Begun(prompt.shape[1]))
        watch = _Watch(prompt.shape[1], self._decode, asked.sampling.stop, tell, stop)
        handle = self._switched(asked.reduced)
        if asked.sampling.seed is not None:
            torch.manual_seed(asked.sampling.seed)
        output = self.model.generate(
            **inputs, generation_config=config, stopping_criteria=StoppingCriteriaList([watch])
        )
        if stop.is_set():
            raise Cancelled
        tokens = output[0, prompt.shape[1] :].tolist()
        text = watch.finish(tokens)
        ended = watch.found or (bool(tokens) and tokens[-1] in _stop_tokens(config))
        self._count(asked, prompt.shape[1], len(tokens), seen, handle)
        self.metrics.seconds.labels(asked.model).observe(time.monotonic() - started)
        if watch.first is not None:
            self.metrics.first.labels(asked.model).observe(watch.first - started)
        return Answer(text, "stop" if ended else "length", prompt.shape[1], len(tokens))

    def close(self) -> None:
        """Take the reduction off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _switched(self, reduced: bool) -> Handle | None:
        """With the reduction on or off."""
        if not reduced:
            self.close()
        elif self._handle is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # said when the server was started
                self._handle = apply(self.model, self.reduction)
        return self._handle

    def _inputs(self, asked: Asked, images: Sequence[Image.Image]) -> dict[str, Any]:
        """What `generate` takes, on the model's device."""
        try:
            made = processed(self.processor, self._text(asked, images), images, "the request")
        except (BadInput, Unsupported) as error:
            raise BadRequest(str(error), "messages") from error
        return on_device(self.model, {name: value for name, value in made.items() if name in self._taken})

    def _room(self, length: int, sampling: Sampling) -> int:
        """The longest answer to a prompt of so many tokens."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = sampling.max_new_tokens if most is None else most - length
        if room < (1 if sampling.fitted else sampling.max_new_tokens):
            raise BadRequest(
                f"messages make {length} tokens and the answer may have {sampling.max_new_tokens}, but the model was "
                f"made for {most} in all: send fewer or smaller images, less text, or ask for less",
                "messages",
                code="context_length_exceeded",
            )
        return min(room, sampling.max_new_tokens)

    def _text(self, asked: Asked, images: Sequence[Image.Image]) -> str:
        """The prompt as text."""
        messages = asked.messages
        if getattr(self.processor, "chat_template", None):
            try:
                return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            except Exception as error:  # a template is a program of its own, and says so what it does not take
                raise BadRequest(f"the model's chat template refuses the messages: {error}", "messages") from error
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise BadRequest("this model has no chat template: send one message, of the user's", "messages")
        question = "\n".join(part.get("text", _PLACE) for part in messages[0]["content"])
        return prompt_text(self.processor, Example("request", tuple(images), question, group="request"))

    def _generation_config(self, sampling: Sampling, most: int) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.num_beams, config.max_length, config.max_new_tokens = 1, None, most
        if sampling.temperature == 0:
            config.do_sample = False
        elif sampling.temperature is not None:
            config.do_sample, config.temperature = True, sampling.temperature
        if sampling.top_p is not None:
            config.top_p = sampling.top_p
            config.do_sample = sampling.temperature != 0
        return config

    def _count(self, asked: Asked, prompt: int, answer: int, seen: int, handle: Handle | None) -> None:
        self.metrics.prompt_tokens.labels(asked.model).inc(prompt)
        self.metrics.answer_tokens.labels(asked.model).inc(answer)
        kept = dict.fromkeys(self._stages, seen)
        if handle is not None and seen and self._stages:
            kept = {name: sum(map(len, handle.kept(layer))) for name, layer in self._stages.items()}
        self.metrics.prompt(seen, kept, reduced=handle is not None)


class _Watch(StoppingCriteria):
    """Looks at an answer after each token: tells its text, ends it at a stop text or where nobody waits for it."""

    def __init__(
        self,
        start: int,
        decode: Callable[[list[int]], str],
        stops: tuple[str, ...],
        tell: Teller,
        cancelled: threading.Event,
    ) -> None:
        self.found = False  # a stop text, which is cut off
        self.first: float | None = None  # when the first token came, in seconds of `time.monotonic`
        self._start = start
        self._decode = decode
        self._stops = stops
        self._tell = tell
        self._cancelled = cancelled
        self._told = ""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Of (1, seq) ids: (1,) bool, whether the answer is over."""
        if self.first is None:
            self.first = time.monotonic()
        text = self._cut(self._decode(input_ids[0, self._start :].tolist()))
        if not self.found:
            # a space may go with what follows, and a stop text may have begun
            text = text.rstrip().removesuffix(_UNFINISHED)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)]
        self._tell_up_to(text)
        over = self.found or self._cancelled.is_set()
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)

    def finish(self, tokens: list[int]) -> str:
        """The whole text."""
        text = self._cut(self._decode(tokens))
        self._tell_up_to(text)
        return text

    def _cut(self, text: str) -> str:
        places = [place for place in map(text.find, self._stops) if place >= 0]
        self.found = self.found or bool(places)
        return text[: min(places, default=None)] if places else text

    def _tell_up_to(self, text: str) -> None:
        if text.startswith(self._told) and len(text) > len(self._told):
            self._tell(text[len(self._told) :])
            self._told = text


def _overlap(text: str, stop: str) -> int:
    """How many characters at a text's end may be the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _span(start: int, end: int) -> str:
    """Layers from ``start`` to before ``end``, as the plugin for vLLM names them."""
    return str(start) if end - start == 1 else f"{start}-{end - 1}"


def _stop_tokens(config: Any) -> set[int]:
    ids = config.eos_token_id
    return set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
