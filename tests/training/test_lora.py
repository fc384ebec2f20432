"""The packed pass with LoRA computes what the merged stock model computes, and has one loss: the answers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from training.lora import IGNORED, Adapted, Questions, initial_lora, matrix_names, merge_lora

PREFIX, VISION, WORDS = [5, 6, 7], 6, 40


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_lora(model: LlamaForCausalLM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lora = initial_lora(model.model, 4, seed=2)
    return {name: x + 0.2 * torch.randn(x.shape, generator=generator) for name, x in lora.items()}


def two_chunks() -> Questions:
    """Questions of 5 and 3 tokens in the first chunk, one of 6 in the second; the rest is padding."""
    segments = torch.tensor([[0] * 5 + [1] * 3, [2] * 6 + [-1] * 2])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])
    tokens = torch.randint(8, WORDS, (2, 8), generator=torch.Generator().manual_seed(3))
    targets = torch.full((2, 8), IGNORED)
    targets[0, 3:5], targets[0, 7], targets[1, 5] = torch.tensor([9, 2]), 10, 11
    return Questions(tokens, targets, positions, segments)


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(VISION, 32, generator=torch.Generator().manual_seed(4))


def stock_logits(model: LlamaForCausalLM, features: Tensor, question: Tensor) -> Tensor:
    """(tokens of the question, vocabulary): that question alone behind the image."""
    embed = model.model.embed_tokens
    whole = torch.cat((embed(torch.tensor(PREFIX)), features, embed(question)))
    return model(inputs_embeds=whole[None]).logits[0, -len(question) :]


@torch.no_grad()
def test_every_question_is_answered_as_by_the_merged_stock_model_alone(features: Tensor) -> None:
    model, questions = tiny_llama(), two_chunks()
    lora = random_lora(model)
    packed = Adapted(model.model, PREFIX, VISION, compiled=False)
    hidden = packed.hidden(features, questions, list(lora.values()))
    logits = F.linear(hidden, model.lm_head.weight)
    merge_lora(model.model, lora)
    for i in range(3):
        rows = questions.segments.flatten() == i
        alone = stock_logits(model, features, questions.tokens.flatten()[rows])
        torch.testing.assert_close(logits[rows], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lora_adds_nothing_before_training_and_something_after() -> None:
    model = tiny_llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    merge_lora(model.model, initial_lora(model.model, 4, seed=2))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    merge_lora(model.model, random_lora(model))
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"model.{name}.weight" for name in matrix_names(3)}


def test_the_only_loss_is_that_of_the_answers(features: Tensor) -> None:
    """It is the stock model's cross-entropy on the answers' tokens, and nothing is added to it."""
    model, questions = tiny_llama(), two_chunks()
    lora = [x.requires_grad_() for x in random_lora(model).values()]
    losses, right = Adapted(model.model, PREFIX, VISION, compiled=False).losses(features, questions, lora)
    assert list(losses) == ["answer"]
    names = matrix_names(3)
    merge_lora(model.model, {f"{names[i // 2]}.{'AB'[i % 2]}": x.detach() for i, x in enumerate(lora)})
    flat = questions.targets.flatten()
    expected, chosen = [], []
    for i in range(3):
        rows = questions.segments.flatten() == i
        logits = stock_logits(model, features, questions.tokens.flatten()[rows])
        asked = flat[rows] != IGNORED
        expected.append(F.cross_entropy(logits[asked], flat[rows][asked], reduction="none"))
        chosen.append(logits[asked].argmax(-1) == flat[rows][asked])
    torch.testing.assert_close(losses["answer"].detach(), torch.cat(expected).mean(), atol=1e-4, rtol=1e-4)
    assert right.tolist() == torch.cat(chosen).tolist()


def test_no_gradient_reaches_the_frozen_weights(features: Tensor) -> None:
    model = tiny_llama()
    lora = [x.requires_grad_() for x in random_lora(model).values()]
    losses, _ = Adapted(model.model, PREFIX, VISION, compiled=False).losses(features, two_chunks(), lora)
    losses["answer"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(x.grad is not None and bool(x.grad.any()) for x in lora)
