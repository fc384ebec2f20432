"""Benchmarks' metrics against lmms-eval's own functions, on generated answers: equal, or different as is said here."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

os.environ.setdefault("OPENAI_API_KEY", "none")  # which two of its modules want when they are imported; nobody is asked

from lmms_eval.api import metrics as harness
from lmms_eval.tasks.chartqa import utils as chartqa
from lmms_eval.tasks.hallusion_bench import evaluate_hb
from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.realworldqa import utils as realworldqa
from lmms_eval.tasks.textvqa import utils as textvqa

from thinsight.evaluation.benchmarks import BENCHMARKS
from thinsight.evaluation.example import Example
from thinsight.evaluation.metrics import get_metric
from thinsight.evaluation.readers.tables import lettered

ImageFile.LOAD_TRUNCATED_IMAGES = False  # as it was before lmms-eval was imported

COUNT = 300
WORDS = "the a red dog yes no two 2 cat's dont one-way U.S. 1,200 3.5 12% street left of is so".split()  # noqa: SIM905
OPTIONS = ["red dog", "blue cat", "a green bird", "none of these"]
ASKED = f"what ?\n{lettered(OPTIONS)}\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"


def sentences(seed: int, words: list[str] = WORDS, most: int = 7) -> Iterator[str]:
    """Answers of a few words with marks, some of them nothing but noise."""
    draw = random.Random(seed)
    for _ in range(COUNT):
        text = " ".join(draw.choices(words, k=draw.randint(1, most)))
        yield draw.choice([str, str.upper, str.capitalize])(text) + draw.choice(["", ".", "!", " ", ",\n"])


def answered(seed: int) -> Iterator[str]:
    """How models name an option."""
    draw = random.Random(seed)
    for _ in range(COUNT):
        letter = draw.choice(LETTERS)
        text = OPTIONS[LETTERS.index(letter)]
        forms = [
            "{0}",
            "{0}.",
            "({0})",
            "{0}. {1}",
            "({0}) {1}",
            "The answer is {0}.",
            "The correct answer is ({0}).",
            " {0}\n",
        ]
        yield draw.choice(forms).format(letter, text)


def example(number: int, answer: str, group: str = "", **extra: Any) -> Example:
    return Example(str(number), (Image.new("RGB", (2, 2)),), "?", (answer,), group=group or str(number), extra=extra)


def measures(name: str, examples: list[Example], scores: list[float]) -> dict[str, float]:
    return {each.name: each.of(examples, np.array(scores)) for each in BENCHMARKS[name].measures}


def test_mme() -> None:
    metric, results, examples, scores = get_metric("mme"), [], [], []
    categories = [*mme.eval_type_dict["Perception"], *mme.eval_type_dict["Cognition"]]
    words = ["yes", "no", "Yes", "No", "not", "y", "n", "there", "is", "Nothing", "n.o", "eyes"]
    for number, said in enumerate(sentences(1, words, 3)):
        doc = {
            "answer": ("Yes", "No")[number % 2],
            "question_id": number // 2,
            "category": categories[number // 2 % 14],
        }
        ((kind, result),) = mme.mme_process_results(doc, [said]).items()
        score = metric(said, [doc["answer"]])
        assert score == result["score"], said
        results.append((kind, result))
        examples.append(example(number, doc["answer"], f"image {number // 2}", task=doc["category"]))
        scores.append(score)
    found = measures("mme", examples, scores)
    for kind, name in (("mme_perception_score", "perception, of 2000"), ("mme_cognition_score", "cognition, of 800")):
        theirs = mme.mme_aggregate_results([result for each, result in results if each == kind])
        assert 100 * found[name] == pytest.approx(theirs)


def test_pope() -> None:
    """Of plain answers. lmms-eval takes any other one for neither, POPE's own scorer for yes or for no; and its share
    of yes is of the labels, POPE's of the answers."""
    draw, metric = random.Random(2), get_metric("pope")
    results, examples, scores = [], [], []
    for number in range(COUNT):
        label, said = draw.choice(["yes", "no"]), draw.choice(["Yes", "No", "yes", " no"])
        doc = {"answer": label, "question_id": number}
        result = pope.pope_process_results(doc, [said])["pope_f1_score"]
        scores.append(metric(said, [label]))
        assert scores[-1] == result["score"]
        results.append(result)
        examples.append(example(number, label))
    found = measures("pope", examples, scores)
    theirs: dict[str, Callable[[Any], float]] = {
        "F1": pope.pope_aggregate_f1_score,
        "precision": pope.pope_aggregate_precision,
        "recall": pope.pope_aggregate_recall,
        "accuracy": pope.pope_aggregate_accuracy,
    }
    for name, aggregate in theirs.items():
        assert found[name] == pytest.approx(aggregate(results))


