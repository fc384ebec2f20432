"""Prompts: an example becomes the token ids that a model reads, and several become one left-padded batch. Every example
is processed alone, and its images only once for all questions about them.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationMixin

from ..errors import BadInput, Unsupported
from ..families import family_of, has_roles, nests_images
from ..runtime import vision_token_mask
from ..runtime.anatomy import MODALITIES, base_model
from ..runtime.cache import CACHE, fresh_cache
from ..runtime.encoding import encoder_inputs, on_device
from .examples import Example, Progress, check_size
from .store import DEFAULT_CACHE_GIB, Store

_PLAIN_PROMPT = "USER: {images}{question} ASSISTANT:"  # LLaVA-1.5's own format
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_PER_TOKEN = ("input_ids", "attention_mask", *_TOKEN_TYPES)
_PLACE = re.compile(r"<image(?:[ _]?(\d+))?>")  # as data sets write it: LLaVA's, and MMMU's numbered ones
_MARK = "thinsight-question"
_MOST_STRETCH = 4  # times max_position_embeddings: beyond that no scaling of positions helps, nor does memory
_PIXELS_SHARE = 0.25  # of the main memory that features may take
_POSITIONS = "_prepare_position_ids_for_generation"

T = TypeVar("T")


def chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """The items in lists of ``size``, the last one of what is left."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


@dataclass(frozen=True)
class Prompt:
    """One example's prompt, on the CPU: all that the model takes except the pixels."""

    input_ids: Tensor  # (seq,) int64
    n_vision: int  # how many of them are vision tokens
    per_token: Mapping[str, Tensor] = field(default_factory=dict)  # token types: (seq,)
    per_image: Mapping[str, Tensor] = field(default_factory=dict)  # sizes, grids: (images, ...)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def n_text(self) -> int:
        return len(self) - self.n_vision

    @property
    def size(self) -> tuple[int, int]:
        """By which prompts of like length stand together: all tokens, and vision tokens."""
        return len(self), self.n_vision


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts."""

    input_ids: Tensor  # (batch, seq) int64
    attention_mask: Tensor  # (batch, seq) int64
    per_token: Mapping[str, Tensor] = field(default_factory=dict)  # (batch, seq), 0 at padding
    per_image: Mapping[str, Tensor] = field(default_factory=dict)  # (images of all prompts, ...)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, as keyword arguments of the model."""
        rows = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {**rows, **self.per_token, **self.per_image}

    def to(self, model: Any) -> PromptBatch:
        """The same on a model's device."""
        moved = on_device(model, self.tensors)
        rows, images = ({name: moved[name] for name in names} for names in (self.per_token, self.per_image))
        return PromptBatch(moved["input_ids"], moved["attention_mask"], rows, images)


def pad_batch(prompts: Sequence[Prompt], pad_token_id: int, width: int = 0) -> PromptBatch:
    """Prompts side by side, padded on the left so that all end in the last column, of at least ``width``."""
    first = prompts[0]
    return PromptBatch(
        _pad([prompt.input_ids for prompt in prompts], pad_token_id, width),
        _pad([torch.ones_like(prompt.input_ids) for prompt in prompts], 0, width),
        {name: _pad([prompt.per_token[name] for prompt in prompts], 0, width) for name in first.per_token},
        {name: torch.cat([prompt.per_image[name] for prompt in prompts]) for name in first.per_image},
    )


def counts_patches(model: Any) -> bool:
    """Whether images come with numbers of patches, counted over all of a processor's output (Molmo2)."""
    return any(name.endswith("_token_pooling") for name in encoder_inputs(model, "image"))


def _pad(rows: Sequence[Tensor], value: int, width: int = 0) -> Tensor:
    """(seq,) each -> (batch, longest seq)."""
    width = max(width, *map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=value) for row in rows])


# -- what a forward pass takes -------------------------------------------------------------------------------


