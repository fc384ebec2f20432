"""What is kept in a folder comes back to the bit or not at all, whoever else writes there."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import changes, failing_writes, full_disk

from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation.store import Store

NUMBERS = [0.1 + 0.2, 1e-320, -0.0, math.pi, math.inf, -math.inf, 12345678901234567890]
ABOUT = {"shares": [[0], [1, 2]], "names": ["image", "ä"]}


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=draw),
        "b": torch.randn(5, generator=draw).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.tensor([math.nan, math.inf]),
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7))
        for name, tensor in expected.items()
    )


def test_what_was_kept_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    store = Store(cache_dir=folder)
    assert list(folder.iterdir()) == []
    assert store.tensors("x") is None
    assert store.value("x") is None
    store.keep_tensors("x", some_tensors(), ABOUT)
    store.keep_value("x", NUMBERS)
    found = Store(cache_dir=str(folder)).tensors("x")
    assert found is not None
    assert same(found[0], some_tensors())
    assert found[1] == ABOUT
    value = Store(cache_dir=folder).value("x")
    assert value == NUMBERS
    assert math.copysign(1, value[2]) == -1
    assert sorted(path.name for path in folder.iterdir()) == ["x.json", "x.safetensors"]


@pytest.mark.parametrize("file", ["x.json", "x.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\0" * len(data),
        lambda data: b"[" * 100_000,
        lambda data: b"\xff" * 4096,
        lambda data: b"[]",
        lambda data: data.replace(b"0.3000", b"0.4000") if data[:1] == b"{" else data[:-9] + b"\1" + data[-8:],
        lambda data: data.replace(b"[1, 2]", b"[2, 1]") if data[:1] != b"{" else data.replace(b"3.14", b"2.14"),
    ],
)
def test_a_damaged_file_is_passed_over_with_one_line(file: str, damage: Any, tmp_path: Path) -> None:
    store = Store(cache_dir=tmp_path)
    store.keep_tensors("x", some_tensors(), ABOUT)
    store.keep_value("x", NUMBERS)
    good = (tmp_path / file).read_bytes()
    bad = damage(good)
    assert bad != good
    (tmp_path / file).write_bytes(bad)
    with pytest.warns(UserWarning, match=rf"{file} cannot be used \(.*computed again") as said:
        assert (store.value("x") if file == "x.json" else store.tensors("x")) is None
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    store.keep_tensors("x", some_tensors(), ABOUT)
    store.keep_value("x", NUMBERS)
    found = store.tensors("x")
    assert found is not None
    assert same(found[0], some_tensors())
    assert store.value("x") == NUMBERS


def test_two_writers_leave_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes while the first is between its temporary file and the final name."""
    first, second = Store(cache_dir=tmp_path), Store(cache_dir=tmp_path)
    replace, reached = os.replace, []

    def interrupted(*paths: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        reached.append(first.tensors("x"))
        second.keep_tensors("x", some_tensors(2), "second")
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    first.keep_tensors("x", some_tensors(1), "first")
    assert reached == [None]
    found = second.tensors("x")
    assert found is not None
    assert same(found[0], some_tensors(1))
    assert found[1] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_ends_the_keeping_with_one_line(call: int, tmp_path: Path) -> None:
    store = Store(cache_dir=tmp_path)
    store.keep_value("before", 1)
    with failing_writes(call, full_disk()) as failed:
        with pytest.warns(UserWarning, match=r"No space left on device.*nothing further is kept") as said:
            store.keep_value("a", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store.keep_tensors("b", some_tensors(), None)
    assert len(said) == len(failed) == 1
    assert store.value("a") is None
    assert store.value("before") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["before.json"]


@pytest.mark.parametrize("file", ["x.json", "x.safetensors"])
def test_one_changed_byte_is_passed_over_or_changes_nothing(file: str, tmp_path: Path) -> None:
    store = Store(cache_dir=tmp_path)
    store.keep_tensors("x", some_tensors(), ABOUT)
    store.keep_value("x", NUMBERS)
    whole, passed_over = (tmp_path / file).read_bytes(), 0
    for changed in changes(whole, 200):
        (tmp_path / file).write_bytes(changed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            value = store.value("x")
            tensors = store.tensors("x")
        passed_over += len(said)
        assert (value if file == "x.json" else tensors) is None or not said
        assert value in (None, NUMBERS)
        assert tensors is None or (same(tensors[0], some_tensors()) and tensors[1] == ABOUT)
    assert passed_over > 100


def test_a_folder_that_goes_away_is_no_error(tmp_path: Path) -> None:
    store = Store(cache_dir=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.value("x") is None
    with pytest.warns(UserWarning, match="cannot be written any more"):
        store.keep_value("x", 1)


@pytest.mark.parametrize("bad", ["", 3, b"bytes", "file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused(bad: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = tmp_path / bad if isinstance(bad, str) and bad else bad
    with pytest.raises(ThinsightError, match=r"cache_dir .* give "):
        Store(cache_dir=given)


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Store(cache_dir="~/cache").keep_value("x", 1)
    assert (tmp_path / "cache" / "x.json").is_file()
    with pytest.raises(BadInput, match="cache_dir '~nouser/x' begins with a user who has no home here"):
        Store(cache_dir="~nouser/x")
