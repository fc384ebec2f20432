"""The paper's claims on a language model that others trained: `demo-smollm2`, whose attention nobody grounded.

`python -m benchmarks.smollm2` runs every part, or continues where it was, and writes benchmarks/results/smollm2.md with
its figures. `--part NAME` runs one part and writes no page, so that several can run side by side; `--page` writes the
page from what is there and says what is not. Nothing on the page is typed by hand: what is lost is printed as lost.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import thinsight as ts
from benchmarks import table
from benchmarks.results import SHOWN, Bench, Scored, interval_words, verdict
from thinsight.budget import fit_rate
from thinsight.certificate import Certificate
from thinsight.errors import Unreachable
from thinsight.evaluation import Evaluation, Interval, RankConsistency
from thinsight.evaluation.base import StandIn
from thinsight.evaluation.examples import Example
from thinsight.evaluation.result import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Measurement
from thinsight.job.compare import compare
from thinsight.job.findings import MedianPrompt, drop_of, task_rows
from thinsight.job.opening import RunFolder, Scores
from thinsight.job.options import CompareOptions, ModelOptions, seeded
from thinsight.loading import DEMOS, load_model
from thinsight.records import write_atomically
from thinsight.report.comparison import OURS, Comparison, draw, markdown, to_csv
from thinsight.report.comparison import table as compared_lines
from thinsight.searches.certify import certify, path_for
from thinsight.searches.priced import priced_search
from thinsight.searches.run import SearchResult
from thinsight.shown import ratio

PAGE = Path(__file__).parent / "results"
MODEL, DTYPE = "demo-smollm2", "bfloat16"
FURTHER = 18  # of the certification questions, to search on as well: 384 + 18 on 134 images
CERTIFYING = 1152  # of the others, to certify on
DROPS = (0.02, 0.01)
SOURCES = ("G-Search", "priced search", "one step at layer 2")  # of paths to certify along
STEP = 32  # of G-Search's counts
TAU_EXAMPLES = 64
ALIKE = 0.6  # Kendall's tau of layers that rank alike
LEAVING = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26)
LADDER = (2, 4, 8, 12)  # layers of the one-step schedules
BUDGETS = (0.25, 0.125, 0.5)  # in the order in which they are run
N_TRIALS = 8
FIRST = ("search-sensitivity", "search-psigmoid", "search-random", "fastv", "fitprune", "divprune", "random")
TIMED_BATCH, TIMED_RUNS = 4, 5
PARTS = ("tau", "gsearch", "priced", "leaving", "ladder", "certify", "transfer", "times", *map(str, BUDGETS), "rest")


class NotRun(Exception):
    """A part of the page that only `--page` lacks."""


class Kept(StandIn):
    """An evaluator that runs a candidate once and on all of its examples: the scores are kept in a folder."""

    def __init__(self, inner: ts.Evaluator, folder: RunFolder, name: str, run: bool = True) -> None:
        super().__init__(inner)
        self.folder, self.name, self.run = folder, name, run

    def __call__(self, candidate: Any, /) -> Evaluation:
        reduction = self.inner.bind(candidate)
        told = json.dumps([reduction.ranker, reduction.schedule.keep_rates], sort_keys=True, default=repr)
        key = f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        found = self.folder.find(key, Scores)
        if found is None:
            evaluation = self.score(reduction)
            assert evaluation.per_example is not None
            found = self.folder.keep(key, Scores(evaluation.score, tuple(evaluation.per_example.tolist())))
            print(f"{self.name}: {reduction.schedule!r} {100 * found.score:.1f} %", flush=True)
        return replace(found.evaluation(), full_score=self.inner.full_score)

    def score(self, candidate: Any) -> Evaluation:
        if not self.run:
            raise NotRun(f"a score on the {self.name} set")
        return self.inner(candidate)

    def at_least(self, candidate: Any, /, floor: float, confidence: float | None = None, seed: int = 0) -> Evaluation:
        return self(candidate)


class Unkept(Kept):
    """For searches, which keep journals of their own."""

    def __call__(self, candidate: Any, /) -> Evaluation:
        return self.score(candidate)

    def at_least(self, candidate: Any, /, floor: float, confidence: float | None = None, seed: int = 0) -> Evaluation:
        if not self.run:
            raise NotRun(f"a score on the {self.name} set")
        return self.inner.at_least(candidate, floor, confidence, seed)

    def sample(self, candidate: Any, /, share: float) -> Evaluation:
        if not self.run:
            raise NotRun(f"a score on the {self.name} set")
        return self.inner.sample(candidate, share)


@dataclass(frozen=True)
class Settings:
    """What is run; a small one tries the script."""

    model: str = MODEL
    dtype: str = DTYPE
    out: Path = Path("out/smollm2")
    limit: int | None = None
    step: int = STEP
    n_trials: int = N_TRIALS
    batch_size: int = 16
    run: bool = True


class Work:
    """The model, its three sets and the folder of what was measured."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.model if settings.model in DEMOS else MODEL  # also of one that lies elsewhere
        self.folder = RunFolder(settings.out / "parts", resume=True)
        self.sets = self._sets()
        self.model, self.processor = load_model(settings.model, settings.dtype)

    def _sets(self) -> dict[str, list[Example]]:
        certification = ts.load_examples("demo:certification")
        found = {
            "search": [*ts.load_examples("demo:calibration"), *certification[-FURTHER:]],
            "certify": certification[:CERTIFYING],
            "test": ts.load_examples("demo:test"),
        }
        return {name: examples[: self.settings.limit] for name, examples in found.items()}

    @cached_property
    def calibration(self) -> Kept:
        return self._evaluator("search", Unkept)

    @cached_property
    def certifying(self) -> Kept:
        return self._evaluator("certify", Kept)

    @cached_property
    def test(self) -> Kept:
        return self._evaluator("test", Kept)

    def _evaluator(self, name: str, kind: type[Kept]) -> Kept:
        settings = self.settings
        evaluator = ts.Evaluator(
            self.model,
            self.processor,
            self.sets[name],
            batch_size=settings.batch_size,
            cache_dir=settings.out / "cache",
            cache_gib=6,
        )
        return kind(evaluator, self.folder, name, settings.run)

    @cached_property
    def prompt(self) -> MedianPrompt:
        return MedianPrompt.of(self.model.config, self.test.prompt_sizes)

    @property
    def depth(self) -> int:
        return int(self.test.num_layers)

    def flops_ratio(self, schedule: ts.Schedule) -> float:
        return self.prompt.flops() / self.prompt.flops(schedule)

    def drop(self, schedule: ts.Schedule) -> tuple[Evaluation, Interval]:
        """The score on the test set, and what is lost."""
        found = self.test(schedule)
        return found, drop_of(self.test.full, found, self.test.examples)

    # -- the parts -------------------------------------------------------------------------------------------

    def tau(self, name: str) -> RankConsistency:
        """Of this model, or of "demo"."""

        def run() -> RankConsistency:
            self.must_run("Kendall's tau")
            model, processor = (self.model, self.processor) if name == "this" else ts.load_demo(name=name)
            return ts.rank_consistency(model, processor, self.sets["test"][:TAU_EXAMPLES])

        return self.folder.once(f"tau-{name}", RankConsistency, run)

    def must_run(self, what: str) -> None:
        if not self.settings.run:
            raise NotRun(what)

    def leaving(self) -> list[tuple[int, Evaluation, Interval]]:
        """No vision token from a layer on; each run begins where the one before ended."""
        found = []
        for layer in (layer for layer in LEAVING if layer < self.depth):
            self.test.share(ts.Schedule.full(self.depth), layer)
            found.append((layer, *self.drop(ts.Schedule.step(self.depth, layer, 0.0))))
        self.test.share(ts.Schedule.full(self.depth), 0)
        return found

    def gsearch(self, max_drop: float) -> SearchResult:
        journal = self.folder.path / f"gsearch-{max_drop:g}.jsonl"
        return ts.gsearch(self.calibration, max_drop, step=self.settings.step, study=journal, resume=True)

    def ladder(self, schedule: ts.Schedule) -> list[tuple[int, ts.Schedule]]:
        """One step each at several layers, of a schedule's FLOPs."""
        budget, found = self.prompt.budget(schedule), []
        for layer in LADDER:
            try:
                rate = fit_rate(budget, partial(ts.Schedule.step, self.depth, layer))
            except Unreachable:
                continue  # what comes before this layer costs more
            found.append((layer, ts.Schedule.step(self.depth, layer, rate)))
        return found

    def ladders(self) -> Iterator[tuple[float, int, ts.Schedule]]:
        """Those of each schedule that G-Search found: what it was allowed, the layer, the step."""
        for drop in DROPS:
            yield from ((drop, *rung) for rung in self.ladder(self.gsearch(drop).schedule))

    def priced(self, max_drop: float) -> SearchResult:
        journal = self.folder.path / f"priced-{max_drop:g}.jsonl"
        return priced_search(self.calibration, max_drop, study=journal, resume=True)

    def found(self, source: str, max_drop: float) -> SearchResult | None:
        """What the search of one of `SOURCES` found; None: it is no search."""
        search = {"G-Search": self.gsearch, "priced search": self.priced}.get(source)
        return None if search is None else search(max_drop)

    def certificate(self, source: str, max_drop: float) -> Certificate:
        """Along the path of one of `SOURCES`."""
        found = self.found(source, max_drop)
        path = path_for(self.calibration.inner, found)
        first = min(i for each in path for i, rate in enumerate(each.keep_rates) if rate < 1)
        self.certifying.share(ts.Schedule.full(self.depth), first)
        certificate = certify(path, self.certifying, max_drop)
        print(f"{source}, {max_drop:g}: {certificate!r}", flush=True)
        return certificate

    def certificates(self) -> list[Certificate]:
        return [self.certificate(source, drop) for drop in DROPS for source in SOURCES]

    def measured(self, name: str, schedule: ts.Schedule, dtype: str) -> Measurement:
        def run() -> Measurement:
            self.must_run("times")
            model = self.model
            if dtype != self.settings.dtype:
                model, _ = load_model(self.settings.model, dtype)
            batch = self.test.reader.typical_batch(self.sets["test"], TIMED_BATCH)
            return ts.timing.measure(model, batch, schedule, runs=TIMED_RUNS, warmup=1)

        return self.folder.once(f"times-{name}-{dtype}", Measurement, run)

    # -- every method at equal cost --------------------------------------------------------------------------

    def comparison(self, budget: float, methods: Sequence[str] = SHOWN) -> Comparison:
        settings = self.settings
        files = {name: self._file(name) for name in ("search", "test")}
        options = CompareOptions(
            model=ModelOptions(settings.model, settings.dtype),
            data=str(files["search"]),
            test_data=str(files["test"]),
            n_trials=settings.n_trials,
            budgets=(budget,),
            methods=tuple(methods),
            batch_size=settings.batch_size,
            cache_dir=settings.out / "cache",
            out=settings.out / "compare",
            resume=True,
        )
        return compare(options).comparison

    def compared(self) -> Comparison:
        """Of what is done; each budget's methods as far as they have been run."""
        found = []
        for budget in BUDGETS:
            done = [name for name in SHOWN if self.is_done(budget, name)]
            if done:
                found.append(self.comparison(budget, done if not self.settings.run else SHOWN))
        if not found:
            raise NotRun("the comparison at equal cost")
        return replace(found[0], runs=tuple(run for each in found for run in each.runs))

    def is_done(self, budget: float, name: str) -> bool:
        if self.settings.run:
            return True
        key = f"keep-{budget:g}-{name}" + ("-seed0" if seeded(name) else "")
        stages = self.settings.out / "compare" / "stages"
        found = stages / f"found-{key}.json"
        return (stages / f"test-{key}.json").exists() or (
            found.exists() and bool(json.loads(found.read_text())["refused"])
        )

    def _file(self, name: str) -> Path:
        """A set as a file, which a comparison takes."""
        path = self.settings.out / f"{name}.jsonl"
        lines = [
            {
                "id": each.id,
                "image": str(each.images[0]),
                "question": each.question,
                "answers": list(each.answers),
                "task": each.task,
            }
            for each in self.sets[name]
        ]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        return path