def test_mmmu_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its parser draws an option at random, ours has none."""
    monkeypatch.setattr(random, "choice", lambda choices: "none")
    metric, index = get_metric("mmmu"), dict(zip(LETTERS, OPTIONS, strict=True))
    words = [*WORDS, "A", "B", "C.", "(D)", "(A)", "blue", "cat", "red", "dog"]
    told = [*answered(3), *sentences(3, words, 9)]
    for said in told:
        theirs = mmmu.parse_multi_choice_response(said, list(LETTERS), index)
        for letter in LETTERS:
            assert metric(said, [letter], ASKED) == float(theirs == letter), said


def test_mmmu_open() -> None:
    metric = get_metric("mmmu")
    words = [*WORDS, "answer", "is", "therefore", "=", "4", "1.25", "1e3", "result", "so", "x"]
    labels = ["2", "1200", "red", "dog", "x", "1.25", "the street", "1000"]
    draw = random.Random(4)
    for said in sentences(4, words, 9):
        for right in (draw.choice(labels), draw.sample(labels, 2)):
            answers = [right] if isinstance(right, str) else right
            theirs = mmmu.eval_open(right, mmmu.parse_open_response(said))
            assert metric(said, answers, "?") == float(theirs), (said, right)


def test_mathvista() -> None:
    """The form of an answer that needs no taking out, which lmms-eval has a model do."""
    theirs, metric, draw = MathVistaEvaluator(), get_metric("mathvista"), random.Random(5)
    hints = {("integer", 0): "an integer answer", ("float", 1): "one decimal place", ("float", 2): "two decimal places"}
    for _ in range(COUNT):
        (kind, precision), hint = draw.choice(list(hints.items()))
        said = draw.choice([str(draw.randint(0, 20)), f"{draw.uniform(0, 2):.1f}", f"{draw.uniform(0, 2):.2f}"])
        if kind == "integer":
            said = str(int(float(said)))
        label = str(draw.randint(0, 20)) if kind == "integer" else str(round(draw.uniform(0, 2), precision))
        found = theirs.normalize_extracted_answer(said, [], "free_form", kind, precision)
        question = f"Hint: Please answer the question requiring {hint} and provide the final value.\nQuestion: ?"
        for right in (label, str(found)):
            assert metric(said, [right], question) == float(theirs.safe_equal(found, right)), (said, right)
    asked = "Question: ?\nChoices:\n" + "\n".join(f"({a}) {b}" for a, b in zip(LETTERS, OPTIONS, strict=True))
    for _ in range(COUNT):
        letter = draw.choice(LETTERS)
        text = OPTIONS[LETTERS.index(letter)]
        said = draw.choice([letter, f"({letter})", text, text[:-1], f"({letter}) {text}"])
        found = theirs.normalize_extracted_answer(said, OPTIONS, "multi_choice", "text", None)
        for right in OPTIONS:
            assert metric(said, [right], asked) == float(theirs.safe_equal(found, right)), said


def test_textvqa() -> None:
    metric, draw = get_metric("vqa_accuracy"), random.Random(6)
    for said in sentences(6, most=3):
        answers = draw.choices([said, *sentences(draw.randint(0, 99), most=2)], k=10)
        doc = {"answers": list(answers), "question_id": 0}
        assert metric(said, answers) == pytest.approx(textvqa.textvqa_process_results(doc, [said])["exact_match"]), said


def test_docvqa() -> None:
    metric, draw = get_metric("anls"), random.Random(7)
    for said in sentences(7, most=3):
        text = " ".join(said.split())  # with other white space it measures lengths before, the official scorer after
        answers = [" ".join(each.split()) for each in draw.choices([said, *sentences(7, most=3)], k=3)]
        assert metric(text, answers) == pytest.approx(harness.anls(answers, [text])["anls"]), (text, answers)


def test_chartqa() -> None:
    metric, draw = get_metric("relaxed_accuracy"), random.Random(8)
    for _ in range(COUNT):
        label = draw.choice([str(draw.randint(0, 30)), f"{draw.uniform(0, 9):.2f}", "12%", "Yes", "1,200", "red"])
        near = f"{float(label) * draw.uniform(0.9, 1.1):.3f}" if label.replace(".", "").isdigit() else label.upper()
        for said in (label, near, draw.choice(["0.12", "1200", "no", "nan", "1e2"])):
            assert metric(said, [label]) == float(chartqa.relaxed_correctness(said, label)), (said, label)


def test_gqa() -> None:
    """lmms-eval leaves all marks out, GQA's scorer none: they are the same on answers of words."""
    metric, draw, words = (
        get_metric("exact_match"),
        random.Random(9),
        ["red", "dog", "left", "yes", "no", "baseball bat"],
    )
    for _ in range(COUNT):
        label = draw.choice(words)
        said = draw.choice([str, str.upper, str.capitalize])(draw.choice([label, draw.choice(words)])) + draw.choice(
            ["", "."]
        )
        theirs = harness.exact_match_hf_evaluate([said], [label], ignore_case=True, ignore_punctuation=True)
        assert metric(said, [label]) == theirs["exact_match"], said


