"""ThinsightError is a ValueError of one line."""

from thinsight.errors import ThinsightError


def test_message_is_one_line() -> None:
    error = ThinsightError("metric is 'a\nb';\n  choose another")
    assert isinstance(error, ValueError)
    assert str(error) == "metric is 'a b'; choose another"
