"""Records: what is refused, what comes back as it was, and that no file is ever half there."""

from __future__ import annotations

import itertools
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import failing_writes, full_disk
from PIL import Image

from thinsight.errors import BadInput, StorageError
from thinsight.records import (
    Undefined,
    append_line,
    decode,
    encode,
    parse_json,
    probe,
    read_json,
    read_object,
    read_sealed,
    seal,
    unseal,
    user_path,
    write_atomically,
)

# -- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, True, "", "ü\ud800", [], {}, -0.0, 0.1 + 0.2, 5e-324, 10**307, -(10**307), [[{"a": [1]}]]]
)
def test_json_comes_back(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value).encode()):
        found = parse_json(text)
        assert found == value
        assert type(found) is type(value)
        assert json.dumps(found) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[1] 2", "Extra data"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        ("NaN", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("1e999", "1e999 is too large a number"),
        ("-1" + "0" * 400 + ".5", "-1000.* is too large a number"),
        ("1" + "0" * 308, "a whole number of 309 digits is too long"),
        ("-" + "9" * 5000, "a whole number of 5000 digits is too long"),
        ('{"a": 1, "b": 2, "a": 1}', "a key is repeated, 'a'"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 65 + "0" + "}" * 65, "nested more than 64 deep"),
        ("[" * 900 + "]" * 900, "nested more than 64 deep"),
        ("[" * 1_000_000, "nested too deep"),
        ('{"a":' * 1_000_000, "nested too deep"),
    ],
)
def test_json_that_is_refused(text: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 120
    path = tmp_path / "file.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(StorageError, match=rf"file\.json is not valid JSON \(.*{reason}.*; mend it"):
        read_json(path, "mend it")


def test_the_deepest_and_longest_that_is_read() -> None:
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json("9" * 308) == 10**308 - 1
    assert float(parse_json("9" * 308)) == 1e308


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone is missing; mend it"):
        read_json(tmp_path / "gone", "mend it")
    with pytest.raises(StorageError, match=r"cannot be read \(Is a directory\); check the file"):
        read_json(tmp_path, "mend it")
    (tmp_path / "list").write_text("[]")
    with pytest.raises(StorageError, match="list holds no JSON object; mend it"):
        read_object(tmp_path / "list", "mend it")


def test_a_checksum_tells_every_change_of_a_value(tmp_path: Path) -> None:
    record = {"a": [0.1, {"b": None}], "c": "x", "d": (1, 2)}
    text = json.dumps(seal(record))
    assert unseal(json.loads(text)) == {**record, "d": [1, 2]}
    assert unseal(json.loads(json.dumps(seal(record), indent=3))) == {**record, "d": [1, 2]}
    for old, new in (("0.1", "0.2"), ("null", "0"), ('"x"', '"y"'), ('"c"', '"e"'), ("[1, 2]", "[2, 1]")):
        with pytest.raises(ValueError, match="its checksum differs"):
            unseal(json.loads(text.replace(old, new)))
        (tmp_path / "file").write_text(text.replace(old, new))
        with pytest.raises(StorageError, match=r"file is damaged .its checksum differs.*; mend it"):
            read_sealed(tmp_path / "file", "mend it")
    for bare in (record, {}, {"checksum": None}, {**record, "checksum": [1]}):
        with pytest.raises(ValueError, match="checksum"):
            unseal(bare)
    for other in ([], 3, "text", None):
        with pytest.raises(ValueError, match="it is not a JSON object"):
            unseal(other)


# -- dataclasses -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    name: str
    at: tuple[int, float] = (0, 0.5)


@dataclass(frozen=True)
class Outer:
    yes: bool
    inner: Inner | None
    inners: tuple[Inner, ...] = ()
    maybe: tuple[Undefined, ...] = ()
    free: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if len(self.inners) > 2:
            raise BadInput("inners are more than two")


def test_dataclasses_come_back() -> None:
    outer = Outer(False, None, (Inner("a"), Inner("é", (3, 1e300))), (0.5,), {"a": [1, {"b": None}], "c": 1.5})
    stored = parse_json(json.dumps(encode(outer)))
    assert decode(Outer, stored, "here", "mend it") == outer
    undefined = decode(Outer, encode(Outer(True, None, maybe=(math.nan, 1.0))), "here", "mend it")
    assert math.isnan(undefined.maybe[0])
    assert undefined.maybe[1] == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"yes": 1}, "here.yes: expected true or false, got 1; mend it"),
        ({"inner": []}, "here.inner: expected an object, got []; mend it"),
        ({"inner": {}}, "here.inner: key 'name' is missing; mend it"),
        ({"inner": {"name": "a", "nome": 1}}, "here.inner: unknown key 'nome'; mend it"),
        ({"inner": {"name": None}}, "here.inner.name: expected text, got None; mend it"),
        ({"inner": {"name": "a", "at": [1.5, 2]}}, "here.inner.at[0]: expected a whole number, got 1.5; mend it"),
        ({"inner": {"name": "a", "at": [1]}}, "here.inner.at[1]: Field required, got [1]; mend it"),
        ({"inners": [{"name": "a"}, {"name": 2}]}, "here.inners[1].name: expected text, got 2; mend it"),
        ({"inners": {}}, "here.inners: expected a list, got {}; mend it"),
        ({"inners": [{"name": "a"}] * 3}, "here: inners are more than two; mend it"),
        ({"maybe": ["1"]}, "here.maybe[0]: expected a finite number, got '1'; mend it"),
        ({"maybe": [True]}, "here.maybe[0]: expected a finite number, got True; mend it"),
        ({"free": [1]}, "here.free: expected an object, got [1]; mend it"),
        ({"k" * 500: 1}, f"here: unknown key '{'k' * 60}'; mend it"),
        ({"yes": "v" * 500}, f"here.yes: expected true or false, got '{'v' * 56}...; mend it"),
    ],
)
def test_dataclasses_are_read_strictly(change: dict[str, Any], says: str) -> None:
    with pytest.raises(StorageError) as caught:
        decode(Outer, {"yes": True, "inner": None, **change}, "here", "mend it")
    assert str(caught.value) == says


