"""What an engine does to requests: batches, preemptions, chunks, compiled steps; and what of it is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import PROMPTS, STAIRS, Prompt
from engine import answers, compare, engine, model_of, references, request, sampling, told
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.core.sched.scheduler import Scheduler

from thinsight.vllm.ledger import Ledger
from thinsight.vllm.metrics import WHOLE
from thinsight.vllm.model import Pass
from thinsight.vllm.plan import Plan
from thinsight.vllm.plan import Prompt as PromptPlan


def identical(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert found == wanted  # log-probabilities too, to the bit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_keeps_all_is_the_stock_model_to_the_bit(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Through the mechanism: stages, own slots, rows taken out and put back, though none is lost."""
    with engine("llava", dtype=dtype) as llm:
        assert type(model_of(llm)).__name__ == "LlavaForConditionalGeneration"
        stock = answers(llm, "llava")
    steps = []
    whole = Ledger._make

    def noted(self: Ledger, step: Any, *rest: Any) -> None:
        steps.append(len(step.prefills))
        whole(self, step, *rest)

    monkeypatch.setattr(Ledger, "_make", noted)
    monkeypatch.setattr(Ledger, "_loses", staticmethod(lambda prompt: len(prompt.vision) > 0))
    prompt_of = Plan.prompt

    def keeps(self: Plan, *given: Any) -> PromptPlan:
        prompt = prompt_of(self, *given)
        sizes = torch.bincount(torch.from_numpy(prompt.image)).tolist()
        prompt.kept, prompt.lost = (tuple(sizes),) * 3, (0, 0, 0)
        return prompt

    monkeypatch.setattr(Plan, "prompt", keeps)
    with engine("llava", STAIRS, dtype=dtype) as llm:
        identical(answers(llm, "llava"), stock)
    assert sum(steps) == sum(bool(prompt.images) for prompt in PROMPTS)


def test_bfloat16_ranks_in_float32() -> None:
    wanted = references()["llava"]["stairs"]
    with engine("llava", STAIRS, dtype="bfloat16") as llm:
        found = answers(llm, "llava")
    first = [abs(a["logps"][0] - b["logps"][0]) for a, b in zip(found, wanted, strict=True)]
    assert sum(a["ids"][0] == b["ids"][0] for a, b in zip(found, wanted, strict=True)) >= 6
    assert sorted(first)[5] < 0.2  # of the rounding of weights


@pytest.mark.parametrize(("blocks", "groups"), [(5, 1), (20, 6)])
def test_a_preempted_request_ranks_by_its_own_prompt_again(
    monkeypatch: pytest.MonkeyPatch, blocks: int, groups: int
) -> None:
    preempted = []
    stock = Scheduler._preempt_request

    def noted(self: Any, request: Any, *rest: Any, **more: Any) -> Any:
        preempted.append((request.num_prompt_tokens, request.num_computed_tokens))
        return stock(self, request, *rest, **more)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    with engine(
        "llava",
        STAIRS,
        block_size=32,
        max_model_len=96,
        num_gpu_blocks_override=blocks,
        max_num_batched_tokens=128,
        disable_hybrid_kv_cache_manager=groups == 1,
    ) as llm:
        compare(answers(llm, "llava"), references()["llava"]["stairs"])
    assert any(computed > prompt for prompt, computed in preempted)  # with words of its answer to read again


