"""What a reduction asks of vLLM: its options, the families it runs on, its stages, and what each prompt loses.

Imports nothing of vLLM: all here is arithmetic on whole numbers and can be tested without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import BadInput, Unsupported
from ..families import FAMILIES
from ..ranking import STATES, TEXT_ATTENTION, VISION_ATTENTION, Ranker, get_ranker
from ..reduction import Reduction
from ..texts import counted

KEY = "thinsight"
PREFIX = "Thinsight"
"""Before a stock architecture's name: the class that runs it under a reduction."""
PER = ("image", "prompt")
MOST_RUNS = 8
"""Groups of KV cache blocks; each costs the scheduler and every step a little."""


@dataclass(frozen=True)
class ServedFamily:
    """A model class of vLLM that runs under a reduction."""

    model_type: str  # of transformers' config; `families.FAMILIES` says how its images split into runs
    architecture: str  # vLLM's name of the class, as in the config's `architectures`
    reads_tower: bool = False  # attention inside its vision tower can be read, per token of the decoder


SERVED: dict[str, ServedFamily] = {
    row.architecture: row
    for row in (
        ServedFamily("glm4v", "Glm4vForConditionalGeneration"),
        ServedFamily("glm4v_moe", "Glm4vMoeForConditionalGeneration"),
        ServedFamily("idefics3", "Idefics3ForConditionalGeneration"),
        ServedFamily("internvl", "InternVLForConditionalGeneration", reads_tower=True),
        ServedFamily("llava", "LlavaForConditionalGeneration", reads_tower=True),
        ServedFamily("llava_next", "LlavaNextForConditionalGeneration"),
        ServedFamily("llava_next_video", "LlavaNextVideoForConditionalGeneration"),
        ServedFamily("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
        ServedFamily("mistral3", "Mistral3ForConditionalGeneration"),
        ServedFamily("paddleocr_vl", "PaddleOCRVLForConditionalGeneration"),
        ServedFamily("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ServedFamily("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ServedFamily("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        ServedFamily("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
        ServedFamily("smolvlm", "SmolVLMForConditionalGeneration"),
    )
}
"""By architecture."""


# -- options --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What stands under "thinsight" in vLLM's additional_config."""

    reduction: str  # a folder, or owner/name on the Hub
    per: str = "image"  # or "prompt", as in `thinsight.apply`
    revision: str | None = None  # Hub only


def read_options(additional_config: Any) -> Options | None:
    """The options; None where vLLM is to run as always.

    Raises:
        BadInput: an option that is not known, or of the wrong kind.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return None
    if isinstance(given, str) and given:
        return Options(given)
    if not isinstance(given, Mapping) or not isinstance(given.get("reduction"), str):
        raise BadInput(
            f'additional_config["{KEY}"] is {given!r}; give a folder or Hub id, or '
            '{"reduction": folder or id, "per": "image" or "prompt", "revision": Hub revision}'
        )
    known = tuple(Options.__dataclass_fields__)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise BadInput(f'additional_config["{KEY}"] has no option {unknown[0]!r}; it has {", ".join(known)}')
    options = Options(**given)
    if options.per not in PER:
        raise BadInput(f'additional_config["{KEY}"]: per is {options.per!r}; choose one of {", ".join(PER)}')
    return options


# -- what runs ------------------------------------------------------------------------------------------------


class Plan:
    """A reduction as vLLM runs it."""

    def __init__(self, reduction: Reduction, family: ServedFamily, per: str = "image") -> None:
        """Raises Unsupported: what this reduction needs is not there in vLLM."""
        self.reduction, self.family, self.per = reduction, family, per
        self.schedule = reduction.schedule
        self.ranker: Ranker = get_ranker(reduction.ranker)
        name, rates = self.ranker.name, self.schedule.keep_rates
        self.starts: tuple[int, ...] = tuple(i for i, rate in enumerate(rates) if rate < (rates[i - 1] if i else 1.0))
        """The first layer of each stage; a stage is a run of layers with one keep rate below 1."""
        if reduction.adaptive is not None:
            raise Unsupported("an adaptive reduction cannot run in vLLM: counts must be known before a prompt is read")
        if reduction.model_type is not None and reduction.model_type != family.model_type:
            raise Unsupported(
                f"the reduction is for {reduction.model_type!r} but the model is {family.model_type!r}; "
                "search on this model"
            )
        if self.starts and self.starts[0] == 0 and not self.ranker.ranks_at_layer_0:
            raise Unsupported(f"the schedule drops tokens before layer 0, where {name} has no attention to rank by")
        if VISION_ATTENTION in self.ranker.needs and not family.reads_tower:
            able = sorted(row.model_type for row in SERVED.values() if row.reads_tower)
            raise Unsupported(
                f"{name} reads attention inside the vision tower, which vLLM gives per token of the decoder for "
                f"{', '.join(able)} only; this model is {family.model_type!r}: rank by text-attention"
            )
        self.splits_runs = FAMILIES[family.model_type].runs
        self._share = float(reduction.rerank)
        self._counts: dict[int, tuple[int, ...]] = {}

    def needs(self, what: str) -> bool:
        """Whether the ranker needs `TEXT_ATTENTION`, `VISION_ATTENTION` or `STATES`."""
        return what in self.ranker.needs

    @cached_property
    def reads_keys(self) -> bool:
        """Whether a stage ranks by attention over a prompt's keys; before layer 0 there are none."""
        return self.needs(TEXT_ATTENTION) and any(self.starts)

    @cached_property
    def layers(self) -> tuple[range, ...]:
        """The layers of each stage."""
        ends = [*self.starts[1:], self.schedule.num_layers]
        return tuple(range(first, end) for first, end in zip(self.starts, ends, strict=True))

    @cached_property
    def runs(self) -> tuple[range, ...]:
        """Runs of equally many layers, each of which has KV cache blocks of its own, for what its first layer holds.

        None where that saves too little, or no number of runs divides that of layers.
        """
        rates = self.schedule.keep_rates
        layers = len(rates)
        best, least = 0, 0.95 * layers
        for size in range(layers, 0, -1):
            if layers % size or layers // size > MOST_RUNS:
                continue
            held = sum(rates[first] * size for first in range(0, layers, size))
            if held < least - 0.02 * layers * bool(best):  # more runs must be worth it
                best, least = size, held
        return tuple(range(first, first + best) for first in range(0, layers, best)) if best else ()

    def stage_of(self, layer: int) -> int | None:
        """The stage that a layer is in; None before the first."""
        return sum(start <= layer for start in self.starts) - 1 if layer >= (self.starts or (layer + 1,))[0] else None

    def describe_blocks(self) -> str:
        """One line: for how much of a prompt's vision tokens KV cache blocks are allotted."""
        held = sum(self.schedule.keep_rates[run[0]] for run in self.runs) / len(self.runs)
        deep = len(self.runs[0])
        return (
            f"KV cache blocks are for {held:.0%} of the vision tokens, in "
            f"{counted(len(self.runs), 'group')} of {counted(deep, 'layer')}"
        )

    def describe(self) -> str:
        """One line: what runs."""
        runs = [
            f"layer{'' if len(layers) == 1 else 's'} {_span(layers)}: {self.schedule.keep_rates[layers[0]]:.4g}"
            for layers in self.layers
        ]
        settings = ", ".join(f"{key} {value}" for key, value in self.ranker.settings.items())
        parts = [
            f"keep rates {'; '.join(runs) if runs else '1 everywhere'}",
            f"ranked by {self.ranker.name}{f' ({settings})' if settings else ''} per {self.per}",
        ]
        if self.reduction.rerank is not True:
            parts.append(f"rerank {self.reduction.rerank}")
        return ", ".join(parts)

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of n tokens enter the layers of each stage."""
        if n not in self._counts:
            counts = self.schedule.counts(n)
            self._counts[n] = tuple(counts[layer] for layer in self.starts)
        return self._counts[n]

    def prompt_of(self, request: Any) -> Prompt:
        """The prompt of a request, as vLLM's scheduler and its runner have it."""
        images, why = [], ""
        for feature in request.mm_features:
            place = feature.mm_position
            inside = np.arange(place.length) if place.is_embed is None else place.is_embed.numpy().nonzero()[0]
            images.append(inside.astype(np.int64) + place.offset)
            if feature.modality not in ("image", "video"):
                why = f"it has {feature.modality}"
        if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
            why = "prompt_logprobs are wanted"
        return self.prompt(request.num_prompt_tokens, images, why)

    def prompt(self, length: int, images: Sequence[np.ndarray], whole: str = "") -> Prompt:
        """What is known of a prompt before anything is computed.

        Args:
            length: its tokens.
            images: of each image or video, the places of its vision tokens, ascending, (n,) int64.
            whole: why it is to be kept whole; "" where it is not.
        """
        if self.splits_runs:
            images = [run for places in images for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)]
        images = [places for places in images if len(places)]
        sizes = tuple(len(places) for places in images)
        groups = sizes if self.per == "image" else (sum(sizes),) if sizes else ()
        counts = [self.counts(n) for n in groups]
        kept = tuple(zip(*counts, strict=True)) if counts else tuple(() for _ in self.starts)
        vision = np.concatenate(images) if images else np.zeros(0, dtype=np.int64)
        number = np.repeat(np.arange(len(sizes)), sizes)
        index = np.concatenate([np.arange(n) for n in sizes]) if sizes else np.zeros(0, dtype=np.int64)
        order = vision.argsort(kind="stable")
        prompt = Prompt(
            length=length,
            vision=vision[order],
            image=number[order],
            index=index[order],
            size=np.repeat(np.array(sizes, dtype=np.int64), sizes)[order],
            kept=kept,
            lost=tuple(sum(groups) - sum(row) for row in kept),
            ranks=self._ranks(groups, kept),
            queries=self._queries(length, vision),
            whole=whole,
        )
        ends = prompt.vision[-1:] == length - 1
        group = prompt.image[-1] if self.per == "image" and len(ends) else 0
        if not whole and any(ends) and any(row[group] == 0 for row in kept):
            prompt.whole = "ends in an image that loses all its tokens"
        return prompt

    def _ranks(self, groups: tuple[int, ...], kept: Sequence[tuple[int, ...]]) -> tuple[bool, ...]:
        """At which stages a prompt is ranked anew: where its counts fall, and fewer than the `rerank` share are to
        stay of what its last ranking kept."""
        ranks, before, last = [], groups, None
        for now in kept:
            anew = now != before and (last is None or sum(now) < self._share * last)
            last = sum(now) if anew else last
            before = now
            ranks.append(anew)
        return tuple(ranks)

    def _queries(self, length: int, vision: np.ndarray) -> np.ndarray:
        """Places of the text whose attention ranks, as `thinsight.apply` has them: (rows,) int64."""
        last = np.array([length - 1])
        if not self.ranker.needs & {TEXT_ATTENTION, STATES} or self.ranker.queries == "last" or not len(vision):
            return last
        text = np.arange(vision.max() + 1, length)
        most = self.ranker.rows
        if most is not None and len(text) > most:
            text = text[(np.arange(most) + 1) * len(text) // most - 1]
        return text if len(text) else last


@dataclass
class Prompt:
    """A request's prompt: where its vision tokens are, and how many of them each stage keeps."""

    length: int
    vision: np.ndarray  # (tokens,) int64: places in the prompt, ascending
    image: np.ndarray  # (tokens,) int64: which image
    index: np.ndarray  # (tokens,) int64: place within the image
    size: np.ndarray  # (tokens,) int64: how many tokens that image has
    kept: tuple[tuple[int, ...], ...]  # per stage, of each group that competes
    lost: tuple[int, ...]  # per stage, tokens that its layers lack
    ranks: tuple[bool, ...]  # per stage, whether it ranks anew
    queries: np.ndarray  # (rows,) int64: places of the text that ranks
    whole: str = ""  # why it is kept whole; "" where it is not

    def decision(self, first: int, end: int, needs_keys: bool) -> str | None:
        """What becomes of it in a pass over its places first..end-1: None where nothing is to be decided (no vision
        token among them); "" where it is reduced; or why it is kept whole.

        Args:
            needs_keys: the ranker reads attention over all the prompt's keys, which only its own pass has.
        """
        here = np.searchsorted(self.vision, (first, end))
        if here[0] == here[1]:
            return None
        if self.whole:
            return self.whole
        if here[0] > 0 or here[1] < len(self.vision) or end < self.length:
            return "its images and question fall into several chunks"
        if first > 0 and needs_keys:
            return "text before its images was read in an earlier chunk"
        return ""


def _span(layers: range) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def stage_labels(plan: Plan) -> list[str]:
    """How each stage is named in metrics: its layers, such as "4-11"."""
    return [_span(layers) for layers in plan.layers]
