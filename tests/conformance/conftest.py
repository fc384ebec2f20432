"""Writes into each test's report (``--junitxml``) which cell of the suite it belongs to."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Properties "behaviour", "family" and "refused" of every cell."""
    for item in items:
        mark = item.get_closest_marker("behaviour")
        if mark is None or not isinstance(item, pytest.Function):
            continue
        name: str = mark.args[0]
        family: Any = item.callspec.params["family"]
        item.user_properties += [
            ("behaviour", name),
            ("family", family.name),
            ("refused", str(mark.kwargs["refused"] or name in family.refuses).lower()),
        ]
