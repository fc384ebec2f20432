"""What harnesses are given: one reduction, said in one way, and a run that ends where something fails."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from tiny import tiny_llava

import thinsight as ts
from thinsight import vlmevalkit
from thinsight.evaluation.readers import READERS
from thinsight.harness import RunFailed, Watch, check_told, loud, put_on
from thinsight.runtime.handle import applied


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ((None, None, None, None), "neither given"),
        (("a/b", 0.5, None, None), "both given"),
        (("a/b", None, 3, None), "layer and ranker go with keep"),
        (("a/b", None, None, "uniform"), "layer and ranker go with keep"),
    ],
)
def test_one_reduction_is_said_in_one_way(told: tuple[Any, ...], why: str) -> None:
    with pytest.raises(ts.BadInput, match=why):
        check_told(*told)


def test_a_reduction_or_a_share_is_put_on(tmp_path: Any) -> None:
    model = tiny_llava()
    layers = model.config.text_config.num_hidden_layers
    with put_on(model, keep=0.25, layer=1, ranker="random:seed=3") as handle:
        assert handle.schedule == ts.Schedule.step(layers, 1, 0.25)
        assert handle.ranker.settings == {"seed": 3}
    with put_on(model, keep=0.5) as handle:
        assert handle.schedule == ts.Schedule.step(layers, 2, 0.5)
    ts.Reduction(ts.Schedule.step(layers, 1, 0.5), "uniform").save_pretrained(tmp_path)
    with put_on(model, str(tmp_path)) as handle:
        assert handle.ranker.name == "uniform"
    assert not applied(model)


def test_what_fails_ends_the_run_past_any_except(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed, match="thinsight: there: no such thing"), loud("there"):
        raise ts.BadInput("no such thing")
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(RunFailed, match="thinsight: there: KeyError: 3"), loud("there"):
        raise KeyError(3)
    assert "Traceback" in capsys.readouterr().err  # not ours: where it came from is told
    assert not issubclass(RunFailed, Exception)


def test_answers_are_counted_and_missing_ones_end_the_run() -> None:
    model = tiny_llava()
    watch = Watch(model)
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    with watch.answering(2):
        model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    assert watch.answered == 2
    with pytest.raises(RunFailed, match="1 of 3 questions never reached"), watch.answering(3):
        model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    with pytest.raises(RunFailed, match=r"generate\(\) failed"), suppress(Exception):  # as harnesses do
        model.generate(input_ids=ids, no_such_option=1)


def test_vlmevalkit_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    with pytest.raises(RunFailed, match="pip install ms-vlmeval"):
        vlmevalkit.main(["--model", "demo", "--keep", "0.5", "--data", "x"])


def test_each_reduction_has_answers_of_its_own(tmp_path: Any) -> None:
    names = set()
    for rate in (0.25, 0.5):
        ts.Reduction(ts.Schedule.step(4, 1, rate)).save_pretrained(tmp_path / "mine")
        told = {"reduction": str(tmp_path / "mine"), "keep": None, "layer": None, "ranker": None}
        names.add(vlmevalkit._name("owner/model", told))
    nothing = dict.fromkeys(("reduction", "keep", "layer", "ranker"))
    names |= {vlmevalkit._name("owner/model", nothing | {"keep": keep}) for keep in (None, 0.25, 0.5)}
    assert len(names) == 5
    assert all(name.startswith("owner--model-") and "/" not in name for name in names)


def test_lmms_eval_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    assert "lmms-eval" in READERS
    monkeypatch.setattr("thinsight.evaluation.readers.lmms.version", missing)
    with pytest.raises(ts.MissingPackage, match=r"pip install 'thinsight\[lmms-eval\]'"):
        ts.load_examples("lmms-eval:textvqa_val:validation")