# -- the page ------------------------------------------------------------------------------------------------


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines]]


def allowed(drop: float) -> str:
    """ "1 point", "2 points"."""
    return f"{100 * drop:g} point{'' if drop == 0.01 else 's'}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


class Page:
    """What is said of a model, section by section."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder
        self.missing: list[str] = []
        self.claims: list[str] = []

    def section(self, title: str, lines: Callable[[], list[str]]) -> list[str]:
        """A section, or that it has not been run."""
        try:
            found = lines()
        except NotRun:
            self.missing.append(title)
            found = ["Not run."]
        return ["", f"## {title}", "", *found]

    @cached_property
    def certificates(self) -> dict[tuple[str, float], Certificate]:
        found = {}
        for drop in DROPS:
            for source in SOURCES:
                try:
                    found[source, drop] = self.work.certificate(source, drop)
                except NotRun:
                    self.missing.append(f"certificate of {allowed(drop)} along {source}")
        return found

    def claim(self, holds: bool, text: str, whole: bool = True) -> None:
        """A claim with its verdict; a part of what it is about, such as some of the methods, only shows so far."""
        words = verdict(holds) if whole or not holds else "**Holds so far.**"
        self.claims.append(f"- {words} {text}")

    def text(self) -> str:
        parts: list[str] = []
        parts += self.section("The model", self.model)
        parts += self.section("Layers rank alike (Figure 1)", self.tau)
        parts += self.section("All vision tokens leave at layer l", self.leaving)
        parts += self.section("G-Search", self.gsearch)
        parts += self.section("Who lays the path that is certified", self.certified)
        parts += self.section("Several steps against one, at equal FLOPs", self.ladder)
        parts += self.section("Every method at equal cost", self.compared)
        parts += self.section("Measured times", self.times)
        parts += self.section("Schedules transfer (Table 4)", self.transfer)
        parts += self.section("Fine-tuning with the reduction switched on (Table 5)", self.finetuned)
        settings = self.work.settings
        where = table.about(torch.device("cpu"))
        sizes = {name: f"{len(examples):,}" for name, examples in self.work.sets.items()}
        head = [
            f"# Results on {self.work.name}",
            "",
            f"Made by `make smollm2` on {datetime.now(timezone.utc):%Y-%m-%d}: {where['machine']}, torch "
            f"{where['torch']}, transformers {where['transformers']}; weights and activations in {settings.dtype}, and "
            f"each schedule is judged against the full model in {settings.dtype}. Searches choose on "
            f"{sizes['search']} questions (the calibration set and {FURTHER} of the certification set), certificates "
            f"are given on {sizes['certify']} others, and scores are on the test set's {sizes['test']}, which has no "
            "part in either. Intervals: 95 %, of paired scores by image. FLOPs: decoder prefill of the median prompt, "
            "full over reduced.",
            "",
            "## Which claims hold",
            "",
            *self.claims,
        ]
        lacking = ["", "Not run so far, and nothing is said of it:", "", *(f"- {each}" for each in self.missing)]
        return "\n".join([*head, *(lacking if self.missing else []), *parts]) + "\n"

    # -- sections --------------------------------------------------------------------------------------------

    def model(self) -> list[str]:
        full = self.work.test.full
        tasks = task_rows(full, full, self.work.test.examples)
        return [
            f"{self.work.depth} layers, {self.work.prompt.n_vision} vision tokens and {self.work.prompt.n_text} others "
            f"in the median prompt, {self.work.prompt.flops() / 1e9:.1f} decoder GFLOPs. The full model gets "
            f"{percent(full.score)} % of the test set right.",
            "",
            *rows(["task", *(each.task for each in tasks)], [["%", *(percent(each.full) for each in tasks)]]),
        ]

    def tau(self) -> list[str]:
        found = {self.work.name: self.work.tau("this"), "demo": self.work.tau("demo")}
        self.draw_tau(found)
        mine = found[self.work.name]
        self.claim(
            bool(min(mine.tau[1:]) >= ALIKE),
            "Layers rank vision tokens alike from the second layer on (the paper's decoders: Kendall's tau of 0.68 and "
            f"more between all neighbours; held to {ALIKE}): {min(mine.tau[1:]):.2f} to {max(mine.tau[1:]):.2f}, "
            f"median {mine.typical_tau:.2f}.",
        )
        self.claim(
            bool(mine.tau[0] < mine.typical_tau),
            f"The first layer ranks otherwise than those behind it: {mine.tau[0]:.2f} between layers 0 and 1, median "
            f"behind {mine.typical_tau:.2f}.",
        )
        lines = []
        for name, each in found.items():
            values = " ".join(f"{value:.2f}" for value in each.tau)
            lines.append([name, values, f"{each.typical_tau:.2f}", f"{100 * each.typical_overlap:.0f} %"])
        return [
            f"Kendall's tau-b of the text attention's rankings of neighbouring layers, mean of {mine.examples} "
            "prompts.",
            "",
            "![Kendall's tau by layer](smollm2-tau.png)",
            "",
            *rows(["model", "layers 0-1, 1-2, ...", "median from 1-2 on", "shared of the best quarter"], lines),
        ]

    def draw_tau(self, found: dict[str, RankConsistency]) -> None:
        figure, axes = new_figure("layer", "Kendall's tau with the next layer")
        for (name, each), marker in zip(found.items(), "os", strict=False):
            axes.plot(range(len(each.tau)), each.tau, marker=marker, markersize=4, label=name)
        axes.set_ylim(0, 1)
        save_figure(figure, axes, self.folder / "smollm2-tau.png")

    def leaving(self) -> list[str]:
        found = self.work.leaving()
        lines = [
            [
                str(layer),
                percent(scored.score),
                interval_words(drop),
                ratio(self.work.flops_ratio(step(self.work, layer))),
            ]
            for layer, scored, drop in found
        ]
        figure, axes = new_figure("layer from which on there is no vision token", "score on the test set (%)")
        axes.plot([layer for layer, *_ in found], [100 * scored.score for _, scored, _ in found], marker="o")
        axes.axhline(100 * self.work.test.full_score, color="0.6", linestyle="--", label="full model")
        save_figure(figure, axes, self.folder / "smollm2-leaving.png")
        free = [layer for layer, _, drop in found if drop.mean <= 0.01]
        self.claim(
            bool(free and free[0] <= self.work.depth * 0.6),
            "Deep layers need no vision token: "
            + (f"without any from layer {free[0]} on" if free else "at no layer where all were dropped is")
            + (" at most 1 point is lost" if free else " the loss within 1 point")
            + f" (of {self.work.depth}; the paper's G-Search keeps 8 % and less from layer 20 of 32 on; held to 60 "
            "% of the depth).",
        )
        return [
            "![Score by leaving layer](smollm2-leaving.png)",
            "",
            *rows(["layer l", "score", "drop [95 %]", "FLOPs"], lines),
        ]

    def gsearch(self) -> list[str]:
        lines = []
        for drop in DROPS:
            try:
                lines.append(self._gsearch(drop))
            except NotRun as reason:
                self.missing.append(f"G-Search at {allowed(drop)} ({reason})")
        if not lines:
            raise NotRun("both tolerances")
        heads = [
            "points allowed", "tokens per layer", "evaluations", "mean keep rate (%)", "score", "drop [95 %]", "FLOPs",
            "certified FLOPs",
        ]  # fmt: skip
        return [f"Counts in multiples of {self.work.settings.step}, from layer 2 on.", "", *rows(heads, lines)]

    def _gsearch(self, drop: float) -> list[str]:
        found, certificate = self.work.gsearch(drop), self.certificates.get(("G-Search", drop))
        scored, lost = self.work.drop(found.schedule)
        reached = self.work.flops_ratio(found.schedule)
        self.claim(
            bool(reached >= 2 and lost.mean <= drop),
            f"G-Search allowed {allowed(drop)} needs at least 2x fewer FLOPs and loses no more on the test "
            f"set: {ratio(reached)}, {interval_words(lost)}.",
        )
        if certificate is not None:
            schedule = certificate.schedule
            self.claim(
                schedule is not None and self.work.flops_ratio(schedule) >= 2,
                f"At least 2x is certified along G-Search's path ({allowed(drop)}, 95 % confidence, "
                f"{certificate.n:,} questions): {told(self.work, certificate)}.",
            )
        return [
            f"{100 * drop:g}",
            ", ".join(counted(found.schedule, self.work.prompt.n_vision)),
            f"{found.evaluations:.0f}",
            percent(found.schedule.mean_keep_rate),
            percent(scored.score),
            interval_words(lost),
            ratio(reached),
            told(self.work, certificate),
        ]

    def certified(self) -> list[str]:
        lines = [self._certified(source, drop) for drop in DROPS for source in SOURCES]
        if not self.certificates:
            raise NotRun("certificates")
        heads = ["path", "points", "found", "evaluations", "certified", "losses / wins", "failed at: losses / wins"]
        return [
            "The same exact test along paths from three sources, from costly to cheap to the first that fails. *Priced "
            "search*: steps at seven layers on an eighth of the search questions say what each band of tokens is worth "
            "at each layer; for every cost the schedule that should lose least, bisected on all search questions. "
            "*Found*: FLOPs of the schedule that a search found within the tolerance on its questions.",
            "",
            *rows(heads, lines),
        ]

    def _certified(self, source: str, drop: float) -> list[str]:
        try:
            found = self.work.found(source, drop)
            searched = ["", ""]
            if found is not None:
                searched = [ratio(self.work.flops_ratio(found.schedule)), f"{found.evaluations:.0f}"]
        except NotRun:
            searched = ["not run", ""]
        certificate = self.certificates.get((source, drop))
        line = [source, f"{100 * drop:g}", *searched, told(self.work, certificate)]
        if certificate is None:
            return [*line, "", ""]
        failed, ended = certificate.failed, f"none, to {ratio(max(map(self.work.flops_ratio, certificate.path)))}"
        if failed is not None:
            tried = ratio(self.work.flops_ratio(certificate.path[len(certificate.steps) - 1]))
            ended = f"{tried}: {failed.losses} / {failed.wins}"
        return [*line, f"{certificate.losses} / {certificate.wins}", ended]

    def ladder(self) -> list[str]:
        lines: list[list[str]] = []
        for drop in DROPS:
            try:
                lines += self._ladder(drop)
            except NotRun as reason:
                self.missing.append(f"one step at the FLOPs of G-Search, {allowed(drop)} ({reason})")
        if not lines:
            raise NotRun("one-step schedules at equal FLOPs")
        return rows(["schedule", "tokens", "mean keep rate (%)", "FLOPs", "score", "several minus this [95 %]"], lines)

    def _ladder(self, drop: float) -> list[list[str]]:
        found = self.work.gsearch(drop).schedule
        several, _ = self.work.drop(found)
        name = f"G-Search, {allowed(drop)}"
        lines, gaps = [self._step_line(name, found, several, "")], []
        for layer, one in self.work.ladder(found):
            try:
                scored, _ = self.work.drop(one)
            except NotRun:
                self.missing.append(f"one step at layer {layer} at the FLOPs of {name}")
                continue
            gaps.append((drop_of(several, scored, self.work.test.examples), layer))
            lines.append(self._step_line(f"one step at layer {layer}", one, scored, interval_words(gaps[-1][0])))
        if gaps:
            best, layer = min(gaps, key=lambda each: each[0].mean)
            sure = "" if best.high <= 0 else ", beyond chance" if best.low > 0 else ", not beyond chance"
            self.claim(
                best.mean > 0,
                f"At the FLOPs of {name}, several steps beat the best one step (at layer {layer}; tried: "
                f"{', '.join(str(tried) for _, tried in sorted(gaps, key=lambda gap: gap[1]))}): "
                f"{interval_words(best)} points{sure}.",
                whole=len(gaps) == len(self.work.ladder(found)),
            )
        return lines

    def _step_line(self, name: str, schedule: ts.Schedule, scored: Evaluation, gap: str) -> list[str]:
        counts = ", ".join(counted(schedule, self.work.prompt.n_vision))
        flops = ratio(self.work.flops_ratio(schedule))
        return [name, counts, percent(schedule.mean_keep_rate), flops, percent(scored.score), gap]

    def compared(self) -> list[str]:
        comparison = self.work.compared()
        for budget in BUDGETS:
            lacking = [name for name in SHOWN if not self.work.is_done(budget, name)]
            if lacking:
                names = "all methods" if len(lacking) == len(SHOWN) else ", ".join(lacking)
                self.missing.append(f"at {100 * budget:g} %: {names}")

        write_atomically(self.folder / "smollm2.csv", to_csv(comparison))
        draw(comparison, self.folder / "smollm2.png")
        at = {(line.budget, line.method): line for line in compared_lines(comparison) if not line.refused}
        for budget in sorted({budget for budget, _ in at}, reverse=True):
            here = {method: line for (b, method), line in at.items() if b == budget}
            ours, sigmoid, fastv = here.get(OURS), here.get("psigmoid"), here.get("fastv")
            if ours is not None:
                above = [each for each in here.values() if each.behind is not None and each.behind.high < 0]
                names = ", ".join(f"{each.title} {percent(each.score)}" for each in above)
                self.claim(
                    not above,
                    f"At {100 * budget:g} % no other method is above the sensitivity search beyond chance: "
                    f"{percent(ours.score)}{'; above it: ' + names if names else ''}.",
                    whole=all(self.work.is_done(budget, name) for name in SHOWN),
                )
            if sigmoid is not None and fastv is not None:
                self.claim(
                    sigmoid.score > fastv.score,
                    f"P-Sigmoid beats FastV at {100 * budget:g} %: {percent(sigmoid.score)} against "
                    f"{percent(fastv.score)}.",
                )
        return [
            f"{comparison.n_trials} evaluations of each search, seed 0; otherwise as on [the page of the embedded "
            "models](README.md).",
            "",
            "![Score against FLOPs](smollm2.png)",
            "",
            markdown(comparison),
        ]

    def times(self) -> list[str]:
        lines = []
        for name, dtype, found in timings(self.work):
            for what in (PREFILL, PREFILL_WITH_IMAGES, ANSWER):
                timing = found.timing(what)
                lines.append(
                    [name, dtype, what, f"{timing.full_ms:.0f}", f"{timing.reduced_ms:.0f}", f"{timing.ratio:.2f}x"]
                )
        head = f"Batches of {TIMED_BATCH}, two threads, medians of {TIMED_RUNS} runs; a whole answer has 16 tokens."
        return [head, "", *rows(["schedule", "dtype", "", "full (ms)", "reduced (ms)", ""], lines)]

    def transfer(self) -> list[str]:
        return transfer_lines(self.work, self.claim)

    def finetuned(self) -> list[str]:
        found = self.folder / "finetune.json"
        if not found.exists():
            raise NotRun("benchmarks/finetune.py")
        from benchmarks.finetune import lines

        told_lines, holds, text = lines(found)
        self.claim(holds, text)
        return told_lines


def step(work: Work, layer: int) -> ts.Schedule:
    return ts.Schedule.step(work.depth, layer, 0.0)


def counted(schedule: ts.Schedule, n_vision: int) -> list[str]:
    """ "256 x2, 160 x4", shallow to deep."""
    counts = schedule.counts(n_vision)
    return [f"{counts[first]} x{last - first + 1}" for first, last, _ in schedule.runs()]


def told(work: Work, certificate: Certificate | None) -> str:
    if certificate is None:
        return "not run"
    return "1.00x (full model)" if certificate.schedule is None else ratio(work.flops_ratio(certificate.schedule))


def new_figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    return figure, axes


def save_figure(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    write_atomically(path, buffer.getvalue())


def timings(work: Work) -> Iterator[tuple[str, str, Measurement]]:
    for drop in DROPS:
        for dtype in dict.fromkeys((work.settings.dtype, "float32")):
            found = work.measured(f"{drop:g}", work.gsearch(drop).schedule, dtype)
            yield f"G-Search, {allowed(drop)}", dtype, found


# -- Table 4 -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A schedule that a search found."""

    keep_rates: tuple[float, ...]


