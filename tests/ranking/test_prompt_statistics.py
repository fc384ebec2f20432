"""Statistics of a prompt's attention against slow transcriptions."""

from __future__ import annotations

import math

import pytest
import torch

from thinsight.errors import ThinsightError
from thinsight.ranking import STATISTICS, get_statistic


def attention(batch: int = 3, heads: int = 2, queries: int = 4, tokens: int = 6) -> torch.Tensor:
    """Rows of a softmax over more columns than these."""
    draw = torch.Generator().manual_seed(0)
    return (2 * torch.randn(batch, heads, queries, tokens + 5, generator=draw)).softmax(-1)[..., :tokens]


QUERIES = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
VALID = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False, True, True, False, True, True]])


def plain_concentration(rows: torch.Tensor) -> float:
    received = rows.double().sum((0, 1))
    shares = (received / received.sum()).tolist()
    return 1 + sum(share * math.log(share) for share in shares) / math.log(len(shares))


def plain_information(rows: torch.Tensor) -> float:
    """The public code's formula, one head after the other, in bits."""
    total = 0.0
    heads, text, vision = rows.shape
    for head in range(heads):
        joint = [[rows[head, x, y].item() / text for y in range(vision)] for x in range(text)]
        for y in range(vision):
            py = sum(joint[x][y] for x in range(text))
            total += sum(p[y] * math.log2(max(p[y] / (py / text + 1e-6), 1e-6)) for p in joint)
    return total / heads


@pytest.mark.parametrize(
    ("name", "plain"), [("concentration", plain_concentration), ("mutual-information", plain_information)]
)
def test_each_is_its_formula(name: str, plain) -> None:
    given = attention()
    found = get_statistic(name)(given, QUERIES, VALID)
    for row in range(3):
        wanted = plain(given[row][:, QUERIES[row]][:, :, VALID[row]])
        assert found[row].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", STATISTICS)
def test_what_is_not_real_does_not_count(name: str) -> None:
    given, statistic = attention(), get_statistic(name)
    changed = given.clone()
    changed[~(QUERIES[:, None, :, None] & VALID[:, None, None, :]).expand_as(given)] = 9.0
    torch.testing.assert_close(statistic(changed, QUERIES, VALID), statistic(given, QUERIES, VALID))


def test_concentration_goes_from_flat_to_peaked() -> None:
    flat, peaked = torch.full((1, 1, 1, 8), 0.1), torch.zeros(1, 1, 1, 8)
    peaked[..., 3] = 0.5
    real, valid = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
    statistic = get_statistic("concentration")
    assert statistic(flat, real, valid).item() == pytest.approx(0, abs=1e-6)
    assert statistic(peaked, real, valid).item() == pytest.approx(1)
    one = torch.arange(8)[None] == 3
    assert statistic(flat, real, one).item() == 0  # of a single token
    assert statistic(flat, real, torch.zeros_like(valid)).item() == 0  # of none


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ThinsightError, match="statistic is 'entropy'; choose one of concentration"):
        get_statistic("entropy")
