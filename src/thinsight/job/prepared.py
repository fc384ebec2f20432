"""What a run on two sets begins with: a folder, data, a model, and one evaluator for each set.

One set is to choose on, the other to prove it on. Opens them in the order that finds mistakes soonest. Knows
nothing about what is searched or compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.batch_size import AUTO
from ..evaluation.evaluator import Evaluator, check_metric
from ..progress import Watcher
from ..reduction import Reduction
from ..searches.study import searchable_score
from .results import MedianPrompt
from .run_folder import RunFolder
from .scoring import Scores, ScoringOptions, make_evaluator
from .session import DEFAULT_OUT, ModelOptions, Opened, Sets, check_sources, load_sets, open_model

__all__ = ["Prepared", "RunOptions", "prepare"]


@dataclass(frozen=True)
class RunOptions(ScoringOptions):
    """What `thinsight search` and `thinsight compare` are both told. ``data`` None is the demo's; see
    `session.load_sets` for the sets."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = None
    test_data: str | None = None
    limit: int | None = None
    out: Path = DEFAULT_OUT
    resume: bool = False

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        super().check()
        check_sources(self.data, self.test_data)


@dataclass(frozen=True)
class _BatchSize:
    """How many prompts of a set fit into memory at once, as the run folder keeps it."""

    size: int


@dataclass(frozen=True)
class Prepared:
    """A run's folder, data, model and evaluators, opened and checked."""

    batch_size: int | str
    watcher: Watcher
    folder: RunFolder
    sets: Sets
    opened: Opened
    calibration: Evaluator
    test: Evaluator

    @property
    def prompt(self) -> MedianPrompt:
        """The prompt whose cost stands for the test set."""
        return MedianPrompt.of(self.opened.model.config, self.test.prompt_sizes)

    def check_full_score(self, *evaluators: Evaluator) -> None:
        """Refuse a full model that scores 0 while the folder is not yet bound to its labels and metric.

        A run that is continued is checked where its search begins.

        Raises:
            ThinsightError: it does; the message has an answer beside its label.
        """
        if not self.folder.begun:
            self.watcher.on_stage("Scoring the full model")
            for evaluator in evaluators:
                searchable_score(evaluator)

    def fix_batch_size(self, which: str) -> int:
        """The batch size of a set, found or halved once, so that a resumed run has the same batches.

        To be called before anything is evaluated on the set.

        Args:
            which: "calibration" or "test".
        """
        evaluator = {"calibration": self.calibration, "test": self.test}[which]

        def find() -> _BatchSize:
            found = _BatchSize(evaluator.fix_batch_size())
            if self.batch_size == AUTO:
                self.watcher.on_note(f"The {which} set runs in batches of {found.size} prompts")
            return found

        kept = self.folder.once(f"batches-{self.batch_size}-{which}", _BatchSize, find)
        return evaluator.fix_batch_size(kept.size)

    def test_scores(self, stage: str, reduction: Reduction | None) -> Scores:
        """Scores on the test set, computed once per stage of the folder; None is the full model."""

        def run() -> Scores:
            self.fix_batch_size("test")
            if reduction is None:
                return Scores.of(self.test.full, self.test.doubt)
            return Scores.of(self.test(reduction))

        return self.folder.once(stage, Scores, run)


def prepare(options: RunOptions, ranker: Any, watcher: Watcher) -> Prepared:
    """Open everything a run on two sets needs, cheapest first.

    Args:
        options: of the run.
        ranker: which tokens a bare schedule keeps.
        watcher: told what is being done.

    Raises:
        ThinsightError: bad options or data, a model that cannot be run, or a folder that holds another run.
    """
    options.check()
    folder = RunFolder(options.out, resume=options.resume)
    watcher.on_stage("Reading the data")
    sets = load_sets(options.data, options.test_data, options.limit, watcher.on_progress)
    if sets.note:
        watcher.on_note(sets.note)
    check_metric([*sets.calibration, *sets.test], options.metric)
    watcher.on_stage("Loading the model")
    opened = open_model(options.model)
    watcher.on_stage("Processing the images")
    calibration, test = (
        make_evaluator(options, opened, examples, watcher, ranker=ranker, sets=2)
        for examples in (sets.calibration, sets.test)
    )
    return Prepared(options.batch_size, watcher, folder, sets, opened, calibration, test)
