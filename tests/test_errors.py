"""Errors are one line, told apart by kind, and no code decides by catching their root."""

import re
from pathlib import Path

import pytest

import thinsight
from thinsight import errors

SOURCE = Path(thinsight.__file__).parent
KINDS = (errors.BadInput, errors.MissingPackage, errors.StorageError, errors.Unreachable, errors.Unsupported)


@pytest.mark.parametrize("kind", [errors.ThinsightError, *KINDS])
def test_message_is_one_line(kind: type[errors.ThinsightError]) -> None:
    error = kind("metric is 'a\nb';\n  choose another")
    assert isinstance(error, ValueError)
    assert str(error) == "metric is 'a b'; choose another"


def test_kinds_are_siblings() -> None:
    for kind in KINDS:
        assert kind.__bases__ == (errors.ThinsightError,)


def test_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in KINDS)


def test_root_is_caught_only_where_every_error_is_treated_alike() -> None:
    """The command prints any of them, and two places let them through before they catch what is not ours."""
    places = [
        f"{path.relative_to(SOURCE).as_posix()}:{found}"
        for path in sorted(SOURCE.rglob("*.py"))
        for found in re.findall(r"except (ThinsightError.*(?:\n\s+raise\n)?)", path.read_text(encoding="utf-8"))
    ]
    assert [place for place in places if "raise" not in place] == ["cli.py:ThinsightError as error:"]


def test_nothing_raises_the_root() -> None:
    raising = [
        path.relative_to(SOURCE).as_posix()
        for path in sorted(SOURCE.rglob("*.py"))
        if re.search(r"\bThinsightError\((?!ValueError)", path.read_text(encoding="utf-8"))
    ]
    assert raising == []
