"""Questions about a scene: ten tasks that need different numbers of vision tokens, from one shape to all.

Knows a scene's contents, not its pixels; knows nothing about models. The words used here are the whole
vocabulary of the demo model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from training.scenes import COLOR_NAMES, GRID, KINDS, Scene

ASKED = (
    "color", "shape", "row", "column", "lookup", "count", "relation", "printed", "handwritten",
    "tallest", "shortest", "bar height",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DIRECTIONS = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Question:
    """A question and where its answer is to be seen.

    ``about``: indices of the things in the scene that hold the answer; what the question as a whole looks at.
    ``points``: (word, things) pairs: the word of the question that names something, with what it names.
    ``asked``: what is asked for, one of ASKED; the task where that says it all.
    ``compared``: (word, thing): by that word, which other thing has been named before.
    """

    task: str
    text: str
    answer: str
    about: tuple[int, ...]
    points: tuple[tuple[int, tuple[int, ...]], ...] = ()
    asked: str = ""
    compared: tuple[int, int] | None = None


T = TypeVar("T")
Maker = Callable[[np.random.Generator, Scene], Question | None]


def _draw(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T | None:
    return _draw(rng, options) if options else None


def _unique(scene: Scene, key: Callable[[int], object]) -> list[int]:
    keys = [key(i) for i in scene.of("shape")]
    return [i for i, k in zip(scene.of("shape"), keys, strict=True) if keys.count(k) == 1]


def _name(scene: Scene, i: int) -> str:
    return f"{scene.things[i].color} {scene.things[i].kind}"


def color(rng: np.random.Generator, scene: Scene) -> Question | None:
    i = _pick(rng, _unique(scene, lambda i: scene.things[i].kind))
    if i is None:
        return None
    return Question("color", f"what color is the {scene.things[i].kind} ?", scene.things[i].color, (i,), ((4, (i,)),))


def shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    i = _pick(rng, _unique(scene, lambda i: scene.things[i].color))
    if i is None:
        return None
    return Question(
        "shape", f"what shape is the {scene.things[i].color} one ?", scene.things[i].kind, (i,), ((5, (i,)),)
    )


def position(rng: np.random.Generator, scene: Scene) -> Question | None:
    i = _pick(rng, _unique(scene, lambda i: _name(scene, i)))
    if i is None:
        return None
    axis = str(rng.choice(("row", "column")))
    place = scene.things[i].row if axis == "row" else scene.things[i].column
    return Question(
        "position", f"which {axis} is the {_name(scene, i)} in ?", NUMBERS[place + 1], (i,), ((5, (i,)),), asked=axis
    )


def lookup(rng: np.random.Generator, scene: Scene) -> Question | None:
    i = _pick(rng, scene.of("shape"))
    if i is None:
        return None
    row, column = NUMBERS[scene.things[i].row + 1], NUMBERS[scene.things[i].column + 1]
    return Question("lookup", f"what is in row {row} column {column} ?", _name(scene, i), (i,), ((6, (i,)),))


def count(rng: np.random.Generator, scene: Scene) -> Question | None:
    shapes = scene.of("shape")
    members: dict[str, tuple[int, ...]] = {"": tuple(shapes)}
    for name in COLOR_NAMES:
        members[f"{name} "] = tuple(i for i in shapes if scene.things[i].color == name)
    for name in KINDS:
        members[f"{name} "] = tuple(i for i in shapes if scene.things[i].kind == name)
    # First the number, then what is counted: otherwise most answers would be "zero" or "one".
    n = _draw(rng, sorted({len(m) for m in members.values()} & set(range(len(NUMBERS)))))
    what = _draw(rng, [name for name, m in members.items() if len(m) == n])
    return Question(
        "count", f"how many {what}shapes are there ?", NUMBERS[n], members[what], ((3 if what else 2, members[what]),)
    )


def relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    named = _unique(scene, lambda i: _name(scene, i))
    pairs: dict[str, list[tuple[int, int]]] = {direction: [] for direction in DIRECTIONS}
    for a in named:
        for b in named:
            dy = scene.things[a].row - scene.things[b].row
            dx = scene.things[a].column - scene.things[b].column
            if abs(dx) > 2 * abs(dy):
                pairs["left" if dx < 0 else "right"].append((a, b))
            elif abs(dy) > 2 * abs(dx):
                pairs["above" if dy < 0 else "below"].append((a, b))
    direction = _pick(rng, [d for d in DIRECTIONS if pairs[d]])
    if direction is None:
        return None
    a, b = _draw(rng, pairs[direction])
    return Question(
        "relation",
        f"where is the {_name(scene, a)} from the {_name(scene, b)} ?",
        direction,
        (a, b),
        ((4, (a,)), (8, (b,))),
        compared=(8, a),
    )


def _number(group: str) -> Maker:
    def make(rng: np.random.Generator, scene: Scene) -> Question | None:
        digits = scene.of(group)
        if not digits:
            return None
        answer = " ".join(scene.things[i].kind for i in digits)
        text = f"what is the {group} number ?"
        # After the prompt (two words more) every digit written looks for the next one.
        first = len(text.split()) + 2
        points = tuple((first + slot, (i,)) for slot, i in enumerate(digits[1:]))
        return Question(group, text, answer, tuple(digits), points)

    return make


def extreme(rng: np.random.Generator, scene: Scene) -> Question | None:
    bars = scene.of("bar")
    if not bars:
        return None
    word, best = ("tallest", max) if rng.random() < 0.5 else ("shortest", min)
    i = best(bars, key=lambda i: scene.things[i].height)
    return Question("extreme bar", f"which bar is the {word} ?", scene.things[i].color, tuple(bars), asked=word)


def height(rng: np.random.Generator, scene: Scene) -> Question | None:
    i = _pick(rng, scene.of("bar"))
    if i is None:
        return None
    return Question(
        "bar height",
        f"how tall is the {scene.things[i].color} bar ?",
        NUMBERS[scene.things[i].height],
        (i,),
        ((5, (i,)),),
    )


TASKS: dict[str, Maker] = {
    "color": color,
    "shape": shape,
    "position": position,
    "lookup": lookup,
    "count": count,
    "relation": relation,
    "printed": _number("printed"),
    "handwritten": _number("handwritten"),
    "extreme bar": extreme,
    "bar height": height,
}

_FRAME = """what color is the shape one which row column in how many shapes are there where from
printed handwritten number bar tallest shortest tall ? user assistant :"""
_DIGITS = tuple("0123456789")
WORDS = tuple(dict.fromkeys((*_FRAME.split(), *COLOR_NAMES, *KINDS, *NUMBERS, *DIRECTIONS, *_DIGITS)))

# Hard tasks are asked more often in training, and far more often once the easy ones are learned.
FIRST_WEIGHTS = {
    "color": 0.7, "shape": 0.7, "position": 1.0, "lookup": 0.8, "count": 1.7, "relation": 1.8,
    "printed": 1.3, "handwritten": 1.5, "extreme bar": 0.9, "bar height": 1.3,
}  # fmt: skip
LATER_WEIGHTS = {
    "color": 0.25, "shape": 0.25, "position": 1.7, "lookup": 0.5, "count": 1.9, "relation": 2.2,
    "printed": 2.0, "handwritten": 2.0, "extreme bar": 0.4, "bar height": 0.8,
}  # fmt: skip

LAST_WEIGHTS = {
    "color": 0.3, "shape": 0.3, "position": 0.7, "lookup": 0.6, "count": 1.8, "relation": 3.0,
    "printed": 2.0, "handwritten": 3.5, "extreme bar": 0.3, "bar height": 0.5,
}  # fmt: skip

# Where a vision token covers more than a patch, numbers and charts are what is hard, and places are easy.
COARSE_WEIGHTS = {
    "color": 0.4, "shape": 0.5, "position": 0.5, "lookup": 0.7, "count": 2.2, "relation": 0.9,
    "printed": 8.0, "handwritten": 2.2, "extreme bar": 1.0, "bar height": 0.5,
}  # fmt: skip

assert len(NUMBERS) > GRID


def ask(rng: np.random.Generator, scene: Scene, n: int, weights: dict[str, float]) -> list[Question]:
    """``n`` questions (repeats possible), their tasks drawn by ``weights`` among those the scene allows."""
    possible = [t for t in TASKS if weights.get(t, 0) > 0 and TASKS[t](rng, scene) is not None]
    p = np.array([weights[t] for t in possible])
    questions = []
    for task in rng.choice(possible, size=n, p=p / p.sum()):
        question = TASKS[str(task)](rng, scene)
        assert question is not None
        questions.append(question)
    return questions
