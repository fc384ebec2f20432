"""vLLM in this process, on small random checkpoints; one engine after the other."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

from cases import SPECIALS, VIDEO_TAKERS, VOCABULARY, Case, Prompt, prompts_of, reduction_folder
from checkpoints import CHECKPOINTS
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(os.environ.get("THINSIGHT_VLLM_TESTS", "out/vllm")).resolve()
WORDS = list(range(SPECIALS, VOCABULARY))


@cache
def references() -> Any:
    return json.loads((ROOT / "references.json").read_text())


def option(case: Case) -> dict[str, Any]:
    """additional_config for a case."""
    folder = str(reduction_folder(ROOT, case))
    return {"thinsight": folder if case.per == "image" else {"reduction": folder, "per": case.per}}


def settings(name: str, **more: Any) -> dict[str, Any]:
    return {
        "model": str(ROOT / name),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "limit_mm_per_prompt": limits(name),
        "max_num_seqs": 4,
        "max_num_batched_tokens": 1024,
        "enable_chunked_prefill": False,
        "disable_log_stats": True,
        **more,
    }


def limits(name: str) -> dict[str, int]:
    """How many images and videos a prompt may have, of what the class takes."""
    images = {} if name == "llava-next-video" else {"image": 3}
    return {**images, **({"video": int(name in VIDEO_TAKERS)} if "video_token_id" in CHECKPOINTS[name].config else {})}


@contextmanager
def engine(name: str, case: Case | None = None, **more: Any) -> Iterator[LLM]:
    """vLLM on a checkpoint, under the case's reduction if there is one."""
    given = {} if case is None or case.rates is None else {"additional_config": option(case)}
    gc.freeze()  # what was imported: vLLM collects garbage nine times per engine
    llm = LLM(**settings(name, **given, **more))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def request(name: str, prompt: Prompt) -> dict[str, Any]:
    checkpoint = CHECKPOINTS[name]
    asked: dict[str, Any] = {"prompt": checkpoint.text(prompt)}
    if prompt.videos:
        videos = [checkpoint.video(i) for i in prompt.images]
        timed = [(frames, {**about, "do_sample_frames": False}) for frames, about in videos]
        asked["multi_modal_data"] = {"video": timed if checkpoint.wants_times else [frames for frames, _ in videos]}
    elif prompt.images:
        asked["multi_modal_data"] = {"image": checkpoint.images(prompt)}
    return asked


def sampling(tokens: int, **more: Any) -> SamplingParams:
    """Greedy, words only, exactly so many."""
    return SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, allowed_token_ids=WORDS, logprobs=0, **more
    )


def answers(llm: LLM, name: str, prompts: list[Prompt] | None = None) -> list[dict[str, Any]]:
    """Answers of all prompts, submitted at once: prefills and decodes of several requests share steps."""
    prompts = prompts_of(name) if prompts is None else prompts
    outputs = llm.generate(
        [request(name, prompt) for prompt in prompts], [sampling(prompt.answer) for prompt in prompts], use_tqdm=False
    )
    return [told(output) for output in outputs]


def told(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    ids = list(first.token_ids)
    logps = [row[token].logprob for row, token in zip(first.logprobs, ids, strict=True)]
    return {"prompt": list(output.prompt_token_ids), "ids": ids, "logps": logps}


def compare(found: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float = 1e-3) -> None:
    """The same prompts, the same answers, log-probabilities within a tolerance."""
    assert [each["prompt"] for each in found] == [each["prompt"] for each in wanted]
    assert [each["ids"] for each in found] == [each["ids"] for each in wanted]
    away = [abs(a - b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f["logps"], w["logps"], strict=True)]
    assert max(away) <= tolerance


def model_of(llm: LLM) -> Any:
    """The model inside."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
