"""Reductions inside vLLM: a plugin that vLLM loads by itself once ``thinsight[vllm]`` is installed.

    vllm serve llava-hf/llava-1.5-7b-hf --additional-config '{"thinsight": "my-reduction"}'
    LLM("llava-hf/llava-1.5-7b-hf", additional_config={"thinsight": "my-reduction"})

Without that option every class is vLLM's own. Nothing of vLLM is copied or replaced: a model class of its own name
derives from the stock one (`model`), attention metadata builders derive from the stock ones (`ledger`), and a worker
tells both which requests run. What of vLLM's configuration cannot run so is refused before weights are loaded
(`settings`).
"""

from __future__ import annotations


def register() -> None:
    """The entry point of the group ``vllm.general_plugins``, called once in every process of vLLM.

    Enters names only: no class of vLLM is loaded, none is changed.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .plan import PREFIX, SERVED
    from .settings import settings_of

    for name in list(ModelRegistry.get_supported_archs()):
        if name in SERVED:
            ModelRegistry.register_model(f"{PREFIX}{name}", f"{__name__}.model:{PREFIX}{name}")
        MODELS_CONFIG_MAP[name] = settings_of(MODELS_CONFIG_MAP.get(name))
