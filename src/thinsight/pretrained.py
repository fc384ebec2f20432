"""One line in transformers: `from_pretrained(name, quantization_config=ts.ReductionConfig("my-reduction"))`.

transformers lets others in where a checkpoint is prepared for quantisation, and keeps in config.json what they were
told. A reduction leaves the weights as they are, so it takes that place and is put on once they are loaded. Knows
nothing about how a reduction runs.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import BadInput
from .reduction import Reduction
from .runtime import apply
from .schedule import Schedule

METHOD = "thinsight"


@register_quantization_config(METHOD)
class ReductionConfig(QuantizationConfigMixin):
    """A reduction as transformers' `from_pretrained` takes it, by `quantization_config=`.

    The model that it gives runs under the reduction (`thinsight.remove(model)` takes it off). `save_pretrained` writes
    the reduction into config.json, whole, and loading that folder puts it on again, in a process that has touched
    `thinsight.ReductionConfig`; in others transformers says that it skips an unknown method, and loads the model
    without. The place is the one of quantisation: for quantised weights use `thinsight.apply`.

    Args:
        reduction: a `Reduction`, its folder or Hub id, or what `Reduction.to_dict` gives.
        per: as for `thinsight.apply`.

    Raises:
        ThinsightError: no reduction there; at loading, whatever `thinsight.apply` refuses.
    """

    def __init__(
        self, reduction: Reduction | str | os.PathLike[str] | dict[str, Any], per: str = "image", **other: Any
    ):
        # transformers hands down whatever stands in config.json, its own `quant_method` included
        unknown = sorted(other.keys() - {"quant_method"})
        if unknown:
            raise BadInput(f"ReductionConfig takes no {unknown[0]!r}: it takes reduction and per")
        self.quant_method = METHOD
        self.reduction = _read(reduction)
        self.per = per

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, which stand in the model's config.json."""
        return {"quant_method": METHOD, "reduction": self.reduction.to_dict(), "per": self.per}

    def __deepcopy__(self, memo: Any) -> ReductionConfig:
        return copy.copy(self)  # nothing in it changes


def _read(reduction: Any) -> Reduction:
    if isinstance(reduction, Reduction):
        return reduction
    if isinstance(reduction, Schedule):
        return Reduction(reduction)
    if isinstance(reduction, dict):
        return Reduction.from_dict(reduction, "config.json: quantization_config.reduction")
    if isinstance(reduction, (str, os.PathLike)):
        return Reduction.from_pretrained(reduction)
    raise BadInput(f"reduction is a {type(reduction).__name__}; pass a Reduction, its folder or its Hub id")


@register_quantizer(METHOD)
class _Loader(HfQuantizer):
    """Puts the reduction on once the weights are there."""

    requires_calibration = False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        apply(model, self.quantization_config.reduction, per=self.quantization_config.per)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
