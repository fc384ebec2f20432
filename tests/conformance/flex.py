"""Flex attention as torch itself computes it without a compiler: slow, exact, and without a C++ toolchain.

Knows nothing about the library under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from transformers import masking_utils
from transformers.integrations import flex_attention as integration


def _plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
    return flex.flex_attention(query, key, value, **options)


def _block_mask(*args: Any, **options: Any) -> Any:
    return flex.create_block_mask(*args, **{**options, "_compile": False})


@contextmanager
def uncompiled_flex() -> Iterator[None]:
    """While it lasts, transformers' flex attention and its masks run without torch.compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(integration, "compile_friendly_flex_attention", _plain)
        patch.setattr(masking_utils, "create_block_mask", _block_mask)
        yield
