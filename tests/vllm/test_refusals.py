"""What cannot run under a reduction is refused by name before weights are loaded; no engine starts here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import CASES, STAIRS, TOWER, Case
from engine import option, settings
from vllm.engine.arg_utils import EngineArgs

from thinsight import Reduction, Schedule


def config_of(name: str, given: Any, **more: Any) -> Any:
    return EngineArgs(**settings(name, additional_config=given, **more)).create_engine_config()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"model_impl": "transformers"}, "transformers"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_that_do_not_go_with_it(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config_of("llava", option(STAIRS), **more)


def saved(folder: Path, rates: list[float], ranker: Any = "text-attention", **more: Any) -> dict[str, str]:
    Reduction(Schedule(rates), ranker, **more).save_pretrained(folder)
    return {"thinsight": str(folder)}


def test_reductions_that_do_not_go_with_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for 5 layers but the model has 6"):
        config_of("llava", saved(tmp_path / "a", [1, 1, 0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="before layer 0"):
        config_of("llava", saved(tmp_path / "b", [0.5] * 6))
    with pytest.raises(ValueError, match="qwen2_vl"):
        config_of("llava", saved(tmp_path / "c", [1] * 5 + [0.5], model_type="qwen2_vl"))
    with pytest.raises(ValueError, match="no folder"):
        config_of("llava", {"thinsight": str(tmp_path / "missing")})
    with pytest.raises(ValueError, match="no option 'pre'"):
        config_of("llava", {"thinsight": {"reduction": "x", "pre": "image"}})


@pytest.mark.parametrize("name", ["llava-next", "qwen2-vl", "idefics3"])
def test_towers_whose_attention_is_not_per_token(name: str) -> None:
    with pytest.raises(ValueError, match="inside the vision tower"):
        config_of(name, option(TOWER))


def test_what_changes_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option: nothing. With it: a class of another name, no prefix caching, the worker."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    stock = EngineArgs(**settings("llava", enable_prefix_caching=True)).create_engine_config()
    assert stock.model_config.hf_config.architectures == ["LlavaForConditionalGeneration"]
    assert stock.cache_config.enable_prefix_caching
    assert "thinsight" not in str(stock.parallel_config.worker_cls)
    case: Case = CASES["llava"][1]
    config = config_of("llava", option(case), enable_prefix_caching=True)
    assert config.model_config.hf_config.architectures == ["ThinsightLlavaForConditionalGeneration"]
    assert not config.cache_config.enable_prefix_caching
    assert config.parallel_config.worker_cls == "thinsight.vllm.model.Worker"


def test_architectures_that_it_does_not_run(tmp_path: Path) -> None:
    import json

    from engine import ROOT

    source = json.loads((ROOT / "llava" / "config.json").read_text())
    source["text_config"]["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(source["text_config"]))
    args = {**settings("llava", additional_config=option(STAIRS)), "model": str(tmp_path), "skip_tokenizer_init": True}
    args.pop("limit_mm_per_prompt")
    with pytest.raises(ValueError, match="does not run LlamaForCausalLM in vLLM"):
        EngineArgs(**args).create_engine_config()
