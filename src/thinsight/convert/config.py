"""The original's settings as stock files: config.json, the chat template, the processor, generation settings.

What the stock config cannot say exactly is refused. The files are written rather than saved from an
`InternVLProcessor`, which cannot be made where torchvision is not installed. Sources: `load_image` of the model cards,
internvl_chat/internvl/train/dataset.py (`dynamic_preprocess`) and conversation.py of github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, LlamaConfig, Phi3Config, PreTrainedTokenizerFast, Qwen2Config

from ..errors import BadInput, ThinsightError, Unsupported

_SHARED_TEXT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling bos_token_id eos_token_id "
    "pad_token_id"
)
_INTERNLM2_DEFAULTS = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bias": True,
}
_VISION_DEFAULTS = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
_VISION_RENAMED = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "initializer_factor": "layer_scale_init_value",
}
_QK_NORM_EPS = 1e-6  # fixed in InternVLVisionAttention
_TEXT_CONFIGS: dict[str, tuple[Any, tuple[str, ...]]] = {  # the stock class, and what it has besides _SHARED_TEXT
    "InternLM2ForCausalLM": (LlamaConfig, ("attention_bias",)),
    "Qwen2ForCausalLM": (Qwen2Config, ("use_sliding_window", "sliding_window", "max_window_layers")),
    "Phi3ForCausalLM": (Phi3Config, ("original_max_position_embeddings", "sliding_window")),
    "LlamaForCausalLM": (LlamaConfig, ("attention_bias", "mlp_bias", "head_dim")),
}
_ROPE_TYPES = {
    "InternLM2ForCausalLM": ("linear", "dynamic"),
    "Phi3ForCausalLM": ("su", "longrope"),  # the first is the second's name in the original code
}


def check_original(config: Mapping[str, Any], name: str) -> None:
    """Refuse what is not an original InternVL checkpoint, or is one that stock transformers cannot run."""
    kind = config.get("model_type")
    if kind == "internvl":
        raise BadInput(f"model {name!r} is converted already (model_type 'internvl'): use it as it is")
    if kind != "internvl_chat":
        raise Unsupported(
            f"model {name!r} has model_type {kind!r}: convert takes original InternVL checkpoints, whose "
            "model_type is 'internvl_chat'"
        )
    for part in ("vision_config", "llm_config"):
        if not isinstance(config.get(part), dict):
            raise BadInput(f"model {name!r} has no {part} in config.json: download the checkpoint anew")
        if config[part].get("quantization_config") is not None:
            raise Unsupported(f"model {name!r} is quantized: convert the original checkpoint instead")
    for lora in ("use_backbone_lora", "use_llm_lora"):
        if config.get(lora):
            raise BadInput(f"model {name!r} has {lora} {config[lora]!r}: merge its LoRA weights before converting it")
    if config.get("ps_version", "v1") != "v2":
        raise BadInput(
            f"model {name!r} has ps_version {config.get('ps_version', 'v1')!r}: InternVL 2 and later have "
            "'v2', and transformers knows no other pixel shuffle"
        )
    if config.get("pad2square"):
        raise BadInput(f"model {name!r} has pad2square, which stock image processors do not do")
    if _tiles(config) > 1 and not config.get("use_thumbnail", False):
        raise BadInput(
            f"model {name!r} has use_thumbnail false with {_tiles(config)} tiles: the stock image processor "
            "always adds the thumbnail; set dynamic_image_size to false in a copy of its config.json"
        )
    architecture_of(config)


def _tiles(config: Mapping[str, Any]) -> int:
    return int(config.get("max_dynamic_patch", 6)) if config.get("dynamic_image_size", False) else 1


def architecture_of(config: Mapping[str, Any]) -> str:
    """The original text model's class name; refused if it is not supported."""
    architectures = config["llm_config"].get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in _TEXT_CONFIGS:
        raise Unsupported(
            f"llm_config.architectures is {architectures!r} in config.json; supported: {', '.join(_TEXT_CONFIGS)}"
        )
    return str(name)


