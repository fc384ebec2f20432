"""The small form of `make coverage`: what is promised is kept, on searches simulated from stored answers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.coverage import ALPHA, MAIN, RULES, Images, Paths, boundary, ours, simulate
from benchmarks.pool import MODELS, Pool, path_of
from thinsight.schedule import Schedule
from thinsight.searches.certify import judge, largest_surplus

ROUNDS = 60


@pytest.fixture(scope="module", params=MODELS)
def images(request: pytest.FixtureRequest) -> Images:
    return Images(Pool.load(path_of(request.param)))


def test_a_pool_is_whole(images: Images) -> None:
    pool = images.pool
    assert len(pool) == 1536
    assert len(images.rows) == 512
    assert pool.calibration.sum() == 384
    assert len(pool.places) == len(pool.schedules) == len(pool.right) == len(pool.same) >= 20
    for place, schedule in enumerate(pool.schedules):
        assert pool.ratios[place] == pytest.approx(1 / pool.spent(schedule))
        changed = pool.right[place] != pool.full
        assert not (changed & pool.same[place]).any()  # an answer that stayed has stayed right or wrong


def test_our_promises_are_kept_and_todays_are_not(images: Images) -> None:
    rules, _, _ = simulate(images, MAIN, 0.01, ROUNDS)
    assert all(cell.rounds == ROUNDS for cell in rules.values())
    for name in ("ours", "e-value", "Clopper-Pearson", "Bonferroni"):
        assert rules[name].share <= ALPHA
    assert rules["today, on A"].share > 0.2
    reached = {name: cell.mean_ratio for name, cell in rules.items()}
    assert reached["ours"] > max(reached[name] for name in RULES if name not in ("ours", "today, on A", "today, on B"))
    assert reached["ours"] >= (3.3 if images.pool.name == "demo" else 1.9)


def test_everybody_lays_a_path_that_can_be_certified(images: Images) -> None:
    _, layers, _ = simulate(images, MAIN, 0.02, 12, everybody=True)
    assert all(cell.rounds == 12 and cell.broken <= 2 for cell in layers.values())
    assert layers["one step"].mean_ratio > 2


def test_it_holds_at_the_very_boundary(images: Images) -> None:
    cells = list(boundary(images, 384, ROUNDS))
    assert cells
    assert np.mean([cell.share for _, cell in cells]) <= ALPHA


def test_the_simulation_judges_as_the_product_does(images: Images) -> None:
    """Losses, wins, design effects, p-values and verdicts of drawn sets."""
    rng = np.random.default_rng(3)
    pool = images.pool
    for n in (96, 384, 1152):
        drawn = images.draw(rng, n)
        table, rows = images.table(drawn), images.questions(drawn)
        groups = np.repeat(np.arange(len(drawn)), images.sizes[drawn]).tolist()
        surplus = largest_surplus(len(rows), 0.02)
        for place in range(0, len(pool.schedules), 5):
            full, reduced = pool.full[rows].astype(float), pool.right[place][rows].astype(float)
            step = judge(full, reduced, 0.02, groups=groups, surplus=surplus)
            assert (step.losses, step.wins) == (table.losses[place], table.wins[place])
            assert step.design_effect == pytest.approx(table.effects[place])
            assert step.p_value == pytest.approx(table.p(place, 0.02))
            assert step.certified == table.passes(place, 0.02, ALPHA)


def test_a_path_is_of_the_pool_and_gets_cheaper(images: Images) -> None:
    paths = Paths(images)
    for schedules in (paths.steps, paths.steps[::4], images.pool.schedules[-3:]):
        path = paths.through(schedules)
        ratios = images.ratios[list(path)]
        assert len(path) >= 1
        assert (np.diff(ratios) > 0).all()
    assert paths.through([Schedule.full(images.pool.num_layers)]) == ()
    table = images.table(np.arange(3))
    assert ours(table, table, (), 0.01) is None
