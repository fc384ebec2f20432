"""Original InternVL checkpoints in small: configs, random weights with the original names, tokenizer files.

One entry of `CHECKPOINTS` per released size, with the same architecture and tiny widths. Knows nothing about
the converter.
"""

from __future__ import annotations

import io
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

IMAGE_SIZE, PATCH_SIZE = 28, 7  # 4 x 4 patches
VISION_TOKENS = 4  # per tile, after the pixel shuffle
VISION_ROLES = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
SENTENCES = [
    "What color is the triangle left of the blue square?",
    "Describe  the image in two sentences, please.",
    "How many circles are there\nin this picture\tand where?",
    "The chart's highest bar is 42, the lowest one is 7.",
    "Répondez en français: où est le café?",
    "图片里有几个三角形？它们是什么颜色？",  # noqa: RUF001
]

_VIT_300M = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
}
_VIT_6B = {**_VIT_300M, "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_QWEN2 = {
    **_TEXT,
    "architectures": ["Qwen2ForCausalLM"],
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 8,
    "max_window_layers": 1,
}
_INTERNLM2 = {
    **_TEXT,
    "architectures": ["InternLM2ForCausalLM"],
    "num_key_value_heads": 2,
    "bias": False,
    "rope_theta": 1000000,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
}
_PHI3 = {
    **_TEXT,
    "architectures": ["Phi3ForCausalLM"],
    "pad_token_id": 420,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 16,
    "sliding_window": 1024,
    "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.3, 1.4], "long_factor": [1.2, 2.0, 4.0, 9.0]},
}
_LLAMA = {**_TEXT, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, "rope_theta": 5000000.0}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "InternVL2-1B": {"vision": _VIT_300M, "text": _QWEN2, "template": "Hermes-2"},
    "InternVL2-2B": {"vision": _VIT_300M, "text": _INTERNLM2, "template": "internlm2-chat"},
    "InternVL2-4B": {"vision": _VIT_300M, "text": _PHI3, "template": "phi3-chat"},
    "InternVL2-8B": {
        "vision": _VIT_300M,
        "text": {**_INTERNLM2, "num_attention_heads": 8, "num_key_value_heads": 2},
        "template": "internlm2-chat",
    },
    "InternVL2-26B": {
        "vision": _VIT_6B,
        "text": {**_INTERNLM2, "num_key_value_heads": 1},
        "template": "internlm2-chat",
    },
    "InternVL2-40B": {"vision": _VIT_6B, "text": _LLAMA, "template": "Hermes-2"},
    "InternVL2_5-26B": {"vision": _VIT_6B, "text": _INTERNLM2, "template": "internvl2_5"},
    "InternVL3-8B": {"vision": _VIT_300M, "text": _QWEN2, "template": "internvl2_5"},
}


def write_checkpoint(
    folder: Path,
    size: str,
    *,
    text: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a whole original checkpoint; returns its config and its weights.

    Args:
        folder: where to; it is made.
        size: a key of `CHECKPOINTS`.
        text: changes to the text config.
        top: changes to the outer config.
        dtype: of the weights.
        shards: files to spread the weights over; with one there is no index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder, size)
    config = original_config(size, vocabulary, text or {}, top or {})
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(config).items()}
    write_json(folder / "config.json", config)
    write_weights(folder, weights, shards)
    return config, weights


