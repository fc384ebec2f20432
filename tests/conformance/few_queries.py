"""DeepSeek-OCR 2 with few queries: the stock class makes 144 or 256 of them, whatever its config says, which are more
tokens than the suite's schedules, ties and minutes are made for.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn


def heed_queries() -> None:
    """From here on a DeepSeek-OCR 2 tower whose config has a number of `queries` gets so many; others stay stock."""
    if not hasattr(transformers, "DeepseekOcr2VisionModel"):
        return
    kind: Any = transformers.DeepseekOcr2VisionModel
    if hasattr(kind.__init__, "__wrapped__"):
        return
    stock = kind.__init__

    def init(self: Any, config: Any) -> None:
        stock(self, config)
        if getattr(config, "queries", None):
            self.query_768_resolution = nn.Embedding(config.queries, config.encoder_config.hidden_size)

    init.__wrapped__ = stock  # type: ignore[attr-defined]
    kind.__init__ = init