def transfer_lines(work: Work, claim: Callable[[bool, str], None]) -> list[str]:
    """The demo's schedule at this depth, and this model's at the demo's, both of G-Search at the least drop."""
    demo, drop = Bench("demo", work.settings.out / "demo"), min(DROPS)
    mine = work.gsearch(drop).schedule

    def search() -> Found:
        journal = work.folder.path / "gsearch-demo.jsonl"
        found = ts.gsearch(demo.calibration, drop, step=STEP, study=journal, resume=True)
        return Found(found.schedule.keep_rates)

    def on_demo(what: str, schedule: ts.Schedule) -> Scored:
        key = f"{what} at {drop:g}"
        if demo.folder.find(key, Scored) is None:
            work.must_run("the schedule on the demo")
        return demo.score(key, ts.Reduction(schedule))

    if work.folder.find("gsearch-demo", Found) is None:
        work.must_run("the demo's schedule")
    theirs = ts.Schedule(work.folder.once("gsearch-demo", Found, search).keep_rates)
    lines, worse = [], []
    for name, own, other in ((work.name, mine, theirs), ("demo", theirs, mine)):
        for what, schedule in (("its own", own), ("the other's", other.resample(own.num_layers))):
            if name == "demo":
                scored = on_demo(what, schedule)
                score, lost, reached = scored.score, Interval(scored.drop, scored.low, scored.high), scored.flops_ratio
            else:
                found, lost = work.drop(schedule)
                score, reached = found.score, work.flops_ratio(schedule)
            worse.append((score, reached))
            lines.append(
                [name, what, percent(schedule.mean_keep_rate), percent(score), interval_words(lost), ratio(reached)]
            )
    claim(
        worse[1][0] <= worse[0][0] and worse[3][0] <= worse[2][0],
        "A schedule of another model loses a little against the model's own: "
        + "; ".join(
            f"{lines[place][0]} {percent(worse[place][0])} at {ratio(worse[place][1])} with its own, "
            f"{percent(worse[place + 1][0])} at {ratio(worse[place + 1][1])} with the other's"
            for place in (0, 2)
        )
        + ".",
    )
    heads = [
        "model",
        f"G-Search's schedule ({100 * drop:g} point)",
        "mean keep rate (%)",
        "score",
        "drop [95 %]",
        "FLOPs",
    ]
    return rows(heads, lines)


