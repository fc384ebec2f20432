"""Adaptive: the rule, its mean, strict reading, and its place in a saved reduction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from thinsight.budget import KeepBudget
from thinsight.errors import ThinsightError
from thinsight.reduction import Reduction
from thinsight.schedule import Adaptive, Schedule

LOW, MIDDLE, HIGH = (Schedule([1, 0.8, *tail]) for tail in ([0.6, 0.4], [0.4, 0.2], [0.2, 0.0]))
FAMILY = Adaptive("concentration", 2, (0.25, 0.5), (LOW, MIDDLE, HIGH), (0.25, 0.5, 0.25))


def test_a_value_picks_a_schedule() -> None:
    assert [FAMILY.level(value) for value in (-1, 0.2, 0.25, 0.49, 0.5, 7)] == [0, 0, 1, 1, 2, 2]


def test_the_mean_is_of_the_calibration_prompts() -> None:
    assert FAMILY.mean().keep_rates == pytest.approx((1, 0.8, 0.4, 0.2))
    assert FAMILY.mean().keep_rates[:2] == (1.0, 0.8)
    spent = FAMILY.average(KeepBudget(4, 10, 0.6).spent)
    assert spent == pytest.approx((0.25 * 28 + 0.5 * 24 + 0.25 * 20) / 40)
    assert Reduction(FAMILY.mean(), adaptive=FAMILY).average(lambda s: s.keep_rates[3]) == pytest.approx(0.2)
    assert Reduction(LOW).average(lambda s: s.keep_rates[3]) == 0.4


def test_a_family_of_lists_is_the_same_and_has_a_hash() -> None:
    edges, shares = [0.25, 0.5], [0.25, 0.5, 0.25]
    family = Adaptive("concentration", 2, edges, [LOW, MIDDLE, HIGH], shares)  # type: ignore[arg-type]
    edges.append(1.0)
    assert {family: 1}[FAMILY] == 1
    assert hash(Reduction(family.mean(), adaptive=family)) == hash(Reduction(FAMILY.mean(), adaptive=FAMILY))


def test_a_saved_reduction_comes_back(tmp_path: Path) -> None:
    reduction = Reduction(FAMILY.mean(), adaptive=FAMILY, model_type="llava")
    reduction.save_pretrained(tmp_path)
    assert Reduction.from_pretrained(tmp_path) == reduction
    card = (tmp_path / "README.md").read_text()
    assert "from layer 2 on" in card
    assert "| from 0.25 | 50.0% | 60.00% |" in card
    config = json.loads((tmp_path / "reduction_config.json").read_text())
    config["adaptive"]["edges"] = [0.5, 0.25]
    (tmp_path / "reduction_config.json").write_text(json.dumps(config))
    with pytest.raises(ThinsightError, match=r"reduction_config.json: adaptive.edges is \(0.5, 0.25\)"):
        Reduction.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"statistic": ""}, "statistic is ''"),
        ({"layer": 0}, "layer is 0; it must be a whole number from 1 to 3"),
        ({"layer": 4}, "layer is 4"),
        ({"layer": True}, "layer is True"),
        ({"layer": 3}, "differ before layer 3"),
        ({"edges": (0.5,)}, "3 schedules, 1 edges and 3 shares"),
        ({"edges": (0.5, 0.5)}, "must be finite numbers that rise"),
        ({"edges": (0.5, float("nan"))}, "must be finite"),
        ({"edges": (0.5, 10**400)}, "must be finite"),
        ({"shares": (0.5, 10**400, 0.5)}, "must be from 0 to 1"),
        ({"shares": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"shares": (1.5, -0.5, 0.0)}, "sum to 1"),
        ({"schedules": (LOW, MIDDLE, Schedule([1.0]))}, r"have \[1, 4\] layers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ThinsightError, match=words):
        dataclasses.replace(FAMILY, **changes)


@pytest.mark.parametrize("damage", [None, [], {"statistic": "x"}, {**FAMILY.to_dict(), "edges": "ab"}])
def test_damaged_entries_are_refused(damage: Any) -> None:
    with pytest.raises(ThinsightError, match="adaptive"):
        Adaptive.from_dict(damage)


def test_a_reduction_of_another_depth_is_refused() -> None:
    with pytest.raises(ThinsightError, match="adaptive has 4 layers but the schedule 5"):
        Reduction(Schedule.full(5), adaptive=FAMILY)