def prompt_positions(model: Any, batch: PromptBatch) -> Tensor:
    """Position ids of left-padded prompts on the model's device: (batch, seq), or (axes, batch, seq)."""
    ours = getattr(type(model), _POSITIONS, None)
    if ours is None or ours is getattr(GenerationMixin, _POSITIONS, None):
        return (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    positions: Tensor = getattr(model, _POSITIONS)(batch.input_ids, batch.tensors)
    return positions


def batch_inputs(model: Any, batch: PromptBatch, **more: Any) -> dict[str, Any]:
    """What the model's ``forward`` takes for whole prompts, on any device."""
    there = batch.to(model)
    ids, mask = there.input_ids, there.attention_mask
    return pass_inputs(model, ids, mask, prompt_positions(model, there), token_types=there.per_token, **more)


def pass_inputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    *,
    token_types: Mapping[str, Tensor],
    cache: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """What the model's ``forward`` takes for new tokens, the first or (with a cache) later ones: ids and token types
    (batch, new), positions (batch, new) or (axes, batch, new), mask (batch, all columns), 1 where seen."""
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(
        input_ids,
        # attention without a mask is faster
        attention_mask=None if bool(attention_mask.all()) else attention_mask,
        position_ids=position_ids,
        is_first_iteration=cache is None,
        **{CACHE: cache},
        **token_types,
        **more,
    )
    if prepared.get("position_ids", position_ids) is None:
        # EXAONE 4.5 and Qwen-Omni count what is cached, of which here some columns may be masked
        prepared["position_ids"] = position_ids
    return {**prepared, **fresh_cache(model)} if cache is None and more.get("use_cache") else prepared


# -- what a processor is given, and gives --------------------------------------------------------------------


def image_token(processor: Any) -> str:
    """The text that stands for an image in the processor's prompts, "<image>" for LLaVA."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    raise BadInput(f"the processor {type(processor).__name__} has no image token: pass the model's own processor")


def prompt_text(processor: Any, example: Example) -> str:
    """The prompt as text, with one image token per image, ending where the model's answer begins.

    The processor's chat template where it has one, else ``USER: <image>\\n{question} ASSISTANT:``. A question
    that holds image tokens itself, or the placeholders of `Example.question`, keeps its images where they
    are; otherwise the images come first.

    Raises:
        ThinsightError: the question places a different number of images than the example has, or numbers
            them otherwise than 1, 2, ...; or the chat template fails.
    """
    token, count = image_token(processor), len(example.images)
    placed = example.question.count(token)
    places = [] if placed else list(_PLACE.finditer(example.question))
    if (placed or places) and (placed or len(places)) != count:
        raise BadInput(
            f"example {example.id!r} has {count} images but its question has {placed or len(places)} "
            f"{token if placed else '<image>'!r} tokens: give one per image, or none to put the images first"
        )
    if placed:
        return _rendered(processor, example, example.question, images=0)
    if not places:
        return _rendered(processor, example, example.question, images=count)
    numbers = [place[1] for place in places]
    if any(numbers) and numbers != [str(number) for number in range(1, count + 1)]:
        said = ", ".join("<image>" if number is None else f"<image {number}>" for number in numbers)
        raise BadInput(
            f"example {example.id!r} places its images as {said}: number them from 1 in the order in which "
            "the question shows them, list its images in that order, and name each once"
        )
    end = places[-1].end()
    if not _PLACE.sub("", example.question[:end]).strip():  # they come first anyway
        return _rendered(processor, example, example.question[end:].lstrip(), images=count)
    written = _written_image(processor, example, token)
    return _rendered(processor, example, _PLACE.sub(lambda _: written, example.question), images=0)


def _rendered(processor: Any, example: Example, question: str, images: int) -> str:
    """The prompt of a question behind so many images."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        try:
            return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program of its own
            reason = f"{type(error).__name__}: {error}"
            raise BadInput(
                f"the processor's chat template fails on the prompt of example {example.id!r} ({reason}): "
                "mend processor.chat_template"
            ) from error
    token = image_token(processor)
    if not has_roles(processor):
        return token * images + question
    return _PLAIN_PROMPT.format(images=f"{token}\n" * images, question=question)


def _written_image(processor: Any, example: Example, token: str) -> str:
    """What a prompt holds for an image: the processor's token, and what its chat template puts around it."""
    if not getattr(processor, "chat_template", None):
        return token
    one, two = (_rendered(processor, example, _MARK, images=count) for count in (1, 2))
    mark, length = one.find(_MARK), len(two) - len(one)
    for start in (mark - length, mark + len(_MARK)):  # before the question, or behind it
        written = one[max(start, 0) : max(start, 0) + length]
        if written.strip() and two == one[:start] + written + one[start:]:
            return written.strip()
    return token


def _process(processor: Any, example: Example, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What the processor makes of one example: (1, seq) and all that belongs to its images."""
    return processed(processor, prompt_text(processor, example), images, f"example {example.id!r}")


def processed(processor: Any, text: str, images: Sequence[Image.Image], what: str) -> dict[str, Any]:
    """What a processor makes of one prompt and its images, which may be none: (1, seq) and all that belongs to them.

    Raises:
        BadInput: the images do not fit the prompt, or memory; or it makes several prompts. It names ``what``.
    """
    start = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    # a chat template may have written it already
    options = {"add_special_tokens": False} if start and text.startswith(start) else {}
    given = [list(images)] if nests_images(processor) else list(images)
    try:
        made = dict(processor(text=[text], images=given if images else None, return_tensors="pt", **options))
    except ValueError as error:  # the processor's own check of images against image tokens
        raise BadInput(
            f"the prompt of {what} does not fit its {len(images)} images ({error}): "
            f"the chat template must put {image_token(processor)!r} where an image belongs"
        ) from error
    except MemoryError:
        raise BadInput(f"the images of {what} do not fit into memory with their processor: make them smaller") from None
    if len(made["input_ids"]) > 1:
        raise BadInput(
            f"{type(processor).__name__} makes {len(made['input_ids'])} prompts of {what}: pass a "
            "processor that asks the example's question alone"
        )
    return made


def collate(parts: Sequence[Tensor]) -> Tensor:
    """What belongs to the images of several prompts, (images, ...) each, as the processor gives it for all of
    them: end to end, with zeros where shapes differ."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *shape)
    start = 0
    for part in parts:
        whole[start : start + len(part)][tuple(map(slice, part.shape))] = part
        start += len(part)
    return whole


def _prompt_of(model: Any, example: Example, inputs: Mapping[str, Any]) -> Prompt:
    """An example's prompt from what its processor made of it, each image token expanded to its vision tokens."""
    input_ids = inputs["input_ids"]  # (1, seq)
    n_vision = int(vision_token_mask(model, input_ids).sum())
    if n_vision == 0:
        raise BadInput(
            f"the prompt of example {example.id!r} has no image token that {type(model).__name__} knows: "
            "pass the processor that belongs to the model"
        )
    taken = inspect.signature(base_model(model).forward).parameters
    rest = {name: value for name, value in inputs.items() if name in taken and isinstance(value, Tensor)}
    return Prompt(
        input_ids[0],
        n_vision,
        per_token={name: rest[name][0] for name in _TOKEN_TYPES if name in rest},
        per_image={name: rest[name] for name in rest if name not in _PER_TOKEN and not name.startswith("pixel_")},
    )


@dataclass(frozen=True)
class _Pixels:
    """What the encoder takes for the images of a prompt, on the CPU, and how many vision tokens they make."""

    tensors: Mapping[str, Tensor]
    n_vision: int

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> _Pixels:
        return _Pixels({name: function(name, each) for name, each in self.tensors.items()}, self.n_vision)


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a bare tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


class PromptReader:
    """Reads examples once: every distinct set of images is opened and processed one time, whatever is asked about it.
    What the encoder takes is kept until it runs, in a quarter of ``cache_gib`` (main memory), then in temporary files.
    """

    def __init__(self, model: Any, processor: Any, cache_gib: float = DEFAULT_CACHE_GIB) -> None:
        self.model = model
        self.processor = processor
        self._pixels: Store[_Pixels] = Store(cache_gib, _PIXELS_SHARE)
        self._prompts: dict[tuple[tuple[str, ...], str], Prompt] = {}
        self._names = {name for modality in MODALITIES for name in encoder_inputs(model, modality)}
        self._warned = False

    def prompts(self, examples: Sequence[Example], progress: Progress | None = None) -> list[Prompt]:
        """The examples' prompts, in their order; ``progress("images", done, total)`` is told, in examples. A
        prompt that is longer than the model was made for is warned about once."""
        by_images: dict[tuple[str, ...], list[Example]] = {}
        for example in examples:
            if (example.image_keys, example.question) not in self._prompts:
                by_images.setdefault(example.image_keys, []).append(example)
        done = len(examples) - sum(map(len, by_images.values()))
        for together in by_images.values():
            self._read(together)
            done += len(together)
            if progress is not None:
                progress("images", done, len(examples))
        prompts = [self._prompts[example.image_keys, example.question] for example in examples]
        longest, example = max(zip(prompts, examples, strict=True), key=lambda pair: len(pair[0]))
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(longest) > most:
            said = (
                f"the prompt of example {example.id!r} has {len(longest)} tokens, but the model was made for at most "
                f"{most} (max_position_embeddings)"
            )
            if len(longest) > _MOST_STRETCH * most:  # the answer would mean nothing, and take hours
                raise BadInput(f"{said}: give fewer or smaller images, or a shorter question")
            if not self._warned:
                self._warned = True
                warnings.warn(f"{said}: what it answers may mean little", stacklevel=2)
        return prompts

    def pixels(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], list[int]]:
        """What the encoder takes for the images of several prompts, as the processor gives it for all of
        them, and how many vision tokens each has."""
        for example in examples:
            if self._pixels.outline(example.image_keys) is None:
                self._read([example])
        parts = [part for example in examples if (part := self._pixels.get(example.image_keys)) is not None]
        strips = family_of(self.model.config).strips
        names = dict.fromkeys(name for part in parts for name in part.tensors)  # tiles are of images that are cut alone
        inputs = {}
        for name in names:
            each = [part.tensors[name] for part in parts if name in part.tensors]
            inputs[name] = torch.cat(each, -1) if strips and name.startswith("pixel_values") else collate(each)
        return inputs, [part.n_vision for part in parts]

    def batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What the processor makes of the examples, as far as the model takes it: one left-padded batch, on the CPU."""
        tokenizer = tokenizer_of(self.processor)
        pads = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
        pad_token = next((int(pad) for pad in pads if pad is not None), 0)  # it is masked, so any token will do
        if len(examples) > 1 and counts_patches(self.model):
            raise Unsupported("this model's images are told by numbers of patches; give it one example at a time")
        return {**pad_batch(self.prompts(examples), pad_token).tensors, **self.pixels(examples)[0]}

    def typical_batch(self, examples: Sequence[Example], batch: int) -> dict[str, Any]:
        """Such a batch of the examples whose prompts are closest to the median length, repeated where there are too
        few."""
        texts = [prompt_text(self.processor, example) for example in examples]
        lengths = [len(self.processor.tokenizer(text)["input_ids"]) for text in texts]
        middle = median_low(lengths)
        order = sorted(range(len(examples)), key=lambda i: (abs(lengths[i] - middle), i))
        return self.batch([examples[order[i % len(order)]] for i in range(batch)])

    def _read(self, together: Sequence[Example]) -> None:
        """Read examples about the same images."""
        key, images = together[0].image_keys, together[0].open_images()
        size = getattr(getattr(self.processor, "image_processor", None), "size", None)
        if size and "shortest_edge" in size and "longest_edge" not in size:  # with both, they bound the pixels
            for image in images:
                check_size(image.size, f"example {together[0].id!r}: image", int(size["shortest_edge"]))
        processor = self.processor  # which stays as it is
        if getattr(processor, "image_processor", None) is not None:
            processor = copy.copy(processor)
            processor.image_processor = _Once(processor.image_processor)
        for example in together:
            inputs = _process(processor, example, images)
            prompt = self._prompts[example.image_keys, example.question] = _prompt_of(self.model, example, inputs)
            if self._pixels.outline(key) is not None:
                continue
            tensors = {}
            for name in sorted(self._names & inputs.keys()):
                value = inputs[name]
                if not isinstance(value, Tensor):
                    raise Unsupported(
                        f"the processor gives {name!r} as a {type(value).__name__}, not as a tensor: use the one "
                        "that transformers has for this model"
                    )
                tensors[name] = value.to(self.model.dtype) if value.is_floating_point() else value
            self._pixels.put(key, _Pixels(tensors, prompt.n_vision))


class _Once:
    """An image processor that is asked about the same images again and again."""

    def __init__(self, image_processor: Any) -> None:
        self._asked = image_processor
        self._made: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._made is None:
            self._made = self._asked(*args, **options)
        return copy.copy(self._made)  # a processor may take something out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asked, name)
