"""Benchmarks' own scoring rules against answers worked out by hand."""

from __future__ import annotations

import pytest

from thinsight.evaluation.metrics import get_metric

RED_OR_BLUE = "what ?\nA. red\nB. blue\nC. a green one"


@pytest.mark.parametrize(
    ("metric", "said", "label", "score"),
    [
        ("mme", "Yes", "Yes", 1),
        ("mme", "y", "yes", 1),
        ("mme", "No, there is none.", "No", 1),
        ("mme", "There is none, no.", "No", 0),  # not in the first four characters
        ("mme", "x", "No", 0),
        ("mme", "N.o", "no", 1),
        ("pope", "Yes.", "yes", 1),
        ("pope", "No", "no", 1),
        ("pope", "There is not a dog. Yes.", "no", 1),
        ("pope", "a cat", "yes", 1),  # whatever is no denial
        ("pope", "No, it is", "yes", 0),
        ("yes_no", "The answer is yes.", "Yes", 1),
        ("yes_no", "Yes or no", "Yes", 0),
        ("yes_no", "nothing", "no", 0),
        ("yes_no", "NO!", "no", 1),
    ],
)
def test_yes_or_no(metric: str, said: str, label: str, score: float) -> None:
    assert get_metric(metric)(said, [label]) == score


@pytest.mark.parametrize(
    ("said", "label", "score"),
    [
        ("B", "B", 1),
        ("(B)", "B", 1),
        ("B.", "B", 1),
        ("(A) or (B)", "B", 1),  # the last one
        ("B and A", "A", 1),
        ("I think it must be blue as far as I see", "B", 1),
        ("it is blue", "B", 0),  # too short to be read for an option's text
        ("none", "A", 0),
    ],
)
def test_mmmu_with_options(said: str, label: str, score: float) -> None:
    assert get_metric("mmmu")(said, [label], RED_OR_BLUE) == score


@pytest.mark.parametrize(
    ("said", "labels", "score"),
    [
        ("so the answer is 12.5", ["12.50"], 1),
        ("1,200", ["1200"], 1),
        ("the result is 3 and thus x = 4", ["4"], 1),
        ("1.3e3 m", ["1300"], 1),
        ("It is a red dog.", ["red"], 1),
        ("It is a blue dog.", ["red", "blue dog"], 1),
        ("it is b", ["b"], 1),
        ("it is bad", ["b"], 0),  # a single letter counts beside a space only
        ("x is y", ["x"], 0),
        ("", ["5"], 0),
    ],
)
def test_mmmu_open(said: str, labels: list[str], score: float) -> None:
    assert get_metric("mmmu")(said, labels, "what ?") == score


INTEGER = "Hint: Please answer the question requiring an integer answer and provide the final value.\nQuestion: ?"
ONE = "Hint: Please answer the question requiring a floating-point number with one decimal place.\nQuestion: ?"
TWO = "Hint: Please answer the question requiring a floating-point number with two decimal places.\nQuestion: ?"
LIST = "Hint: Please answer the question requiring a Python list as an answer.\nQuestion: ?"
CHOICE = "Question: ?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) obtuse"


@pytest.mark.parametrize(
    ("question", "said", "label", "score"),
    [
        (INTEGER, "14", "14", 1),
        (INTEGER, "The number missing in the sequence is 14.", "14", 1),
        (INTEGER, "Of 3 and 4 the answer is 1,200 apples", "1200", 1),
        (INTEGER, "14.9", "14", 1),  # cut off, as the official scorer does
        (INTEGER, "fourteen", "14", 0),
        (ONE, "0.64", "0.6", 1),
        (ONE, "about 0.7", "0.6", 0),
        (TWO, "$1.45", "1.45", 1),
        (TWO, "1.4", "1.4", 1),
        (TWO, "1.44", "1.4", 0),
        (LIST, "between [2007, 2008]", "[2007, 2008]", 1),
        (CHOICE, "The correct answer is (B) 8/11.", "8/11", 1),
        (CHOICE, "B", "8/11", 1),
        (CHOICE, "obtus", "obtuse", 1),  # the most similar option
        (CHOICE, "A", "8/11", 0),
        (CHOICE, "C", "C", 1),
        ("?", "2.50", "2.5", 1),
        ("?", "a word", "a word", 1),
    ],
)
def test_mathvista(question: str, said: str, label: str, score: float) -> None:
    assert get_metric("mathvista")(said, [label], question) == score


@pytest.mark.parametrize(
    "text", ["answer " * 20_000, "(" * 20_000, "1" * 20_000, "1," * 20_000, "[" * 20_000, "is " * 9999]
)
def test_a_long_answer_is_read_like_a_short_one(text: str) -> None:
    """Quadratic rules would take minutes."""
    for name in ("mme", "pope", "yes_no", "mmmu", "mathvista"):
        for question in (RED_OR_BLUE, INTEGER, "?"):
            assert get_metric(name)(text, ["nothing"], question) == 0
