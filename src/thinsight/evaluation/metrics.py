"""Metrics: how good one predicted text is, given the answers that count as right. Each returns a number in
[0, 1].

Pure functions of strings. Knows nothing about models, tokens, images or how a prediction came about.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import BadInput

__all__ = ["METRICS", "Metric", "edit_distance", "get_metric", "normalize_vqa", "option_letter"]

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Metric:
    """A named scoring rule: ``metric(prediction, answers) -> float`` in [0, 1], higher is better.

    ``answers`` holds at least one text; with several, the prediction is compared with each as the rule says.
    """

    name: str
    rule: Callable[[str, Sequence[str]], float]

    def __call__(self, prediction: str, answers: Sequence[str]) -> float:
        if not answers:
            raise BadInput(
                f"metric {self.name!r} needs at least one answer, got none: add 'answer' or 'answers'"
            )
        return self.rule(prediction, answers)

    def ceiling(self, answers: Sequence[str]) -> float:
        """The highest score that any prediction can get on these answers.

        1 for most; for VQA accuracy fewer agreeing annotators allow less, and only their own answers score at
        all.
        """
        if self.rule is vqa_accuracy:
            return max(vqa_accuracy(answer, answers) for answer in answers)
        return 1.0

    def lost(self, beginning: str, answers: Sequence[str]) -> bool:
        """Whether it is certain that no prediction that begins so scores anything.

        Args:
            beginning: a prediction's first characters; the last ones may be those of a character that is not
                whole yet (U+FFFD).
            answers: as for a call.
        """
        if self.rule is not exact_match:
            return False
        said = _squeezed(beginning.rstrip("\ufffd"))
        return not any(f"{_plain(answer)}.".startswith(said) for answer in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers, else 0.

    Accuracy by string equality as GQA counts it (arXiv 1902.09506), ignoring case, outer and repeated white
    space and a final full stop, as evaluation harnesses do. Other punctuation counts: "3.5" is not "35".
    """
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The VQA challenge's accuracy (Antol et al., arXiv 1505.00468; official ``vqaEval``): leave one
    annotator out.

    For each annotator, min(1, matches among the *others* / 3); the mean over annotators. Both sides are
    normalized as the official script does (``normalize_vqa``). A single answer has no others to compare with:
    then equality counts.
    """
    said = normalize_vqa(prediction)
    matches = [normalize_vqa(answer) == said for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity (Biten et al., arXiv 1905.13648, eq. 1), of one prediction.

    The best answer's 1 - distance / longer length, ignoring case and repeated white space; below the
    threshold of 0.5 it counts 0. Exactly 0.5 counts, as in the official scorer of ST-VQA and DocVQA.
    """
    said = _squeezed(prediction)
    best = max(_similarity(said, _squeezed(answer)) for answer in answers)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy (Masry et al., arXiv 2203.10244, after PlotQA, arXiv 1909.00997).

    A number may be off by 5 % of the true one; anything else must match but for case. "12%" is read as 0.12
    and "1,200" as 1200.
    """
    return float(any(_relaxed_equal(prediction, answer) for answer in answers))


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the option letter in the prediction is the answer's, else 0.

    Letters are found by fixed rules in the manner of MMBench (arXiv 2307.06281) and MMMU (arXiv 2311.16502),
    without a judge model and without guessing when there is none. An answer that is no letter is compared as
    ``exact_match`` does.
    """
    said = option_letter(prediction)
    for answer in answers:
        letter = option_letter(answer)
        if letter is not None and letter == said:
            return 1.0
        if letter is None and _plain(answer) == _plain(prediction):
            return 1.0
    return 0.0


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is the full model's own answer, letter by letter, else 0. Needs no labels."""
    return float(prediction in answers)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        rule.__name__: Metric(rule.__name__, rule)
        for rule in (exact_match, vqa_accuracy, anls, relaxed_accuracy, multiple_choice, agreement)
    }
)


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ThinsightError: there is none; the message lists the names.
    """
    if isinstance(name, str) and name in METRICS:
        return METRICS[name]
    close = difflib.get_close_matches(str(name), METRICS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise BadInput(f"unknown metric {name!r}: {hint}choose one of {', '.join(METRICS)}")


# -- text equality -------------------------------------------------------------------------------------------


def _squeezed(text: str) -> str:
    return " ".join(text.casefold().split())


def _plain(text: str) -> str:
    return _squeezed(text).removesuffix(".").rstrip()


# -- VQA normalization ---------------------------------------------------------------------------------------

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_DIGIT_NAMES)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've "
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _without_one_apostrophe(word)}


def normalize_vqa(text: str) -> str:
    """A text as the official VQA script compares it: no punctuation, digits for number words, no articles.

    Lower case; an apostrophe that was left out of a contraction is put back. The official script skips parts
    of this for answers that its data set ships normalized already; here every text gets all of it.
    """
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    drop_all = _DIGIT_COMMA.search(flat) is not None
    result = flat
    for mark in _PUNCTUATION:
        at_word_edge = mark + " " in flat or " " + mark in flat
        result = result.replace(mark, "" if drop_all or at_word_edge else " ")
    words = (_NUMBER_WORDS.get(word, word) for word in _LONE_PERIOD.sub("", result).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


# -- edit distance -------------------------------------------------------------------------------------------


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))  # distances from a[:i] to every prefix of b
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


# -- numbers -------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][+-]?\d+)?")


def _number(text: str) -> float | None:
    """The finite number that the whole text is, else None."""
    bare = text.strip().removesuffix(".")
    percent = bare.endswith("%")
    bare = bare.removesuffix("%").strip()
    if not _NUMBER.fullmatch(bare) or not any(letter.isdigit() for letter in bare):
        return None
    try:
        value = float(bare.replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if percent else value


def _relaxed_equal(prediction: str, answer: str) -> bool:
    said, true = _number(prediction), _number(answer)
    if said is None or true is None:
        return _plain(prediction) == _plain(answer)
    return abs(said - true) <= RELATIVE_TOLERANCE * abs(true) * (1 + 1e-12)  # 105 against 100 is within 5 %


# -- option letters ------------------------------------------------------------------------------------------

_LETTER_RULES = tuple(
    re.compile(pattern)
    for pattern in (
        r"^\s*[(\[]?([A-Za-z])[)\].:]*\s*$",  # "B"  "(b)"  "B."
        r"^\s*[(\[]([A-Za-z])[)\]]",  # "(B) a dog"
        r"^\s*([A-Z])\s*[).:,]",  # "B. a dog"
        r"(?i:answer|option|choice)(?:\s+(?:is|would be))?\s*[:=]?\s*[(\[]?([A-Z])\b",  # "the answer is B"
        r"[(\[]([A-Z])[)\]]",  # "it shows (B)"
    )
)


def option_letter(text: str) -> str | None:
    """The option letter a text names, upper case, or None. "A dog" names none."""
    for rule in _LETTER_RULES:
        found = rule.search(text)
        if found:
            return found.group(1).upper()
    return None
