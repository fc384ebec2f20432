"""Every sentence about certainty, at the corners: what it says is what the certificate or the interval holds."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from report.test_report_html import EVIL, Page
from rich.console import Console

from thinsight.certificate import Certificate, Step, shown_p, steps_table
from thinsight.errors import ThinsightError
from thinsight.evaluation.result import Interval, drop_interval
from thinsight.report import data as d
from thinsight.report import tables, words
from thinsight.report.data import load_report_data, save_report_data
from thinsight.report.html import render
from thinsight.schedule import Schedule
from thinsight.searches.certify import exact_p_value, judge

PATH = tuple(Schedule.step(4, 1, rate) for rate in (0.5, 0.25, 0.125))
FULL = Schedule.full(4)


def made(counts: list[tuple[int, int]], n: int = 1152, **changes: object) -> Certificate:
    """A certificate by the exact test, each schedule with these losses and wins of n."""
    values: dict[str, object] = {"images": n, "max_drop": 0.01, "full_score": 0.9, "fingerprint": "f" * 16, **changes}
    steps = []
    for losses, wins in counts:
        p = exact_p_value(losses, wins, n, float(str(values["max_drop"])))
        steps.append(Step(0.9 - (losses - wins) / n, losses, wins, p, 1.0, certified=p <= 0.05))
    return Certificate(PATH, tuple(steps), n, confidence=0.95, **values)  # type: ignore[arg-type]


def report_of(
    certificate: Certificate | None, drop: Interval, full_score: float = 0.9, **changes: object
) -> d.ReportData:
    keep = FULL if certificate is not None and certificate.schedule is None else PATH[0]
    keep = certificate.schedule if certificate is not None and certificate.schedule is not None else keep
    parts: dict[str, object] = {
        "dataset": d.DatasetInfo("test", 1152, metric="exact_match", fingerprint="f" * 16),
        "search": d.SearchInfo("G-Search", max_drop=0.01),
        "keep_rates": keep.keep_rates,
        "headline": d.Headline(full_score, full_score - drop.mean, drop, keep.mean_keep_rate, 2.0),
        **changes,
    }
    return d.ReportData("Corner", d.ModelInfo("m"), certificate=certificate, **parts)  # type: ignore[arg-type]


SMALL = drop_interval(np.ones(3), np.ones(3))
LEVEL = drop_interval(np.ones(1152), np.ones(1152))
BETTER = drop_interval(np.zeros(1152), np.repeat([1.0, 0.0], [60, 1092]))
WORSE = drop_interval(np.ones(1152), np.repeat([0.0, 1.0], [60, 1092]))
ZERO = drop_interval(np.zeros(64), np.zeros(64))

INTERVALS = {"n = 3": SMALL, "no discordant pair": LEVEL, "improvement": BETTER, "loss": WORSE, "full score 0": ZERO}
CERTIFICATES: dict[str, Certificate | None] = {
    "none": None,
    "n = 3": made([(0, 0)], 3, max_drop=0.7),
    "nothing certified of 3": made([(0, 0)], 3),
    "no discordant pair": made([(0, 0), (0, 0), (0, 0)]),
    "full score 0": made([(0, 0)], full_score=0.0),
    "improvement": made([(0, 20)]),
    "nothing certified": made([(22, 7)]),
    "half of a path": made([(2, 4), (7, 8), (11, 6)]),
    "used before": made([(2, 4)], used_before=True),
    "strict": made([(2, 4)], strict=True),
    "agreement": made([(2, 0), (22, 0)], metric="agreement", full_score=1.0),
}
CLUSTERED = replace(CERTIFICATES["half of a path"], steps=(Step(0.9, 1, 1, 0.004, 1.44, certified=True),))


@pytest.mark.parametrize(("kind", "interval"), [*itertools.product(CERTIFICATES, INTERVALS)])
def test_every_sentence_at_the_corners(kind: str, interval: str) -> None:
    certificate, drop = CERTIFICATES[kind], INTERVALS[interval]
    data = report_of(certificate, drop, 0.0 if interval == "full score 0" else 0.9)
    said = [words.meaning(data), *(words.certified(certificate) if certificate else [])]
    for sentence in said:
        assert sentence.endswith(".")
        assert not re.search(r"unlikely|surely|guarantee[^.]|nan|None| 0\.00 points are", sentence)
        assert "[0.0, 0.0]" not in sentence
    promised = certificate is not None and certificate.schedule is not None
    assert ("estimated" in said[0]) == (certificate is None)
    assert any(sentence.startswith("At most ") for sentence in said) == promised
    if interval == "full score 0":
        assert "the drop says nothing" in said[0] or data.headline.full_score
    if certificate is None:
        assert len(said) == 1
    else:  # what a certificate covers is not said of the interval, nor of the calibration set
        assert "allowed" not in said[0].split("only the certificate allows")[0]
        assert "a part in choosing this one" in said[0]
    page, terminal = Page(render(data)).text, io.StringIO()
    Console(file=terminal, width=2000, color_system=None).print(data)
    for sentence in said:
        assert sentence.replace(" points", "") in page.replace("\N{NO-BREAK SPACE}", " ").replace(" points", "")
        assert sentence in terminal.getvalue()


@pytest.mark.parametrize(
    ("certificate", "promise", "evidence"),
    [
        (
            CERTIFICATES["n = 3"],
            "At most 70 points of the score are lost on data like these, with 95 % confidence.",
            "0 losses and 0 wins in 3 examples about 3 images, p = 0.028.",
        ),
        (
            CERTIFICATES["half of a path"],
            "At most 1 point of the score is lost on data like these, with 95 % confidence.",
            "7 losses and 8 wins in 1,152 examples about 1,152 images, p = 0.004.",
        ),
        (
            CERTIFICATES["improvement"],
            "At most 1 point of the score is lost on data like these, with 95 % confidence.",
            "0 losses and 20 wins in 1,152 examples about 1,152 images, p = 0.002.",
        ),
        (
            CERTIFICATES["agreement"],
            "At most 1 % of the answers change on data like these, with 95 % confidence.",
            "2 losses and 0 wins in 1,152 examples about 1,152 images, p = 0.003.",
        ),
        (
            CERTIFICATES["nothing certified"],
            "Nothing is promised but the full model: no schedule of the path could be certified with 95 % confidence.",
            "Tested on 1,152 examples about 1,152 images.",
        ),
        (
            made([(1, 0)], max_drop=0.005, images=1),
            "At most 0.5 points of the score are lost on data like these, with 95 % confidence.",
            "1 loss and 0 wins in 1,152 examples about 1 image, p = 0.023.",
        ),
    ],
)
def test_a_promise_in_words(certificate: Certificate, promise: str, evidence: str) -> None:
    assert words.certified(certificate)[:2] == [promise, evidence]


@pytest.mark.parametrize(
    ("certificate", "caveats"),
    [
        (CERTIFICATES["half of a path"], []),
        (CERTIFICATES["full score 0"], ["The full model scores 0 on these examples"]),
        (CERTIFICATES["used before"], ["These examples had been used for a certificate before"]),
        (CERTIFICATES["strict"], ["One example per image was tested"]),
        (CLUSTERED, ["were divided by the design effect, 1.44."]),
        (replace(CLUSTERED, strict=True, used_before=True), ["used for a certificate before", "One example per image"]),
    ],
)
def test_what_a_reader_has_to_know_beside_it(certificate: Certificate, caveats: list[str]) -> None:
    told = words.certified(certificate)[2:]
    assert "one certificate (docs/guarantee.md)" in told[-1]
    assert len(told) == len(caveats) + 1
    assert all(caveat in sentence for caveat, sentence in zip(caveats, told, strict=False))


def test_a_design_effect_is_told_from_where_it_counts() -> None:
    images = np.arange(600) // 3
    full, reduced = np.ones(600), np.ones(600)
    reduced[:6] = 0
    for groups, told in ((images.tolist(), True), (None, False)):
        step = judge(full, reduced, 0.1, groups=groups)
        certificate = Certificate(PATH, (step,), 600, 200, 0.1, 0.95, 1.0, "f")
        assert any("design effect" in each for each in certificate.caveats) == told == (step.design_effect > 1.1)


@pytest.mark.parametrize("p", [0.0011, 0.0349999, 0.05, 0.0020004, 0.9999])
def test_a_p_value_is_never_printed_smaller_than_it_is(p: float) -> None:
    assert p <= float(shown_p(p)) <= p + 0.001


@pytest.mark.parametrize(
    ("drop", "search", "says"),
    [
        (SMALL, None, "none of up to 100.00 points is ruled out"),
        (LEVEL, None, "none of up to 0.34 points is ruled out"),
        (BETTER, None, "The reduced model does better here, beyond chance"),
        (WORSE, None, "A loss beyond chance"),
        (
            LEVEL,
            d.SearchInfo("G-Search", max_drop=0.01),
            "The whole interval is within the 1.0 points that were allowed.",
        ),
        (SMALL, d.SearchInfo("G-Search", max_drop=0.01), "the interval reaches beyond that."),
    ],
)
def test_what_is_estimated_says_so(drop: Interval, search: d.SearchInfo | None, says: str) -> None:
    said = words.meaning(report_of(None, drop, search=search))
    assert says in said
    assert said.endswith(" What is lost is estimated, not certified.")


def test_agreement_is_told_as_changed_answers() -> None:
    drop = drop_interval(np.ones(100), np.repeat([0.0, 1.0], [2, 98]))
    data = report_of(None, drop, 1.0, dataset=d.DatasetInfo("test", 100, metric="agreement"))
    said = words.meaning(data)
    assert said.startswith("2.0 % of the answers here are not the full model's; up to 7.")
    assert "loss" not in said


def test_the_full_model_loses_nothing() -> None:
    data = report_of(CERTIFICATES["nothing certified"], LEVEL)
    assert words.meaning(data).startswith("Every layer sees every vision token: this is the full model")


def test_a_certificate_of_other_examples_says_so() -> None:
    data = report_of(CERTIFICATES["half of a path"], LEVEL)
    other = replace(data, dataset=d.DatasetInfo("test", 3, fingerprint="another"))
    for each in (other, replace(data, dataset=None)):
        assert words.meaning(each).endswith("The certificate is of other questions than these.")


# -- the certificate's table, and its place in a report ------------------------------------------------------


def test_each_schedule_of_the_path_has_a_row() -> None:
    certificate = made([(2, 4), (24, 7)])
    table = steps_table(certificate, (1.78, 2.7, 3.07))
    assert table.markdown().splitlines()[2:] == [
        "| **62.5 %** | 1.78x | 2 | 4 | 0.002 | certified |",
        "| 43.8 % | 2.70x | 24 | 7 | 1.000 | not certified |",
        "| 34.4 % | 3.07x | | | | not tested |",
    ]
    assert table.notes == ["Not certified at 1 point: 24 losses and 7 wins in 1,152 examples; this schedule loses 1.5."]
    stopped = replace(certificate, steps=(Step(0.8, None, None, None, 1.0, certified=False, complete=False),))
    assert steps_table(stopped).rows[0][1:] == ["\N{EN DASH}"] * 3 + ["stopped, not certified"]
    assert "stopped as soon as" in steps_table(stopped).notes[0]
    assert steps_table(made([(0, 0)] * 3)).notes == []


def test_certificates_show_themselves() -> None:
    certificate = made([(2, 4), (11, 6)])
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(certificate)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    for each in (text, Page(certificate._repr_html_()).text):
        assert "At most 1 point" in each
        assert "not certified" in each
        assert "ffffffffffffffff" in each


def test_a_report_keeps_its_certificate(tmp_path) -> None:
    data = report_of(CERTIFICATES["half of a path"], LEVEL, path_ratios=(1.78, 2.7, 3.07))
    save_report_data(tmp_path, data)
    assert load_report_data(tmp_path) == data
    page = Page(render(data))
    assert {"href": "#promise"} in page.all("a")
    assert "2.70\N{MULTIPLICATION SIGN}" in page.text
    assert "about 3," in page.text
    assert "examples would be needed" in page.text
    assert "#promise" not in render(report_of(None, LEVEL))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: {"path_ratios": (1.0,)}, "path_ratios has 1 ratios for a path of 3"),
        (lambda data: {"path_ratios": (1.0, 2.0, float("inf"))}, "give finite numbers"),
        (lambda data: {"keep_rates": PATH[2].keep_rates}, "certificate is of "),
        (lambda data: {"certificate": CERTIFICATES["nothing certified"]}, "certificate is of 'the full model'"),
        (lambda data: {"certificate": None}, "path_ratios has 3 ratios for a path of 0"),
    ],
)
def test_a_report_of_something_else_is_refused(change: Callable[[d.ReportData], dict[str, object]], says: str) -> None:
    data = report_of(CERTIFICATES["half of a path"], LEVEL, path_ratios=(1.78, 2.7, 3.07))
    with pytest.raises(ThinsightError, match=says):
        replace(data, **change(data))


def test_the_frontier_says_what_became_of_its_points() -> None:
    certificate = made([(2, 4), (22, 7)])
    rows = [d.FrontierRow(each.keep_rates, each.mean_keep_rate, 2.0, 0.9, False) for each in (*PATH, FULL)]
    table = tables.frontier_table(rows, certificate)
    assert [row[4] for row in table.rows] == ["certified", "not certified", "not tested", ""]
    assert len(tables.frontier_table(rows).columns) == len(tables.frontier_table(rows[3:], certificate).columns) == 4


def test_no_text_of_a_certificate_is_markup() -> None:
    data = report_of(made([(2, 4)], fingerprint=EVIL, metric=EVIL), LEVEL)
    page = Page(render(data))
    assert page.open == []
    assert not page.all("script")
    assert page.text.count("<script>alert(") >= 2
