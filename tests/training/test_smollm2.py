"""The recipe of `demo-smollm2`: resumes exactly, stops when told, and learns from the answers alone."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_smollm2 import RECIPE, plain_tower, tiny_tokenizer, tiny_trainer

from training.assets import load_assets
from training.lora import IGNORED
from training.questions import TASKS, ask
from training.scenes import draw_scene
from training.smollm2 import Projector, Trainer, accuracies, standardising
from training.smollm2_data import CHUNKS, LENGTH, draw_questions, encode_question, names_of, pack, right_answers

ALIKE = dict.fromkeys(TASKS, 1.0)


def finish(trainer: Trainer, steps: int) -> Trainer:
    trainer.run(steps, log_every=2, probe_every=2, probe_images=1, save_s=1000.0)
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    assert one.step == other.step
    assert one.accuracy == other.accuracy
    assert all(torch.equal(x, other.parameters[name]) for name, x in one.parameters.items())
    ours, theirs = one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[i][name]) for i, state in ours.items() for name, x in state.items())


@pytest.mark.parametrize("broken_off", [-1, 0, 2])
def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path, broken_off: int) -> None:
    """Broken off in the first stage, between the stages, and in the second."""
    straight = finish(tiny_trainer(tmp_path / "straight"), 4)
    finish(tiny_trainer(tmp_path / "broken"), broken_off)
    resumed = tiny_trainer(tmp_path / "broken")
    assert resumed.step == RECIPE.naming_steps + broken_off
    assert_same(finish(resumed, 4), straight)
    assert any(bool(x.any()) for name, x in straight.parameters.items() if name.endswith(".B"))


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    assert_same(finish(tiny_trainer(tmp_path / "1", workers=1), 2), finish(tiny_trainer(tmp_path / "3", workers=3), 2))


def test_a_signal_ends_the_run_after_its_step_and_saves_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    step = trainer.train_step

    def step_and_signal() -> tuple[float, list[tuple[str, bool]]]:
        if trainer.step == 3:
            trainer.stop(signal.SIGTERM, None)
        return step()

    trainer.train_step = step_and_signal  # type: ignore[method-assign]
    finish(trainer, 10)
    assert trainer.step == tiny_trainer(tmp_path).step == 4
    assert not list(tmp_path.glob("*.tmp"))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["stopped"] == "to be continued"


def test_decay_ends_a_run_that_may_be_broken_off_too(tmp_path: Path) -> None:
    trainer = finish(tiny_trainer(tmp_path), 3)
    assert trainer.rate() == RECIPE.rate
    trainer.begin_decay(4)
    finish(trainer, 5)
    resumed = tiny_trainer(tmp_path)
    resumed.begin_decay(400)  # goes on with the decay that has begun
    assert resumed.rate() == pytest.approx(RECIPE.rate / 2)
    finish(resumed, 100)
    assert resumed.step == RECIPE.naming_steps + 7
    assert resumed.rate() == 0.0
    assert torch.load(tmp_path / "before-decay.pt", weights_only=True)["step"] == RECIPE.naming_steps + 3


def test_another_recipe_needs_to_be_asked_for(tmp_path: Path) -> None:
    finish(tiny_trainer(tmp_path), 1)
    faster = replace(RECIPE, rate=2e-3)
    with pytest.raises(SystemExit, match="another rate: give the same recipe"):
        tiny_trainer(tmp_path, faster)
    with pytest.raises(SystemExit, match="another rank"):
        tiny_trainer(tmp_path, replace(RECIPE, rank=8), replan=True)
    replanned = tiny_trainer(tmp_path, faster, replan=True)
    assert replanned.replanned == [{"step": replanned.step, "changed": {"rate": [1e-3, 2e-3]}}]


def test_the_second_stage_learns_from_the_answers_alone(tmp_path: Path) -> None:
    """What is differentiated is the answers' cross-entropy: not attention, nor any other inner state."""
    trainer = finish(tiny_trainer(tmp_path), 1)
    leaves = trainer._leaves()
    result = trainer._answer(0, leaves, ALIKE)
    rng, scene = trainer._draw(0, trainer.step, 0)
    asked = draw_questions(rng, scene, ALIKE, trainer.tokenizer)
    features = trainer.projector(plain_tower([scene])[0], leaves[:4])
    losses, right = trainer.adapted.losses(features, asked.questions, leaves[4:])
    assert list(losses) == ["answer"]
    assert result.loss == float(losses["answer"])
    expected = torch.autograd.grad(losses["answer"], leaves)
    assert all(torch.equal(x, y) for x, y in zip(result.gradients, expected, strict=True))
    assert result.answers == right_answers(asked, right)


