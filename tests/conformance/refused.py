"""Models that cannot run under a reduction, and what their users are told.

Knows nothing about how the refusal is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import transformers
from transformers import PreTrainedModel

from .families import FAMILIES, config, text
from .inputs import BOS, EOS, PAD, VOCABULARY


def mllama() -> PreTrainedModel:
    """Images by cross-attention layers."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_output_dim": 64,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    decoder = text("mllama_text_model", cross_attention_layers=[1], rope_parameters=rope)
    settings = transformers.MllamaConfig(text_config=decoder, vision_config=vision)
    return transformers.MllamaForConditionalGeneration._from_config(settings)


def florence2() -> PreTrainedModel:
    """An encoder-decoder."""
    bart = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 4,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": BOS,
    }
    tower = {
        "depths": [1],
        "embed_dim": [32],
        "num_heads": [2],
        "num_groups": [2],
        "patch_size": [7],
        "patch_stride": [4],
        "patch_padding": [3],
        "patch_prenorm": [False],
        "projection_dim": 32,
    }
    settings = transformers.Florence2Config(**config(bart, tower))
    return transformers.Florence2ForConditionalGeneration._from_config(settings)


def lfm2() -> PreTrainedModel:
    """A hybrid whose convolution layers carry a state along the sequence."""
    tower = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 7,
        "num_patches": 16,
    }
    decoder = text("lfm2", layer_types=["conv", "full_attention"] * 2)
    settings = transformers.Lfm2VlConfig(**config(decoder, tower))
    return transformers.Lfm2VlForConditionalGeneration._from_config(settings)


def minimax_m3() -> PreTrainedModel:
    """Layers that choose blocks of keys by their place in the cache."""
    family = FAMILIES["minimax-m3-vl"]
    kinds = {**family.config["text_config"], "layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
    index = {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2}
    return replace(family, config={**family.config, "text_config": {**kinds, **index}}).build()


def llama() -> PreTrainedModel:
    """A text model."""
    return transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**text("llama")))


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mllama": (mllama, "'mllama' reads images by cross-attention"),
    "florence2": (florence2, "'florence2' is an encoder-decoder"),
    "minimax-m3-sparse": (minimax_m3, r"'minimax_m3_vl' has layers \(minimax_m3_sparse\) that choose"),
    "llama": (llama, "model_type is 'llama', which transformers .* does not load as a model that answers"),
}
