"""What of the vLLM plugin is arithmetic or a refusal, without vLLM: options, stages, what becomes of prompts.

What runs in the engine is tests/vllm's subject, in an environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_inputs, tiny_llava

import thinsight as ts
from thinsight.errors import BadInput, Unsupported
from thinsight.families import FAMILIES
from thinsight.runtime.call import query_columns, read_call
from thinsight.vllm.plan import SERVED, Options, Plan, read_options, stage_labels
from thinsight.vllm.settings import has_runs, plan_of, refuse, share_blocks, switch_off

LLAVA, INTERNVL = SERVED["LlavaForConditionalGeneration"], SERVED["InternVLForConditionalGeneration"]
STAIRS = (1, 0.6, 0.6, 0.3, 0.3, 0.1)


def plan(rates: tuple[float, ...] = STAIRS, ranker: Any = "text-attention", per: str = "image", **more: Any) -> Plan:
    family = more.pop("family", LLAVA)
    return Plan(ts.Reduction(ts.Schedule(list(rates)), ranker, **more), family, per)


def test_importing_thinsight_does_not_load_it() -> None:
    code = "import sys, thinsight; sys.exit(any(name.startswith('thinsight.vllm') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options() -> None:
    assert read_options({}) is None
    assert read_options(None) is None
    assert read_options({"other": 1}) is None
    assert read_options({"thinsight": "folder"}) == Options("folder")
    given = {"reduction": "owner/name", "per": "prompt", "revision": "main"}
    assert read_options({"thinsight": given}) == Options("owner/name", "prompt", "main")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (7, "give a folder or Hub id"),
        ("", "give a folder or Hub id"),
        ({"per": "image"}, "give a folder or Hub id"),
        ({"reduction": "x", "ranker": "y"}, "no option 'ranker'"),
        ({"reduction": "x", "per": "row"}, "per is 'row'"),
    ],
)
def test_options_that_cannot_be_right(given: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read_options({"thinsight": given})


def test_every_family_is_one_that_transformers_runs() -> None:
    for row in SERVED.values():
        assert FAMILIES[row.model_type].model_class == row.architecture


def test_a_schedule_becomes_stages() -> None:
    found = plan()
    assert found.starts == (1, 3, 5)
    assert [list(layers) for layers in found.layers] == [[1, 2], [3, 4], [5]]
    assert stage_labels(found) == ["1-2", "3-4", "5"]
    assert found.counts(16) == (10, 5, 2)
    assert plan((1, 1, 1)).starts == ()
    assert plan((0.5, 0.5), "random").starts == (0,)
    said = found.describe()
    assert "layers 1-2: 0.6; layers 3-4: 0.3; layer 5: 0.1" in said
    assert "text-attention" in said


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plan((0.5, 0.5)), "before layer 0"),
        (lambda: plan(model_type="qwen2_vl"), "is for 'qwen2_vl'"),
        (
            lambda: Plan(
                ts.Reduction(ts.Schedule([1, 0.5]), "vision-attention"), SERVED["Qwen2VLForConditionalGeneration"]
            ),
            "inside the vision tower",
        ),
    ],
)
def test_reductions_that_vllm_cannot_run(make: Any, says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        make()


def places(*runs: tuple[int, int]) -> list[np.ndarray]:
    return [np.arange(*run) for run in runs]


def test_a_prompt_loses_by_its_images_or_as_a_whole() -> None:
    images = places((2, 12), (13, 20))  # 10 and 7 tokens
    found = plan().prompt(25, images)
    assert found.kept == ((6, 5), (3, 3), (1, 1))
    assert found.lost == (6, 11, 15)
    assert found.image.tolist() == [0] * 10 + [1] * 7
    assert found.index.tolist() == [*range(10), *range(7)]
    assert found.size.tolist() == [10] * 10 + [7] * 7
    together = plan(per="prompt").prompt(25, images)
    assert together.kept == ((11,), (6,), (2,))
    assert together.lost == (6, 11, 15)
    assert plan().prompt(5, []).lost == (0, 0, 0)


def test_images_that_encoders_list_in_pieces_are_runs_of_the_prompt() -> None:
    two_runs = [np.r_[2:6, 8:12]]
    assert plan(family=INTERNVL).prompt(20, two_runs).kept[0] == (3, 3)
    assert plan().prompt(20, two_runs).kept[0] == (5,)


def test_ranks_as_rerank_says() -> None:
    def ranks(rerank: bool | float, rates: tuple[float, ...] = STAIRS) -> tuple[bool, ...]:
        return plan(rates, rerank=rerank).prompt(30, places((2, 18))).ranks

    assert ranks(True) == (True, True, True)
    assert ranks(False) == (True, False, False)
    assert ranks(0.5) == (True, False, True)  # 10, 5 (not fewer than half of them), 2
    assert plan((1, 0.99, 0.98)).prompt(9, places((2, 4))).ranks == (False, False)  # no count falls


def test_the_text_that_ranks_is_that_of_transformers() -> None:
    model = tiny_llava()
    for rows in ([[3, 40]], [[3, 2, 5]], [[2, 0]], [[4, 17]]):
        inputs = tiny_inputs(rows)
        call = read_call(model, {**inputs, "pixel_values": None})
        assert call is not None
        vision = call.layout.vision[0].nonzero().flatten().numpy()
        for queries in ("instruction", "last"):
            found = plan(ranker={"name": "text-attention", "queries": queries}).prompt(
                inputs["input_ids"].shape[1], [vision]
            )
            columns, real = query_columns(call.layout, call.prompt, queries, 16)
            assert torch.equal(torch.from_numpy(found.queries), columns[0][real[0]])


def test_what_becomes_of_chunks() -> None:
    prompt = plan().prompt(30, places((5, 15), (16, 20)))
    assert prompt.decision(0, 30, True) == ""
    assert prompt.decision(0, 64, True) == ""  # after a preemption, with its answer
    assert prompt.decision(0, 5, True) is None  # text only
    assert prompt.decision(20, 30, True) is None
    assert "several chunks" in str(prompt.decision(0, 18, True))
    assert "several chunks" in str(prompt.decision(18, 30, True))
    assert "several chunks" in str(prompt.decision(0, 25, True))  # the question is cut
    assert "earlier chunk" in str(prompt.decision(5, 30, True))
    assert prompt.decision(5, 30, False) == ""
    whole = plan().prompt(30, places((5, 15)), "prompt_logprobs are wanted")
    assert whole.decision(0, 30, False) == "prompt_logprobs are wanted"


def test_a_prompt_that_ends_in_an_image_keeps_its_last_token() -> None:
    assert plan().prompt(15, places((5, 15))).whole == ""
    assert "loses all its tokens" in plan((1, 0.5, 0)).prompt(15, places((5, 15))).whole


def configuration(folder: Path, **changes: Any) -> Any:
    """What the plugin reads of vLLM's configuration."""
    ts.Reduction(ts.Schedule(list(STAIRS))).save_pretrained(folder)
    config = SimpleNamespace(
        additional_config={"thinsight": str(folder)},
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["LlavaForConditionalGeneration"]),
            hf_text_config=SimpleNamespace(num_hidden_layers=6),
            multimodal_config=SimpleNamespace(video_pruning_rate=None, mm_encoder_only=False),
            runner_type="generate",
            model_impl="auto",
            enable_prompt_embeds=False,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
            worker_cls="auto",
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(), cudagraph_mm_encoder=False),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True, disable_chunked_mm_input=False),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(config, part) if part else config, field, value)
    return config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"model_config__model_impl": "transformers"}, "model_impl"),
        ({"model_config__enable_prompt_embeds": True}, "prompt embeddings"),
        ({"model_config__multimodal_config": SimpleNamespace(video_pruning_rate=0.5)}, "video_pruning_rate"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"parallel_config__worker_cls": "mine"}, "worker class"),
        ({"compilation_config__pass_config": SimpleNamespace(enable_sp=True)}, "sequence parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV transfer"),
    ],
)
def test_options_of_vllm_that_do_not_go_with_it(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    config = configuration(tmp_path, **changes)
    with pytest.raises(Unsupported, match=says):
        refuse(config, plan_of(config))


def test_what_is_read_of_a_configuration(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    found = plan_of(config)
    refuse(config, found)
    assert found.starts == (1, 3, 5)
    config.model_config.hf_text_config.num_hidden_layers = 7
    with pytest.raises(BadInput, match="6 layers but the model has 7"):
        plan_of(config)
    config.model_config.hf_config.architectures = ["MambaForCausalLM"]
    with pytest.raises(Unsupported, match="does not run MambaForCausalLM"):
        plan_of(config)


def test_a_tower_that_runs_all_images_as_one_has_no_attention_per_image(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    ts.Reduction(ts.Schedule(list(STAIRS)), "vision-attention").save_pretrained(tmp_path)
    assert plan_of(config).ranker.name == "vision-attention"
    config.model_config.hf_config.vision_config = SimpleNamespace(model_type="pixtral")
    with pytest.raises(Unsupported, match="for all images together"):
        plan_of(config)


def test_tensor_parallelism_goes_with_pooled_text_attention_alone(tmp_path: Path) -> None:
    config = configuration(tmp_path, parallel_config__tensor_parallel_size=2)
    refuse(config, plan())
    refuse(config, plan(ranker="random"))
    for ranker in ("vision-attention", "sparsevlm"):
        with pytest.raises(Unsupported, match="tensor parallelism"):
            refuse(config, plan(ranker=ranker))


def test_what_is_switched_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    config = configuration(tmp_path)
    said = " ".join(switch_off(config))
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.disable_chunked_mm_input
    assert all(word in said for word in ("prefix caching", "chunked prefill", "V1 model runner"))
    assert switch_off(config) == [each for each in switch_off(config) if "chunked" in each]


def test_runs_are_equally_deep_and_hold_what_their_first_layer_holds() -> None:
    runs = plan(ts.Schedule.stages(32, {2: 0.5, 8: 0.2}).keep_rates)
    assert [len(run) for run in runs.runs] == [4] * 8
    assert [layer for run in runs.runs for layer in run] == list(range(32))
    assert [runs.stage_of(run[0]) for run in runs.runs] == [None, 0, *[1] * 6]
    assert runs.describe_blocks() == "KV cache blocks are for 34% of the vision tokens, in 8 groups of 4 layers"


@pytest.mark.parametrize(
    ("rates", "ranker", "depths"),
    [
        (ts.Schedule.stages(24, {1: 0.99}).keep_rates, "text-attention", []),  # saves too little
        (ts.Schedule.stages(31, {2: 0.5}).keep_rates, "text-attention", []),  # 31 has no divisor
        ((0.5,) * 31, "uniform", [31]),
        (ts.Schedule.stages(12, {6: 0.5, 7: 0.49}).keep_rates, "text-attention", [6, 6]),
    ],
)
def test_how_many_runs(rates: tuple[float, ...], ranker: str, depths: list[int]) -> None:
    assert [len(run) for run in plan(rates, ranker).runs] == depths


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager is set"),
        ({"scheduler_cls": "my.Scheduler"}, "scheduler_cls is set"),
        ({"hybrid": False}, "no hybrid KV cache manager on this platform"),
    ],
)
def test_where_blocks_are_for_full_prompts_it_is_said(changes: dict[str, Any], why: str) -> None:
    given = {"disable_hybrid_kv_cache_manager": None, "scheduler_cls": None, **changes}
    hybrid = given.pop("hybrid", True)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(**given))
    (told,) = share_blocks(config, plan(), hybrid=hybrid)
    assert has_runs(config) == (not why)
    assert why in told
    assert ("full prompts" in told) == bool(why)


def test_keys_are_read_behind_layer_0_alone() -> None:
    assert plan().reads_keys
    assert not plan((0.5,) * 6, "staged").reads_keys
    assert plan((0.5,) * 3 + (0.2,) * 3, "staged").reads_keys
    assert not plan((0.5,) * 6, "random").reads_keys