# -- the command ---------------------------------------------------------------------------------------------


def run_part(work: Work, part: str) -> None:
    """One of `PARTS`, which keeps what it finds."""
    if part.replace(".", "").isdigit():
        work.comparison(float(part), FIRST)
        return
    parts: dict[str, Callable[[], Any]] = {
        "tau": lambda: [work.tau("this"), work.tau("demo")],
        "gsearch": lambda: [work.drop(work.gsearch(drop).schedule) for drop in DROPS],
        "leaving": work.leaving,
        "ladder": lambda: [work.drop(one) for _, _, one in work.ladders()],
        "certify": work.certificates,
        "priced": lambda: [print(work.priced(drop), flush=True) for drop in DROPS],
        "transfer": lambda: transfer_lines(work, lambda holds, text: None),
        "times": lambda: list(timings(work)),
        "rest": lambda: [work.comparison(budget) for budget in BUDGETS],
    }
    parts[part]()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default=DTYPE)
    parser.add_argument("--out", type=Path, default=Settings.out)
    parser.add_argument("--page", action="store_true", help="write the page from what is there, run nothing")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="run these parts and write no page")
    parser.add_argument("--limit", type=int, help="so many questions of each set, to try the script")
    parser.add_argument("--results", type=Path, default=PAGE, help="folder of the page")
    given = parser.parse_args(argv)
    settings = Settings(given.model, given.dtype, given.out, given.limit, run=not given.page)
    work = Work(settings)
    if given.part:
        for part in given.part:
            run_part(work, part)
            print(f"done: {part}", flush=True)
        return
    given.results.mkdir(parents=True, exist_ok=True)
    page = given.results / "smollm2.md"
    write_atomically(page, Page(work, given.results).text())
    print(f"Written: {page}")


if __name__ == "__main__":
    main()
