"""Training under a reduction: labels aligned, gradients that flow, checkpointing that changes nothing.

Knows nothing about any one family.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from thinsight.runtime import apply
from thinsight.schedule import Schedule

from .behaviours import behaviour
from .checks import Case, close
from .family import Family, decoder_of
from .inputs import Batch, Row, Spec

CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))
ROWS: tuple[Spec, ...] = ([3, 5], [2, 3, 9])
IGNORED = -100


def labelled(batch: Batch) -> dict[str, Tensor]:
    """A batch with its text as labels; vision tokens and padding are left out, as in any fine-tuning."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    labels = torch.where(mask, ids, IGNORED)
    for number, row in enumerate(batch.rows):
        start = ids.shape[1] - len(row.ids)
        labels[number, start + torch.tensor([0, *row.vision])] = IGNORED  # nothing says the first token
    return {**batch.inputs, "labels": labels}


def loss_by_hand(family: Family, rows: list[Row]) -> float:
    """Cross-entropy of every text token, from the reference's logits of the token in front of it.

    A dropped vision token in front of a text token says nothing: its logits are zeros.
    """
    total, count = 0.0, 0
    for row in rows:
        reference = CASE.reference(family, row)
        logits = reference.read(row)
        vision = row.vision
        for place in set(vision) - {vision[number] for number in reference.kept[3]}:
            logits[place] = 0
        for place in range(1, len(row.ids)):
            if place not in vision:
                total -= float(logits[place - 1].log_softmax(-1)[row.ids[place]])
                count += 1
    return total / count


@behaviour("training")
def test_the_loss_is_the_one_computed_by_hand(family: Family) -> None:
    """Labels stay in the caller's columns, whatever was dropped."""
    batch = family.batch(family.rows(ROWS, 23))
    with CASE.apply(family.model()), torch.no_grad():
        loss = family.model()(**family.placed(labelled(batch))).loss
    assert float(loss) == pytest.approx(loss_by_hand(family, batch.rows), abs=2e-4)


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@behaviour("training")
def test_gradients_flow_and_checkpointing_leaves_them_as_they_are(family: Family) -> None:
    """Every decoder layer learns, and the layers before a reduction learn from those behind it."""
    model, inputs = family.build(), labelled(family.batch(family.rows(ROWS, 24)))
    with CASE.apply(model):
        plain = gradients(model.train(), inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpointed = gradients(model, inputs)
    full = gradients(model, inputs)
    assert checkpointed.keys() == plain.keys() == full.keys()
    for name, gradient in plain.items():
        close(checkpointed[name], gradient)
    layers = decoder_gradients(model, plain)
    assert len(layers) == 4
    assert all(float(norm) > 0 for norm in layers.values())
    assert any(not torch.allclose(full[name], plain[name], atol=1e-3) for name in plain)


def decoder_gradients(model: PreTrainedModel, found: dict[str, Tensor]) -> dict[int, Tensor]:
    """The norm of each decoder layer's gradients."""
    names: Any = {id(p): name for name, p in model.named_parameters()}
    return {
        number: torch.stack([found[names[id(p)]].norm() for p in layer.parameters() if names[id(p)] in found]).norm()
        for number, layer in enumerate(decoder_of(model).layers)
    }


@behaviour("training")
def test_a_few_steps_lower_the_loss(family: Family) -> None:
    model, inputs = family.build(), labelled(family.batch(family.rows(ROWS, 25)))
    optimiser = torch.optim.Adam(decoder_of(model).layers.parameters(), lr=3e-3)
    losses = []
    with apply(model, CASE.schedule):
        for _ in range(4):
            loss = model(**inputs, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