def test_chunked_prompts_are_reduced_where_image_and_question_are_read_together() -> None:
    known = references()["llava"]
    with engine("llava", STAIRS, enable_chunked_prefill=True, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(
            [request("llava", prompt) for prompt in PROMPTS],
            [sampling(prompt.answer) for prompt in PROMPTS],
            use_tqdm=False,
        )
        lost = model_of(llm).ledger._lost
        counted = dict(model_of(llm).ledger._tally._values)
        reduced = [any(name.split("-")[0] == output.request_id for name in lost) for output in outputs]
    assert True in reduced
    pairs = zip(known["stairs"], known["full"], reduced, strict=True)
    wanted = [
        stairs if mine or not prompt.images else full
        for (stairs, full, mine), prompt in zip(pairs, PROMPTS, strict=True)
    ]
    compare([told(output) for output in outputs], wanted)
    whole = [prompt for prompt, mine in zip(PROMPTS, reduced, strict=True) if prompt.images and not mine]
    assert whole  # some were cut
    reasons = {key: number for key, number in counted.items() if WHOLE in key}
    assert sum(reasons.values()) == len(whole)
    assert all("chunk" in key for key in reasons)


def test_text_in_front_of_images_may_be_read_in_a_chunk_of_its_own() -> None:
    """Its keys are kept for the ranking: a chunk never ends inside an image, so that text before it is read alone."""
    words = (tuple(range(30, 70)), tuple(range(80, 85)))
    prompts = [
        Prompt("long text", words, (1,), 12),
        Prompt("longer", (words[0][::-1] + words[0][:9], words[1]), (2,), 9),
    ]
    with engine("llava", STAIRS) as llm:
        wanted = answers(llm, "llava", prompts)
    with engine("llava") as llm:
        assert [each["ids"] for each in answers(llm, "llava", prompts)] != [each["ids"] for each in wanted]
    chunks: list[tuple[int, int]] = []
    decide = PromptPlan.decision

    def noted(self: PromptPlan, first: int, end: int, needs_keys: bool) -> str | None:
        decision = decide(self, first, end, needs_keys)
        chunks.append((first, end))
        assert not decision
        return decision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptPlan, "decision", noted)
        with engine("llava", STAIRS, enable_chunked_prefill=True, max_num_batched_tokens=48, max_num_seqs=2) as llm:
            compare(answers(llm, "llava", prompts), wanted, 1e-5)
    assert sum(first > 0 for first, _ in chunks) >= 2


def test_compiled_steps() -> None:
    with engine("llava", STAIRS, enforce_eager=False) as llm:
        compare(answers(llm, "llava"), references()["llava"]["stairs"])


def test_blocks_are_allotted_for_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinsight.vllm.blocks import RunManager

    held: dict[str, dict[int, int]] = {}
    full: dict[str, int] = {}
    stock = RunManager.allocate_new_blocks

    def noted(self: Any, request: str, tokens: int, *rest: Any) -> Any:
        made = stock(self, request, tokens, *rest)
        held.setdefault(request, {})[self.kv_cache_group_id] = len(self.req_to_blocks[request])
        full[request] = -(-tokens // self.block_size)
        return made

    monkeypatch.setattr(RunManager, "allocate_new_blocks", noted)
    with engine("llava", STAIRS, block_size=32) as llm:
        compare(answers(llm, "llava"), references()["llava"]["stairs"])
        plan = model_of(llm).plan
    assert [len(run) for run in plan.runs] == [1] * 6
    for number, prompt in enumerate(PROMPTS):
        name = next(each for each in held if each.split("-")[0] == str(number))
        text = sum(map(len, prompt.words)) + 1 + prompt.answer - 1  # the last word is not read again
        wanted = [text + sum(max(1, round(16 * rate)) for _ in prompt.images) for rate in STAIRS.rates or ()]
        assert list(held[name].values()) == [-(-tokens // 32) for tokens in wanted], name
    assert sum(sum(each.values()) for each in held.values()) < 0.9 * 6 * sum(full.values())


def test_without_groups_of_blocks() -> None:
    with engine("llava", STAIRS, disable_hybrid_kv_cache_manager=True) as llm:
        compare(answers(llm, "llava"), references()["llava"]["stairs"])
        assert len(llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_cache_config.kv_cache_groups) == 1


class _Asked(TorchDispatchMode):
    """Operations whose result a host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in (args[1] or ()))
            if (name in ("index", "index_put", "index_put_"))
            else False
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_ranking_asks_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens stay is known before; which ones is decided for all prompts of a step at once."""
    asked = _Asked()
    prompts: list[int] = []
    drop = Pass._drop

    def watched(self: Pass, *given: Any) -> None:
        prompts.append(len(self.step.prefills))
        with asked:
            drop(self, *given)

    monkeypatch.setattr(Pass, "_drop", watched)
    with engine("llava", STAIRS) as llm:
        compare(answers(llm, "llava"), references()["llava"]["stairs"])
    assert max(prompts) > 1
    assert asked.found == []