def original_config(size: str, vocabulary: int, text: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    entry = CHECKPOINTS[size]
    vision = {**entry["vision"], "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_channels": 3}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "vision_config": {**vision, "model_type": "intern_vit_6b", "hidden_act": "gelu"},
        "llm_config": {**entry["text"], "vocab_size": vocabulary, **text},
        "template": entry["template"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "force_image_size": IMAGE_SIZE,
        "ps_version": "v2",
        "select_layer": -1,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        **top,
    }


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_weights(folder: Path, weights: dict[str, Tensor], shards: int) -> None:
    """Spread over files at random, as no order of the original's files is promised."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    names = list(weights)
    random.Random(0).shuffle(names)
    files = {f"model-{n + 1:05}-of-{shards:05}.safetensors": names[n::shards] for n in range(shards)}
    for file, chosen in files.items():
        save_file({name: weights[name] for name in chosen}, folder / file)
    weight_map = {name: file for file, chosen in files.items() for name in chosen}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


# -- weights ---------------------------------------------------------------------------------------------


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Float32 weights wide enough that attention is far from flat."""
    generator = torch.Generator().manual_seed(0)
    shapes = {**_vision_shapes(config), **_text_shapes(config["llm_config"])}
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * drawn if name.endswith("bias") else 1 + 0.2 * drawn
    return drawn * (0.5 if "embed" in name else 1.5 / shape[-1] ** 0.5)


def _vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vision, text_width = config["vision_config"], config["llm_config"]["hidden_size"]
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    embeddings = "vision_model.embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        embeddings + "class_embedding": (1, 1, width),
        embeddings + "position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, width),
        embeddings + "patch_embedding.weight": (width, 3, patch, patch),
        embeddings + "patch_embedding.bias": (width,),
        "mlp1.0.weight": (4 * width,),
        "mlp1.0.bias": (4 * width,),
        "mlp1.1.weight": (text_width, 4 * width),
        "mlp1.1.bias": (text_width,),
        "mlp1.3.weight": (text_width, text_width),
        "mlp1.3.bias": (text_width,),
    }
    for layer in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        for name in ("norm1", "norm2"):
            shapes[at + name + ".weight"] = (width,)
            if vision["norm_type"] == "layer_norm":
                shapes[at + name + ".bias"] = (width,)
        shapes[at + "attn.qkv.weight"] = (3 * width, width)
        if vision["qkv_bias"]:
            shapes[at + "attn.qkv.bias"] = (3 * width,)
        if vision["qk_normalization"]:
            shapes[at + "attn.q_norm.weight"] = shapes[at + "attn.k_norm.weight"] = (width,)
        shapes |= {
            at + "attn.proj.weight": (width, width),
            at + "attn.proj.bias": (width,),
            at + "mlp.fc1.weight": (inner, width),
            at + "mlp.fc1.bias": (inner,),
            at + "mlp.fc2.weight": (width, inner),
            at + "mlp.fc2.bias": (width,),
            at + "ls1": (width,),
            at + "ls2": (width,),
        }
    return shapes


