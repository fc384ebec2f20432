"""Metrics: how good one predicted text is, given the answers that count as right. Each returns a number in [0, 1].

Texts are compared after Unicode normalisation: NFKC (full-width letters and ligatures are the plain ones) in
`exact_match` and `multiple_choice`; the canonical NFC, which changes no character's look, in the metrics that a
benchmark has published, so that text in NFC, as nearly all is, scores as there; none in `agreement`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from ..errors import BadInput
from ..registry import Registry

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Metric:
    """A named scoring rule: ``metric(prediction, answers, question) -> float`` in [0, 1], higher is better.

    ``answers`` holds at least one text; with several, the prediction is compared with each as the rule says. Of the
    question only the options that it lists are read, and only where ``reads_options``, or all of it where
    ``reads_question``.
    `thinsight.testing.MetricContract` holds a metric to all this.

    Attributes:
        name: what data files and options call it.
        rule: ``rule(prediction, answers)``, and the options by letter as a third where ``reads_options``.
        reads_options: whether an option's text counts as its letter.
        reads_question: whether the rule takes the question as a third argument, for what form of answer it asks.
        ceiling: ``ceiling(answers)``, the highest score that any prediction can get on these answers.
        lost: ``lost(beginning, answers)``, whether it is certain that no prediction that begins so scores anything. The
            beginning's last characters may be those of a character that is not whole yet (U+FFFD).
        needs_answers: whether it compares with labels; if not, ``answers`` is the full model's own answer.
        by_tokens: whether the answers' tokens must be the full model's: the rule is not asked, and decoding stops where
            they part.
    """

    name: str
    rule: Callable[..., float]
    reads_options: bool = False
    ceiling: Callable[[Sequence[str]], float] = lambda answers: 1.0
    lost: Callable[[str, Sequence[str]], bool] = lambda beginning, answers: False
    needs_answers: bool = True
    by_tokens: bool = False
    reads_question: bool = False

    def __post_init__(self) -> None:
        if self.by_tokens and self.needs_answers:
            raise BadInput(f"metric {self.name!r} goes by_tokens of the full model's answer: set needs_answers=False")

    def __call__(self, prediction: str, answers: Sequence[str], question: str = "") -> float:
        if not answers:
            raise BadInput(f"metric {self.name!r} needs at least one answer, got none: add 'answer' or 'answers'")
        if self.reads_options:
            return self.rule(prediction, answers, options_of(question))
        if self.reads_question:
            return self.rule(prediction, answers, question)
        return self.rule(prediction, answers)

    def chance(self, answers: Sequence[str], question: str = "") -> float:
        """What guessing scores on average, by the form of the answers: 1 / n where all of them are among the n options
        that the question lists, 1/2 for yes or no and true or false, else 0."""
        if not self.needs_answers or not answers:
            return 0.0
        options = options_of(question)
        if options and all(_label_letter(answer, options) for answer in answers):
            return 1.0 / len(options)
        said = {_plain(answer) for answer in answers}
        return 0.5 if any(said <= pair for pair in _EITHER_OR) else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers, else 0: accuracy by string equality as GQA counts it (arXiv
    1902.09506), ignoring case, outer and repeated white space, a final full stop and how Unicode writes a character
    (NFKC), as evaluation harnesses do. Other punctuation counts: "3.5" is not "35"."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The VQA challenge's accuracy (Antol et al., arXiv 1505.00468; official ``vqaEval``): leave one annotator out.

    For each annotator, min(1, matches among the *others* / 3); the mean over annotators. Both sides are normalized as
    the official script does (``normalize_vqa``). A single answer has no others to compare with: then equality counts.
    """
    said = normalize_vqa(prediction)
    matches = [normalize_vqa(answer) == said for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return math.fsum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity (Biten et al., arXiv 1905.13648, eq. 1), of one prediction.

    The best answer's 1 - distance / longer length, ignoring case and repeated white space; below the threshold of 0.5
    it counts 0. Exactly 0.5 counts, as in the official scorer of ST-VQA and DocVQA.
    """
    said, best = _squeezed(_composed(prediction).lower()), 0.0
    for answer in answers:
        right = _squeezed(_composed(answer).lower())
        longest = max(len(said), len(right))
        best = max(best, 1.0 - edit_distance(said, right) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy (Masry et al., arXiv 2203.10244, section 5.1, after PlotQA, arXiv 1909.00997), by the
    rules of the scorer that is in use (``relaxed_correctness`` of Pix2Struct, arXiv 2210.03347).

    A number may be off by 5 % of the true one; anything else must match but for case. "12%" is read as 0.12. As there,
    "1,200" is no number, a final full stop of a word counts, and a true 0 must be matched as text.
    """
    return float(any(_relaxed_equal(_composed(prediction), _composed(answer)) for answer in answers))


def multiple_choice(prediction: str, answers: Sequence[str], options: Mapping[str, str] | None = None) -> float:
    """1 if the option that the prediction names is the answer's, else 0.

    Options are found by fixed rules (see `option_letter`) in the manner of MMBench (arXiv 2307.06281) and MMMU (arXiv
    2311.16502), without a judge model and without guessing when there is none. An answer that names no option is
    compared as ``exact_match`` does.
    """
    known = options or {}
    said, text = option_letter(prediction, known), _plain(prediction)
    for answer in answers:
        letter = _label_letter(answer, known)
        if (text == _plain(answer)) if letter is None else (letter == said):
            return 1.0
    return 0.0


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is the full model's own answer, letter by letter, else 0. Needs no labels."""
    return float(prediction in answers)


_FULL_STOPS = (".", "\u3002")
_EITHER_OR = (frozenset({"yes", "no"}), frozenset({"true", "false"}))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Texts that `exact_match` takes for one. Decomposed, and folded character by character, so that the beginning of a
    text stays one, see `_cannot_match`."""
    flat = _squeezed(unicodedata.normalize("NFKD", text).casefold())
    return flat[:-1].rstrip() if flat.endswith(_FULL_STOPS) else flat


def _cannot_match(beginning: str, answers: Sequence[str]) -> bool:
    """Whether `exact_match` is lost. White space is left out, which a tokenizer may take back before the next word, and
    accents at the end, which what follows may still reorder."""
    whole = unicodedata.normalize("NFKD", beginning.rstrip("\ufffd"))
    while whole and unicodedata.combining(whole[-1]):
        whole = whole[:-1]
    said = "".join(whole.casefold().split())
    right = ("".join(_plain(answer).split()) for answer in answers)
    return not any((answer + stop).startswith(said) for answer in right for stop in _FULL_STOPS)


METRICS: Registry[Metric] = Registry(
    "metric", "thinsight.metrics", builtin=("thinsight.evaluation.rules",), code=attrgetter("rule")
)
for _metric in (
    Metric("exact_match", exact_match, lost=_cannot_match),
    # fewer agreeing annotators allow less than 1, and only their own answers score at all
    Metric("vqa_accuracy", vqa_accuracy, ceiling=lambda answers: max(vqa_accuracy(each, answers) for each in answers)),
    Metric("anls", anls),
    Metric("relaxed_accuracy", relaxed_accuracy),
    Metric("multiple_choice", multiple_choice, reads_options=True),
    Metric("agreement", agreement, needs_answers=False, by_tokens=True),
):
    METRICS.register(_metric)


def get_metric(metric: str | Metric) -> Metric:
    """The metric of that name, or itself; `BadInput` lists the names where there is none."""
    return metric if isinstance(metric, Metric) else METRICS[metric]


def metric_for(answers: Sequence[str], metric: str | Metric | None, where: str) -> Metric:
    """The metric asked for; None: exact_match where there are answers, else agreement with the full model. `BadInput`
    where there is no such metric, or where it needs answers and ``where`` has none."""
    chosen = get_metric(("exact_match" if answers else "agreement") if metric is None else metric)
    if chosen.needs_answers and not answers:
        raise BadInput(f"{where} has no answer, which metric {chosen.name!r} needs: add one, or use metric='agreement'")
    return chosen


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


_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}


def normalize_vqa(text: str) -> str:
    """A text as the official VQA script compares it: no punctuation, digits for number words, no articles.

    Lower case; an apostrophe that was left out of a contraction is put back. The official script skips parts of this
    for answers that its data set ships normalized already; here every text gets all of it.
    """
    flat = _composed(text).replace("\n", " ").replace("\t", " ").strip()
    drop_all = _DIGIT_COMMA.search(flat) is not None
    result = flat
    for mark in _PUNCTUATION:
        at_word_edge = mark + " " in flat or " " + mark in flat
        result = result.replace(mark, "" if drop_all or at_word_edge else " ")
    words = (_NUMBER_WORDS.get(word, word) for word in _LONE_PERIOD.sub("", result).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))  # distances from a[:i] to every prefix of b
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _number(text: str) -> float | None:
    """The number that the whole text is, else None."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed_equal(prediction: str, answer: str) -> bool:
    said, true = _number(prediction), _number(answer)
    if said is not None and true:
        return abs(said - true) / abs(true) <= RELATIVE_TOLERANCE  # nothing that is not finite is near
    return prediction.lower() == answer.lower()


# -- options -------------------------------------------------------------------------------------------------

_REASON = r"(?:because|since|as|for|is|in|and|or|which)\b"
# one capital that is no word: "A" and "I" may begin a phrase
_CAPITAL = rf"([A-Z])(?![\w'\u2019])(?:(?<![AI])|(?!\s+(?!{_REASON})[a-z]))"
_BRACKETED = r"[(\[]\s*([A-Za-z])\s*[)\]]"
_SMALL = r"([a-z])(?=\s*(?:[).\],;!]|$))"  # "the answer is b."
_RIGHT = r"(?!\s+(?:is|are)\s+(?:not|wrong|incorrect|false|out)\b)"
# "A or B", "A, B and C" name none
_ALONE = (
    rf"{_RIGHT}(?!\s*(?:or|and)\s*(?:option\s+)?[(\[]?[A-Z]\b)"
    r"(?!(?:\s*,\s*[(\[]?[A-Z]\b[)\]]?)+\s*(?:,|or\b|and\b|$))"
)
_CALLED = r"(?:option|choice|answer)\s+"
_COPULA = r"(?:\s*(?:is|would be|should be|must be|:|=|\u662f|\u4e3a))+\s*"

_BARE = re.compile(rf"\W*(?i:{_CALLED})?[(\[]?\s*([A-Za-z])\s*[)\]]?[\s.:,!]*")
_CONCLUSIONS = (
    re.compile(  # "the answer is B"
        rf"(?i:\b(?:answer|option|choice)|\u7b54\u6848|\u9009\u9879)(?i:{_COPULA}(?:{_CALLED})?)"
        rf"(?:{_BRACKETED}|{_CAPITAL}|{_SMALL}){_ALONE}"
    ),
    re.compile(  # "both are wrong, so B"
        rf"(?i:\b(?:so|therefore|thus|hence|choose|select|pick|go with)\b[\s,:]*(?:it is\s+)?(?:{_CALLED})?)"
        rf"(?:{_BRACKETED}|{_CAPITAL}){_ALONE}"
    ),
    re.compile(rf"(?:{_BRACKETED}|\b([A-Z]))\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"),
)
_LEADING = (
    re.compile(rf"\s*{_BRACKETED}{_ALONE}"),  # "(B) a dog"
    re.compile(r"\s*([A-Z])\s*(?:[):]|\.(?!\w))"),  # "B. a dog", not "U.S."
    re.compile(rf"\s*([A-Z])\s*{_ALONE},"),  # "B, a dog", not "A, B and C"
    re.compile(r"\s*([A-Z])[^\S\n]*(?:\n|\s(?:because|since)\b)"),  # "B" and a line of reasons
)
_MENTION = re.compile(rf"(?<!\w)[(\[]\s*([A-Z])\s*[)\]]{_RIGHT}")  # "it shows (B)"
_BOXES = (re.compile(r"(?is).*<answer>(.*?)</answer>"), re.compile(r"(?s).*\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"))
_THOUGHT = re.compile(r"(?is).*</think>")
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|__|[*`${}]")
_LISTED = re.compile(r"(?:(?<=[\s,;])|^)(?:[(\[]([A-Z])[)\]]|([A-Z])[.):])\s*(?=\S)", re.MULTILINE)
_SAYS = re.compile(rf"(?is).*\b(?:answer|option|choice){_COPULA}(.+)")


def options_of(question: str) -> dict[str, str]:
    """The texts of the options that a question lists, by letter; empty where it lists none.

    A list is A, B and so on, as "A. red", "A) red", "A: red" or "(A) red", each on a line of its own or behind one
    another; of several lists the last one.
    """
    text = _tidy(question)
    lists: list[list[re.Match[str]]] = [[]]
    for mark in _LISTED.finditer(text):
        letter = mark[1] or mark[2]
        if letter == "A":
            lists.append([])
        if letter == chr(ord("A") + len(lists[-1])):
            lists[-1].append(mark)
    last = next((each for each in reversed(lists) if len(each) > 1), [])
    ends = [*(mark.start() for mark in last[1:]), len(text)]
    return {
        mark[1] or mark[2]: text[mark.end() : end].split("\n")[0].strip().rstrip(",;").rstrip()
        for mark, end in zip(last, ends, strict=False)
    }


def option_letter(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """The option that an answer names, as an upper-case letter, or None. "A dog" names none.

    Read in this order: what stands in ``<answer>...</answer>`` or ``\\boxed{...}``; an answer that is a letter and
    nothing else; an answer that is an option's text; the last conclusion ("the correct option is B", "so B", "B is
    correct"); the letter that it begins with ("B. a dog"); the one letter that it mentions in brackets. Brackets may be
    full-width, marks of Markdown and LaTeX do not count, nor does what stands before ``</think>``.

    Args:
        text: a model's answer.
        options: the options' texts by letter, see `options_of`; other letters are then no options.
    """
    known = options or {}
    said = _THOUGHT.sub("", _tidy(text))
    for box in _BOXES:
        if (inside := box.match(said)) and (letter := _named(inside[1], known)) is not None:
            return letter
    return _named(said, known)


def _tidy(text: str) -> str:
    """In NFKC, with single spaces and no empty lines."""
    lines = unicodedata.normalize("NFKC", text).split("\n")
    return "\n".join(filter(None, (" ".join(line.split()) for line in lines)))


def _named(text: str, options: Mapping[str, str]) -> str | None:
    said = _MARKUP.sub("", text)
    if (whole := _whole(said, options)) is not None:
        return whole
    concluded = [found for rule in _CONCLUSIONS for found in _letters(rule.finditer(said), options)]
    if concluded:
        return max(concluded)[1]
    told = _SAYS.match(said)
    if told and (letter := _letter_of_text(told[1], options)) is not None:
        return letter
    for _, first in _letters((rule.match(said) for rule in _LEADING), options):
        return first
    mentioned = {letter for _, letter in _letters(_MENTION.finditer(said), options)}
    return mentioned.pop() if len(mentioned) == 1 else None


def _whole(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose letter or text is all that is said."""
    found = _letters([_BARE.fullmatch(text)], options)
    return next((letter for _, letter in found), None) or _letter_of_text(text, options)


def _letter_of_text(text: str, options: Mapping[str, str]) -> str | None:
    said = _plain(_MARKUP.sub("", text))
    same = [letter for letter, option in options.items() if said and _plain(_MARKUP.sub("", option)) == said]
    return same[0] if len(same) == 1 else None


def _letters(found: Iterable[re.Match[str] | None], options: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """The letters that were found, each with its place; only those of options where these are known."""
    for match in filter(None, found):
        letter = next(group for group in match.groups() if group).upper()
        if not options or letter in options:
            yield match.start(match.lastindex or 0), letter


def _label_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that a label names: its letter, its text, or both as "B. a dog"."""
    said = _tidy(answer)
    if (whole := _whole(said, options)) is not None:
        return whole
    for _, letter in _letters((rule.match(said) for rule in _LEADING[:2]), options):
        return letter
    return None