def test_ai2d_and_realworldqa() -> None:
    """lmms-eval reads "B" and "B. ..." of AI2D; of RealWorldQA many forms."""
    metric, draw = get_metric("multiple_choice"), random.Random(10)
    for said in answered(10):
        label = draw.choice(LETTERS)
        assert (
            metric(said, [label], ASKED)
            == realworldqa.realworldqa_process_results({"answer": label}, [said])["exact_match"]
        )
    for _ in range(COUNT):
        label, said = draw.choice(["0", "2", "Yes", "Downhill"]), draw.choice(["0", "2.", "yes", "downhill.", "Uphill"])
        assert (
            metric(said, [label], "?")
            == realworldqa.realworldqa_process_results({"answer": label}, [said])["exact_match"]
        )
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter

    read = MultiChoiceRegexFilter()
    for said in answered(11):
        if (said.strip()[:1] in LETTERS and len(said.strip()) < 3) or said[1:2] == ".":
            (found,) = read.apply([[said.strip()]], [{}])
            for letter in LETTERS:
                theirs = harness.exact_match_hf_evaluate([found], [letter], ignore_case=True, ignore_punctuation=True)
                assert metric(said, [letter], ASKED) == theirs["exact_match"], said


def test_mmbench() -> None:
    """Circular: every rotation right; the letter is read by rules on both sides."""
    metric, draw = get_metric("multiple_choice"), random.Random(12)
    rows, examples, scores = [], [], []
    for number in range(COUNT // 4):
        hard = draw.random() < 0.3
        for turn in range(4):
            turned = OPTIONS[turn:] + OPTIONS[:turn]
            label = LETTERS[-turn % 4]
            letter = draw.choice(LETTERS) if hard else label
            text = turned[LETTERS.index(letter)]
            forms = ["{0}", "{0}.", "({0})", "({0}) {1}", "The answer is {0}."]
            said = draw.choice(forms).format(letter, text)
            options = dict(zip(LETTERS, turned, strict=True))
            rows.append(
                {
                    "index": number + turn * 10**6,
                    "question": "?",
                    "answer": label,
                    "prediction": said,
                    "hint": "nan",
                    "source": "s",
                    "split": "dev",
                    "category": "c",
                    "L2-category": "l",
                    **options,
                }
            )
            asked = f"?\n{lettered(turned)}"
            scores.append(metric(said, [label], asked))
            examples.append(example(len(scores), label, f"image {number}", unit=str(number)))
    overall, _, _ = MMBench_Evaluator().eval_result(rows, eval_method="static")
    found = measures("mmbench", examples, scores)["circular accuracy"]
    assert found == pytest.approx(overall)
    assert 0.1 < found < 0.95


def test_hallusionbench() -> None:
    """By its rule without GPT-4, on answers that say one of the two words; without the figures that are none, which
    that rule counts and the official scorer does not."""
    metric, draw = get_metric("yes_no"), random.Random(13)
    results, examples, scores = [], [], []
    for number in range(COUNT):
        kind, group, figure, question = draw.choice(["VD", "VS"]), number // 6, number % 3, number % 2
        label = draw.choice(["0", "1"])
        said = draw.choice(["Yes, it is.", "No.", "yes", "no, never", "The answer is yes"])
        figure += kind == "VS"
        results.append(
            {
                "category": kind,
                "subcategory": "x",
                "set_id": group,
                "figure_id": figure,
                "question_id": question,
                "gt_answer": label,
                "model_prediction": said,
            }
        )
        answer = ("no", "yes")[int(label)]
        scores.append(metric(said, [answer]))
        unit = f"{kind}_x_{group}"
        examples.append(example(number, answer, unit=unit, task=kind, figure_id=str(figure), asked=str(question)))
    found = measures("hallusionbench", examples, scores)
    for name in ("aAcc", "qAcc", "fAcc"):
        assert found[name] == pytest.approx(evaluate_hb.hb_aggregation_result_intern(results, name)), name
