"""Makes `demo-smollm2` of SmolLM2's weights, what was trained on top of them, and the demo's vision tower.

A stock `LlavaForConditionalGeneration` and its processor. Knows nothing about how the parts were trained, nor where
the whole is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

DONOR = Path(__file__).resolve().parent / "demo" / "model"  # whose vision tower and image processor it has
VISION_TOKENS = 256
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
BETWEEN, END = "\n", "<|im_end|>"  # image and question; the end of a turn
# SmolLM2 has no token for an image; this one of its special tokens stands in no text of ours.
SPARE_TOKEN, IMAGE_TOKEN = "<filename>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}" + IMAGE_TOKEN + BETWEEN + "{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_pretrained(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2 in float32, dequantised to plain linear layers, and its tokenizer."""
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    vars(model.config).pop("quantization_config", None)  # with it the model could not be saved
    vars(model.config).pop("_model_name_or_path", None)
    model.config._name_or_path = file.stem  # rather than a path of this machine
    return model, AutoTokenizer.from_pretrained(**where)


def matrix_names(layers: int) -> list[str]:
    """The names, inside a `LlamaModel`, of the linear layers that get an addition."""
    return [f"layers.{i}.{matrix}" for i in range(layers) for matrix in MATRICES]


@torch.no_grad()
def merge_lora(language: nn.Module, lora: dict[str, Tensor]) -> None:
    """Adds B A to every matrix of ``language``, in place, computed in float32."""
    for name in matrix_names(len(language.layers)):
        weight = language.get_submodule(name).weight
        weight.copy_(weight.float() + lora[f"{name}.B"].float() @ lora[f"{name}.A"].float())


def build_config(text: Any, vision: Any, image_token_id: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_token_index=image_token_id,
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def merge(
    pretrained: LlamaForCausalLM, adapter: dict[str, Tensor], tower: nn.Module, image_token_id: int
) -> LlavaForConditionalGeneration:
    """The whole model in float32. Changes ``pretrained``, whose weights get the LoRA added."""
    lora = {name: x for name, x in adapter.items() if not name.startswith("projector.")}
    merge_lora(pretrained.model, lora)
    model = LlavaForConditionalGeneration(build_config(pretrained.config, tower.config, image_token_id))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(pretrained.model.state_dict())
    model.model.multi_modal_projector.load_state_dict(
        {name.removeprefix("projector."): x.float() for name, x in adapter.items() if name.startswith("projector.")}
    )
    model.tie_weights()
    model.generation_config.do_sample = False
    return model.eval()


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The demo's image processor, the spare token renamed, and the prompt that training used."""
    renamed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace(SPARE_TOKEN, IMAGE_TOKEN))
    named = PreTrainedTokenizerFast(
        tokenizer_object=renamed, bos_token="<|im_start|>", eos_token=END, pad_token=END,
        unk_token="<|endoftext|>", additional_special_tokens=[IMAGE_TOKEN], padding_side="left",
    )  # fmt: skip
    donor = LlavaProcessor.from_pretrained(DONOR)
    return LlavaProcessor(
        image_processor=donor.image_processor, tokenizer=named, patch_size=donor.patch_size,
        vision_feature_select_strategy=donor.vision_feature_select_strategy, chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN, num_additional_image_tokens=donor.num_additional_image_tokens,
    )  # fmt: skip


def write_model(weights: Path, adapter: Path, folder: Path) -> None:
    """The stock model folder, float16, of SmolLM2's weights and the file ``adapter``."""
    pretrained, tokenizer = load_pretrained(weights)
    donor = LlavaForConditionalGeneration.from_pretrained(DONOR, dtype=torch.float32)
    image_token_id = tokenizer.convert_tokens_to_ids(SPARE_TOKEN)
    model = merge(pretrained, load_file(adapter), donor.model.vision_tower, image_token_id)
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