def test_the_first_stage_trains_the_projector_alone_and_its_loss_falls(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, replace(RECIPE, naming_steps=30))
    before = {name: x.clone() for name, x in trainer.parameters.items()}
    losses = [trainer.train_step()[0] for _ in range(20)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    changed = {name for name, x in trainer.parameters.items() if not torch.equal(x, before[name])}
    assert changed == {f"projector.{name}" for name in Projector.NAMES}


def test_weak_tasks_are_asked_more_often(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.accuracy |= {"color": 1.0, "count": 0.5}
    weights = trainer.weights()
    assert weights["color"] == pytest.approx(0.1)
    assert weights["color"] < weights["count"] < weights["relation"]


def test_the_stock_projector_computes_the_same_without_standardising() -> None:
    projector = standardising(plain_tower, seed=0)
    features = plain_tower([draw_scene(np.random.default_rng(1), load_assets("train"))])
    trained = projector.initial(32, seed=1)
    stock = Projector(torch.zeros(192), torch.ones(192))
    expected = projector(features, list(trained.values()))
    found = stock(features, list(projector.stock(trained).values()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_questions_are_packed_whole_and_none_twice() -> None:
    tokenizer, rng = tiny_tokenizer(), np.random.default_rng(2)
    questions = ask(rng, draw_scene(rng, load_assets("train")), 40, ALIKE)
    asked = pack(questions, tokenizer)
    batch = asked.questions
    assert batch.tokens.shape == (CHUNKS, LENGTH)
    assert 5 < len(asked.tasks) <= len(set(questions))
    texts = []
    for i in range(len(asked.tasks)):
        (chunk,) = set((batch.segments == i).nonzero()[:, 0].tolist())
        here = batch.segments[chunk] == i
        ids, targets = batch.tokens[chunk][here], batch.targets[chunk][here]
        assert batch.positions[chunk][here].tolist() == list(range(len(ids)))
        assert targets[:-1][targets[:-1] != IGNORED].tolist() == ids[1:][targets[:-1] != IGNORED].tolist()
        texts.append(tokenizer.decode(ids.tolist() + targets[-1:].tolist()))
    expected = {tokenizer.decode([*itertools.chain(*encode_question(q, tokenizer))]) for q in questions}
    assert len(set(texts)) == len(texts)
    assert set(texts) <= expected


def test_an_answer_is_right_if_all_of_its_tokens_are() -> None:
    rng = np.random.default_rng(3)
    asked = draw_questions(rng, draw_scene(rng, load_assets("train")), ALIKE, tiny_tokenizer())
    answered = asked.questions.targets != IGNORED
    right = torch.ones(int(answered.sum()), dtype=torch.bool)
    assert all(ok for _, ok in right_answers(asked, right))
    right[1] = False  # of the first question's answer
    assert [ok for _, ok in right_answers(asked, right)] == [False] + [True] * (len(asked.tasks) - 1)
    assert accuracies([("shape", True), ("color", False), ("shape", False)]) == {"color": 0.0, "shape": 0.5}


def test_things_of_a_scene_differ_in_their_names() -> None:
    tokenizer = tiny_tokenizer()
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed), load_assets("train"))
        named = [tuple(names_of(thing)) for thing in scene.things]
        assert len(set(named)) == len(named)
        assert all(len(tokenizer.encode(name)) == 1 for names in named for name in names)