def test_what_a_record_cannot_hold() -> None:
    for bad, says in ((math.inf, "infinite"), (object(), "object"), ({1}, "set"), (Image.new("L", (1, 1)), "Image")):
        with pytest.raises(BadInput, match=says):
            encode({"a": [bad]})


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, before: bytes | None, error: BaseException) -> None:
    for call in itertools.count():
        path = tmp_path / str(call) / "file"
        path.parent.mkdir()
        if before is not None:
            path.write_bytes(before)
        with failing_writes(call, error) as failed, suppress(StorageError, KeyboardInterrupt):
            write_atomically(path, "new")
        found = path.read_bytes() if path.exists() else None
        assert found == (before if failed else b"new")
        assert [each for each in path.parent.iterdir() if each != path] == []
        if not failed:
            break
    assert call == 5  # opened, written in two parts, waited for, put in its place


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_line_is_there_or_not(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "lines"
    for call in itertools.count():
        path.write_bytes(b"first\n")
        with failing_writes(call, error) as failed, suppress(StorageError, KeyboardInterrupt):
            append_line(path, "second", "mend it")
        whole = not failed or (call >= 2 and isinstance(error, KeyboardInterrupt))  # open, half, rest, fsync
        assert path.read_bytes() == (b"first\nsecond\n" if whole else b"first\n")
        if not failed:
            break
    assert call == 4
    append_line(path, "third", "mend it")
    assert path.read_bytes() == b"first\nsecond\nthird\n"
    path.unlink()
    with pytest.raises(StorageError, match=r"cannot be written .*; mend it"):
        append_line(path, "lost", "mend it")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        failing_writes(3, full_disk()),
        pytest.raises(
            StorageError, match=r"file cannot be written \(No space left on device\); free the disk, or choose"
        ),
    ):
        write_atomically(tmp_path / "file", "new")


def test_every_file_is_waited_for_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("wait"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "new" / "file", b"\x00\xff")
    assert order == ["wait", "replace"]
    assert (tmp_path / "new" / "file").read_bytes() == b"\x00\xff"


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, "text")
    assert path.read_text() == "text"


def test_half_of_a_surrogate_pair_is_written_as_its_escape(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, json.dumps("a\ud800ü", ensure_ascii=False))
    assert path.read_bytes() == '"a\\ud800ü"'.encode()
    assert read_json(path, "") == "a\ud800ü"


def test_links_and_folders_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "link" / "below"):
        with pytest.raises(StorageError, match="cannot be written"):
            write_atomically(path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "folder", "link"]


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    probe(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        probe(tmp_path / "file")


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert user_path("~/x", "out") == Path("/home/me/x")
    assert user_path(Path("a/~/b"), "out") == Path("a/~/b")
    for given in ("~nouser/x", "~nouser"):
        with pytest.raises(BadInput, match=f"out '{given}' begins with a user who has no home here: write the"):
            user_path(given, "out")
    (tmp_path / "~nouser").write_text("a file of that name")
    assert user_path("~nouser", "data") == Path("~nouser")
    with pytest.raises(BadInput, match=r"out 'a\\x00b' holds a NUL character"):
        user_path("a\0b", "out")
