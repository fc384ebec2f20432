"""lmms-eval's own models under a reduction. The harness finds them by the entry point ``thinsight`` of its group
``lmms_eval.models`` once ``thinsight[lmms-eval]`` is installed:

    python -m lmms_eval --model thinsight_llava_hf --model_args pretrained=ID,reduction=my-reduction --tasks textvqa

`thinsight_NAME` is the harness's class NAME, made by it with all other arguments, prompts and generation settings its
own; the reduction is put on the model that it loaded. Nothing of lmms-eval is imported before it asks.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from PIL import ImageFile

from .harness import Watch, check_told, loud, put_on

PREFIX = "thinsight_"
NAMES = (
    "aria",
    "gemma3",
    "gemma4",
    "glm4v",
    "idefics2",
    "internvl_hf",
    "llama4_scout",
    "llava_hf",
    "mistral3_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "video_llava",
)
"""The harness's names for classes over stock transformers models that a reduction runs on."""


def manifests() -> list[Any]:
    """What the entry point gives: each model, with the kinds (chat, simple) that this release of the harness has.

    Called while ``lmms_eval.models`` is imported, with its tables there already.
    """
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS, AVAILABLE_SIMPLE_MODELS
    from lmms_eval.models.registry_v2 import ModelManifest

    kinds = {"chat": AVAILABLE_CHAT_TEMPLATE_MODELS, "simple": AVAILABLE_SIMPLE_MODELS}
    return [
        ModelManifest(
            model_id=f"{PREFIX}{name}",
            **{f"{kind}_class_path": f"{__name__}.{name}__{kind}" for kind, known in kinds.items() if name in known},
        )
        for name in NAMES
        if any(name in known for known in kinds.values())
    ]


def __getattr__(name: str) -> Any:
    """The class that a manifest names: made when the harness asks for it."""
    model, _, kind = name.rpartition("__")
    if model not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with loud(f"lmms-eval's model {model!r} cannot be imported, see docs/harnesses.md for what it needs"):
        return under_reduction(_stock(model, kind))


def _stock(model: str, kind: str) -> Any:
    """The harness's own class."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    path = getattr(MODEL_REGISTRY_V2.get_manifest(model), f"{kind}_class_path")
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


@cache
def under_reduction(stock: Any) -> Any:
    """A class of the harness whose model runs under a reduction.

    ``reduction=FOLDER`` or ``reduction=HUB_ID``, or ``keep=0.25`` with ``layer=`` and ``ranker=`` (see `put_on`), is
    taken from its arguments, all others are the stock class's. What fails ends the run.
    """

    class UnderReduction(stock):
        def __init__(
            self,
            *args: Any,
            reduction: str | None = None,
            keep: float | None = None,
            layer: int | None = None,
            ranker: str | None = None,
            **kwargs: Any,
        ) -> None:
            with loud("model_args"):
                check_told(reduction, keep, layer, ranker)
            with loud(f"lmms-eval's {stock.__name__} cannot be made"):
                super().__init__(*args, **kwargs)
            with loud("model_args"):
                self.handle = put_on(self.model, reduction, keep, layer, ranker)
            self.watch = Watch(self.model)
            # the harness has it true: half an image would be shown to the model, and nobody told
            ImageFile.LOAD_TRUNCATED_IMAGES = False

        def generate_until(self, requests: Any) -> Any:
            with self.watch.answering(len(requests)):
                return super().generate_until(requests)

        def generate_until_multi_round(self, requests: Any) -> Any:
            with self.watch.answering(len(requests)):
                return super().generate_until_multi_round(requests)

    UnderReduction.__name__ = UnderReduction.__qualname__ = f"{stock.__name__}UnderReduction"
    return UnderReduction
