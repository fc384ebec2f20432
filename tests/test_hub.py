"""Push and pull over HTTP, against a stand-in of the Hub: the command, the card, and what never leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_standin import TOKEN, Hub, running
from tiny import tiny_llava

import thinsight as ts
from thinsight.certificate import Certificate, Step
from thinsight.runtime import weights_of

SCHEDULE = ts.Schedule([1.0, 0.5, 0.25, 0.25])
PROMISE = Certificate(
    (SCHEDULE,), (Step(0.965, 12, 12, 0.0013, 1.0, True),), 2000, 667, 0.01, 0.95, 0.965, "0123456789abcdef"
)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


def run(hub: Hub, folder: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, whose Hub is the stand-in."""
    names = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **names, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def push(hub: Hub, folder: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    return run(hub, folder, "-m", "thinsight", "push", *words, token=token)


def saved(folder: Path, base: str = "llava-hf/llava-1.5-7b-hf") -> ts.Reduction:
    measured = {
        "full_score": 0.965,
        "score": 0.9645,
        "drop": 0.0005,
        "metric": "exact_match",
        "test": {"name": "questions.jsonl", "examples": 2000, "hash": "3e0eb9352b50000e"},
    }
    reduction = ts.Reduction(
        SCHEDULE,
        base_model_name_or_path=base,
        model_type="llava",
        measured=measured,
        certificate=PROMISE,
        weights=weights_of(tiny_llava()),
    )
    reduction.save_pretrained(folder / "reduction")
    return reduction


def test_what_is_pushed_comes_back(hub: Hub, tmp_path: Path) -> None:
    reduction = saved(tmp_path)
    told = push(hub, tmp_path, str(tmp_path / "reduction"), "someone/reduction", "--private")
    assert told.returncode == 0, told.stderr
    assert f"Pushed: {hub.url}/someone/reduction/commit/" in told.stdout
    assert hub.private == {"someone/reduction": True}
    assert sorted(hub.repos["someone/reduction"]) == ["README.md", "reduction_config.json"]
    script = "import sys, json, thinsight as ts; print(json.dumps(ts.Reduction.from_pretrained(sys.argv[1]).to_dict()))"
    back = run(hub, tmp_path, "-c", script, "someone/reduction")
    assert back.returncode == 0, back.stderr
    assert ts.Reduction.from_dict(json.loads(back.stdout)) == reduction


def test_the_card_is_what_the_hub_reads(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    saved(tmp_path)
    assert push(hub, tmp_path, str(tmp_path / "reduction"), "someone/reduction").returncode == 0
    card = hub.repos["someone/reduction"]["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "thinsight"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert (front["base_model"], front["base_model_relation"]) == ("llava-hf/llava-1.5-7b-hf", "adapter")
    results = ModelCard(card).data.eval_results  # which huggingface_hub refuses to read where it is not as it should be
    assert results is not None
    figures = {each.metric_name: each.metric_value for each in results}
    assert figures == {
        "exact_match, largest drop, certified with 95% confidence": 0.01,
        "exact_match, full model": 0.965,
        "exact_match, reduced": 0.9645,
        "exact_match, drop": 0.0005,
    }
    assert {each.dataset_name for each in results} == {"questions.jsonl"}


def test_no_path_of_this_machine_leaves(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path, base=str(tmp_path / "checkpoints" / "my-llava"))
    assert push(hub, tmp_path, str(tmp_path / "reduction"), "someone/reduction").returncode == 0
    for content in hub.repos["someone/reduction"].values():
        assert str(tmp_path) not in content.decode()
    assert "base_model:" not in hub.repos["someone/reduction"]["README.md"].decode()


def test_a_changed_card_on_the_hub_stays(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path)
    first = [str(tmp_path / "reduction"), "someone/reduction"]
    assert push(hub, tmp_path, *first).returncode == 0
    hub.repos["someone/reduction"]["README.md"] += b"My own notes.\n"
    hub.commits.append({"repo": "someone/reduction"})  # whoever changed it
    ts.Reduction(ts.Schedule.full(8)).save_pretrained(tmp_path / "other")
    told = push(hub, tmp_path, str(tmp_path / "other"), "someone/reduction")
    assert told.returncode == 0, told.stderr
    assert "was not written by thinsight, or was changed" in told.stderr
    assert hub.repos["someone/reduction"]["README.md"].endswith(b"My own notes.\n")
    assert json.loads(hub.repos["someone/reduction"]["reduction_config.json"])["num_layers"] == 8


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (("{}/reduction", "someone/reduction"), "hf_wrong", "could not be pushed to"),
        (("{}/reduction", "not a name"), TOKEN, "could not be pushed to"),
        (("{}/nothing", "someone/reduction"), TOKEN, "there is no folder"),
    ],
)
def test_what_fails_is_one_line(hub: Hub, tmp_path: Path, words: tuple[str, ...], token: str, message: str) -> None:
    saved(tmp_path)
    told = push(hub, tmp_path, *(word.format(tmp_path) for word in words), token=token)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert message in told.stderr
    assert hub.commits == []


def test_a_card_that_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path)
    hub.refuse_cards = True
    told = push(hub, tmp_path, str(tmp_path / "reduction"), "someone/reduction")
    assert told.returncode == 2
    assert "could not be pushed to" in told.stderr
    assert "Traceback" not in told.stderr


def test_only_what_was_certified_is_in_the_index(tmp_path: Path) -> None:
    replace(saved(tmp_path), certificate=None).save_pretrained(tmp_path / "plain")
    front = yaml.safe_load((tmp_path / "plain" / "README.md").read_text().split("---\n")[1])
    names = [each["name"] for each in front["model-index"][0]["results"][0]["metrics"]]
    assert names == ["exact_match, full model", "exact_match, reduced", "exact_match, drop"]
    ts.Reduction(SCHEDULE).save_pretrained(tmp_path / "bare")
    assert "model-index" not in (tmp_path / "bare" / "README.md").read_text()
