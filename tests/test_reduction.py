"""Reduction: round trip, strict reading, atomic writing, the model card, Hub traffic (faked)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damage import failing_writes, full_disk

from thinsight.errors import StorageError, ThinsightError
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule

SCHEDULE = Schedule([1.0, 1.0, 0.1 + 0.2, 1 / 3 * 0.3, 0.0])


def saved(folder: Path, **changes: Any) -> Path:
    """A valid folder with some top-level keys changed; a key set to ... is removed."""
    Reduction(SCHEDULE).save_pretrained(folder)
    path = folder / "reduction_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def test_round_trip_is_exact(tmp_path: Path) -> None:
    reduction = Reduction(
        SCHEDULE,
        {"name": "text-attention", "queries": "last"},
        base_model_name_or_path="llava-hf/llava-1.5-7b-hf",
        model_type="llava",
        search={"method": "gsearch", "max_drop": 0.01, "solver": {"name": "bisect"}},
        measured={"score": 0.9, "drop": [0.001, -0.002, 0.004], "device": "cpü"},
    )
    reduction.save_pretrained(tmp_path / "deep" / "folder")
    assert Reduction.from_pretrained(tmp_path / "deep" / "folder") == reduction
    assert Reduction.from_pretrained(str(tmp_path / "deep" / "folder")).schedule == SCHEDULE
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["README.md", "reduction_config.json"]


def test_config_has_the_documented_keys(tmp_path: Path) -> None:
    Reduction(SCHEDULE, model_type="llava").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "reduction_config.json").read_text())
    assert list(config) == [
        "schema_version",
        "thinsight_version",
        "base_model_name_or_path",
        "model_type",
        "num_layers",
        "keep_rates",
        "ranker",
        "search",
        "measured",
    ]
    assert config["schema_version"] == 1
    assert config["num_layers"] == 5
    assert config["ranker"] == {"name": "text-attention"}


def test_ranker_may_be_a_name_a_dict_or_an_object() -> None:
    expected = {"name": "random", "seed": 3}
    assert Reduction(SCHEDULE, expected).ranker == expected
    assert Reduction(SCHEDULE, SimpleNamespace(name="random", settings={"seed": 3})).ranker == expected
    assert Reduction(SCHEDULE, "random").ranker == {"name": "random"}


@pytest.mark.parametrize("ranker", [None, 3, {}, {"name": 1}, "", {"seed": 3}, SimpleNamespace(name="x")])
def test_bad_ranker(ranker: Any) -> None:
    with pytest.raises(ThinsightError, match="ranker is"):
        Reduction(SCHEDULE, ranker)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"schedule": [1.0, 0.5]}, "schedule is"),
        ({"schedule": SCHEDULE, "model_type": 3}, "model_type is 3"),
        ({"schedule": SCHEDULE, "search": [1]}, "search is"),
        ({"schedule": SCHEDULE, "measured": "fast"}, "measured is 'fast'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ThinsightError, match=named):
        Reduction(**arguments)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"schema_version": True}, "schema_version is True"),
        ({"schema_version": ...}, "schema_version is None"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"ranker": ...}, "'ranker' is missing"),
        ({"ranker": "random"}, "ranker is 'random'"),
        ({"ranker": {"seed": 1}}, "ranker is"),
        ({"num_layers": 4}, "num_layers is 4 but there are 5"),
        ({"num_layers": 5.0}, "num_layers is 5.0"),
        ({"keep_rates": [1.0, 0.5, 0.6, 0.1, 0.0]}, r"keep_rates\[2\] is 0.6"),
        ({"keep_rates": [1.0, 0.5, 0.4, 0.1, -0.5]}, r"keep_rates\[4\] is -0.5"),
        ({"keep_rates": "11111"}, "keep_rates is '11111'"),
        ({"keep_rates": [], "num_layers": 0}, "keep_rates is empty"),
        ({"search": []}, r"search is \[\]"),
        ({"model_type": 1}, "model_type is 1"),
        ({"thinsight_version": 1}, "thinsight_version is 1"),
    ],
)
def test_strict_reading(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ThinsightError, match=named) as caught:
        Reduction.from_pretrained(saved(tmp_path, **changes))
    assert "reduction_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"schema_version": 1, "schema_version": 1}',
        b"[" * 100_000,
        b"[" * 500 + b"]" * 500,
        b'{"schema_version": ' + b"1" * 5000 + b"}",
    ],
)
def test_corrupt_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reduction_config.json").write_bytes(content)
    with pytest.raises(ThinsightError, match=r"reduction_config\.json"):
        Reduction.from_pretrained(tmp_path)


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / "reduction_config.json"
    path.write_text(path.read_text().replace("{", '{"num_layers": 5, ', 1))
    with pytest.raises(ThinsightError, match="a key is repeated"):
        Reduction.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "rate", ["1" + "0" * 400, "-1" + "0" * 400, "1e400", "1" * 5000, "NaN", "2", '"1"', "true"]
)
def test_a_keep_rate_that_is_none_is_refused(tmp_path: Path, rate: str) -> None:
    """A reduction has no checksum, for it is the user's to edit: its values are held to their range."""
    path = saved(tmp_path) / "reduction_config.json"
    path.write_text(path.read_text().replace("[1.0, 1.0", f"[{rate}, 1.0"))
    with pytest.raises(ThinsightError, match=r"reduction_config\.json") as caught:
        Reduction.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(ThinsightError, match="there is no folder"):
        Reduction.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ThinsightError, match="there is no folder nowhere"):
        Reduction.from_pretrained("nowhere")
    with pytest.raises(ThinsightError, match=r"has no reduction_config\.json"):
        Reduction.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ThinsightError, match="is a file"):
        Reduction.from_pretrained(tmp_path / "file")


