"""The speed benchmarks at toy size: rows are whole, kept and resumed, and peers compute what they claim to.

Times are never looked at: a shared machine's say nothing.
"""

from __future__ import annotations

import functools
import json
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from shlex import split
from typing import Any

import numpy as np
import pytest
import torch

import thinsight as ts
from benchmarks import finetune, gpu, limit, peers, prefill, products, search_cost, smollm2, table, vllm
from thinsight import cost
from thinsight.reduction import Reduction
from thinsight.runtime import vision_token_mask
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

PREFILL = split("--hidden 64 --layers 10 --side 4 --runs 1 --answers 1 --tokens 2 --no-demos --device cpu")
PEERS = split("--hidden 64 --layers 3 --side 6 --batch 1 2 --runs 1 --device cpu")
GPU = split("--tiny --batch 1 --schedules gsearch")
WHERE = {"machine", "device", "threads", "torch", "transformers", "date", "rows"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def table_rows(path: Path) -> int:
    """Rows of a Markdown table, without its head."""
    return sum(line.startswith("|") for line in path.read_text().splitlines()) - 2


# --- prefill


def test_prefill_rows_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "new" / "prefill.json"
    prefill.main([*PREFILL, "--batch", "1", "--schedules", "gsearch", "--out", str(out)])
    first = read(out)
    assert set(first) == WHERE
    (row,) = first["rows"]
    assert (row["model"], row["N"], row["text"], row["batch"]) == (prefill.RANDOM, 16, 64, 1)
    assert row["ratio"] == pytest.approx(row["full_ms"] / row["reduced_ms"])
    assert row["closeness"] == pytest.approx(row["ratio"] / row["flops_ratio"])
    assert row["answer_ratio"] == pytest.approx(row["answer_full_ms"] / row["answer_reduced_ms"])
    assert len(row["full_runs_ms"]) == len(row["reduced_runs_ms"]) == 1
    assert 1 < row["flops_ratio_causal"] < row["flops_ratio"] < 2
    assert row["full_kv_bytes"] == 10 * 2 * 80 * 64 * 4
    assert row["kv_ratio"] == row["full_kv_bytes"] / row["reduced_kv_bytes"] > 1
    assert row["weight_bytes"] > 0
    assert 0 < row["scoring_share"] + row["hooks_share"] < 1
    assert {"full_peak_bytes", "reduced_peak_bytes"} <= set(row)

    options = [*PREFILL, "--batch", "1", "2", "--schedules", "gsearch", "fastv-50", "--out", str(out)]
    prefill.main([*options, "--resume"])
    rows = read(out)["rows"]
    assert rows[0] == row  # not measured again
    assert [(row["batch"], row["schedule"]) for row in rows] == [
        (1, "gsearch"), (1, "fastv-50"), (2, "gsearch"), (2, "fastv-50"),
    ]  # fmt: skip
    page = out.with_suffix(".md")
    assert table_rows(page) == 4
    assert page.read_text().splitlines()[-1].endswith(f"transformers {first['transformers']}.")


def test_resume_refuses_rows_of_another_machine(tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    where = table.about(torch.device("cpu"))
    table.Results(out, where, {}, resume=False).add({"batch": 1})
    assert table.Results(out, where, {}, resume=True).has({"batch": 1})
    assert not table.Results(out, where, {}, resume=False).rows
    with pytest.raises(SystemExit, match="leave out --resume"):
        table.Results(out, {**where, "threads": 99}, {}, resume=True)


def test_demo_models_are_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(prefill.DEMOS) == ["demo", "demo-internvl"]
    monkeypatch.setattr(prefill, "DEMOS", ["demo-internvl"])  # one tells, and is fast
    arguments = Namespace(demos=True, batch=[2], dtype="float32", device="cpu", side=[])
    ((name, work),) = prefill.workloads(arguments)
    assert (name, work.n_vision, work.batch) == ("demo-internvl", 64, 2)
    assert work.n_text > 0


def test_the_shape_that_the_overhead_benchmark_measures() -> None:
    assert prefill.Shape() == prefill.Shape(hidden=512, layers=16, side=24)


@pytest.mark.parametrize("layers", [10, 24, 40])
def test_schedules(layers: int) -> None:
    for name, make in prefill.SCHEDULES.items():
        schedule = make(layers, 576).schedule
        assert schedule.num_layers == layers
        assert schedule.keep_rates[0] == 1, name
    mean = sum(prefill.sigmoid_of_an_eighth(layers, 576).schedule.counts(576)) / (576 * layers)
    assert 0.124 < mean <= 0.125
    assert prefill.fastv_half(layers, 576).schedule.counts(576) == (576, 576, *[288] * (layers - 2))


def test_flops_count_the_head_once_on_both_sides() -> None:
    shape = prefill.Shape(64, 10, 4)
    work = prefill.workload(prefill.build(shape, torch.float32, "cpu"), prefill.prompt(shape, 1))
    assert set(prefill.flops_ratios(work, Schedule.full(10)).values()) == {1.0}
    # a tiny decoder before a vocabulary of 32,000: dropping nearly all gains little
    assert prefill.flops_ratios(work, Schedule.step(10, 1, 0.0))["flops_ratio"] < 80 / 64


# --- limit


def test_limit_rows_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "limit.json"
    shape = split("--hidden 64 --layers 12 --side 6 --runs 1 --device cpu")
    options = [*shape, "--out", str(out)]
    limit.main(options)
    rows = json.loads(out.read_text())["rows"]
    assert [row["schedule"] for row in rows] == list(prefill.SCHEDULES)
    for row in rows:
        assert row["limit_ratio"] * row["limit_ms"] == pytest.approx(row["full_ms"])
        assert row["closeness"] == pytest.approx(row["ratio"] / row["limit_ratio"])
        assert row["limit_closeness"] == pytest.approx(row["limit_ratio"] / row["flops_ratio"])
    limit.main([*options, "--resume"])
    assert json.loads(out.read_text())["rows"] == rows


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_products_rows(tmp_path: Path) -> None:
    out = tmp_path / "products.json"
    products.main([*split("--hidden 64 --layers 2 --tokens 8 4 --runs 1 --out"), str(out)])
    few, most = json.loads(out.read_text())["rows"]
    assert (few["tokens"], most["tokens"], most["of_most"]) == (4, 8, 1)
    assert few["of_most"] == pytest.approx(few["memory"] / most["memory"])
    assert few["ratio"] == pytest.approx(few["memory"] / few["cache"])
    assert "| 4 |" in out.with_suffix(".md").read_text()


# --- search_cost


def test_search_cost_rows(tmp_path: Path) -> None:
    out = tmp_path / "search.json"
    search_cost.main(["--examples", "4", "--max-drop", "0.5", "--out", str(out)])
    cheap, whole = json.loads(out.read_text())["rows"]
    assert cheap["same"]
    assert cheap["keep_rates"] == whole["keep_rates"]
    assert cheap["evaluations"] == whole["evaluations"]
    assert cheap["full_runs"] < whole["full_runs"]


# --- the page of a language model that others trained


def test_a_page_says_what_was_run_and_what_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DROPS", (0.5,))
    monkeypatch.setattr(smollm2, "LEAVING", (2, 6))
    monkeypatch.setattr(smollm2, "LADDER", (2, 4))
    monkeypatch.setattr(smollm2, "TAU_EXAMPLES", 3)
    monkeypatch.setattr(smollm2, "FIRST", ("search-random", "fastv", "random"))
    options = split("--model demo --dtype float32 --limit 6")
    options += ["--out", str(tmp_path / "work"), "--results", str(tmp_path / "page")]
    page = tmp_path / "page" / "smollm2.md"

    smollm2.main([*options, "--part", "tau", "gsearch", "leaving"])
    assert not page.exists()
    smollm2.main([*options, "--page"])
    first = page.read_text()
    assert (tmp_path / "page" / "smollm2-tau.png").exists()
    assert "Not run so far" in first
    assert first.count("\nNot run.\n") == 5  # certificates, comparison, times, both tables of the paper

    journals = {path: path.read_bytes() for path in (tmp_path / "work" / "parts").glob("gsearch-*")}
    smollm2.main([*options, "--part", "certify", "ladder", "0.25"])
    smollm2.main([*options, "--page"])
    second = page.read_text()
    assert second.count("\nNot run.\n") == 3
    assert "| one step at layer 2 | 50 |  |  | " in second
    assert "FastV" in second
    assert "at 25 %: search-sensitivity, " in second  # among what is missing
    assert (tmp_path / "page" / "smollm2.csv").read_text().count("\n") == 4
    assert all(path.read_bytes() == before for path, before in journals.items())  # nothing was searched again


def test_a_part_that_was_kept_is_not_run_again(tmp_path: Path) -> None:
    settings = smollm2.Settings("demo", "float32", tmp_path, limit=3)
    schedule = Schedule.step(12, 2, 0.1)
    found = smollm2.Work(settings).test(schedule)
    again = smollm2.Work(replace(settings, run=False)).test
    assert again(schedule).per_example.tolist() == found.per_example.tolist()
    with pytest.raises(smollm2.NotRun):
        again(Schedule.step(12, 2, 0.2))


# --- fine-tuning under a reduction


def test_fine_tuning_rows(tmp_path: Path) -> None:
    out = tmp_path / "finetune.json"
    finetune.main(["--steps", "2", "--images", "2", "--limit", "6", "--out", str(out)])
    found = read(out)
    assert [row["training"] for row in found["rows"]] == ["none", finetune.WITHOUT, finetune.WITH]
    assert found["questions"] == 4
    before, _, after = found["rows"]
    assert after["reduced_gain"][0] == pytest.approx(after["reduced"] - before["reduced"])
    table_lines, holds, said = finetune.lines(out)
    assert len(table_lines) == 7
    assert not holds  # six questions show nothing
    assert "12.5 %" in said


def test_what_is_trained_on_is_the_answer_and_its_end() -> None:
    _, processor = ts.load_demo()
    inputs, is_prompt = finetune.batch(processor, np.random.default_rng(0), 3)
    assert torch.equal(is_prompt, inputs["labels"] == finetune.IGNORED)
    for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
        answer = labels[labels != finetune.IGNORED]
        assert torch.equal(ids[-len(answer) :], answer)
        assert answer[-1] == processor.tokenizer.eos_token_id
        assert 2 <= len(answer) <= 6


# --- peers


def test_peers_rows_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    peers.main([*PEERS, "--out", str(out)])
    before = read(out)
    assert set(before) == WHERE
    rows = before["rows"]
    assert [row["method"] for row in rows] == 2 * list(peers.METHODS)
    for row in rows:
        dropped = row["method"] in peers.DROPPING
        assert row["kept"] == (36 if row["method"] == peers.STOCK else 18)
        assert row["cached"] == [100, 100, 82 if dropped else 100]
        assert row["tokens"] == row["cached"][-1]
        assert row["same_tokens"] == (None if row["method"] == peers.STOCK else 1)
        assert len(row["runs_ms"]) == 1
    assert {row["ratio"] for row in rows if row["method"] == peers.STOCK} == {1}
    peers.main([*PEERS, "--resume", "--out", str(out)])
    assert read(out)["rows"] == rows
    assert table_rows(out.with_suffix(".md")) == 10


def test_peers_give_the_logits_of_thinsight_and_leave_no_trace() -> None:
    shape = prefill.Shape(64, 4, 6)
    model = prefill.build(shape, torch.float32, "cpu")
    inputs = prefill.prompt(shape, 2)
    work = prefill.workload(model, inputs)
    methods = peers.sides(work, vision_token_mask(model, inputs["input_ids"]))
    with torch.inference_mode():
        logits = {}
        for name, under in methods.items():
            with under():
                logits[name] = work.prefill().logits
        stock = work.prefill().logits
    assert torch.equal(stock, logits[peers.STOCK])
    assert not torch.allclose(stock, logits[peers.THINSIGHT], atol=1e-4)
    for name in (peers.MATRIX, peers.ONE_MATRIX, peers.MASK):
        torch.testing.assert_close(logits[name], logits[peers.THINSIGHT], atol=1e-5, rtol=1e-4)
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_peers_that_keep_different_numbers_are_not_compared() -> None:
    def kept(count: int, last: int) -> peers.Kept:
        return peers.Kept((10, last), (frozenset(range(count)),), None)

    same = {peers.THINSIGHT: kept(3, 7), peers.MATRIX: kept(3, 7), peers.MASK: kept(3, 10)}
    peers.check_counts(same)
    for wrong in ({peers.MATRIX: kept(3, 8)}, {peers.MASK: kept(2, 10)}):
        with pytest.raises(SystemExit, match="keeps"):
            peers.check_counts({**same, **wrong})


# --- gpu


def test_gpu_rows_of_every_model(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main([*GPU, "--out", str(out)])
    rows = read(out)["rows"]
    expected = [(name, n // 64) for name, decoder in gpu.MODELS.items() for n in decoder.vision_tokens]
    assert sorted((row["model"], row["N"]) for row in rows) == sorted(2 * expected)
    for row in rows:
        assert "skipped" not in row, row
        assert {"ratio", "flops_ratio", "answer_ratio", "kv_ratio"} <= set(row)
        captured = row["mode"] == gpu.CAPTURED
        assert captured == ("scoring_share" not in row)
        assert row.get("recorder") == (gpu.REPLAY if captured else None)
    page = out.with_suffix(".md")
    assert table_rows(page) == 2 * len(expected)
    assert page.read_text().count("captured (eager replay)") == len(expected)


def test_gpu_rows_that_cannot_run_say_why_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.compare

    def compare(work: Any, reduction: Any, runs: Any) -> Any:
        if work.batch == 2:
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        row = real(work, reduction, runs)
        return row | {"reduced_kv_bytes": row["full_kv_bytes"]} if work.batch == 3 else row

    monkeypatch.setattr(gpu, "compare", compare)
    out = tmp_path / "gpu.json"
    options = [*GPU, "--models", "LLaVA-1.5-7B", "--answers", "0", "--out", str(out)]
    gpu.main([*options, "--batch", "2", "3", "1", "--modes", "eager", "captured"])
    rows = read(out)["rows"]
    assert [row["mode"] for row in rows] == 3 * ["eager"] + 3 * ["captured"]
    reasons = ["out of memory", "the cache is not the schedule's", None]
    assert [row.get("skipped") for row in rows] == 2 * reasons
    gpu.main([*options, "--attention", "none-such", "--modes", "eager", "--resume"])
    *before, last = read(out)["rows"]
    assert before == rows
    assert "none-such" in last["skipped"]


def test_gpu_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_gpu_sizes_are_the_published_ones() -> None:
    billions = {}
    for name, decoder in gpu.MODELS.items():
        model = gpu.build(decoder, torch.bfloat16, torch.device("meta"))
        weights = [*model.get_decoder().parameters(), *model.lm_head.parameters()]
        billions[name] = round(sum(weight.numel() for weight in weights) / 1e9, 2)
    assert billions == {
        "InternVL2-1B": 0.63,  # 0.49 with a head that shares the embeddings' weights
        "LLaVA-1.5-7B": 6.74,
        "LLaVA-NeXT-7B": 6.74,
        "Qwen2.5-VL-7B": 7.62,
        "InternVL2-8B": 7.74,
        "LLaVA-1.5-13B": 13.02,
    }


@pytest.fixture
def tiny() -> tuple[prefill.Workload, Reduction]:
    decoder = gpu.replace(gpu.MODELS["LLaVA-1.5-7B"].tiny(), layers=2)
    model = gpu.build(decoder, torch.float32, torch.device("cpu"))
    return gpu.workload(model, 8, 1), Reduction(Schedule([1.0, 0.5]))


def lengths(work: prefill.Workload) -> list[int]:
    return [layer.keys.shape[2] for layer in work.prefill()[CACHE].layers]


def test_compiled_sides_do_not_serve_each_other(
    tiny: tuple[prefill.Workload, Reduction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    # pytest would have the compiler write out a trace of its work, which takes ten times as long as the work
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "level", logging.CRITICAL)
    work, reduction = tiny
    with torch.inference_mode(), gpu.compiled(work, reduction) as fast:
        for _ in range(2):
            assert lengths(fast) == [72, 72]
            with fast.under(reduction):
                assert lengths(fast) == [72, 68]
    assert "forward" not in vars(work.model.get_decoder())


def test_captured_sides_are_switched(tiny: tuple[prefill.Workload, Reduction], monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []

    class Counting(gpu.EagerReplay):
        def record(self, job: Any) -> Any:
            return lambda: replays.append(job) or job()

    monkeypatch.setattr(gpu, "EagerReplay", Counting)
    work, reduction = tiny
    with torch.inference_mode(), gpu.captured(work, reduction) as fast:
        for _ in range(2):
            before = len(replays)
            assert lengths(fast) == [72, 72]
            assert len(replays) == before + 1
            with fast.under(reduction):
                before = len(replays)
                assert lengths(fast) == [72, 68]
                assert len(replays) == before + 1
    assert "forward" not in vars(work.model.get_decoder())
    assert lengths(work) == [72, 72]


# --- vLLM: what needs none


def test_vllm_sides_cost_the_same_and_lose_what_they_say() -> None:
    config = prefill.build(prefill.Shape(64, 24, 24), torch.float32, "meta").config
    schedule = vllm.stairs(24)
    flat = vllm.one_ratio(config, schedule, 576)
    assert len(set(flat.keep_rates)) == 1
    flops = [cost.flops(config, n_vision=576, n_text=vllm.TEXT, schedule=each) for each in (schedule, flat)]
    assert flops[1] == pytest.approx(flops[0], rel=0.005)
    thin = vllm.thin_stages(24, 576)
    assert sorted(set(thin.counts(576)), reverse=True) == [576 - i for i in range(7)]


def test_the_committed_ratios_in_vllm_are_nine_tenths_of_what_flops_say() -> None:
    found = json.loads((table.RESULTS / "vllm.json").read_text())["rows"]
    rows = [row for row in found if row["kind"] == "prefill" and row["engine"] == "schedule" and row["batch"] >= 4]
    assert {row["N"] for row in rows} == {576, 2304}
    for row in rows:
        assert row["decoder_ratio"] / row["flops_ratio"] >= 0.9, row
