"""Who has lost what: the tokens that each running request lacks at each stage, and attention metadata made from it.

Counts are known before anything is ranked, so the metadata of all stages of a step is made before its forward pass, in
one operation on the device. Rotary positions are not touched: a stage's cache is compact, its tokens keep their places
in the prompt. Knows nothing about hidden states or scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend

from ..ranking import TEXT_ATTENTION
from .metrics import KEPT, REDUCED, SEEN, WHOLE, Tally
from .plan import Plan, Prompt, stage_labels

logger = init_logger("vllm.thinsight")


@dataclass
class Prefill:
    """A prompt that is read and reduced in a step."""

    request: str
    prompt: Prompt
    number: int  # which request of the step
    first: int  # the place in the prompt at which the step begins
    start: int  # the step's row that it begins at


@dataclass
class Step:
    """One forward pass of the engine."""

    key: Any  # of vLLM's metadata: the same object for all builders of a step
    tokens: int = 0  # rows without padding
    prefills: list[Prefill] = field(default_factory=list)
    prefixes: list[Prefill] = field(default_factory=list)  # text in front of images, read in a chunk of its own
    starts: np.ndarray | None = None  # (1 + stages, requests + 1): first row of each request, without drops and with
    metadata: list[Any] = field(default_factory=list)  # vLLM's common metadata, per stage
    slots: list[Tensor] = field(default_factory=list)  # of the KV cache, per stage


class Ledger:
    """What the requests of one worker hold."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runner: Any = None  # vLLM's, which knows the requests; the worker sets it once the model is loaded
        self.step = Step(None)
        self._nothing = (0,) * len(plan.starts)
        self._lost: dict[str, tuple[int, ...]] = {}
        self._prompts: dict[str, Prompt] = {}
        self._tally = Tally()
        self._labels = stage_labels(plan)
        self.prefix_keys: dict[str, dict[int, Tensor]] = {}  # per request and layer, (tokens, heads, size)

    def of_stage(self, stage: int, common: Any, block_size: int) -> Any:
        """vLLM's common metadata as a stage's layers have it."""
        if self.step.key is not common.query_start_loc_cpu:
            self.step = self._advance(common, block_size)
        return self.step.metadata[stage] if self.step.metadata else common

    def _advance(self, common: Any, block_size: int) -> Step:
        """Take note of the requests of a step, and make its metadata."""
        step, runner = Step(common.query_start_loc_cpu), self.runner
        batch = None if runner is None else runner.input_batch
        requests = common.num_reqs
        if batch is None or len(batch.req_ids) != requests:
            return step  # vLLM warms up
        start = common.query_start_loc_cpu[: requests + 1].numpy()
        lengths = np.diff(start)
        computed = batch.num_computed_tokens_cpu[:requests].astype(np.int64)
        step.tokens = int(start[-1])
        dropped = np.zeros((len(self._nothing), requests), dtype=np.int64)
        for number in np.flatnonzero(computed < batch.num_prompt_tokens[:requests]).tolist():
            self._read(
                step, batch.req_ids[number], number, int(computed[number]), int(lengths[number]), int(start[number])
            )
        for prefill in step.prefills:
            dropped[:, prefill.number] = prefill.prompt.lost
        lost = np.array([self._lost.get(name, self._nothing) for name in batch.req_ids], dtype=np.int64).T
        if len(self._lost) > 2 * len(runner.requests) + 64:
            self._forget(runner.requests)
        if step.prefills or lost.any():
            self._make(step, common, block_size, computed + lengths - lost, lengths - dropped)
        return step

    def _read(self, step: Step, name: str, number: int, first: int, length: int, start: int) -> None:
        """A part of a prompt is read."""
        if first == 0:  # it begins, or begins anew after a preemption
            for table in (self._lost, self._prompts, self.prefix_keys):
                table.pop(name, None)
        prompt = self._prompts.get(name)
        if prompt is None:
            prompt = self._prompts[name] = self._prompt(self.runner.requests[name])
        if not self._loses(prompt):
            return
        prefill = Prefill(name, prompt, number, first, start)
        needs_keys = self.plan.needs(TEXT_ATTENTION) and name not in self.prefix_keys
        decision = prompt.decision(first, first + length, needs_keys)
        if decision is None:
            if self.plan.needs(TEXT_ATTENTION) and first + length <= prompt.vision[0]:
                step.prefixes.append(prefill)
            return
        if decision:
            self.prefix_keys.pop(name, None)
            if prompt.vision[0] >= first:  # the first of several chunks that it is cut into
                logger.warning_once("thinsight: a prompt was kept whole: %s", decision)
                self._tally.add(WHOLE, 1, reason=decision)
                self._count(prompt, reduced=False)
            return
        step.prefills.append(prefill)
        self._lost[name] = prompt.lost
        self._tally.add(REDUCED, 1)
        self._count(prompt, reduced=True)

    @staticmethod
    def _loses(prompt: Prompt) -> bool:
        return any(prompt.lost)

    def _count(self, prompt: Prompt, *, reduced: bool) -> None:
        self._tally.add(SEEN, len(prompt.vision))
        for label, lost in zip(self._labels, prompt.lost, strict=True):
            self._tally.add(KEPT, len(prompt.vision) - (lost if reduced else 0), layers=label)

    def _prompt(self, request: Any) -> Prompt:
        """A request's prompt, as vLLM's runner knows it."""
        images, why = [], ""
        for feature in request.mm_features:
            place = feature.mm_position
            inside = np.arange(place.length) if place.is_embed is None else place.is_embed.numpy().nonzero()[0]
            images.append(inside.astype(np.int64) + place.offset)
            if feature.modality not in ("image", "video"):
                why = f"it has {feature.modality}"
        if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
            why = "prompt_logprobs are wanted"
        return self.plan.prompt(request.num_prompt_tokens, images, why)

    def _forget(self, requests: Any) -> None:
        for table in (self._lost, self._prompts, self.prefix_keys):
            for name in [name for name in table if name not in requests]:
                del table[name]

    def _make(self, step: Step, common: Any, block_size: int, seq_lens: np.ndarray, lengths: np.ndarray) -> None:
        """The metadata of all stages: arithmetic on the host, one copy and one look-up on the device.

        Args:
            seq_lens: (stages, requests), tokens in the cache after this step.
            lengths: (stages, requests), of them new in this step.
        """
        stages, requests = lengths.shape
        starts = np.zeros((stages, requests + 1), dtype=np.int64)
        starts[:, 1:] = lengths.cumsum(axis=1)
        step.starts = np.concatenate([common.query_start_loc_cpu[: requests + 1].numpy()[None], starts])
        flat = lengths.ravel()
        request = np.repeat(np.tile(np.arange(requests), stages), flat)
        first = np.repeat((seq_lens - lengths).ravel(), flat)
        begin = np.repeat(flat.cumsum() - flat, flat)
        place = first + np.arange(len(first)) - begin
        packed = np.concatenate([starts.ravel(), seq_lens.ravel(), request, place]).astype(np.int32)
        device = common.seq_lens.device
        host = torch.from_numpy(packed)
        on_device = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        sizes = [starts.size, seq_lens.size, len(request), len(request)]
        start_all, seq_all, requests_all, places = on_device.split(sizes)
        table = common.block_table_tensor
        blocks = table[requests_all.long(), (places // block_size).long()]
        slots = (blocks.long() * block_size + places % block_size).split(starts[:, -1].tolist())
        padded = len(common.slot_mapping)  # of a compiled step that drops nothing: keys and values have as many rows
        host_starts, host_lens = torch.from_numpy(starts.astype(np.int32)), torch.from_numpy(seq_lens.astype(np.int32))
        for stage in range(stages):
            mine, pad = slots[stage], 0 if step.prefills else padded - step.tokens
            step.slots.append(torch.nn.functional.pad(mine, (0, pad), value=-1) if pad else mine)
            step.metadata.append(
                common.replace(
                    query_start_loc=start_all.view(stages, -1)[stage],
                    query_start_loc_cpu=host_starts[stage],
                    seq_lens=seq_all.view(stages, -1)[stage],
                    seq_lens_cpu_upper_bound=host_lens[stage],
                    num_actual_tokens=int(starts[stage, -1]),
                    max_query_len=int(lengths[stage].max()),
                    max_seq_len=int(seq_lens[stage].max()),
                    slot_mapping=step.slots[-1],
                    positions=None,
                    _num_computed_tokens_cache=None,
                    _token_to_req_indices_cache=None,
                )
            )


def reduced_backend(backend: Any, stage: int, ledger: Ledger) -> Any:
    """A stock attention backend whose metadata counts what a stage has left."""
    base = backend.get_builder_cls()

    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        reduced = ledger.of_stage(stage, common_attn_metadata, self.kv_cache_spec.block_size)
        return base.build(self, 0, reduced, fast_build)

    members = {
        "build": build,
        # a step that drops cannot be replayed; graphs of the pieces between attention leave it out anyway
        "_cudagraph_support": AttentionCGSupport.NEVER,
        "get_cudagraph_support": classmethod(lambda cls, *_: AttentionCGSupport.NEVER),
        "supports_update_block_table": False,  # or one stage would be given another's metadata
    }
    builder = type(f"Thinsight{stage}{base.__name__}", (base,), members)
    return subclass_attention_backend(f"Thinsight{stage}", backend, builder)
