"""Flash attention's calling convention (two-dimensional masks, causal by itself), played by a stand-in on the
CPU."""

from __future__ import annotations

import pytest
import torch
from reference import Reference, unpadded
from tiny import tiny_inputs, tiny_llava
from torch import Tensor
from transformers import AttentionInterface

from thinsight.runtime import apply
from thinsight.schedule import Schedule


def stand_in(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    """What flash attention computes: causal, aligned to the last key, padding from a (batch, keys) mask."""
    assert mask is None or mask.ndim == 2
    positions = kwargs.get("position_ids")
    assert positions is None or positions.shape[-1] == query.shape[2]
    assert positions is None or query.shape[0] > 1 or (positions.diff() == 1).all()
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None]
    if mask is not None:
        seen = seen & mask.bool()[:, None, :]
    groups = module.num_key_value_groups
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * kwargs["scaling"]
    weights = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize(
    "rows", [[[3, 5]], [[3, 5], [2, 3, 9], [7]], [[3, 21], [2, 3, 3]]], ids=["single", "padded", "ragged"]
)
def test_reduced_flash_equals_reference(rows: list[list[int]]) -> None:
    schedule = Schedule([1, 0.7, 0.3, 0.3])
    model, slow = tiny_llava(), tiny_llava("eager")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    batch = tiny_inputs(rows, seed=51)
    with apply(model, schedule):
        out = model.generate(
            **batch,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row in range(len(rows)):
        reference = Reference(slow, schedule)
        logits = reference.read(*unpadded(batch, row))[-1]
        for step, token in enumerate(out.sequences[row, -4:].tolist()):
            torch.testing.assert_close(out.logits[step][row], logits, atol=2e-4, rtol=2e-4)
            logits = reference.answer(token)
