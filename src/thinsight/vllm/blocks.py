"""KV cache blocks for the tokens that a stage keeps, not for the full prompt.

vLLM allots blocks per group of layers. Layers are put into groups of equal depth (`Plan.runs`), each with a cache spec
of its own; the spec's manager takes what a prompt loses off the tokens that it allots for, and a scheduler tells the
managers which prompts there are. All three are classes that vLLM lets a plugin bring: a backend's `customize_spec`,
`KVCacheSpecRegistry`, `scheduler_cls`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .plan import Plan, Prompt
from .settings import plan_of


@dataclass(frozen=True, kw_only=True)
class RunSpec(FullAttentionSpec):
    """The cache of a run's layers, never of another run's."""

    run: int = 0
    stage: int | None = None  # its first layer's, the one that loses least; None: nothing is lost

    @classmethod
    def of(cls, spec: Any, run: int, stage: int | None) -> Any:
        """A stock spec as a run's; one of another kind as it is."""
        if type(spec) is not FullAttentionSpec:
            return spec
        return cls(**{each.name: getattr(spec, each.name) for each in fields(spec) if each.init}, run=run, stage=stage)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return KVCacheSpec.merge.__func__(cls, specs)  # what is not equal stays apart

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class RunManager(FullAttentionManager):
    """Allots blocks for what a run's layers hold."""

    prompts: Callable[[str], Prompt | None]  # by request; the scheduler sets it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts = lambda _: None
        self._cut: set[str] = set()  # requests whose images and question fell into several chunks

    def held(self, request: str, tokens: int) -> int:
        """How many of a request's first so many tokens are in the cache."""
        stage, prompt = self.kv_cache_spec.stage, self.prompts(request)
        if stage is None or prompt is None or prompt.whole or tokens < prompt.length or request in self._cut:
            return tokens
        return tokens - prompt.lost[stage]

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return int(super().get_num_blocks_to_allocate(request_id, self.held(request_id, num_tokens), *args, **kwargs))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        prompt = self.prompts(request_id)
        if prompt is not None and len(prompt.vision) and prompt.vision[0] < num_tokens < prompt.length:
            self._cut.add(request_id)
        return super().allocate_new_blocks(request_id, self.held(request_id, num_tokens), *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        self._cut.discard(request_id)
        return super().pop_blocks_for_free(request_id)


class _Tells:
    """Mixin over a stock scheduler: its managers learn what each prompt loses."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self._plan: Plan = plan_of(vllm_config)
        self._told: dict[str, Prompt] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:  # type: ignore[attr-defined]
            if isinstance(manager, RunManager):
                manager.prompts = self._prompt

    def _prompt(self, name: str) -> Prompt | None:
        prompt = self._told.get(name)
        if prompt is None:
            requests = self.requests  # type: ignore[attr-defined]
            if name not in requests:
                return None
            if len(self._told) > 2 * len(requests) + 64:
                self._told = {each: told for each, told in self._told.items() if each in requests}
            prompt = self._told[name] = self._plan.prompt_of(requests[name])
        return prompt


@cache
def _telling(stock: type) -> type:
    return type(f"Thinsight{stock.__name__}", (_Tells, stock), {})


def scheduler(**kwargs: Any) -> Any:
    """What vLLM calls to make its scheduler: the stock one of its configuration, which tells its managers."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return _telling(AsyncScheduler if asynchronous else Scheduler)(**kwargs)


KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # or the stock specs would not be registered behind this one
KVCacheSpecRegistry.register(RunSpec, RunManager)
