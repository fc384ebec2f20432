"""Who has lost what: the tokens that each running request lacks at each stage, and attention metadata made from it.

Counts are known before anything is ranked, so the metadata of all stages of a step is made before its forward pass,
with one copy to the device and one look-up for each group of cache blocks. Rotary positions are not touched: a stage's
cache is compact, its tokens keep their places in the prompt. Knows nothing about hidden states or scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend

from .blocks import RunSpec
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
    layout: Layout | None = None  # None: nothing is lost
    slots: dict[int, list[Tensor]] = field(default_factory=dict)  # of the KV cache, per run and stage


@dataclass
class Layout:
    """Where the tokens of a step stand in each stage's compact cache; on the device unless said otherwise."""

    starts: Tensor  # (stages, requests + 1) int32
    starts_host: Tensor  # the same on the host
    seq_lens: Tensor  # (stages, requests) int32
    seq_lens_host: Tensor
    request: Tensor  # (tokens of all stages,) int64
    place: Tensor  # (tokens of all stages,) int64
    tokens: list[int]  # per stage
    longest: list[tuple[int, int]]  # per stage, of new tokens and of all


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

    def of_stage(self, stage: int, run: int, common: Any, block_size: int) -> Any:
        """vLLM's common metadata of a run's layers, as those of a stage have it."""
        if self.step.key is not common.query_start_loc_cpu:
            self.step = self._advance(common)
        layout = self.step.layout
        if layout is None:
            return common
        if run not in self.step.slots:
            self.step.slots[run] = self._slots(layout, common, block_size)
        return common.replace(
            query_start_loc=layout.starts[stage],
            query_start_loc_cpu=layout.starts_host[stage],
            seq_lens=layout.seq_lens[stage],
            seq_lens_cpu_upper_bound=layout.seq_lens_host[stage],
            num_actual_tokens=layout.tokens[stage],
            max_query_len=layout.longest[stage][0],
            max_seq_len=layout.longest[stage][1],
            slot_mapping=self.step.slots[run][stage],
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _slots(self, layout: Layout, common: Any, block_size: int) -> list[Tensor]:
        """The slots of all stages in the blocks of a run, in one look-up."""
        blocks = common.block_table_tensor[layout.request, layout.place // block_size]
        slots = (blocks.long() * block_size + layout.place % block_size).split(layout.tokens)
        # a compiled step that drops nothing is padded: its keys and values have as many rows
        pad = 0 if self.step.prefills else len(common.slot_mapping) - self.step.tokens
        return [torch.nn.functional.pad(each, (0, pad), value=-1) if pad else each for each in slots]

    def _advance(self, common: Any) -> Step:
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
            self._make(step, common, computed + lengths - lost, lengths - dropped)
        return step

    def _read(self, step: Step, name: str, number: int, first: int, length: int, start: int) -> None:
        """A part of a prompt is read."""
        if first == 0:  # it begins, or begins anew after a preemption
            for table in (self._lost, self._prompts, self.prefix_keys):
                table.pop(name, None)
        prompt = self._prompts.get(name)
        if prompt is None:
            prompt = self._prompts[name] = self.plan.prompt_of(self.runner.requests[name])
        if not self._loses(prompt):
            return
        prefill = Prefill(name, prompt, number, first, start)
        needs_keys = self.plan.reads_keys and name not in self.prefix_keys
        decision = prompt.decision(first, first + length, needs_keys)
        if decision is None:
            if self.plan.reads_keys and first + length <= prompt.vision[0]:
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

    def _forget(self, requests: Any) -> None:
        for table in (self._lost, self._prompts, self.prefix_keys):
            for name in [name for name in table if name not in requests]:
                del table[name]

    def _make(self, step: Step, common: Any, seq_lens: np.ndarray, lengths: np.ndarray) -> None:
        """The layout of all stages: arithmetic on the host, one copy to the device.

        Args:
            seq_lens: (stages, requests), tokens in the cache after this step.
            lengths: (stages, requests), of them new in this step.
        """
        stages, requests = lengths.shape
        self._check_blocks(seq_lens)
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
        starts_there, lens_there, requests_there, places = on_device.split(sizes)
        step.layout = Layout(
            starts=starts_there.view(stages, -1),
            starts_host=torch.from_numpy(starts.astype(np.int32)),
            seq_lens=lens_there.view(stages, -1),
            seq_lens_host=torch.from_numpy(seq_lens.astype(np.int32)),
            request=requests_there.long(),
            place=places.long(),
            tokens=starts[:, -1].tolist(),
            longest=[(int(a), int(b)) for a, b in zip(lengths.max(axis=1), seq_lens.max(axis=1), strict=True)],
        )

    def _check_blocks(self, seq_lens: np.ndarray) -> None:
        """Keys and values must have blocks: the scheduler, in another process, counts what is lost by itself."""
        for group, spec in self._held:
            table = self.runner.input_batch.block_table[group]
            room = table.num_blocks_per_row[: seq_lens.shape[1]].astype(np.int64) * table.block_size
            if (room < seq_lens[spec.stage]).any():
                raise RuntimeError(
                    "thinsight: a prompt was given too few KV cache blocks; start vLLM with "
                    "--disable-hybrid-kv-cache-manager, and report this"
                )

    @cached_property
    def _held(self) -> list[tuple[int, Any]]:
        """Groups of KV cache blocks that leave out what is lost."""
        groups = enumerate(self.runner.kv_cache_config.kv_cache_groups)
        found = [(number, group.kv_cache_spec) for number, group in groups]
        return [(number, spec) for number, spec in found if getattr(spec, "stage", None) is not None]


def reduced_backend(backend: Any, stage: int | None, run: int, runs: bool, ledger: Ledger) -> Any:
    """A stock attention backend of a run's layers.

    Args:
        stage: what they have left is counted in its metadata; None: they lose nothing.
        runs: whether the run has KV cache blocks of its own.
    """
    base = backend.get_builder_cls()
    prefix = f"Thinsight{'' if stage is None else stage}Run{run}"

    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        reduced = ledger.of_stage(stage, run, common_attn_metadata, self.kv_cache_spec.block_size)  # type: ignore[arg-type]
        return base.build(self, 0, reduced, fast_build)

    members = {
        "build": build,
        # a step that drops cannot be replayed; graphs of the pieces between attention leave it out anyway
        "_cudagraph_support": AttentionCGSupport.NEVER,
        "get_cudagraph_support": classmethod(lambda cls, *_: AttentionCGSupport.NEVER),
        "supports_update_block_table": False,  # or one stage would be given another's metadata
    }
    builder = base if stage is None else type(f"{prefix}{base.__name__}", (base,), members)
    made = subclass_attention_backend(prefix, backend, builder)
    if runs:
        first = ledger.plan.stage_of(ledger.plan.runs[run][0])
        made.customize_spec = classmethod(lambda cls, spec: RunSpec.of(backend.customize_spec(spec), run, first))
    return made
