"""What releases of transformers that pyproject.toml allows get wrong themselves, without any reduction.

Tests that hold a model to the reference are left out where the stock model does not pass them either. On
transformers 5.23 nothing is. Knows nothing about the library under test.
"""

from __future__ import annotations

from typing import NamedTuple

import transformers
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

INSTALLED = tuple(int(part) for part in transformers.__version__.split(".")[:2])


class Fault(NamedTuple):
    """One of them."""

    first: tuple[int, int]  # release that has it
    mended: tuple[int, int]  # release that has it no more
    tests: str  # regular expression of their ids
    reason: str


FAULTS = (
    Fault(
        (5, 19),
        (5, 20),
        r"test_replayed_answers_under_other_settings\[eager",
        "eager attention makes its mask from a number on the host, which cannot be recorded",
    ),
    Fault((5, 20), (5, 21), r"[\[-]smolvlm\b", "SmolVLM runs only where an image has a multiple of patch_size tokens"),
    Fault(
        (5, 19),
        (5, 23),
        r"later_turn\[(gemma3|qwen3-vl)-image|same_cache_equals_the_reference\[gemma3-new image|"
        r"test_a_cached_prefix_serves_several_prompts\[gemma3\]",
        "Gemma 3 and Qwen3-VL read a new image in a later turn wrongly",
    ),
    Fault((5, 19), (5, 23), "test_each_chunk_of_a_prompt", "chunked prefill loses the images"),
    Fault((5, 24), (5, 25), r"\[llama4", "Llama 4 looks for image outputs that its decoder does not give"),
    Fault((5, 24), (5, 25), "fail_in_the_stock_kimi", "there they do not fail any more"),
    Fault((5, 19), (5, 23), "checkpointing_leaves_them_as_they_are", "layers are checkpointed with hooks"),
)


def takes_adapters() -> bool:
    """Whether transformers' own `add_adapter` works with the PEFT that is installed; transformers 5.24 asks
    for one that is not out yet."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


def faults(installed: tuple[int, ...] = INSTALLED) -> list[Fault]:
    """Those of a release."""
    return [fault for fault in FAULTS if fault.first <= installed < fault.mended]
