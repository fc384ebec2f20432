"""Metrics that single benchmarks have defined: yes or no in three ways, MMMU's parsers, MathVista's answers.

Each is written from the facts of its scorer; where that one asks another model or draws at random, it is said here what
stands in for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .metrics import METRICS, Metric, edit_distance, option_letter, options_of

Number = float | str

_LONGEST = 4000  # characters of an answer that is searched through, its last ones


def _labels(answers: Sequence[str]) -> set[str]:
    return {answer.strip().rstrip(".").lower() for answer in answers}


def mme(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer says the label, yes or no, as MME's scorer reads it (arXiv 2306.13394): the whole answer, the
    letter y or n, or what stands in its first four characters."""
    said = prediction.lower().strip().replace(".", "")
    if len(said) == 1:
        said = {"y": "yes", "n": "no"}.get(said, "")
    elif said not in ("yes", "no"):
        said = next((word for word in ("yes", "no") if word in said[:4]), "")
    return float(said in _labels(answers))


def pope(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer says the label as POPE's scorer reads it (arXiv 2305.10355): no where the first sentence holds
    the word no or not, else yes."""
    words = prediction.split(".")[0].replace(",", "").split()
    said = "no" if {"No", "no", "not"} & set(words) else "yes"
    return float(said in _labels(answers))


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer holds the word of the label, yes or no, and not the other one; else it is wrong. HallusionBench
    (arXiv 2310.14566) asks GPT-4 instead: this is the rule that evaluation harnesses use without it."""
    found = {"yes", "no"} & set(re.findall(r"[a-z]+", prediction.lower()))
    return float(len(found) == 1 and found <= _labels(answers))


# -- MMMU ----------------------------------------------------------------------------------------------------

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_KEY = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu(prediction: str, answers: Sequence[str], question: str) -> float:
    """MMMU's two parsers (arXiv 2311.16502): one for questions that list options, one for open ones.

    Where the official parser finds no option it draws one at random; here that answer is wrong.
    """
    prediction = prediction[-_LONGEST:]
    if options := options_of(question):
        said = _mmmu_letter(prediction, options)
        return float(said is not None and said in {answer.strip() for answer in answers})
    right = [each for answer in answers for each in _normal(answer)]
    texts = [each for each in right if isinstance(each, str)]
    for each in _open_answers(prediction):
        if any(text in each for text in texts) if isinstance(each, str) else each in right:
            return 1.0
    return 0.0


def _mmmu_letter(text: str, options: Mapping[str, str]) -> str | None:
    """(B), else B and a space, else B and a full stop; else, of a longer answer, an option's text. The last of all."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    said = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in options if form.format(letter) in said]:
            return max(found, key=lambda letter: said.rfind(place.format(letter)))
    if len(said.split()) <= 5:
        return None
    low = said.lower()
    found = [letter for letter, option in options.items() if option.lower() in low]
    return max(found, key=lambda letter: low.rfind(options[letter].lower())) if found else None


def _open_answers(text: str) -> list[Number]:
    """What an open answer may say: the tails behind words of conclusion, and all numbers in them."""
    lines = text.strip().strip(".").lower().split("\n")
    tails = []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for key in (*_KEYS, "=") if number == len(lines) else _KEYS:
            if key in line:
                tail = line.split(key)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _NO_KEY:
            tails.append(shortest)
    tails = tails or ["\n".join(lines)]
    numbers = [number for tail in tails for rule in _NUMBERS for number in rule.findall(tail)]
    return [each for found in (*tails, *numbers) for each in _normal(found)]


def _normal(text: str) -> list[Number]:
    """A number rounded to two digits, or a text in small letters; a single character only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]


# -- MathVista -----------------------------------------------------------------------------------------------

_ANSWER = re.compile(r"(?is).*\banswers?\b\s*(?:is|are|:|=)*\s*:?\s*(.+)")
_FIGURE = re.compile(r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LIST = re.compile(r"\[[^\[\]]*\]")
_LETTER_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")


def mathvista(prediction: str, answers: Sequence[str], question: str) -> float:
    """MathVista's accuracy (arXiv 2310.02255): the answer taken out of the text, brought to the form that is asked for,
    and compared with the label as text.

    The official scorer has GPT-4 take the answer out. Here rules do: the option that is named, the most similar one
    where none is, or the last number behind "the answer is", else of the text. The form (a whole number, one or two
    decimal places, a list, an option) is read from the hint in the question, without one from the label.
    """
    said = prediction.strip()[-_LONGEST:]
    if options := options_of(question):
        chosen = _choice(said, options)
        return float(any(chosen == _option_text(answer, options) for answer in answers))
    return float(any(_as_asked(said, answer, question) == answer.strip() for answer in answers))


def _choice(said: str, options: Mapping[str, str]) -> str:
    texts = list(options.values())
    if said in texts:
        return said
    if (letter := option_letter(said, options)) is not None:
        return options[letter]
    told = _ANSWER.match(said)
    rest = told[1].strip() if told else said
    if (bracketed := _LETTER_IN_BRACKETS.search(rest)) and bracketed[1].upper() in options:
        return options[bracketed[1].upper()]
    return min(texts, key=lambda text: edit_distance(rest, text))


def _option_text(answer: str, options: Mapping[str, str]) -> str:
    label = answer.strip()
    return label if label in options.values() else options.get(label.upper(), label)


def _as_asked(said: str, answer: str, question: str) -> str | None:
    """The answer in the form that the question asks for; None where it has none of it."""
    digits = _digits(answer, question)
    if digits is None:
        if re.search(r"(?i)python list", question) or answer.strip().startswith("["):
            found = _LIST.findall(said)
            return found[-1] if found else said
        return said
    told = _ANSWER.match(said)
    figures = _FIGURE.findall(told[1] if told else "") or _FIGURE.findall(said)
    if not figures:
        return None
    try:
        value = float(figures[-1].replace(",", ""))
        return str(round(value, digits)) if digits else str(int(value))
    except (ValueError, OverflowError):
        return None


def _digits(answer: str, question: str) -> int | None:
    """Decimal places that are asked for; 0: a whole number. None: no number is asked for."""
    hints = ((r"integer", 0), (r"one decimal place", 1), (r"two decimal places", 2), (r"python list", None))
    for hint, digits in hints:
        if re.search(rf"(?i)answer.*\b{hint}\b", question):
            return digits
    if re.fullmatch(r"[-+]?\d+", answer.strip()):
        return 0
    number = re.fullmatch(r"[-+]?\d*\.(\d+)", answer.strip())
    return len(number[1]) if number else None


for _metric in (
    Metric("mme", mme),
    Metric("pope", pope),
    Metric("yes_no", yes_no),
    Metric("mmmu", mmmu, reads_question=True),
    Metric("mathvista", mathvista, reads_question=True),
):
    METRICS.register(_metric)
