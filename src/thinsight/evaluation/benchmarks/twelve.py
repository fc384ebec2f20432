"""The twelve benchmarks of the paper (arXiv 2412.00556), asked as LLaVA and evaluation harnesses ask them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..example import Example
from ..readers.rows import Row
from ..readers.tables import lettered, listed
from .base import BENCHMARKS, Benchmark, Fields
from .measures import all_right, mean, over_categories, yes_measures

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_ROTATED = 10**6  # MMBench numbers the rotations of a question so far apart
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _question(row: Fields) -> str:
    return str(row["question"]).strip()


def _short(row: Fields) -> Fields:
    return {"question": _question(row) + _SHORT}


def _options(row: Fields) -> list[str]:
    found = listed(row.get("options"))
    return [str(each) for each in found] if isinstance(found, list) else []


def _choices(row: Fields) -> Fields:
    """Options by letter."""
    options, question = _options(row), _question(row)
    return {"question": f"{question}\n{lettered(options)}{_LETTER}" if options else question}


def _ai2d(row: Fields) -> Fields:
    """An answer that is a number, as text or not, counts the options from 0."""
    answers, options = row.get("answers") or [], _options(row)
    label = str(answers[0]).strip() if len(answers) == 1 else ""
    if label.isdigit() and int(label) < len(options):
        answers = [chr(ord("A") + int(label))]
    return {**_choices(row), "answers": answers or None}


def _category(example: Example) -> str:
    """Of the benchmark's own."""
    return str(example.extra.get("category", example.task))


# -- MME -----------------------------------------------------------------------------------------------------


def _mme(row: Fields) -> Fields:
    return {"question": _question(row).replace(" Please answer yes or no.", "") + _SHORT}


def _pair(example: Example) -> tuple[str, str]:
    return _category(example), example.group


def _cognition(example: Example) -> bool:
    return _category(example) in _COGNITION


def _perception(example: Example) -> bool:
    return not _cognition(example)


# -- MMBench -------------------------------------------------------------------------------------------------


def _mmbench(row: Fields) -> Fields:
    hint = row.get("hint")
    told = f"{hint.strip()}\n" if isinstance(hint, str) and hint.strip().lower() not in ("", "nan") else ""
    found = _choices(row)
    return {**found, "question": told + found["question"], "unit": str(int(row["id"]) % _ROTATED)}


def _rotations(row: Row) -> list[Row]:
    """The question once for each option that may come first."""
    options, answers = _options(dict(row.fields)), row.fields.get("answers")
    if len(options) < 2 or not answers:
        return [row]
    place = ord(str(answers[0]).strip()) - ord("A")
    found = []
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        label = chr(ord("A") + (place - turn) % len(options))
        number = int(row.fields["id"]) + turn * _ROTATED
        found.append(replace(row, fields={**row.fields, "id": number, "options": turned, "answers": [label]}))
    return found


def _unit(example: Example) -> str:
    return str(example.extra.get("unit", example.id))


# -- MMMU and MathVista --------------------------------------------------------------------------------------

_PLACE = re.compile(r"<image (\d+)>")


def _mmmu(row: Fields) -> Fields:
    options = _options(row)
    question = _question(row)
    text = f"{question}\n{lettered(options)}\n{_LETTER}" if options else f"{question}\n{_SHORT}"
    name = re.fullmatch(r"[a-z]+_(.+?)_\d+", str(row["id"]))
    return {"question": _placed(text, row.get("images") or ()), "task": name[1] if name else row.get("task")}


def _placed(text: str, images: Sequence[Any]) -> str:
    """Images where the text names each of them once and in order; else it names them by number, behind all of them."""
    if [int(number) for number in _PLACE.findall(text)] == list(range(1, len(images) + 1)):
        return text
    return _PLACE.sub(r"image \1", text)


def _mathvista(row: Fields) -> Fields:
    question, options = _question(row), _options(row)
    if options and "Choices:" not in question:
        listed_ = "\n".join(f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options))
        question = f"{question}\nChoices:\n{listed_}"
    if "Hint:" not in question:
        question = f"{_hint(row, bool(options))}Question: {question}"
    return {"question": question}


def _hint(row: Fields, chosen: bool) -> str:
    """What MathVista tells a model of the answer's form."""
    digits = str(row.get("precision", "")).split(".")[0]
    number = "requiring a floating-point number with"
    forms = {
        "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
        "1": f"{number} one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
        "2": f"{number} two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
        "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], at the end.",
    }
    kind = str(row.get("answer_type", ""))
    if chosen:
        return "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
    form = forms.get(digits if kind == "float" else kind)
    return f"Hint: Please answer the question {form}\n" if form else ""


# -- the others ----------------------------------------------------------------------------------------------


def _textvqa(row: Fields) -> Fields:
    return {"question": _question(row).capitalize() + _SHORT}


