"""One registry for all kinds: names, did-you-mean, clashes, and items of other distributions."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from thinsight.errors import BadInput
from thinsight.registry import Registry


class Salt:
    """An item."""

    name = "salt"


class Pepper:
    """Another one."""

    name = "pepper"


@dataclass(frozen=True)
class Row:
    """An item that is no code itself."""

    name: str
    function: Callable[[], int]


@pytest.fixture
def spices() -> Registry[type]:
    registry: Registry[type] = Registry("spice")
    registry.register(Salt)
    registry.register(Pepper)
    return registry


def test_names_in_the_order_they_entered(spices: Registry[type]) -> None:
    assert list(spices) == ["salt", "pepper"]
    assert spices["salt"] is Salt
    assert spices.values() == [Salt, Pepper]
    assert "salt" in spices
    assert "sugar" not in spices


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(spices: Registry[type]) -> None:
    with pytest.raises(BadInput, match=r"^spice is 'peper'; did you mean 'pepper'\? choose one of salt, pepper$"):
        spices["peper"]
    with pytest.raises(BadInput, match=r"^spice is 'x'; choose one of salt, pepper$"):
        spices["x"]
    with pytest.raises(BadInput, match=r"^spice is \['salt'\]; "):
        spices[["salt"]]


def test_a_name_is_taken_once(spices: Registry[type]) -> None:
    assert spices.register(Salt) is Salt
    with pytest.raises(BadInput, match=r"'salt' is taken by Salt of .*test_registry; choose another name"):
        spices.register(Pepper, "salt")


def test_a_row_is_known_by_its_code() -> None:
    registry: Registry[Row] = Registry("row", code=attrgetter("function"))
    registry.register(Row("one", len))
    registry.register(Row("one", len))
    with pytest.raises(BadInput, match="'one' is taken by len of builtins"):
        registry.register(Row("one", max))


def test_a_row_may_be_known_by_other_names() -> None:
    registry: Registry[Row] = Registry("row", code=lambda row: row.function.__name__, key="function")
    registry.register(Row("one", len), "one")
    registry.register(Row("uno", len), "one")
    with pytest.raises(BadInput, match="'one' is taken by len; choose another name"):
        registry.register(Row("one", max), "one")
    with pytest.raises(BadInput, match="row name is <built-in function max>"):
        registry.register(Row("one", max))


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a:b", "a=b", "a\n", 7])
def test_a_name_can_be_said_on_a_command_line(spices: Registry[type], name: str) -> None:
    with pytest.raises(BadInput, match="spice name is"):
        spices.register(Salt, name)


def test_builtin_modules_are_imported_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, "builtin_spices", "holder.register(Thyme)", monkeypatch)
    registry: Registry[type] = Registry("spice", builtin=("builtin_spices",))
    monkeypatch.setattr(sys.modules[__name__], "holder", registry, raising=False)
    assert "builtin_spices" not in sys.modules
    assert list(registry) == ["thyme"]


def test_who_imports_a_builtin_module_before_its_turn_does_not_change_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        _module(tmp_path, f"{name}_spices", f"Thyme.name = {name!r}; holder.register(Thyme)", monkeypatch)
    registry: Registry[type] = Registry("spice", builtin=("first_spices", "second_spices", "third_spices"))
    monkeypatch.setattr(sys.modules[__name__], "holder", registry, raising=False)
    import_module("third_spices")
    registry.register(Salt)
    assert list(registry) == ["salt", "first", "second", "third"]


def test_other_distributions_enter_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, "good_spices", "holder.register(Thyme)", monkeypatch)
    _module(tmp_path, "bad_spices", "raise RuntimeError('no thyme left')", monkeypatch)
    _module(tmp_path, "idle_spices", "", monkeypatch)
    _module(tmp_path, "fake_spices", "Thyme.name = 'salt'", monkeypatch)
    _module(tmp_path, "whole_spices", "Thyme.name = 'basil'", monkeypatch)
    info = tmp_path / "garden-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: garden\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[test.spices]\nthyme = good_spices\nsage = bad_spices\nmint = idle_spices:Thyme\n"
        "salt = fake_spices:Thyme\nbasil = whole_spices:Thyme\n"
    )
    registry: Registry[type] = Registry("spice", group="test.spices")
    monkeypatch.setattr(sys.modules[__name__], "holder", registry, raising=False)
    registry.register(Salt)
    assert registry["salt"] is Salt
    assert "good_spices" not in sys.modules  # not before it is asked for
    with pytest.warns(UserWarning, match="the spice") as warned:
        assert registry["thyme"].__name__ == "Thyme"
    assert [str(each.message) for each in warned] == [
        "the spice 'mint' of garden: idle_spices:Thyme enters no spice of that name",
        "the spice 'sage' of garden cannot be loaded: RuntimeError: no thyme left",
        f"the spice 'salt' of garden cannot be loaded: BadInput: spice name 'salt' is taken by Salt of {__name__}; "
        "choose another name",
    ]
    assert list(registry) == ["salt", "basil", "thyme"]  # by name of the entry point, behind what was there
    assert registry["salt"] is Salt


def _module(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    text = f"""
        import sys

        holder = getattr(sys.modules[{__name__!r}], "holder")

        class Thyme:
            name = "thyme"

        {code}
    """
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
