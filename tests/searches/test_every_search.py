"""The contract, held to by every search that is registered."""

from __future__ import annotations

import pytest

from thinsight.errors import BadInput
from thinsight.searches import SEARCHES, Search, SearchResult
from thinsight.testing import SearchContract


class TestEverySearch(SearchContract):
    @pytest.fixture(params=SEARCHES)
    def search(self, request: pytest.FixtureRequest) -> Search:
        return SEARCHES[request.param]


def test_a_search_is_told_what_it_takes() -> None:
    def mine(evaluator: object, budget: float, seed: int = 0) -> tuple[object, ...]:
        return evaluator, budget, seed

    search = Search("mine", mine, "Mine")
    assert search("evaluator", 0.5, seed=3, n_trials=9) == ("evaluator", 0.5, 3)
    assert not search.chooses_ranker


def test_what_a_search_is_under() -> None:
    def mine(evaluator: object, budget: float) -> SearchResult:
        raise AssertionError

    with pytest.raises(BadInput, match="under is 'money'; choose budget or max_drop"):
        Search("mine", mine, "Mine", under="money")