def image_size_of(config: Mapping[str, Any]) -> int:
    """Height and width in pixels of the tiles that the vision tower reads."""
    return int(config.get("force_image_size") or _vision_field(config, "image_size"))


def vision_depths(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many vision layers are needed for ``select_layer`` (hidden state i is the output of i layers), and how many
    there are. Refused: a state that the tower does not have, or its input."""
    stored = int(_vision_field(config, "num_hidden_layers"))
    selected = config.get("select_layer", -1)
    needed = selected if selected >= 0 else stored + 1 + selected
    if not 1 <= needed <= stored:
        raise BadInput(f"select_layer is {selected} in config.json, but the vision tower has {stored} layers")
    return needed, stored


def convert_config(config: Mapping[str, Any], *, tied: bool, image_token_id: int, dtype: str) -> InternVLConfig:
    """The stock config of a checkpoint that `check_original` let through. ``tied``: it stores no output embeddings,
    because they are the input embeddings. Refused: a field that is missing, of the wrong kind, or without counterpart.
    """
    image_size, patch_size = image_size_of(config), _vision_field(config, "patch_size")
    ratio = config.get("downsample_ratio", 0.5)
    try:
        text = _convert_text(architecture_of(config), config["llm_config"])
        text.tie_word_embeddings = tied
        return InternVLConfig(
            vision_config=_convert_vision(config),
            text_config=text,
            image_token_id=image_token_id,
            image_seq_length=int((image_size // patch_size) ** 2 * ratio**2),
            downsample_ratio=ratio,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=tied,
            architectures=["InternVLForConditionalGeneration"],
            dtype=dtype,
        )
    except ThinsightError:
        raise
    except Exception as error:  # transformers' own validation has several kinds
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"config.json does not make a valid InternVLConfig ({reason}): download the checkpoint anew"
        ) from error


def _vision_field(config: Mapping[str, Any], name: str) -> Any:
    return config["vision_config"].get(name, _VISION_DEFAULTS[name])


def _convert_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = {name: _vision_field(config, name) for name in _VISION_DEFAULTS}
    if vision["qk_normalization"] and vision["layer_norm_eps"] != _QK_NORM_EPS:
        raise BadInput(
            f"vision_config.layer_norm_eps is {vision['layer_norm_eps']} with qk_normalization: transformers "
            f"fixes it to {_QK_NORM_EPS} there"
        )
    stock = {_VISION_RENAMED.get(name, name): value for name, value in vision.items()}
    return {**stock, "num_hidden_layers": vision_depths(config)[0]}


def _convert_text(architecture: str, llm: Mapping[str, Any]) -> Any:
    """The stock text config; InternLM2 computes what Llama computes, ``bias`` being that of its attention."""
    kind, own = _TEXT_CONFIGS[architecture]
    scaling = llm.get("rope_scaling")
    if scaling is not None and architecture in _ROPE_TYPES:
        form = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
        if form not in _ROPE_TYPES[architecture]:
            raise Unsupported(
                f"llm_config.rope_scaling is of type {form!r} in config.json; supported for {architecture}: "
                f"{', '.join(_ROPE_TYPES[architecture])}"
            )
    if architecture == "InternLM2ForCausalLM":
        llm = {**_INTERNLM2_DEFAULTS, **llm}
        llm["attention_bias"] = llm["bias"]
    fields = {name: llm[name] for name in (*_SHARED_TEXT.split(), *own) if name in llm}
    if kind is Phi3Config:
        # a window as long as the longest sequence never hides a key; without it the cache stays a plain one
        window, longest = fields.get("sliding_window"), fields.get("max_position_embeddings", 4096)
        if window is not None and window >= longest:
            fields["sliding_window"] = None
        if scaling is not None:
            factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
            fields["rope_scaling"] = {"rope_type": "longrope", **factors}
    return kind(**fields)


IMAGE_TOKEN = "<IMG_CONTEXT>"
VIDEO_TOKEN = "<video>"  # the processor replaces it; the model never sees it

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "  # noqa: RUF001
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Conversation:
    """How a conversation becomes one string: every message is its role's opening, its text, ``end``."""

    system_message: str
    system: str = "<|im_start|>system\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>"


_CONVERSATIONS = {
    "Hermes-2": Conversation(_SYSTEM_2),
    "internlm2-chat": Conversation(_SYSTEM_2),
    "phi3-chat": Conversation(_SYSTEM_2, "<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
    "internvl2_5": Conversation(_SYSTEM_2_5, end="<|im_end|>\n"),
}


def find_conversation(config: dict[str, Any]) -> Conversation:
    """The template that an original config.json names, with its own ``system_message`` where it has one."""
    name = config.get("template")
    if name not in _CONVERSATIONS:
        raise Unsupported(f"template is {name!r} in config.json; supported: {', '.join(_CONVERSATIONS)}")
    own = config.get("system_message")
    return replace(_CONVERSATIONS[name], system_message=own) if isinstance(own, str) else _CONVERSATIONS[name]


def chat_template(conversation: Conversation) -> str:
    """A Jinja chat template that renders what the original code renders; an image is its token and a line break."""
    default, system, user, assistant, end = map(_literal, astuple(conversation))
    return "".join(
        (
            "{%- macro render(content) -%}",
            "{%- if content is string -%}{{- content -}}{%- else -%}{%- for item in content -%}",
            "{%- if item['type'] == 'image' -%}{{- " + _literal(IMAGE_TOKEN + "\n") + " -}}",
            "{%- elif item['type'] == 'video' -%}{{- " + _literal(VIDEO_TOKEN + "\n") + " -}}",
            "{%- else -%}{{- item['text'] -}}{%- endif -%}",
            "{%- endfor -%}{%- endif -%}",
            "{%- endmacro -%}",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set system, turns = render(messages[0]['content']), messages[1:] -%}",
            "{%- else -%}",
            "{%- set system, turns = " + default + ", messages -%}",
            "{%- endif -%}",
            "{{- " + system + " + system + " + end + " -}}",
            "{%- for message in turns -%}",
            "{%- if message['role'] == 'user' -%}{{- " + user + " -}}",
            "{%- elif message['role'] == 'assistant' -%}{{- " + assistant + " -}}",
            "{%- else -%}{{- raise_exception('a conversation has the roles user and assistant, ",
            "after at most one system message') -}}{%- endif -%}",
            "{{- render(message['content']) + " + end + " -}}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- " + assistant + " -}}{%- endif -%}",
        )
    )


def _literal(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BICUBIC = 3  # PIL's number


def write_processor(
    folder: Path,
    config: Mapping[str, Any],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    image_seq_length: int,
) -> None:
    """Write processor_config.json, chat_template.jinja and the tokenizer's files; ``config`` is the original one,
    ``image_seq_length`` counts the vision tokens of one tile."""
    size, tiled = image_size_of(config), bool(config.get("dynamic_image_size", False))
    pixels = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _IMAGENET_MEAN,
        "image_std": _IMAGENET_STD,
    }
    tiles = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": tiled,
        "min_patches": int(config.get("min_dynamic_patch", 1)) if tiled else 1,
        # one patch is one whole image, which also holds where a processor turns cropping on by itself
        "max_patches": _tiles(config),
    }
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": image_seq_length,
        "image_processor": {**pixels, **tiles},
        "video_processor": {**pixels, "video_processor_type": "InternVLVideoProcessor"},
    }
    text = json.dumps(processor, indent=2, sort_keys=True) + "\n"
    (folder / "processor_config.json").write_text(text, encoding="utf-8")
    tokenizer.chat_template = chat_template(conversation)
    tokenizer.save_pretrained(folder)  # writes chat_template.jinja too


def stop_token_id(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> int:
    """The token at which the original's `chat` ends an answer; refused if the tokenizer lacks it."""
    stop_token = conversation.end.strip()
    number = tokenizer.convert_tokens_to_ids(stop_token)
    if number is None or number == tokenizer.unk_token_id:
        raise BadInput(
            f"the tokenizer has no {stop_token!r}, which ends a message in this checkpoint's "
            "template: they belong to different checkpoints"
        )
    return int(number)
