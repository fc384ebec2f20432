"""What of vLLM's configuration a reduction needs, switches off, or cannot run with.

Reads a configuration that vLLM hands over, before any weight is loaded; imports nothing of vLLM but its logger and the
name of its platform.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import BadInput, Unsupported
from ..families import tower_of
from ..ranking import TEXT_ATTENTION, VISION_ATTENTION
from ..reduction import Reduction
from .metrics import publish
from .plan import KEY, PREFIX, SERVED, Plan, read_options

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention backends whose metadata is made from what `ledger` changes."""
RUN_ON = ("0.32",)
"""The releases of vLLM on which the tests passed."""
WORKER = "thinsight.vllm.model.Worker"
SCHEDULER = "thinsight.vllm.blocks.scheduler"


def settings_of(stock: Any) -> type:
    """An entry of vLLM's MODELS_CONFIG_MAP that does what the stock entry of an architecture does, if it has one, and
    then prepares for a reduction, if one is asked for."""

    class Settings:
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if stock is not None:
                stock.verify_and_update_config(vllm_config)
            prepare(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if stock is not None:
                stock.verify_and_update_model_config(model_config)

    return Settings


def prepare(vllm_config: Any) -> None:
    """Have vLLM run a reduction, if its additional_config names one.

    Raises:
        BadInput: the option, or the reduction, cannot be read.
        Unsupported: the model, the reduction, or another option does not go with it.
    """
    if read_options(vllm_config.additional_config) is None:
        return
    from vllm import __version__
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    config = vllm_config.model_config.hf_config
    architecture = config.architectures[0]
    plan = plan_of(vllm_config)
    refuse(vllm_config, plan)
    changed = switch_off(vllm_config)
    changed += share_blocks(vllm_config, plan, hybrid=current_platform.support_hybrid_kv_cache())
    config.architectures = [f"{PREFIX}{architecture}"]
    vllm_config.parallel_config.worker_cls = WORKER
    publish()
    told = f"thinsight: {architecture} with {plan.describe()}" + (f"; {'; '.join(changed)}" if changed else "")
    logger = init_logger(f"vllm.{KEY}")
    logger.info("%s", told)
    if not __version__.startswith(tuple(f"{each}." for each in RUN_ON)):
        logger.warning("thinsight was tested on vLLM %s; this is %s", ", ".join(RUN_ON), __version__)


def plan_of(vllm_config: Any) -> Plan:
    """What is to run, of a configuration that asks for a reduction.

    Raises:
        BadInput, Unsupported: it cannot run on this model.
    """
    options = read_options(vllm_config.additional_config)
    if options is None:
        raise BadInput(f'additional_config has no "{KEY}"')
    config = vllm_config.model_config.hf_config
    architecture = config.architectures[0].removeprefix(PREFIX)
    if architecture not in SERVED:
        raise Unsupported(
            f"thinsight does not run {architecture} in vLLM; it runs {', '.join(sorted(SERVED))}, and others on "
            "transformers"
        )
    plan = Plan(
        Reduction.from_pretrained(options.reduction, revision=options.revision), SERVED[architecture], options.per
    )
    if plan.needs(VISION_ATTENTION) and tower_of(config).images != "fixed":  # Pixtral under LLaVA's class
        raise Unsupported(
            f"{plan.ranker.name} reads attention inside the vision tower, which this one has for all images "
            "together; rank by text-attention"
        )
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    if plan.schedule.num_layers != layers:
        raise BadInput(
            f"{options.reduction} is for {plan.schedule.num_layers} layers but the model has {layers}; "
            "search on this model"
        )
    return plan


def refuse(vllm_config: Any, plan: Plan) -> None:
    """Raises Unsupported, naming the option, if another one does not go with a reduction."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    multimodal, split = model.multimodal_config, parallel.tensor_parallel_size > 1
    wrong = {
        "an encoder or pooling runner": model.runner_type != "generate",
        "model_impl='transformers'": model.model_impl == "transformers",
        "prompt embeddings: drop enable_prompt_embeds": model.enable_prompt_embeds,
        "video_pruning_rate, which drops tokens itself": bool(getattr(multimodal, "video_pruning_rate", None)),
        "mm_encoder_only": bool(getattr(multimodal, "mm_encoder_only", False)),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism inside one engine: start one server per replica": parallel.data_parallel_size > 1,
        "context parallelism": max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        "dual batch overlap": bool(parallel.enable_dbo) or parallel.ubatch_size > 1,
        "sequence parallelism": bool(getattr(vllm_config.compilation_config.pass_config, "enable_sp", False)),
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "KV transfer": vllm_config.kv_transfer_config is not None,
        "encoder cache transfer": getattr(vllm_config, "ec_transfer_config", None) is not None,
        "kv_sharing_fast_prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "a worker class of your own": parallel.worker_cls not in ("auto", WORKER),
        f"tensor parallelism and {plan.ranker.name}": split
        and (plan.needs(VISION_ATTENTION) or (plan.needs(TEXT_ATTENTION) and not plan.ranker.pools)),
        f"cudagraph_mm_encoder and {plan.ranker.name}": plan.needs(VISION_ATTENTION)
        and bool(vllm_config.compilation_config.cudagraph_mm_encoder),
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise Unsupported(f"a thinsight reduction cannot run with {what}")


def switch_off(vllm_config: Any) -> list[str]:
    """Switch off what is not right under a reduction, and say what and why."""
    changed = []
    if vllm_config.cache_config.enable_prefix_caching:
        vllm_config.cache_config.enable_prefix_caching = False
        changed.append("prefix caching is off (which tokens a block holds depends on the question)")
    scheduler = vllm_config.scheduler_config
    if scheduler.enable_chunked_prefill:
        scheduler.disable_chunked_mm_input = True
        changed.append("chunked prefill: an image is never cut; a prompt whose question is cut from it is kept whole")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        changed.append("the V1 model runner runs")
    return changed


def share_blocks(vllm_config: Any, plan: Plan, *, hybrid: bool) -> list[str]:
    """Have KV cache blocks allotted for what is kept where vLLM can, and say so, or why not.

    Args:
        hybrid: whether vLLM has groups of layers with blocks of their own on this platform.
    """
    scheduler = vllm_config.scheduler_config
    if not plan.runs:
        return []
    why = ""
    if scheduler.disable_hybrid_kv_cache_manager:
        why = "disable_hybrid_kv_cache_manager is set"
    elif not hybrid:
        why = "vLLM has no hybrid KV cache manager on this platform"
    elif scheduler.scheduler_cls not in (None, SCHEDULER):
        why = "scheduler_cls is set"
    if why:
        return [f"KV cache blocks are for full prompts ({why})"]
    scheduler.scheduler_cls = SCHEDULER
    return [plan.describe_blocks()]


def has_runs(vllm_config: Any) -> bool:
    """Whether `share_blocks` has them so allotted."""
    return bool(vllm_config.scheduler_config.scheduler_cls == SCHEDULER)
