"""Reduction: round trip, strict reading, atomic writing, the model card, Hub traffic (faked)."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import json
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from damage import failing_writes, full_disk

from thinsight import certificate
from thinsight.certificate import Certificate
from thinsight.errors import StorageError, ThinsightError
from thinsight.reduction import Reduction
from thinsight.schedule import Adaptive, Schedule

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


RECORDED = Reduction(
    SCHEDULE,
    {"name": "staged", "first": {"name": "cdpruner", "layers": [1, 2]}},
    search={"method": "sensitivity", "rankers": [{"name": "random", "seed": 1}]},
    measured={"drop": {"mean": 0.1}, "runs": [1, 2]},
)


@pytest.mark.parametrize("change", [
    lambda r: r.ranker.update(name="random"),
    lambda r: r.ranker.__setitem__("name", "random"),
    lambda r: r.ranker["first"].pop("layers"),
    lambda r: r.ranker["first"]["layers"].append(3),
    lambda r: r.measured["runs"].sort(reverse=True),
    lambda r: r.measured["runs"].__iadd__([3]),
    lambda r: r.search.setdefault("seed", 1),
    lambda r: r.search["rankers"][0].clear(),
    lambda r: r.measured.popitem(),
    lambda r: r.measured["drop"].__delitem__("mean"),
    lambda r: r.measured["drop"].__ior__({"mean": 0}),
    lambda r: setattr(r, "measured", None),
])  # fmt: skip
def test_nothing_in_a_reduction_can_be_changed(change: Any) -> None:
    before = json.dumps([RECORDED.ranker, RECORDED.search, RECORDED.measured])
    with pytest.raises((TypeError, AttributeError)):
        change(RECORDED)
    assert json.dumps([RECORDED.ranker, RECORDED.search, RECORDED.measured]) == before


def test_what_a_reduction_was_made_from_is_not_part_of_it() -> None:
    record: dict[str, Any] = {"rankers": [{"name": "random"}]}
    reduction = Reduction(SCHEDULE, search=record)
    record["rankers"][0]["name"] = "uniform"
    record["rankers"].append(1)
    assert reduction.search == {"rankers": [{"name": "random"}]}
    mine = dict(RECORDED.measured or {})
    mine["score"] = 1.0
    assert "score" not in (RECORDED.measured or {})


def test_reductions_are_keys_by_content(tmp_path: Path) -> None:
    RECORDED.save_pretrained(tmp_path)
    again = Reduction.from_pretrained(tmp_path)
    same = [again, copy.copy(RECORDED), copy.deepcopy(RECORDED), pickle.loads(pickle.dumps(RECORDED))]
    assert {RECORDED: 1}[again] == 1
    assert {RECORDED, *same} == {RECORDED}
    assert all(type(each.search) is type(RECORDED.search) for each in same)
    others = {
        Reduction(SCHEDULE),
        Reduction(Schedule.full(5)),
        Reduction(SCHEDULE, "random"),
        Reduction(SCHEDULE, {"name": "random", "seed": 1}),
        Reduction(SCHEDULE, rerank=False),
        Reduction(SCHEDULE, search={}),
        Reduction(SCHEDULE, search={"a": 1}),
        Reduction(SCHEDULE, measured={"a": 1}),
        Reduction(SCHEDULE, model_type="llava"),
    }
    assert len(others) == 9
    assert json.loads(json.dumps(dataclasses.asdict(RECORDED)["search"])) == {
        "method": "sensitivity",
        "rankers": [{"name": "random", "seed": 1}],
    }


def test_as_json_values_it_can_be_changed() -> None:
    config = RECORDED.to_dict()
    config["ranker"]["first"]["layers"].append(3)
    config["search"]["rankers"][0]["name"] = "uniform"
    config["measured"].clear()
    assert RECORDED.to_dict() == {**config, **{
        name: json.loads(json.dumps(getattr(RECORDED, name))) for name in ("ranker", "search", "measured")
    }}  # fmt: skip
    assert type(config["ranker"]) is type(config["search"]["rankers"][0]) is dict
    assert Reduction.from_dict(RECORDED.to_dict()) == RECORDED


def test_records_without_end_are_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = [endless]
    with pytest.raises(ThinsightError, match="nested more than 64 levels"):
        Reduction(SCHEDULE, search=endless)


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


@pytest.mark.parametrize("rate", ["1" + "0" * 400, "-1" + "0" * 400, "1e400", "1" * 5000, "NaN", "2", '"1"', "true"])
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


def test_push_to_hub_uploads_the_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    uploaded = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            pass

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def hf_hub_download(self, repo_id: str, name: str, **kwargs: Any) -> str:
            if not there.exists():
                raise absent("404", response=SimpleNamespace(headers={}, request=None))
            return str(there)

        def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: Any, **kw: Any) -> Any:
            files = (path for path in Path(folder_path).iterdir() if path.name != ignore_patterns)
            uploaded[repo_id] = {path.name: path.read_text() for path in files}
            return SimpleNamespace(commit_url="the-url")

    there, absent = tmp_path / "README.md", RemoteEntryNotFoundError
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert Reduction(SCHEDULE).push_to_hub("mine") == "the-url"
    assert json.loads(uploaded["me/mine"]["reduction_config.json"])["num_layers"] == 5
    assert "## Schedule" in uploaded["me/mine"]["README.md"]
    there.write_text(uploaded["me/mine"]["README.md"])  # ours, as it was pushed
    Reduction(Schedule.full(7)).push_to_hub("mine")
    assert "7 layers" in uploaded["me/mine"]["README.md"]
    there.write_text(uploaded["me/mine"]["README.md"] + "My own notes.\n")
    with pytest.warns(UserWarning, match=r"README\.md of me/mine was not written by thinsight, or was changed"):
        Reduction(Schedule.full(8)).push_to_hub("mine")
    assert [*uploaded["me/mine"]] == ["reduction_config.json"]


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    less = json.loads("[" * 70 + "]" * 70)
    for bad in (float("nan"), float("inf"), object(), {1, 2}, 10**400, 10**5000, deep, less, {1: 0, "1": 0}):
        with pytest.raises(ThinsightError, match=r"cannot be saved as JSON|nested more than 32 levels deep"):
            Reduction(SCHEDULE, measured={"score": bad}).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_of_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    """A path with an odd byte in it, say: a search that took hours must not fail to save what it found."""
    odd = "caf\udce9"
    reduction = Reduction(
        SCHEDULE, base_model_name_or_path=f"/models/{odd}", search={odd: [odd]}, measured={"test": {"name": odd}}
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


@pytest.mark.parametrize(
    "mine",
    [
        "# My project\n\nlibrary_name: thinsight\n",
        "---\nlibrary_name: thinsight\ntags: [x]\n---\n\n# My own reduction\n",
        "",
        b"\xff\xfe not text",
    ],
)
def test_a_readme_of_the_users_own_is_left_alone(tmp_path: Path, mine: str | bytes) -> None:
    card = tmp_path / "README.md"
    content = mine if isinstance(mine, bytes) else mine.encode()
    card.write_bytes(content)
    with pytest.warns(UserWarning, match=r"README\.md was not written by thinsight, or was changed since"):
        Reduction(SCHEDULE).save_pretrained(tmp_path)
    assert card.read_bytes() == content
    assert Reduction.from_pretrained(tmp_path).schedule == SCHEDULE


def test_our_readme_is_replaced_until_it_is_changed(tmp_path: Path, recwarn: Any) -> None:
    card = tmp_path / "README.md"
    Reduction(SCHEDULE).save_pretrained(tmp_path)
    Reduction(Schedule.full(7)).save_pretrained(tmp_path)
    assert "7 layers" in card.read_text()
    card.write_text(card.read_text().replace("\n", "\r\n"), newline="")  # as git may check it out
    Reduction(Schedule.full(8)).save_pretrained(tmp_path)
    assert "8 layers" in card.read_text()
    assert not recwarn.list
    changed = card.read_text().replace("8 layers", "eight layers")
    card.write_text(changed)
    with pytest.warns(UserWarning, match="is left as it is"):
        Reduction(SCHEDULE).save_pretrained(tmp_path)
    assert card.read_text() == changed


HOSTILE = 'a/b\nlicense: mit\n---\n# mine\n```\n"); import os; ("|<img src=x>`x` \x1b[2J'


def test_a_hostile_name_adds_nothing_to_the_card(tmp_path: Path) -> None:
    reduction = Reduction(
        SCHEDULE,
        {"name": HOSTILE, HOSTILE: [HOSTILE]},
        base_model_name_or_path=HOSTILE,
        search={HOSTILE: HOSTILE, "rankers": [{"name": HOSTILE}]},
        measured={"device": HOSTILE},
    )
    reduction.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    plain = Reduction(
        SCHEDULE,
        {"name": "x", "y": ["z"]},
        base_model_name_or_path="a",
        search={"x": "x", "rankers": [{"name": "x"}]},
        measured={"device": "x"},
    )
    plain.save_pretrained(tmp_path / "plain")
    expected = (tmp_path / "plain" / "README.md").read_text()
    assert card.count("\n") == expected.count("\n")
    front = card.split("---\n")[1]
    assert yaml.safe_load(front) == {
        "library_name": "thinsight",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vision-token-reduction"],
    }
    assert "\x1b" not in card
    assert not re.search(r"(?<!\\)<img", re.sub(r"```python\n.*?\n```", "", card, flags=re.DOTALL))
    for line, wanted in zip(card.splitlines(), expected.splitlines(), strict=True):
        cells = re.sub(r"\\.", "", line).count("|")
        assert not wanted.startswith("|") or cells == wanted.count("|")
        assert line.startswith("```") == wanted.startswith("```")
    snippet = card.split("```python\n")[1].split("\n```")[0]
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    names = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    assert names == [f"path/to/{reduction.base_model_name_or_path}"] * 2 + ["this/folder"]


@pytest.mark.parametrize("name", ["demo", "demo-internvl", "demo-smollm2"])
def test_the_card_loads_the_demos(tmp_path: Path, name: str) -> None:
    Reduction(SCHEDULE, base_model_name_or_path=name).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f'model, processor = ts.load_demo(name="{name}")\n' in card
    assert "transformers" not in card.split("```python")[1]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("demo", "demo"),
        ("my model", "my model"),
        ("/home/me/secret/my-llava", "my-llava"),
        ("/home/me/secret/my-llava/", "my-llava"),
        ("~/my-llava", "my-llava"),
        ("./my-llava", "my-llava"),
        ("../runs/my-llava", "my-llava"),
        ("runs/today/my-llava", "my-llava"),
        (r"C:\Users\me\my-llava", "my-llava"),
        ("C:/Users/me/my-llava", "my-llava"),
        (r"..\my-llava", "my-llava"),
        ("/home/me/.cache/huggingface/hub/models--a--b-7b/snapshots/0123/", "a/b-7b"),
        ("/cache/models--gpt2/snapshots/0123", "gpt2"),
        ("", ""),
        (None, None),
    ],
)
def test_of_a_path_only_the_last_part_is_kept(tmp_path: Path, given: str | None, kept: str | None) -> None:
    reduction = Reduction(SCHEDULE, base_model_name_or_path=given)
    assert reduction.base_model_name_or_path == kept
    reduction.save_pretrained(tmp_path)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert not given or kept == given or given not in written
    assert "secret" not in written
    saved(tmp_path, base_model_name_or_path=given)  # as an older version wrote it
    assert Reduction.from_pretrained(tmp_path).base_model_name_or_path == kept


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


# -- with a certificate --------------------------------------------------------------------------------------

STEP = Schedule.step(4, 1, 0.5)
TESTED = certificate.Step(0.895, 2, 1, 0.004, 1.0, certified=True)
FAILED = certificate.Step(0.88, 22, 7, 0.85, 1.0, certified=False)
PROMISE = Certificate(
    (STEP, Schedule.step(4, 1, 0.25)), (TESTED, FAILED), 1152, 384, 0.01, 0.95, 0.9, "0123456789abcdef"
)
NOTHING = dataclasses.replace(PROMISE, steps=(FAILED,))


def test_a_certificate_is_part_of_a_reduction(tmp_path: Path) -> None:
    reduction = Reduction(STEP, {"name": "random", "seed": 3}, certificate=PROMISE)
    assert reduction.certificate == PROMISE
    assert reduction != Reduction(STEP, {"name": "random", "seed": 3})
    assert "certified" in repr(reduction)
    reduction.save_pretrained(tmp_path)
    back = Reduction.from_pretrained(tmp_path)
    assert back == reduction
    assert hash(back) == hash(reduction)
    assert back.certificate is not None
    assert back.certificate.reason == PROMISE.reason
    named = dataclasses.replace(back, base_model_name_or_path="owner/model", measured={"score": 0.9})
    assert named.certificate == PROMISE
    assert pickle.loads(pickle.dumps(named)) == named


def test_the_full_model_may_be_all_that_is_promised() -> None:
    assert Reduction(Schedule.full(4), certificate=NOTHING).certificate == NOTHING
    with pytest.raises(ThinsightError, match="nothing but the full model"):
        Reduction(STEP, certificate=NOTHING)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schedule": STEP.with_tail(3, 0.25)}, "certificate is of "),
        ({"schedule": STEP.resample(8)}, "certificate is of "),
        ({"ranker": "random"}, "another ranker"),
        ({"ranker": {"name": "text-attention", "queries": "last"}}, "another ranker"),
        ({"rerank": False}, "another ranker"),
        ({"adaptive": Adaptive("entropy", 1, [0.5], [STEP, STEP], [0.5, 0.5])}, "another ranker, adaptive"),
        ({"certificate": NOTHING}, "nothing but the full model"),
        ({"certificate": PROMISE.to_dict()}, "pass what thinsight.certify gave"),
    ],
)
def test_a_certificate_is_of_one_reduction(change: dict[str, Any], named: str) -> None:
    reduction = Reduction(STEP, certificate=PROMISE)
    with pytest.raises(ThinsightError, match=named):
        dataclasses.replace(reduction, **change)
    if "certificate" not in change:
        assert dataclasses.replace(reduction, **change, certificate=None).certificate is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep_rates": [1.0, 0.5, 0.5, 0.4]}, "certificate is of "),
        ({"ranker": {"name": "random"}}, "another ranker"),
        ({"rerank": 0.5}, "another ranker"),
        ({"certificate": None}, "must be an object"),
        ({"certificate": {}}, "certificate: key 'path' is missing"),
    ],
)
def test_a_certificate_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    Reduction(STEP, certificate=PROMISE).save_pretrained(tmp_path)
    path = tmp_path / "reduction_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ThinsightError, match=named) as caught:
        Reduction.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"subject": ""}, "subject is empty"),
        ({"subject": "of another"}, "another ranker"),
        ({"images": 5000}, "images is 5000"),
        ({"max_drop": "1 %"}, "certificate.max_drop: expected a finite number"),
        ({"extra": 1}, "certificate: unknown key 'extra'"),
        ({"path": [[1.0, 0.6, 0.5, 0.5], [1.0, 0.25, 0.25, 0.25]]}, "certificate is of "),
    ],
)
def test_a_certificate_changed_by_hand_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    Reduction(STEP, certificate=PROMISE).save_pretrained(tmp_path)
    path = tmp_path / "reduction_config.json"
    config = json.loads(path.read_text())
    config["certificate"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(ThinsightError, match=named) as caught:
        Reduction.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_the_card_says_what_is_promised(tmp_path: Path) -> None:
    def card(promise: Certificate | None, schedule: Schedule = STEP) -> str:
        Reduction(schedule, certificate=promise).save_pretrained(tmp_path)
        section = (tmp_path / "README.md").read_text().split("## What is promised\n\n")[1].split("\n## ")[0]
        return section.replace("\\", "")

    assert card(None).strip() == "Nothing: what is lost is estimated, not certified."
    told = card(PROMISE)
    assert told.startswith(
        "At most 1 point of the score is lost on data like these, with 95 % confidence. "
        "2 losses and 1 win in 1,152 examples about 384 images, p = 0.004.\n"
    )
    assert "Schedules tested, costly ones first: 2 of 2; not certified at 1 point: 22 losses and 7 wins" in told
    assert "`0123456789abcdef`" in told
    assert "docs/guarantee.md" in told
    assert "before" not in told
    assert "had been used for a certificate before" in card(dataclasses.replace(PROMISE, used_before=True))
    nothing = card(NOTHING, Schedule.full(4))
    assert nothing.startswith("Nothing is promised but the full model")
    assert "Schedules tested, costly ones first: 1 of 2; not certified at 1 point" in nothing