def _text_shapes(llm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    build = {"InternLM2ForCausalLM": _internlm2_shapes, "Phi3ForCausalLM": _phi3_shapes}
    return build.get(llm["architectures"][0], _llama_shapes)(llm)


def _sizes(llm: dict[str, Any]) -> tuple[int, int, int]:
    width = llm["hidden_size"]
    return width, llm["intermediate_size"], width // llm["num_attention_heads"] * llm["num_key_value_heads"]


def _internlm2_shapes(llm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    (width, inner, keys), vocabulary = _sizes(llm), llm["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.tok_embeddings.weight": (vocabulary, width),
        "language_model.model.norm.weight": (width,),
        "language_model.output.weight": (vocabulary, width),
    }
    for layer in range(llm["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        shapes |= {
            at + "attention.wqkv.weight": (width + 2 * keys, width),
            at + "attention.wo.weight": (width, width),
            at + "feed_forward.w1.weight": (inner, width),
            at + "feed_forward.w3.weight": (inner, width),
            at + "feed_forward.w2.weight": (width, inner),
            at + "attention_norm.weight": (width,),
            at + "ffn_norm.weight": (width,),
        }
        if llm["bias"]:
            shapes |= {at + "attention.wqkv.bias": (width + 2 * keys,), at + "attention.wo.bias": (width,)}
    return shapes


def _outer_shapes(llm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, vocabulary = llm["hidden_size"], llm["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (vocabulary, width),
        "language_model.model.norm.weight": (width,),
    }
    if not llm["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (vocabulary, width)
    for layer in range(llm["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (width,)
    return shapes


def _phi3_shapes(llm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, keys = _sizes(llm)
    shapes = _outer_shapes(llm)
    for layer in range(llm["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        shapes |= {
            at + "self_attn.qkv_proj.weight": (width + 2 * keys, width),
            at + "self_attn.o_proj.weight": (width, width),
            at + "mlp.gate_up_proj.weight": (2 * inner, width),
            at + "mlp.down_proj.weight": (width, inner),
        }
    return shapes


def _llama_shapes(llm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, keys = _sizes(llm)
    shapes = _outer_shapes(llm)
    for layer in range(llm["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        for part, rows in (("q", width), ("k", keys), ("v", keys)):
            shapes[f"{at}self_attn.{part}_proj.weight"] = (rows, width)
            if llm["architectures"] == ["Qwen2ForCausalLM"]:
                shapes[f"{at}self_attn.{part}_proj.bias"] = (rows,)
        shapes |= {
            at + "self_attn.o_proj.weight": (width, width),
            at + "mlp.gate_proj.weight": (inner, width),
            at + "mlp.up_proj.weight": (inner, width),
            at + "mlp.down_proj.weight": (width, inner),
        }
    return shapes


# -- tokenizers ------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, size: str) -> int:
    """Write the tokenizer's original files; returns the size of the vocabulary."""
    architecture = CHECKPOINTS[size]["text"]["architectures"][0]
    return {
        "InternLM2ForCausalLM": _write_internlm2_tokenizer,
        "Qwen2ForCausalLM": _write_qwen2_tokenizer,
        "Phi3ForCausalLM": _write_phi3_tokenizer,
        "LlamaForCausalLM": _write_yi_tokenizer,
    }[architecture](folder)


@lru_cache(maxsize=8)
def sentencepiece_model(*, dummy_prefix: bool, extra: tuple[str, ...] = (), **more: Any) -> bytes:
    """A small BPE model with byte fallback, trained on `SENTENCES`; ``extra`` are user-defined pieces."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        byte_fallback=True,
        user_defined_symbols=list(extra),
        add_dummy_prefix=dummy_prefix,
        num_threads=1,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "vocab_size": 420,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            **more,
        },
    )
    return written.getvalue()


def _token(content: str, rstrip: bool = False) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False, "special": True}
    return {"content": content, **flags}


def _write_internlm2_tokenizer(folder: Path) -> int:
    """Six reserved pieces inside the vocabulary are renamed, the vision tokens come after it."""
    reserved = tuple(f"[UNUSED_TOKEN_{n}]" for n in range(141, 147))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix=False, extra=reserved))
    chat = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
    added = {0: "<unk>", 1: "<s>", 2: "</s>", **dict(enumerate(chat, 3)), **dict(enumerate(VISION_ROLES, 420))}
    settings = {
        "added_tokens_decoder": {str(number): _token(text) for number, text in added.items()},
        "additional_special_tokens": [*chat, *VISION_ROLES],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "added_tokens.json", {text: number for number, text in added.items() if number >= 420})
    return 420 + len(VISION_ROLES)


def _write_phi3_tokenizer(folder: Path) -> int:
    """Llama's tokenizer, not the legacy one; its chat tokens eat the white space behind them."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix=True))
    chat = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    texts = ["<unk>", "<s>", "</s>"]
    tokens = {str(number): _token(text) for number, text in enumerate(texts)}
    tokens |= {str(420 + n): _token(text, rstrip=text != "<|endoftext|>") for n, text in enumerate(chat)}
    tokens |= {str(425 + n): _token(text) for n, text in enumerate(VISION_ROLES)}
    settings = {
        "added_tokens_decoder": tokens,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 131072,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    return 425 + len(VISION_ROLES)


def _write_yi_tokenizer(folder: Path) -> int:
    """Llama's legacy tokenizer over a model without a dummy prefix; added tokens in a file of their own."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix=False))
    added = dict(enumerate(("<|im_start|>", "<|im_end|>", *VISION_ROLES), 420))
    settings = {
        "additional_special_tokens": list(added.values()),
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": _token("<s>"),
        "eos_token": _token("</s>"),
        "unk_token": _token("<unk>"),
        "pad_token": None,
        "model_max_length": 4096,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "added_tokens.json", {text: number for number, text in added.items()})
    return 420 + len(added)


def _write_qwen2_tokenizer(folder: Path) -> int:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.model.save(str(folder))  # vocab.json and merges.txt
    first = backend.get_vocab_size()
    added = dict(enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_ROLES), first))
    settings = {
        "added_tokens_decoder": {str(number): _token(text) for number, text in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *VISION_ROLES],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "model_max_length": 8192,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "added_tokens.json", {text: number for number, text in added.items()})
    return first + len(added)
