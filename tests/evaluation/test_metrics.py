"""Metrics against values worked out by hand from each rule's source."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinsight.errors import ThinsightError
from thinsight.evaluation.metrics import METRICS, edit_distance, get_metric, normalize_vqa, option_letter


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("red", ["red"], 1),
        (" Red. ", ["red"], 1),
        ("upper  left", ["Upper left"], 1),
        ("3.5", ["35"], 0),
        ("red", ["blue", "RED"], 1),
        ("", ["red"], 0),
        ("reddish", ["red"], 0),
    ],
)
def test_exact_match(prediction, answers, score):
    assert get_metric("exact_match")(prediction, answers) == score


@pytest.mark.parametrize(
    ("matching", "score"),
    # ten annotators: leave-one-out mean of min(1, others / 3); e.g. 2 match: (2 x 1/3 + 8 x 2/3) / 10
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_annotators(matching, score):
    answers = ["yes"] * matching + ["no"] * (10 - matching)
    assert get_metric("vqa_accuracy")("Yes!", answers) == pytest.approx(score)


def test_vqa_accuracy_of_one_answer_is_equality():
    assert get_metric("vqa_accuracy")("the dog", ["dog"]) == 1
    assert get_metric("vqa_accuracy")("cat", ["dog"]) == 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("it's", "it's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("yes, the left one", "yes left 1"),
        ("black\nand\twhite ", "black and white"),
    ],
)
def test_vqa_normalization(text, normal):
    assert normalize_vqa(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("Hello  World", ["hello world"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("ab", ["cd"], 0.0),
        ("ab", ["ac"], 0.5),
        ("abc", ["axy"], 0.0),  # similarity 1/3 is below the threshold
        ("hallo", ["cello", "hello"], 0.8),
        ("", ["x"], 0.0),
    ],
)
def test_anls(prediction, answers, score):
    assert get_metric("anls")(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance
    assert edit_distance(b, a) == distance


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_metric(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-10.4", "-10", 1),
        ("10", "-10", 0),
        ("12%", "0.12", 1),
        ("12.5%", "12%", 1),
        ("1,200", "1200", 1),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("No", "yes", 0),
        ("nan", "100", 0),
        ("", "100", 0),
        ("42.", "42", 1),
    ],
)
def test_relaxed_accuracy(prediction, answer, score):
    assert get_metric("relaxed_accuracy")(prediction, [answer]) == score


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("(c) a dog", "C"),
        ("The answer is D", "D"),
        ("Answer: A", "A"),
        ("The correct option is (B).", "B"),
        ("It shows (B), I think", "B"),
        ("A dog", None),
        ("I see a cat", None),
        ("answer is a dog", None),
        ("", None),
    ],
)
def test_option_letter(text, letter):
    assert option_letter(text) == letter


def test_multiple_choice():
    metric = get_metric("multiple_choice")
    assert metric("B. a dog", ["B"]) == 1
    assert metric("C", ["B"]) == 0
    assert metric("a dog", ["B"]) == 0
    assert metric("A dog", ["a dog"]) == 1


def test_agreement_is_to_the_letter():
    assert get_metric("agreement")("A dog.", ["A dog."]) == 1
    assert get_metric("agreement")("a dog", ["A dog."]) == 0


@pytest.mark.parametrize("name", METRICS)
@given(text=st.text(max_size=12), answers=st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_every_score_is_a_share(name, text, answers):
    assert 0.0 <= METRICS[name](text, answers) <= 1.0


def test_unknown_metric_lists_the_known_ones():
    with pytest.raises(ThinsightError, match=r"'exactmatch'.*did you mean 'exact_match'.*relaxed_accuracy"):
        get_metric("exactmatch")


def test_a_metric_without_answers_is_an_error():
    with pytest.raises(ThinsightError, match="needs at least one answer"):
        get_metric("anls")("red", [])


@pytest.mark.parametrize(
    ("beginning", "answers", "lost"),
    [
        ("", ["red"], False),
        ("Re", ["red"], False),
        ("red", ["blue", "red circle"], False),
        ("red.", ["red"], False),
        ("red. ", ["red"], False),
        ("red.\ufffd", ["red"], False),
        ("red,", ["red"], True),
        ("reds", ["red"], True),
        ("green", ["red", "blue"], True),
        ("3.5", ["3"], True),
    ],
)
def test_exact_match_knows_a_lost_beginning(beginning, answers, lost):
    assert get_metric("exact_match").lost(beginning, answers) is lost
    assert not get_metric("anls").lost(beginning, answers)


def test_what_is_lost_scores_nothing_and_what_matches_is_never_lost():
    metric = get_metric("exact_match")
    answers = ["Red circle.", "No.  7"]
    for text in ("red  circle", " RED circle.", "no. 7.", "no. 7", "red circles", "circle", "no"):
        lost = [metric.lost(text[:end], answers) for end in range(len(text) + 1)]
        assert lost == sorted(lost)  # once lost, lost for good
        if metric(text, answers):
            assert not any(lost)
