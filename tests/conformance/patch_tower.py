"""Towers in place of those of the package timm, which the suite does without: one convolution from patches on.

They give what `TimmWrapperModel` gives: maps, or rows of tokens behind a CLS token, as transformers 5.23 reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel, TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModelOutput


class PatchTower(PreTrainedModel):
    """Pixels (images, 3, side, side) -> maps (images, hidden, rows, columns) as Gemma 3n's tower."""

    config_class = Gemma3nVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flex_attn = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.model_args
        patch, width = settings["patch_size"], settings.get("embed_dim") or config.hidden_size
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.rows = "embed_dim" in settings  # a ViT's settings
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> TimmWrapperModelOutput:
        """Features of each patch."""
        maps = torch.tanh(self.patches(pixel_values.to(self.dtype))) * 1.5  # models may write over what they get
        if not self.rows:
            return TimmWrapperModelOutput(last_hidden_state=maps)
        rows = maps.flatten(2).transpose(1, 2)
        return TimmWrapperModelOutput(last_hidden_state=torch.cat([rows.mean(1, keepdim=True), rows], dim=1))


class TimmTower(PatchTower):
    """As FastVLM's tower, or with a ViT's settings as PerceptionLM's: (images, 1 + patches, embed_dim)."""

    config_class = TimmWrapperConfig


def register_towers() -> None:
    """From here on these are the towers of every such model that is built."""
    for tower in (PatchTower, TimmTower):
        AutoModel.register(tower.config_class, tower, exist_ok=True)
