"""A cell of the suite: one family crossed with one behaviour, which passes or is refused with its reason.

Knows nothing about what any behaviour is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from thinsight.errors import ThinsightError

from .families import FAMILIES
from .family import Family

Test = Callable[..., None]


def for_each(families: Iterable[Family] | None = None) -> pytest.MarkDecorator:
    """Run a test for each family (all if not given) as `family`; those that are not core are marked
    "conformance"."""
    params = [
        pytest.param(family, id=family.name, marks=() if family.core else pytest.mark.conformance)
        for family in (FAMILIES.values() if families is None else families)
    ]
    return pytest.mark.parametrize("family", params)


def behaviour(name: str, families: Iterable[Family] | None = None, *, refused: bool = False) -> Callable[[Test], Test]:
    """Run a test for each family as `family`; where the family refuses the behaviour, expect its message.

    Args:
        name: of the behaviour, as `Family.refuses` and the table of results have it. Several tests may share
            one.
        families: those to which it applies, all if not given.
        refused: every family refuses it, which is what the test itself checks.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def cell(*args: Any, family: Family, **kwargs: Any) -> None:
            if name not in family.refuses:
                test(*args, family=family, **kwargs)
                return
            with pytest.raises(ThinsightError, match=family.refuses[name]):
                test(*args, family=family, **kwargs)

        return pytest.mark.behaviour(name, refused=refused)(for_each(families)(cell))

    return decorate
