"""A made-up report for the tests of this folder: no number in it was measured. Knows nothing about models."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from thinsight.evaluation.result import RankConsistency, Timing
from thinsight.report import data as d
from thinsight.schedule import Schedule
from thinsight.searches.run import Trial


def _scene(place: int, size: int = 256) -> Image.Image:
    """A picture with a few shapes on a smooth or a noisy ground."""
    rng = np.random.default_rng(place)
    ramp = np.linspace(60, 220, size)[:, None, None] * np.array([0.6, 0.8, 1.0]) * np.ones((1, size, 1))
    ground = ramp + rng.normal(0, 18, (size, size, 3)) if place % 2 else np.full((size, size, 3), 245.0)
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(image)
    for k, color in enumerate(("#d33", "#2a6", "#36c", "#e90")):
        x, y = rng.integers(10, size - 80, 2)
        box = (int(x), int(y), int(x) + 60, int(y) + 60)
        draw.ellipse(box, fill=color) if k % 2 else draw.rectangle(box, fill=color)
    return image


def _picture(place: int, rates: tuple[float, ...], layers: tuple[int, ...], side: int) -> d.Picture:
    """Tokens near the middle of one shape stay longest, so the sets are nested."""
    rng = np.random.default_rng(100 + place)
    rows, columns = np.divmod(np.arange(side * side), side)
    center = rng.integers(3, side - 3, 2)
    distance = np.hypot(rows - center[0], columns - center[1]) + rng.normal(0, 1.6, side * side)
    order = np.argsort(distance)
    kept = [order[: math.ceil(rates[layer] * side * side)] for layer in layers]
    questions = ("What color is the square?", "How many shapes are there?", "Is the circle left of the square?")
    answers = ("red", "4", "yes")
    reduced = "no" if place == 2 else answers[place % 3]
    return d.Picture(
        _scene(place), (side, side), kept, layers, questions[place % 3], answers[place % 3], reduced, answers[place % 3]
    )


def make_report(layers: int = 16, side: int = 16, pictures: int = 3) -> d.ReportData:
    """A complete report: every part present, every optional number given."""
    rng = np.random.default_rng(0)
    i = np.arange(layers)
    smooth = 1 / (1 + np.exp(0.55 * (i - 0.3 * layers)))
    rates = tuple(np.round(np.where(i < 2, 1.0, np.minimum.accumulate(smooth * 0.82)) * side**2) / side**2)
    rates = tuple(float(r) for r in rates)
    mean = sum(rates) / layers
    flops_full, flops = 2.61e10, 2.61e10 / 2.634
    drop = d.Interval(0.0034, -0.0041, 0.0103)

    def method(name: str, keep: object, loss: float, kind: str = "baseline", note: str = "") -> d.MethodRow:
        gap = d.Interval(loss, loss - 0.0075 - loss / 8, loss + 0.0071 + loss / 8)
        cost = flops * (1 + 0.002 * len(name) / 20)
        return d.MethodRow(name, keep, 0.941 - loss, gap, mean, cost, flops_full / cost, note, kind)

    step = Schedule.step(layers, 2, 0.25).keep_rates
    methods = (
        d.MethodRow("full", Schedule.full(layers).keep_rates, 0.941, None, 1.0, flops_full, 1.0, "", "full"),
        method("G-Search", rates, 0.0034, "found", "text attention"),
        method("FastV-like", step, 0.0412, note="one step at layer 2, text attention"),
        method("random", rates, 0.1180, note="the same schedule, random tokens"),
        method("uniform", rates, 0.0630, note="the same schedule, evenly spread tokens"),
        method("downsampling", (), 0.0890, note="a smaller image, all layers"),
    )
    tasks = ("color of a shape", "position", "counting", "relation", "reading a number", "handwriting", "bar chart")
    full = (0.995, 0.98, 0.93, 0.951, 0.902, 0.881, 0.948)
    trials = []
    for layer in range(2, layers):
        for keep in (rates[layer] * 0.8, rates[layer]):
            ok = keep == rates[layer]
            count = math.ceil(keep * side**2)
            score = 0.9375 if ok else 0.9245
            tried = Schedule((*rates[:layer], *[keep] * (layers - layer)))
            trials.append(Trial(layer, keep, count, score, ok, ok, tried, seconds=1.7 + 0.01 * layer))
    tau = tuple(np.clip(0.78 + 0.06 * np.sin(i[1:]) - 0.55 * (i[1:] == 1) + rng.normal(0, 0.01, layers - 1), -1, 1))
    far = np.abs(i[:, None] - i[None, :])
    matrix = np.clip(0.95 ** (2.4 * far) - 0.5 * ((i[:, None] == 0) ^ (i[None, :] == 0)), -1, 1)
    shown = tuple(sorted({2, layers // 4, layers // 3, layers // 2, layers - 1}))
    return d.ReportData(
        title="G-Search on the demo model",
        model=d.ModelInfo("thinsight demo", "llava", "float32", "cpu (2 threads)", "sdpa", 14_200_000, layers, side**2),
        dataset=d.DatasetInfo(
            "demo:test", 1024, "demo:calibration", 384, "exact match", "sha256:7f3a9c", "sha256:12be44"
        ),
        headline=d.Headline(
            0.941, 0.9376, drop, mean, 2.634, 2.91, 1.912, 1.214, flops_full, flops_full / 2.634, 6.7e9
        ),
        search=d.SearchInfo("G-Search", 0.01, "bisect", "text-attention (instruction)", 0, 96, 148.0, 0.944, 0.9375),
        keep_rates=rates,
        methods=methods,
        per_task=tuple(
            d.TaskRow(name, 146 + place, score, score - 0.002 * place)
            for place, (name, score) in enumerate(zip(tasks, full, strict=True))
        ),
        timing=(
            Timing("prefill", (412.7,) * 7, (215.8,) * 7, 8),
            Timing("whole answer", (633.2,) * 7, (521.6,) * 7, 8),
        ),
        trials=tuple(trials),
        consistency=RankConsistency(
            np.array(tau), matrix, np.clip(np.array(tau) + 0.08, 0, 1), np.full(layers, 0.013), 0.25, 64
        ),
        pictures=tuple(_picture(place, rates, shown, side) for place in range(pictures)),
        environment={"thinsight": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "processor": "2 cores"},
        commands=("thinsight search --max-drop 0.01 --out runs/demo", "thinsight report runs/demo"),
        created="2026-01-31 12:00 UTC",
    )


def with_changes(report: d.ReportData, worse: int = 3, better: int = 2, text: str = "") -> d.ReportData:
    """The report with so many changed answers in its table, and with pictures of both outcomes and of neither."""

    def row(place: int) -> d.ChangedAnswer:
        full, reduced = (1.0, 0.25) if place < worse else (0.5, 1.0)
        question = text or f"Is the text of page {place} longer than the one that stands beside it?"
        said = (text or "forty two", text or "42", text or "a table of numbers that goes on and on " * (place % 3))
        return d.ChangedAnswer(text or f"page/{place}", question, *said, full, reduced, text or "reading a number")

    rows = [row(place) for place in range(min(worse + better, d.MOST_CHANGED))]
    outcomes = ("worse", "better", "same")
    pictures = [replace(each, outcome=outcomes[place % 3]) for place, each in enumerate(report.pictures)]
    return replace(report, changes=d.Changes(1024, worse, better, tuple(rows)), pictures=tuple(pictures))


def alike(tau: tuple[float, ...], matrix: object = None, **parts: object) -> RankConsistency:
    """Rank consistency with these taus, and something to go with them."""
    layers = len(tau) + 1
    rest = {"topk_overlap": np.full(layers - 1, 0.6), "tied_share": np.zeros(layers), **parts}
    return RankConsistency(
        np.array(tau), np.eye(layers) if matrix is None else matrix, **rest, top_rate=0.25, examples=3
    )


@pytest.fixture(scope="session")
def report() -> d.ReportData:
    return make_report()


@pytest.fixture(scope="session")
def bare_report() -> d.ReportData:
    """The least a report can hold."""
    return d.ReportData("Bare", d.ModelInfo("some/model"))
