"""How often a promise is broken: whole searches on redrawn questions, simulated from stored answers.

`python -m benchmarks.coverage` (`make coverage`) draws, for each of many rounds, a set A to search on and a set B to
certify on, both by image and with replacement from the pool of exact answers (benchmarks/pool.py). A search lays a
path of schedules from A, a rule picks one of them on B. A promise is broken where the schedule's true drop, over the
whole pool, is above what was allowed. Writes benchmarks/results/coverage.md, in minutes on one core and without a
model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from benchmarks.pool import FIRST_LAYER, MODELS, RESULTS, STEP, Pool, Redrawn, path_of
from thinsight.schedule import Schedule
from thinsight.searches.certify import (
    CLUSTERED,
    accepted,
    best_of_bands,
    exact_p_value,
    largest_surplus,
    lay_path,
    path_for,
)
from thinsight.searches.gsearch import gsearch

ROUNDS = 1000
HARD = 10  # times as many where the promise is hardest to keep
ALPHA = 0.05
DROPS = (0.005, 0.01, 0.02)
SIZES = ((96, 288), (192, 192), (384, 384), (384, 1152), (384, 3000))  # questions of A and of B
MAIN = (384, 1152)
STAKES = np.linspace(0.05, 0.95, 10)  # of the e-value's bets, as shares of the largest one

p_value = cache(exact_p_value)
surplus_of = cache(largest_surplus)


class Images:
    """A pool by image: what is lost and won on each under each schedule."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.rows = [np.flatnonzero(pool.groups == image) for image in np.unique(pool.groups)]
        losses = np.array([pool.full & ~right for right in pool.right])  # (schedules, questions)
        wins = np.array([~pool.full & right for right in pool.right])
        self.losses, self.wins = self._by_image(losses), self._by_image(wins)  # (images, schedules)
        self.sizes = np.array([len(rows) for rows in self.rows])
        self.drops = (losses.sum(1) - wins.sum(1)) / len(pool)  # true ones
        self.ratios = np.array(pool.ratios)

    def _by_image(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.array([flags[:, rows].sum(1) for rows in self.rows], dtype=np.int64)

    def draw(self, rng: np.random.Generator, questions: int) -> NDArray[np.int64]:
        """Numbers of images, drawn with replacement, for about so many questions."""
        return rng.integers(len(self.rows), size=round(questions / float(self.sizes.mean())))

    def questions(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([self.rows[image] for image in images])

    def table(self, images: NDArray[np.int64]) -> Table:
        losses, wins = self.losses[images], self.wins[images]
        return Table(int(self.sizes[images].sum()), self.sizes[images], losses, wins)


@dataclass(frozen=True)
class Table:
    """Losses and wins of a drawn set, per image and schedule."""

    n: int
    sizes: NDArray[np.int64]
    by_image_lost: NDArray[np.int64]
    by_image_won: NDArray[np.int64]

    @cached_property
    def losses(self) -> NDArray[np.int64]:
        return self.by_image_lost.sum(0)

    @cached_property
    def wins(self) -> NDArray[np.int64]:
        return self.by_image_won.sum(0)

    @cached_property
    def drops(self) -> NDArray[np.float64]:
        return (self.losses - self.wins) / self.n

    @cached_property
    def effects(self) -> NDArray[np.float64]:
        """As `thinsight.evaluation.statistics.design_effect`, of all schedules at once."""
        many, n = len(self.sizes), self.n
        sums = self.by_image_lost - self.by_image_won
        alone = (self.losses + self.wins - n * self.drops**2) / (n * (n - 1))
        together = many / (many - 1) * ((sums - self.sizes[:, None] * self.drops) ** 2).sum(0) / n**2
        found = np.divide(together, alone, out=np.ones(len(alone)), where=alone > 1e-15)
        return np.round(np.maximum(1.0, found), 9)

    def p(self, place: int, max_drop: float) -> float:
        """As `thinsight.searches.certify.judge`."""
        losses, wins, effect = int(self.losses[place]), int(self.wins[place]), float(self.effects[place])
        scale = effect if effect > CLUSTERED else 1.0
        size = max(1, math.floor(self.n / scale))
        lost = min(size, math.ceil(losses / scale))
        return p_value(lost, min(size - lost, math.floor(wins / scale)), size, max_drop)

    def passes(self, place: int, max_drop: float, alpha: float) -> bool:
        surplus = self.losses[place] - self.wins[place]
        if surplus > surplus_of(self.n, max_drop, 1 - alpha):
            return False
        return self.p(place, max_drop) <= alpha


Rule = Callable[[Table, Table, Sequence[int], float], int | None]
"""From A, B, the path and the drop allowed: a place in the pool, or None for the full model."""


def down_to_the_first_failure(path: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    found = None
    for place in path:
        if not passes(place):
            break
        found = place
    return found


def ours(_: Table, b: Table, path: Sequence[int], max_drop: float) -> int | None:
    """Fixed sequence, exact paired test."""
    return down_to_the_first_failure(path, lambda place: b.passes(place, max_drop, ALPHA))


def today(a: Table, _: Table, path: Sequence[int], max_drop: float) -> int | None:
    """The cheapest whose drop on A is within the tolerance."""
    within = [place for place in path if a.drops[place] <= max_drop + 1e-9]
    return within[-1] if within else None


def today_on_b(_: Table, b: Table, path: Sequence[int], max_drop: float) -> int | None:
    """The same on B."""
    return today(b, b, path, max_drop)


def clopper_pearson(_: Table, b: Table, path: Sequence[int], max_drop: float) -> int | None:
    """Fixed sequence, upper limit of the share of losses."""

    def passes(place: int) -> bool:
        losses = int(b.losses[place])
        return losses < b.n and float(betaincinv(losses + 1, b.n - losses, 1 - ALPHA)) <= max_drop

    return down_to_the_first_failure(path, passes)


def e_value(_: Table, b: Table, path: Sequence[int], max_drop: float) -> int | None:
    """Fixed sequence, bets of fixed stakes on every example (Waudby-Smith & Ramdas, arXiv 2010.09686), the mean of
    their capitals."""
    stakes = STAKES / (1 - max_drop)

    def passes(place: int) -> bool:
        losses, wins = int(b.losses[place]), int(b.wins[place])
        logs = losses * np.log1p(stakes * (max_drop - 1)) + wins * np.log1p(stakes * (max_drop + 1))
        logs += (b.n - losses - wins) * np.log1p(stakes * max_drop)
        return float(np.logaddexp.reduce(logs)) - math.log(len(stakes)) >= -math.log(ALPHA)

    return down_to_the_first_failure(path, passes)


def bonferroni(_: Table, b: Table, path: Sequence[int], max_drop: float) -> int | None:
    """The cheapest that passes the exact test at alpha / schedules."""
    passing = [place for place in path if b.passes(place, max_drop, ALPHA / len(path))]
    return passing[-1] if passing else None


RULES: dict[str, Rule] = {
    "today, on A": today,
    "today, on B": today_on_b,
    "ours": ours,
    "e-value": e_value,
    "Clopper-Pearson": clopper_pearson,
    "Bonferroni": bonferroni,
}


# -- who lays the path ---------------------------------------------------------------------------------------


class Paths:
    """Paths of schedules that the pool holds. What a search would put between is taken as the nearest of them."""

    def __init__(self, images: Images) -> None:
        self.images, self.pool = images, images.pool
        self.rates = np.array([schedule.keep_rates for schedule in self.pool.schedules])
        self.steps = [s for s in self.pool.schedules if len(set(s.keep_rates[FIRST_LAYER:])) == 1]
        self.every = sorted((self.pool.places[s] for s in self.steps), key=lambda place: images.ratios[place])
        self.known: dict[tuple[Schedule, ...], tuple[int, ...]] = {}
        self.asked = self.missed = 0

    def through(self, schedules: Sequence[Schedule]) -> tuple[int, ...]:
        """`lay_path` through these, as places in the pool."""
        some = any(not each.is_full for each in schedules)
        return self.places(lay_path(schedules, self.pool.spent, self.pool.n_vision, most=None) if some else ())

    def places(self, laid: tuple[Schedule, ...]) -> tuple[int, ...]:
        """A path as places in the pool."""
        if laid not in self.known:
            places = [self.nearest(schedule) for schedule in laid]
            falling = list(dict.fromkeys(places))
            self.known[laid] = tuple(
                place
                for number, place in enumerate(falling)
                if all(self.images.ratios[place] > self.images.ratios[other] for other in falling[:number])
            )
        return self.known[laid]

    def nearest(self, schedule: Schedule) -> int:
        if schedule in self.pool.places:
            return self.pool.places[schedule]
        least = 0.5 / self.pool.n_vision
        ours, theirs = np.maximum(self.rates, least), np.maximum(schedule.keep_rates, least)
        return int(np.abs(np.log(ours) - np.log(theirs)).sum(1).argmin())

    def one_step(self, _: Table, __: NDArray[np.int64], ___: float) -> tuple[int, ...]:
        """One step at layer 2: made without A."""
        return self.through(self.steps)

    def g_search(self, _: Table, questions: NDArray[np.int64], max_drop: float) -> tuple[int, ...]:
        """What G-Search accepted on A, and steps between."""
        self.searched = evaluator = Redrawn(self.pool, questions)
        self.found = gsearch(evaluator, max_drop, step=STEP[self.pool.name])
        self.asked += evaluator.asked
        self.missed += evaluator.missed
        return self.through(accepted(self.found))

    def default(self, _: Table, __: NDArray[np.int64], ___: float) -> tuple[int, ...]:
        """The product's: likewise, and on with one step, see `path_for`; of the search that was just made."""
        return self.places(path_for(self.searched, self.found))

    def multi_step(self, a: Table, _: NDArray[np.int64], __: float) -> tuple[int, ...]:
        """Schedules of several steps, in each band of cost the one that does best on A: what the sensitivity
        search's frontier comes to."""
        return self._best([s for s in self.pool.schedules if s not in set(self.steps)], a)

    def pareto(self, a: Table, questions: NDArray[np.int64], max_drop: float) -> tuple[int, ...]:
        """All of them, in each band of cost the one that does best on A."""
        return self._best(self.pool.schedules, a)

    def _best(self, schedules: Sequence[Schedule], a: Table) -> tuple[int, ...]:
        scored = [(schedule, -float(a.drops[self.pool.places[schedule]])) for schedule in schedules]
        return self.through(best_of_bands(scored, self.pool.spent))

    def layers(self) -> dict[str, Callable[[Table, NDArray[np.int64], float], tuple[int, ...]]]:
        return {
            "one step": self.one_step,
            "G-Search": self.g_search,
            "G-Search, then one step": self.default,
            "several steps": self.multi_step,
            "Pareto front of all": self.pareto,
        }


# -- simulated -----------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One rule at one size and tolerance, over all rounds."""

    broken: int = 0
    rounds: int = 0
    ratio: float = 0.0
    full: int = 0

    def add(self, images: Images, place: int | None, max_drop: float) -> None:
        self.rounds += 1
        if place is None:
            self.full += 1
            self.ratio += 1.0
            return
        self.ratio += float(images.ratios[place])
        self.broken += bool(images.drops[place] > max_drop + 1e-9)

    @property
    def share(self) -> float:
        """Of broken promises."""
        return self.broken / self.rounds

    @property
    def mean_ratio(self) -> float:
        """FLOPs ratio reached, 1 where the full model remains."""
        return self.ratio / self.rounds

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} / {self.mean_ratio:.2f}"


def simulate(
    images: Images, sizes: tuple[int, int], max_drop: float, rounds: int, seed: int = 0, everybody: bool = False
) -> tuple[dict[str, Cell], dict[str, Cell], float]:
    """Every rule on the path of one step, our rule on ``everybody``'s path, and the share of what G-Search asked for
    that the pool does not hold."""
    rng = np.random.default_rng([seed, *sizes, round(1e6 * max_drop)])
    paths = Paths(images)
    rules = {name: Cell() for name in RULES}
    layers = {name: Cell() for name in paths.layers()}
    for _ in range(rounds):
        drawn, other = images.draw(rng, sizes[0]), images.draw(rng, sizes[1])
        a, b = images.table(drawn), images.table(other)
        path, every = paths.one_step(a, drawn, max_drop), paths.every
        for name, rule in RULES.items():
            rules[name].add(images, rule(a, b, every if name.startswith("today") else path, max_drop), max_drop)
        if everybody:
            for name, lay in paths.layers().items():
                laid = lay(a, images.questions(drawn), max_drop)
                layers[name].add(images, ours(a, b, laid, max_drop), max_drop)
    return rules, layers, paths.missed / max(1, paths.asked)


def boundary(images: Images, n: int, rounds: int, seed: int = 1) -> Iterator[tuple[float, Cell]]:
    """Our rule where it is hardest: a tolerance a hair below the true drop of a schedule on the path."""
    path = Paths(images).through(Paths(images).steps)
    for place in path:
        max_drop = round(float(images.drops[place]) - 1e-6, 6)
        if not 0.004 < max_drop < 0.05:
            continue
        cell, rng = Cell(), np.random.default_rng([seed, place])
        for _ in range(rounds):
            b = images.table(images.draw(rng, n))
            cell.add(images, ours(b, b, path, max_drop), max_drop)
        yield max_drop, cell


# -- how much data -------------------------------------------------------------------------------------------

COUNTS = (100, 192, 384, 768, 1152, 2000, 3000, 5000, 10_000)
KINDS = {  # share lost and share won
    "100 % same": (0.0, 0.0),
    "99.5 %": (0.0025, 0.0025),
    "99 %": (0.005, 0.005),
    "98 %": (0.01, 0.01),
    "97 %": (0.015, 0.015),
    "95 % same; losses = wins": (0.025, 0.025),
    "99 %, all losses": (0.01, 0.0),
    "98 %, drop 0.5": (0.0125, 0.0075),
}


@cache
def least_drop(losses: int, wins: int, n: int) -> float:
    """The smallest ``max_drop`` that so many losses and wins certify."""
    low, high = max(0.0, (losses - wins) / n), 1.0
    for _ in range(14):
        middle = math.sqrt(max(low, 1e-5) * high)
        low, high = (low, middle) if p_value(losses, wins, n, middle) <= ALPHA else (middle, high)
    return high


def data_table(rounds: int) -> str:
    rows = []
    for n in COUNTS:
        row = [f"{n:,}"]
        for lost, won in KINDS.values():
            rng = np.random.default_rng(n)
            drawn = rng.multinomial(n, [lost, won, 1 - lost - won], size=rounds)
            found = [100 * least_drop(int(losses), int(wins), n) for losses, wins, _ in drawn]
            row.append(f"{np.quantile(found, 0.5):.2f} / {np.quantile(found, 0.8):.2f}")
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    return markdown(["n", *KINDS], rows)


def page(rounds: int) -> str:
    parts = [HEAD.format(rounds=rounds, alpha=100 * ALPHA)]
    worst = 0.0
    for name in MODELS:
        pool = Pool.load(path_of(name))
        images = Images(pool)
        steps = Paths(images)
        count = len(steps.steps)
        parts.append(
            f"## {name}\n\n{len(pool.schedules)} schedules, {count} of them one step at layer {FIRST_LAYER}; the full "
            f"model gets {100 * pool.full.mean():.2f} % right."
        )
        rows, laid = [], []
        for sizes in SIZES:
            for max_drop in DROPS:
                rules, layers, missed = simulate(images, sizes, max_drop, rounds, everybody=sizes == MAIN)
                worst = max(worst, rules["ours"].share)
                rows.append([f"{sizes[0]}, {sizes[1]}", f"{100 * max_drop:g}", *map(str, rules.values())])
                print(name, *rows[-1], sep=" | ", flush=True)
                if sizes == MAIN:
                    worst = max(worst, *(cell.share for cell in layers.values()))
                    laid.append([f"{100 * max_drop:g}", *map(str, layers.values()), f"{100 * missed:.1f}"])
                    print(name, *laid[-1], sep=" | ", flush=True)
        parts.append(markdown(["A, B", "points", *RULES], rows))
        parts.append(f"### Who lays the path (our rule, A = {MAIN[0]}, B = {MAIN[1]})")
        parts.append(markdown(["points", *steps.layers(), "not in the pool, %"], laid))
        parts.append(
            "*G-Search*: real searches on A, counts in multiples of "
            f"{STEP[name]}, schedules accepted and steps between; a candidate that the pool does not hold counts as "
            "failing. *G-Search, then one step*: the default of `thinsight search`, on with fewer tokens from layer "
            f"{FIRST_LAYER} on. *Several steps*: of all schedules with more than one step, the best on A in each band "
            "of 8 % of FLOPs, a stand-in for the sensitivity search's frontier. *Pareto front*: likewise, of all "
            "schedules."
        )
        hard = [[f"{100 * drop:.2f}", str(cell)] for drop, cell in boundary(images, MAIN[1], HARD * rounds)]
        worst = max(worst, *(float(row[1].split(" / ")[0]) / 100 for row in hard))
        parts.append(
            f"### A hair below the true drop of a schedule on the path (our rule, B = {MAIN[1]}, "
            f"{HARD * rounds:,} rounds)"
        )
        parts.append(markdown(["points", "broken % / FLOPs ratio"], hard))
    parts.append(
        "## How much data\n\nThe smallest `max_drop`, in points, at which one schedule is certified: in half of "
        "draws / in 80 % of them. Columns: how many answers' scores stay the same, and how the others change."
    )
    parts.append(data_table(min(rounds, 200)))
    error = math.sqrt(ALPHA * (1 - ALPHA) / rounds)
    parts.append(
        f"The most often that our rule broke its promise in any cell: {100 * worst:.1f} % (bar: {100 * ALPHA:g} %; "
        f"standard error of a cell at the bar: {100 * error:.1f})."
    )
    return "\n\n".join(parts) + "\n"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEAD = """# Broken promises

`make coverage`: {rounds} simulated searches per cell, from stored answers of the embedded models to 1,536 questions on
512 images (benchmarks/pool.py). Each round draws a set A to search on and a set B to certify on, by image and with
replacement. Cells: **share of rounds in which the true drop is above what was allowed, in % / mean FLOPs ratio
reached**, 1 where the full model remains. The promise is made with 95 % confidence, so the first number may be
{alpha:g}.

*today*: the cheapest schedule whose measured drop is within the tolerance, of all that were run. *ours*: from
costly to cheap down to the first failure of the exact paired test (docs/guarantee.md). *e-value*, *Clopper-Pearson*
(losses only): other tests on the same sequence. *Bonferroni*: the exact test of every schedule at 5 % / schedules. The
path of these rules is one step at layer 2, from 1.5x FLOPs on; it is made without A."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="simulated searches per cell")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage.md")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(arguments.rounds), encoding="utf-8")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
