"""Metrics against values worked out by hand from each rule's source."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinsight.errors import ThinsightError
from thinsight.evaluation.metrics import (
    METRICS,
    Metric,
    edit_distance,
    get_metric,
    normalize_vqa,
    option_letter,
    options_of,
)
from thinsight.testing import MetricContract


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
        ("\uff32\uff25\uff24\uff0e", ["red"], 1),  # full-width letters and full stop
        ("cafe\u0301", ["caf\u00e9"], 1),
        ("CAF\u00c9", ["cafe\u0301"], 1),
        ("o\ufb03ce", ["office"], 1),
        ("cafe", ["caf\u00e9"], 0),
        ("STRASSE", ["stra\u00dfe"], 1),
        ("\u7ea2\u8272\u3002", ["\u7ea2\u8272"], 1),
        ("cat .", ["cat"], 1),
        ("cat . dog", ["cat"], 0),
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
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)]
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
        ("1,200", "1200", 0),
        ("1,200", "1,200", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.001", "0", 0),
        ("abc", "abc.", 0),
        ("ABC", "abc", 1),
        ("1e3", "1000", 1),
        ("inf", "100", 0),
        ("100", "inf", 0),
        ("nan", "nan", 0),
        ("5 %", "0.05", 1),
        ("caf\u00e9", "cafe\u0301", 1),
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
        ("The correct option is **D**", "D"),
        ("C\nBecause the sign is red.", "C"),
        ("\uff08B\uff09", "B"),
        ("\uff22", "B"),
        ("**B**", "B"),
        ("**B.** a dog", "B"),
        (r"\boxed{B}", "B"),
        (r"The answer is $\boxed{\text{C}}$.", "C"),
        ("<answer>B</answer>", "B"),
        ("First (A) seems right. <answer> (C) </answer>", "C"),
        ("<think>maybe (A)</think>\nB", "B"),
        ("Both A and C are wrong, so B", "B"),
        ("B\n\nThe picture shows (A) only once.", "B"),
        ("A. This one is red. B. This one is blue. Therefore, the answer is B.", "B"),
        ("A is incorrect. C is the right one", "C"),
        ("I choose option C because it is red", "C"),
        ("The answer is A because it is red", "A"),
        ("The answer is b.", "B"),
        ("Answer:\n\nC", "C"),
        ("\u7b54\u6848\uff1aC", "C"),
        ("The answer is B, A is wrong", "B"),
        ("The answer is A dog", None),
        ("So I think it is red", None),
        ("The answer is B or C", None),
        ("A, B and C are wrong", None),
        ("(B) is wrong, it is red", None),
        ("It shows (B) and (C)", None),
        ("There are dog(s) here", None),
        ("U.S.", None),
    ],
)
def test_option_letter(text, letter):
    assert option_letter(text) == letter


ASKED = "Which animal?\nA. cat\nB. a dog\nC. both of them\nAnswer with the option's letter."


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (ASKED, {"A": "cat", "B": "a dog", "C": "both of them"}),
        ("Which? (A) red (B) blue, (C) dark green", {"A": "red", "B": "blue", "C": "dark green"}),
        ("Which?\nA: red\nB: blue", {"A": "red", "B": "blue"}),
        ("Is (A) or (B) taller?\nA) the left one\nB) the right one", {"A": "the left one", "B": "the right one"}),
        ("\uff08A\uff09red\n\uff08B\uff09blue", {"A": "red", "B": "blue"}),
        ("what color is it ?", {}),
        ("What is A. Smith's name?", {}),
        ("", {}),
    ],
)
def test_options_of_a_question(question, options):
    assert options_of(question) == options


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("a dog", ["B"], 1),
        ("A dog.", ["B"], 1),
        ("The answer is a dog.", ["B"], 1),
        ("cat", ["B"], 0),
        ("B", ["a dog"], 1),
        ("C", ["a dog"], 0),
        ("both of them", ["C. both of them"], 1),
        ("D", ["D"], 1),  # no option of that name: as text
        ("the answer is D, so B", ["B"], 1),
        ("dog", ["B"], 0),  # no guessing
    ],
)
def test_the_text_of_an_option_counts_where_the_question_lists_it(prediction, answers, score):
    assert get_metric("multiple_choice")(prediction, answers, ASKED) == score


def test_multiple_choice():
    metric = get_metric("multiple_choice")
    assert metric("U.K.", ["U.S."]) == 0
    assert metric("B. a dog", ["B"]) == 1
    assert metric("C", ["B"]) == 0
    assert metric("a dog", ["B"]) == 0
    assert metric("A dog", ["a dog"]) == 1


def test_agreement_is_to_the_letter():
    assert get_metric("agreement")("A dog.", ["A dog."]) == 1
    assert get_metric("agreement")("a dog", ["A dog."]) == 0


@pytest.mark.parametrize("name", METRICS)
@given(
    text=st.text(max_size=12),
    answers=st.lists(st.text(max_size=12), min_size=1, max_size=5),
    question=st.sampled_from(["", ASKED]),
)
def test_every_score_is_a_share_that_an_answer_may_reach(name, text, answers, question):
    metric = METRICS[name]
    assert 0.0 <= metric(text, answers, question) <= metric.ceiling(answers) <= 1.0
    assert metric(text, answers, question) == metric(text, answers[::-1], question)
    assert 0.0 <= metric.chance(answers, question) <= 0.5


@pytest.mark.parametrize("name", ["exact_match", "vqa_accuracy", "anls", "agreement"])
@given(one=st.text("aB .\u0301\u00e9\u00df5%", max_size=6), other=st.text("aB .\u0301\u00e9\u00df5%", max_size=6))
def test_equality_is_symmetric(name, one, other):
    assert METRICS[name](one, [other]) == METRICS[name](other, [one])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_names_its_source(name):
    assert "arXiv" in METRICS[name].rule.__doc__ or name == "agreement"


@pytest.mark.parametrize(
    ("name", "answers", "question", "chance"),
    [
        ("multiple_choice", ["B"], ASKED, 1 / 3),
        ("multiple_choice", ["a dog"], ASKED, 1 / 3),
        ("exact_match", ["B"], ASKED, 1 / 3),
        ("multiple_choice", ["B"], "which ?", 0),
        ("exact_match", ["Yes"], "is it red ?", 1 / 2),
        ("vqa_accuracy", ["yes", "no", "yes"], "is it red ?", 1 / 2),
        ("exact_match", ["false"], "", 1 / 2),
        ("exact_match", ["yes", "maybe"], "", 0),
        ("anls", ["red"], ASKED, 0),
        ("agreement", [], ASKED, 0),
    ],
)
def test_chance_goes_by_the_form_of_the_answers(name, answers, question, chance):
    assert METRICS[name].chance(answers, question) == pytest.approx(chance)


class TestEveryMetric(MetricContract):
    @pytest.fixture(params=METRICS)
    def metric(self, request: pytest.FixtureRequest) -> Metric:
        return METRICS[request.param]


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


TRICKY = (
    "caCA .\u3002\uff0e \n'n\u0301\u0323\u0345\u03b1\u00e9\u00c9\u1e69\u00df\ufb01\u01f0"
    "\u03a3\u03c2\u0130\u00a8\uac00\u1100\u1161\u11a8\ufffd5%,(B)"
)
TEXTS = st.text(TRICKY, max_size=6)
WAYS = ("NFC", "NFD", "NFKC", "NFKD")


@st.composite
def scoring(draw):
    """A list of answers, and a text made from one of them in ways that may keep its score."""
    answers = draw(st.lists(TEXTS, min_size=1, max_size=3))
    text = unicodedata.normalize(draw(st.sampled_from(WAYS)), draw(st.sampled_from(answers)))
    text = draw(st.sampled_from([str, str.upper, str.lower, str.casefold]))(text)
    gaps = draw(st.sampled_from(["", " ", "  ", "\n"]))
    return gaps + text.replace(" ", " " + gaps) + draw(st.sampled_from(["", ".", " .", "\u3002", " \u3002 "])), answers


@pytest.mark.parametrize("name", METRICS)
@given(scoring())
@settings(max_examples=300)
def test_no_beginning_of_what_scores_is_lost(name, case):
    """Wherever the decoding is, and where it is in the middle of a character."""
    text, answers = case
    metric = METRICS[name]
    if metric(text, answers) > 0:
        for end in range(len(text) + 1):
            assert not metric.lost(text[:end], answers)
            assert not metric.lost(text[:end].strip() + "\ufffd\ufffd", answers)


@pytest.mark.parametrize("name", METRICS)
@given(beginning=TEXTS, rest=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=300)
def test_what_is_lost_scores_nothing_however_it_goes_on(name, beginning, rest, answers):
    metric = METRICS[name]
    if metric.lost(beginning, answers):
        assert metric(beginning, answers) == 0
        assert metric(beginning + rest, answers) == 0
        assert metric.lost(beginning + rest.rstrip("\ufffd") + "x", answers)


def test_decoding_goes_on_where_white_space_may_go_again():
    """A tokenizer that cleans up writes "do n" and then "don't"."""
    metric = get_metric("exact_match")
    assert metric("don't", ["don't"]) == 1
    assert not metric.lost("do n", ["don't"])
    assert not metric.lost("cat .", ["cat"])
    assert metric.lost("cat . d", ["cat"])


@pytest.mark.parametrize(
    "text",
    ["answer" + " \t" * 20_000, "\n" * 40_000, "(" * 20_000, "so A or B, " * 3000, "the answer is A or B " * 2000],
)
def test_a_long_answer_is_read_like_a_short_one(text):
    """None of them names an option; quadratic rules would take minutes."""
    assert option_letter(text, {"A": "x", "B": "y"}) is None
    assert options_of(text) == {}
    assert METRICS["multiple_choice"](text, ["B"], text) == 0
