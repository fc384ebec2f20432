"""Which reductions run on which checkpoint, and on which prompts. Both environments read this; it imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

SPECIALS = 20  # token ids below are no words
VOCABULARY = 136
SPECIAL_IDS = list(range(SPECIALS))


@dataclass(frozen=True)
class Prompt:
    """Words of a prompt, an image between neighbours, or a video."""

    name: str
    words: tuple[tuple[int, ...], ...]
    images: tuple[int, ...]
    answer: int  # tokens
    videos: bool = False  # the images are the first frames of videos


def prompts(count: int) -> list[Prompt]:
    """One image, two, a long question, text only, three images, one more, in turn; answers of 4 to 24 tokens."""
    draw = Random(0)
    shapes = ((3, 5), (2, 3, 9), (4, 30), (7,), (1, 1, 2, 4), (6, 2))
    made = []
    for number in range(count):
        shape = shapes[number % len(shapes)]
        words = tuple(tuple(draw.randrange(SPECIALS, VOCABULARY) for _ in range(n)) for n in shape)
        images = tuple(number + i for i in range(len(shape) - 1))
        made.append(Prompt(f"prompt-{number}", words, images, 4 + number * 5 % 21))
    return made


PROMPTS = prompts(8)
VIDEOS = [
    Prompt("video-0", ((21, 22, 23), (60, 61, 62, 63)), (40,), 9, videos=True),
    Prompt("video-1", ((50,), tuple(range(70, 95))), (41,), 12, videos=True),
]
# not Qwen3-VL: stock vLLM 0.32 answers otherwise than stock transformers there
VIDEO_TAKERS = ("llava-next-video", "llava-onevision", "qwen2-vl", "qwen2.5-vl")


def prompts_of(name: str) -> list[Prompt]:
    """What a checkpoint is asked."""
    images = [prompt for prompt in PROMPTS if not prompt.images] if name == "llava-next-video" else PROMPTS
    return images + VIDEOS * (name in VIDEO_TAKERS)


@dataclass(frozen=True)
class Case:
    """A reduction; `rates` None is the stock model."""

    name: str
    rates: tuple[float, ...] | None
    ranker: tuple[tuple[str, Any], ...] = (("name", "text-attention"),)
    rerank: bool | float = True
    per: str = "image"


def named(ranker: str, **settings: Any) -> tuple[tuple[str, Any], ...]:
    return (("name", ranker), *settings.items())


FULL = Case("full", None)
STAIRS = Case("stairs", (1, 0.6, 0.6, 0.3, 0.3, 0.1))
EARLY = Case("early", (0.7, 0.7, 0.4, 0.4, 0.2, 0.2), named("random", seed=3))
TOWER = Case("tower", (0.5, 0.5, 0.5, 0.25, 0.25, 0.25), named("vision-attention"))
LLAVA = (
    FULL,
    STAIRS,
    EARLY,
    TOWER,
    Case("zero", (1, 1, 0.5, 0.5, 0, 0)),
    Case("last", (1, 0.8, 0.6, 0.4, 0.2, 0.1), named("text-attention", queries="last"), rerank=0.5),
    Case("rows", (1, 0.8, 0.6, 0.4, 0.2, 0.1), named("text-attention", rows=None), rerank=False),
    Case("prompt", (1, 1, 0.5, 0.5, 0.2, 0.2), per="prompt"),
    Case("uniform", (0.5, 0.5, 0.3, 0.3, 0.3, 0.1), named("uniform")),
    Case("divprune", (0.5, 0.5, 0.5, 0.5, 0.5, 0.5), named("divprune")),
    Case("visionzip", (0.5, 0.5, 0.5, 0.5, 0.5, 0.5), named("visionzip", keep=0.5)),
    Case("staged", (0.7, 0.7, 0.4, 0.4, 0.2, 0.2), named("staged")),
    Case("cdpruner", (0.5, 0.5, 0.5, 0.25, 0.25, 0.25), named("cdpruner")),
    Case("dart", (1, 0.5, 0.5, 0.5, 0.5, 0.5), named("dart")),
    Case("vispruner", (0.5, 0.5, 0.5, 0.5, 0.5, 0.5), named("vispruner")),
    Case("downsample", (0.25, 0.25, 0.25, 0.25, 0.25, 0.25), named("downsample")),
    Case("sparsevlm", (1, 0.6, 0.6, 0.3, 0.3, 0.3), named("sparsevlm")),
)
CASES: dict[str, tuple[Case, ...]] = {
    "llava": LLAVA,
    "llava-qwen2": (STAIRS,),
    "pixtral": (STAIRS, EARLY),
    "llava-next": (STAIRS, EARLY),
    "llava-next-video": (STAIRS, EARLY),
    "llava-onevision": (STAIRS, EARLY),
    "internvl": (STAIRS, EARLY, TOWER),
    "internvl-qwen3": (STAIRS,),
    "qwen2-vl": (STAIRS, EARLY),
    "qwen2.5-vl": (STAIRS, EARLY),
    "qwen3-vl": (STAIRS, EARLY),
    "qwen3-vl-moe": (STAIRS,),
    "mistral3": (STAIRS, EARLY),
    "glm4v": (FULL, STAIRS, EARLY),
    "glm4v-moe": (STAIRS,),
    "paddleocr-vl": (STAIRS,),
    "idefics3": (STAIRS, EARLY),
    "smolvlm": (STAIRS, EARLY),
}


def reduction_folder(root: Path, case: Case) -> Path:
    return root / "reductions" / case.name


def inputs_file(root: Path, name: str, prompt: Prompt) -> Path:
    """What a checkpoint's processor makes of a prompt."""
    return root / "inputs" / name / f"{prompt.name}.safetensors"