def test_hub_id_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("offline\nand no cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ThinsightError, match="no folder 'someone/reduction', and the Hugging Face Hub"):
        Reduction.from_pretrained("someone/reduction")


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    Reduction(SCHEDULE).save_pretrained(tmp_path)
    asked = []

    def give(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo_id, filename, kwargs))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give)
    assert Reduction.from_pretrained("someone/reduction", revision="v2").schedule == SCHEDULE
    assert asked == [("someone/reduction", "reduction_config.json", {"revision": "v2", "token": None})]


def test_push_to_hub_uploads_the_saved_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            pass

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> Any:
            uploaded[repo_id] = {path.name: path.read_text() for path in Path(folder_path).iterdir()}
            return SimpleNamespace(commit_url="the-url")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert Reduction(SCHEDULE).push_to_hub("mine") == "the-url"
    assert json.loads(uploaded["me/mine"]["reduction_config.json"])["num_layers"] == 5
    assert "## Schedule" in uploaded["me/mine"]["README.md"]


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    less = json.loads("[" * 70 + "]" * 70)
    for bad in (float("nan"), float("inf"), object(), {1, 2}, 10**400, 10**5000, deep, less, {1: 0, "1": 0}):
        with pytest.raises(ThinsightError, match="cannot be saved as JSON"):
            Reduction(SCHEDULE, measured={"score": bad}).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_of_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    """A path with an odd byte in it, say: a search that took hours must not fail to save what it found."""
    odd = "caf\udce9"
    reduction = Reduction(
        SCHEDULE,
        base_model_name_or_path=f"/models/{odd}",
        search={odd: [odd]},
        measured={"test": {"name": odd}},
    )
    reduction.save_pretrained(tmp_path)
    assert Reduction.from_pretrained(tmp_path) == reduction
    assert "caf\\udce9" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Reduction(SCHEDULE).save_pretrained("~/mine")
    assert Reduction.from_pretrained(tmp_path / "mine") == Reduction.from_pretrained("~/mine")
    for refused in (Reduction.from_pretrained, Reduction(SCHEDULE).save_pretrained):
        with pytest.raises(ThinsightError, match="'~nouser/x' begins with a user who has no home here"):
            refused("~nouser/x")


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ThinsightError, match="cannot be written"):
        Reduction(SCHEDULE).save_pretrained(tmp_path / "file" / "below")


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    for call in itertools.count():
        folder = tmp_path / str(call)
        Reduction(SCHEDULE).save_pretrained(folder)
        with failing_writes(call, error) as failed, suppress(StorageError, KeyboardInterrupt):
            Reduction(Schedule.full(3)).save_pretrained(folder)
        assert sorted(os.listdir(folder)) == ["README.md", "reduction_config.json"]
        found = Reduction.from_pretrained(folder).schedule
        assert found == (SCHEDULE if failed else Schedule.full(3))
        if not failed:
            break
    assert call == 10


def test_card_shows_schedule_figures_and_use(tmp_path: Path) -> None:
    reduction = Reduction(SCHEDULE, base_model_name_or_path="llava-hf/llava-1.5-7b-hf")
    measured = {"drop": {"mean": 0.0012, "low": -0.003, "high": 0.005}, "device": "cpu"}
    dataclasses.replace(reduction, measured=measured).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "    0-1  100.00%  ########################################\n" in card
    assert "      2   30.00%  ############\n" in card
    assert "| drop: low | -0.003 |" in card
    assert 'from_pretrained("llava-hf/llava-1.5-7b-hf")' in card
    assert "base_model: llava-hf/llava-1.5-7b-hf" in card
    assert "## How it was found" not in card


def test_a_foreign_readme_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n\nlibrary_name: thinsight\n")
    Reduction(SCHEDULE).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("# My project")
    (tmp_path / "README.md").unlink()
    Reduction(SCHEDULE).save_pretrained(tmp_path)
    Reduction(Schedule.full(7)).save_pretrained(tmp_path)
    assert "7 layers" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("rerank", [False, 0.8, True])
def test_when_tokens_are_ranked_anew_is_saved(tmp_path: Path, rerank: bool | float) -> None:
    reduction = Reduction(SCHEDULE, rerank=rerank)
    reduction.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "reduction_config.json").read_text())
    assert config.get("rerank", True) == rerank
    assert ("rerank" in config) == (rerank is not True)  # older versions read what says nothing new
    assert Reduction.from_pretrained(tmp_path) == reduction
    assert Reduction(SCHEDULE) != Reduction(SCHEDULE, rerank=0.8)


@pytest.mark.parametrize("rerank", [1, 0, 2.5, "always", None, 10**300])
def test_a_damaged_rerank_is_refused(tmp_path: Path, rerank: Any) -> None:
    with pytest.raises(ThinsightError, match=r"reduction_config\.json: rerank is"):
        Reduction.from_pretrained(saved(tmp_path, rerank=rerank))
