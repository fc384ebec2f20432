"""Prompts, tiles and stop tokens of a converted checkpoint against the original's code, written down anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2.exceptions import TemplateError
from original_checkpoints import CHECKPOINTS, VISION_TOKENS, write_checkpoint
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import is_torchvision_available

from thinsight import load_model
from thinsight.convert import convert

SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
ONE_PER_TEMPLATE = ["InternVL2-1B", "InternVL2-2B", "InternVL2-4B", "InternVL3-8B"]


def original_prompt(template: str, turns: list[tuple[str, str | None]], system: str | None = None) -> str:
    """conversation.py's get_prompt for the separator style MPT; a last answer of None is left open."""
    opening, roles, separator, message = {
        "Hermes-2": ("<|im_start|>system\n", ("<|im_start|>user\n", "<|im_start|>assistant\n"), "<|im_end|>", SYSTEM_2),
        "internlm2-chat": (
            "<|im_start|>system\n",
            ("<|im_start|>user\n", "<|im_start|>assistant\n"),
            "<|im_end|>",
            SYSTEM_2,
        ),
        "phi3-chat": ("<|system|>\n", ("<|user|>\n", "<|assistant|>\n"), "<|end|>", SYSTEM_2),
        "internvl2_5": (
            "<|im_start|>system\n",
            ("<|im_start|>user\n", "<|im_start|>assistant\n"),
            "<|im_end|>\n",
            SYSTEM_2_5,
        ),
    }[template]
    prompt = opening + (system or message) + separator
    for question, answer in turns:
        prompt += roles[0] + question + separator
        prompt += roles[1] + (answer + separator if answer else "")
    return prompt


def original_tiles(image: Image.Image, size: int, most: int) -> list[Image.Image]:
    """The model card's dynamic_preprocess with use_thumbnail: the grid nearest in shape, and the whole."""
    width, height = image.size
    grids = sorted(
        {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= most},
        key=lambda grid: grid[0] * grid[1],
    )
    best, smallest = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        large = width * height > 0.5 * size * size * columns * rows
        if difference < smallest or (difference == smallest and large):
            best, smallest = (columns, rows), difference
    columns, rows = best
    whole = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    boxes = [(x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(columns)]
    tiles = [whole.crop(box) for box in boxes]
    return [*tiles, image.resize((size, size), Image.Resampling.BICUBIC)] if len(tiles) > 1 else tiles


def original_pixels(tiles: list[Image.Image]) -> torch.Tensor:
    """ToTensor and ImageNet's mean and standard deviation: (tiles, 3, size, size)."""
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    arrays = [torch.from_numpy(np.asarray(tile).copy()).permute(2, 0, 1) / 255 for tile in tiles]
    return torch.stack([(array - mean) / std for array in arrays])


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make(tmp_path: Path, size: str, **changes: Any) -> Path:
    write_checkpoint(tmp_path / "original", size, **changes)
    return convert(tmp_path / "original", tmp_path / "converted")


@pytest.mark.parametrize("size", ONE_PER_TEMPLATE)
def test_prompt(size: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path, size))
    template = CHECKPOINTS[size]["template"]

    def render(messages: list[dict[str, Any]], **more: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more)

    image, text = {"type": "image"}, {"type": "text", "text": 'What\'s  "this"?\n'}
    first = {"role": "user", "content": [image, image, text]}
    question = '<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhat\'s  "this"?\n'
    expected = original_prompt(template, [(question, None)])
    assert render([first], add_generation_prompt=True) == expected

    later = [{"role": "assistant", "content": "A star."}, {"role": "user", "content": "Sure?"}]
    expected = original_prompt(template, [(question, "A star."), ("Sure?", None)])
    assert render([first, *later], add_generation_prompt=True) == expected
    expected = original_prompt(template, [(question, "A star.")])
    assert render([first, later[0]]) == expected

    own = [{"role": "system", "content": "Be brief."}, first]
    expected = original_prompt(template, [(question, None)], system="Be brief.")
    assert render(own, add_generation_prompt=True) == expected
    with pytest.raises(TemplateError, match="roles user and assistant"):
        render([first, {"role": "tool", "content": "x"}])


def test_own_system_message(tmp_path: Path) -> None:
    out = make(tmp_path, "InternVL3-8B", top={"system_message": 'Say "no".'})
    prompt = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.startswith('<|im_start|>system\nSay "no".<|im_end|>\n<|im_start|>user\nHi')


@pytest.mark.parametrize("size", ONE_PER_TEMPLATE)
def test_stops_where_the_original_stops(size: str, tmp_path: Path) -> None:
    out = make(tmp_path, size)
    tokenizer = AutoTokenizer.from_pretrained(out)
    stop = "<|end|>" if size == "InternVL2-4B" else "<|im_end|>"
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(stop)
    assert generation.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("shape", [(100, 60), (28, 28), (300, 40), (40, 300), (90, 90), (31, 57), (10, 10)])
def test_tiles(shape: tuple[int, int], tmp_path: Path) -> None:
    out = make(tmp_path, "InternVL2-1B", top={"max_dynamic_patch": 6})
    settings = json.loads((out / "processor_config.json").read_text())["image_processor"]
    processor = GotOcr2ImageProcessorPil(**settings)
    image = picture(*shape)
    expected = original_pixels(original_tiles(image, 28, 6))
    made = processor(image, return_tensors="pt")
    assert made["num_patches"].tolist() == [len(expected)]
    torch.testing.assert_close(made["pixel_values"], expected, atol=1e-5, rtol=1e-5)


def test_one_tile(tmp_path: Path) -> None:
    out = make(tmp_path, "InternVL2-1B", top={"dynamic_image_size": False, "use_thumbnail": False})
    settings = json.loads((out / "processor_config.json").read_text())["image_processor"]
    made = GotOcr2ImageProcessorPil(**settings)(picture(100, 30), return_tensors="pt", crop_to_patches=True)
    assert made["pixel_values"].shape == (1, 3, 28, 28)


def test_settings_of_the_processor(tmp_path: Path) -> None:
    settings = json.loads((make(tmp_path, "InternVL2-8B") / "processor_config.json").read_text())
    assert settings["processor_class"] == "InternVLProcessor"
    assert settings["image_seq_length"] == VISION_TOKENS
    assert settings["video_processor"]["size"] == {"height": 28, "width": 28}


@pytest.mark.skipif(not is_torchvision_available(), reason="InternVLProcessor's video part needs torchvision")
@pytest.mark.parametrize("size", CHECKPOINTS)
def test_front_door(size: str, tmp_path: Path) -> None:
    """The whole of it by `load_model`, as any other checkpoint: prompt, image, answer."""
    model, processor = load_model(make(tmp_path, size), device="cpu")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[picture(60, 30)], return_tensors="pt")
    bos = processor.tokenizer.convert_tokens_to_ids("<s>")
    begins = CHECKPOINTS[size]["text"]["architectures"][0] in ("InternLM2ForCausalLM", "Phi3ForCausalLM")
    assert (int(inputs["input_ids"][0, 0]) == bos) is begins
    tiles = len(inputs["pixel_values"])
    assert tiles == 3  # two and the whole
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tiles * VISION_TOKENS
    made = model.generate(**inputs, max_new_tokens=2)
    assert made.shape[1] > inputs["input_ids"].shape[1]