def _chartqa(row: Fields) -> Fields:
    kind = str(row.get("type", row.get("split", ""))).lower()
    task = {"human": "human", "augme": "augmented"}.get(kind[:5], row.get("task"))
    return {"question": _question(row) + "\nAnswer the question with a single word.", "task": task}


def _of_chartqa(kind: str) -> Any:
    return lambda example: _category(example) == kind


def _hallusionbench(row: Fields) -> Fields:
    answers = [{"0": "no", "1": "yes"}.get(str(each).strip(), each) for each in row.get("answers") or ()]
    kept = ("task", "subcategory", "set_id")
    together = "_".join(str(row.get(name, "")) for name in kept)
    return {"question": _question(row), "answers": answers, "unit": together, "asked": str(row["id"])}


def _pair_of_questions(example: Example) -> tuple[str, str]:
    return _unit(example), str(example.extra.get("asked"))


def _figure(example: Example) -> tuple[str, str]:
    return _unit(example), str(example.extra.get("figure_id"))


def _seen(example: Example) -> bool:
    """Not the questions of visual supplements that come without a figure."""
    return not (_category(example) == "VS" and str(example.extra.get("figure_id")) == "0")


for _benchmark in (
    Benchmark(
        "mme",
        "MME",
        "arXiv 2306.13394",
        "hf:lmms-lab-encoder/MME:test",
        "mme",
        _mme,
        (
            over_categories("perception, of 2000", _category, total=True, unit=_pair, only=_perception),
            over_categories("cognition, of 800", _category, total=True, unit=_pair, only=_cognition),
            mean("accuracy"),
            all_right("accuracy+", _pair),
        ),
        sampled=_pair,
    ),
    Benchmark(
        "mmbench",
        "MMBench",
        "arXiv 2307.06281",
        "hf:lmms-lab-encoder/MMBench:en:dev",
        "multiple_choice",
        _mmbench,
        (all_right("circular accuracy", _unit), mean("accuracy of single rotations")),
        together=_unit,
        expand=_rotations,
    ),
    Benchmark("gqa", "GQA", "arXiv 1902.09506", "", "exact_match", _short, (mean("accuracy"),)),
    Benchmark(
        "mmmu",
        "MMMU",
        "arXiv 2311.16502",
        "hf:lmms-lab-encoder/MMMU:validation",
        "mmmu",
        _mmmu,
        (mean("accuracy"), over_categories("mean over subjects", _category, total=False)),
    ),
    Benchmark(
        "mathvista",
        "MathVista",
        "arXiv 2310.02255",
        "hf:AI4Math/MathVista:testmini",
        "mathvista",
        _mathvista,
        (mean("accuracy, extraction by rules"),),
        max_new_tokens=64,
        prefers={"image": ("decoded_image",), "question": ("query",), "id": ("pid",)},
    ),
    Benchmark(
        "ai2d",
        "AI2D",
        "arXiv 1603.07396",
        "hf:lmms-lab-encoder/ai2d:test",
        "multiple_choice",
        _ai2d,
        (mean("accuracy"),),
    ),
    Benchmark(
        "textvqa",
        "TextVQA",
        "arXiv 1904.08920",
        "hf:lmms-lab-encoder/textvqa:validation",
        "vqa_accuracy",
        _textvqa,
        (mean("VQA accuracy"),),
    ),
    Benchmark(
        "chartqa",
        "ChartQA",
        "arXiv 2203.10244",
        "hf:lmms-lab-encoder/ChartQA:test",
        "relaxed_accuracy",
        _chartqa,
        (mean("relaxed accuracy"), mean("human", _of_chartqa("human")), mean("augmented", _of_chartqa("augmented"))),
    ),
    Benchmark(
        "docvqa",
        "DocVQA",
        "arXiv 2007.00398",
        "hf:lmms-lab-encoder/DocVQA:DocVQA:validation",
        "anls",
        _short,
        (mean("ANLS"),),
        max_new_tokens=32,
    ),
    Benchmark(
        "pope",
        "POPE",
        "arXiv 2305.10355",
        "hf:lmms-lab-encoder/POPE:test",
        "pope",
        _short,
        (*yes_measures(), mean("accuracy")),
    ),
    Benchmark(
        "realworldqa",
        "RealWorldQA",
        "x.ai, April 2024",
        "hf:lmms-lab-encoder/RealWorldQA:test",
        "multiple_choice",
        _choices,
        (mean("accuracy"),),
    ),
    Benchmark(
        "hallusionbench",
        "HallusionBench",
        "arXiv 2310.14566",
        "hf:lmms-lab-encoder/HallusionBench:image",
        "yes_no",
        _hallusionbench,
        (
            mean("aAcc"),
            all_right("qAcc", _pair_of_questions, cluster=_unit),
            all_right("fAcc", _figure, cluster=_unit, only=_seen),
        ),
        prefers={"answers": ("gt_answer",), "id": ("question_id",)},
        together=_unit,
    ),
):
    BENCHMARKS.register(_benchmark)
