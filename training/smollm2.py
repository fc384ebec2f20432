"""Trains `demo-smollm2`'s projector and LoRA: `python -m training.smollm2 --out runs/smollm2`.

The demo's vision tower and SmolLM2-135M-Instruct stay as they are. First the projector learns to call every
patch by SmolLM2's own words for what is there; then projector and LoRA learn from the answers. The answer
loss is the only one of that stage: no loss on attention of any kind, nor on anything else inside the model.

The rate stays constant after its warm-up, so a run may be stopped (SIGTERM, Ctrl-C) and continued at any
time, exactly; `--decay STEPS` begins its end, in which the rate falls to 0, and keeps the state before as
`before-decay.pt`. The result depends on the seed, not on the number of workers. Knows nothing about export.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.assets import load_assets
from training.lora import Adapted, initial_lora
from training.model import ARCHITECTURES
from training.packed import normalise
from training.questions import TASKS
from training.scenes import Scene, draw_scene
from training.smollm2_data import (
    BEFORE,
    CHUNKS,
    LENGTH,
    VISION_TOKENS,
    Encoder,
    draw_questions,
    named_patches,
    right_answers,
)
from training.smollm2_export import load_pretrained, pretrained_file
from training.transplant import load_donor

# Streams of random numbers: (seed, stream, step, image).
TRAINING, PROBE, STATISTICS = 0, 1, 2
STATISTICS_SCENES = 64


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes."""

    seed: int = 0
    rank: int = 32
    naming_steps: int = 1500  # of the first stage
    naming_images: int = 8  # a step
    naming_rate: float = 2e-3
    background: float = 0.15  # weight of a patch that shows nothing, in the first stage
    images: int = 4  # a step of the second stage
    rate: float = 1e-3  # of LoRA's B
    rate_a: float = 0.3  # share of it for LoRA's A
    rate_projector: float = 0.3  # share of it for the projector
    warmup: int = 50
    beta2: float = 0.95
    clip: float = 1.0
    least_weight: float = 0.1  # how often a task is asked that is always answered right; never right: + 1
    memory: float = 0.01  # share of a new answer in a task's running accuracy


FIXED = ("seed", "rank", "naming_steps", "naming_images")  # what a run that has begun cannot change


@dataclass
class Result:
    """What one image gave: its loss, the gradients, and (task, right) of its questions."""

    loss: float
    gradients: tuple[Tensor, ...]
    answers: list[tuple[str, bool]]


class Projector:
    """A stock `LlavaMultiModalProjector` in parameters that train well: over standardised features.

    The tower's features have means and deviations far from 0 and 1; `stock` folds them in.
    """

    NAMES = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean, self.deviation = mean, deviation

    def initial(self, width: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = (width, len(self.mean)), (width,), (width, width), (width,)
        spread = len(self.mean) ** -0.5, 0.0, width**-0.5, 0.0
        draws = (torch.randn(shape, generator=generator) for shape in shapes)
        return {name: scale * x for name, scale, x in zip(self.NAMES, spread, draws, strict=True)}

    def __call__(self, features: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """(..., vision width) -> (..., width); parameters in the order of NAMES."""
        first, first_bias, second, second_bias = parameters
        inner = F.gelu(F.linear((features - self.mean) / self.deviation, first, first_bias))
        return F.linear(inner, second, second_bias)

    def stock(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same function of features as they come."""
        weight = parameters["linear_1.weight"] / self.deviation
        bias = parameters["linear_1.bias"] - weight @ self.mean
        return {**parameters, "linear_1.weight": weight, "linear_1.bias": bias}


class Tower:
    """The demo's frozen vision tower: scenes to (images, 256, 192) float32."""

    def __init__(self) -> None:
        self.architecture = ARCHITECTURES["llava"]
        self.model = load_donor().model.vision_tower.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, scenes: list[Scene]) -> Tensor:
        pixels = normalise(np.stack([scene.pixels for scene in scenes]), self.architecture)
        return self.model(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def standardising(tower: Callable[[list[Scene]], Tensor], seed: int) -> Projector:
    """A projector with the mean and deviation of every feature over some scenes."""
    rng, assets = np.random.default_rng((seed, STATISTICS)), load_assets("train")
    features = tower([draw_scene(rng, assets) for _ in range(STATISTICS_SCENES)]).flatten(0, 1)
    return Projector(features.mean(0), features.std(0))


class Trainer:
    """A run in folder ``out``; continues what is there.

    ``language``: the frozen `LlamaModel`, in the precision to compute in.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        language: nn.Module,
        tokenizer: Encoder,
        tower: Callable[[list[Scene]], Tensor],
        workers: int = 1,
        compiled: bool = False,
        replan: bool = False,
    ) -> None:
        self.recipe, self.out, self.replan = recipe, out, replan
        self.tokenizer, self.tower = tokenizer, tower
        self.assets = load_assets("train")
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.adapted = Adapted(language, tokenizer.encode(BEFORE), VISION_TOKENS, compiled)
        self.projector = standardising(tower, recipe.seed)
        self.embeddings = language.embed_tokens.weight.float()
        projector = self.projector.initial(self.embeddings.shape[1], recipe.seed)
        self.parameters = {f"projector.{name}": x for name, x in projector.items()}
        self.parameters |= initial_lora(language, recipe.rank, recipe.seed)
        self.step = 0
        self.decay: list[int] = []  # the step at which the rate begins to fall, and in how many it does
        self.accuracy = dict.fromkeys(TASKS, 0.0)  # of late
        self.replanned: list[dict[str, Any]] = []
        self.stopping = self.prepared = False
        state = self._read()
        self.optimizer = self._optimizer()
        if state is not None:
            self._restore(state)

    @property
    def naming(self) -> bool:
        """Whether the projector still learns words alone."""
        return self.step < self.recipe.naming_steps

    @property
    def trained(self) -> list[str]:
        """The parameters that train in this stage."""
        return [name for name in self.parameters if name.startswith("projector.") or not self.naming]

    def _optimizer(self) -> torch.optim.Optimizer:
        share = {"A": self.recipe.rate_a, "B": 1.0}
        groups: dict[float, list[Tensor]] = defaultdict(list)
        for name in self.trained:
            groups[share.get(name.rpartition(".")[2], self.recipe.rate_projector)].append(self.parameters[name])
        described = [{"params": params, "share": 1.0 if self.naming else s} for s, params in groups.items()]
        return torch.optim.AdamW(described, lr=0.0, betas=(0.9, self.recipe.beta2), weight_decay=0.0, fused=True)

    def rate(self) -> float:
        """The rate of this step: warm-up, then constant; in a stage's end it falls to 0."""
        recipe = self.recipe
        if self.naming:
            left = (recipe.naming_steps - self.step) / recipe.naming_steps
            return recipe.naming_rate * min(1.0, (self.step + 1) / recipe.warmup, 2 * left)
        factor = min(1.0, (self.step - recipe.naming_steps + 1) / recipe.warmup)
        if self.decay:
            begun, length = self.decay
            factor *= max(0.0, 1 - (self.step - begun) / length)
        return recipe.rate * factor

    def weights(self) -> dict[str, float]:
        """How often each task is asked: the more, the less it is answered right."""
        return {task: self.recipe.least_weight + 1 - right for task, right in self.accuracy.items()}

    def _leaves(self) -> list[Tensor]:
        """What gradients are taken of: LoRA in the decoder's precision, the projector in float32."""
        return [
            self.parameters[name]
            .to(torch.float32 if name.startswith("projector.") else self.adapted.dtype, copy=True)
            .requires_grad_()
            for name in self.trained
        ]

    def _draw(self, stream: int, step: int, image: int) -> tuple[np.random.Generator, Scene]:
        rng = np.random.default_rng((self.recipe.seed, stream, step, image))
        return rng, draw_scene(rng, self.assets)

    def _name_patches(self, image: int, leaves: list[Tensor]) -> Result:
        """The first stage: squared distance to the words' embeddings, relative to their squared length."""
        _, scene = self._draw(TRAINING, self.step, image)
        named, shown = named_patches(scene, self.tokenizer, self.embeddings)
        weight = torch.where(shown, 1.0, self.recipe.background)
        distance = (self.projector(self.tower([scene])[0], leaves) - named).pow(2).sum(-1)
        loss = (distance * weight).sum() / (named.pow(2).sum(-1) * weight).sum()
        return Result(loss.item(), torch.autograd.grad(loss, leaves), [])

    def _answer(self, image: int, leaves: list[Tensor], weights: dict[str, float]) -> Result:
        """The second stage: the sum of `Adapted.losses`, which are the answers' alone."""
        rng, scene = self._draw(TRAINING, self.step, image)
        asked = draw_questions(rng, scene, weights, self.tokenizer)
        projector, lora = leaves[: len(Projector.NAMES)], leaves[len(Projector.NAMES) :]
        features = self.projector(self.tower([scene])[0], projector)
        losses, right = self.adapted.losses(features, asked.questions, lora)
        loss = torch.stack(list(losses.values())).sum()
        return Result(loss.item(), torch.autograd.grad(loss, leaves), right_answers(asked, right))

    def train_step(self) -> tuple[float, list[tuple[str, bool]]]:
        """The mean loss, and what was answered."""
        recipe, leaves = self.recipe, self._leaves()
        if self.naming:
            work = [self.pool.submit(self._name_patches, i, leaves) for i in range(recipe.naming_images)]
        else:
            weights = self.weights()
            if not self.prepared:
                self.adapted.prepare(leaves[len(Projector.NAMES) :], CHUNKS, LENGTH)
                self.prepared = True
            work = [self.pool.submit(self._answer, i, leaves, weights) for i in range(recipe.images)]
        results = [one.result() for one in work]
        # In the order of the images, whichever worker was first: sums of floats depend on it.
        for i, name in enumerate(self.trained):
            self.parameters[name].grad = torch.stack([r.gradients[i].float() for r in results]).mean(0)
        nn.utils.clip_grad_norm_([self.parameters[name] for name in self.trained], recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group["share"]
        self.optimizer.step()
        answers = [answer for result in results for answer in result.answers]
        for task, right in answers:
            self.accuracy[task] += recipe.memory * (right - self.accuracy[task])
        self.step += 1
        if self.step == recipe.naming_steps:
            self.optimizer = self._optimizer()
        return float(np.mean([r.loss for r in results])), answers

    @torch.no_grad()
    def probe(self, images: int) -> dict[str, float]:
        """Exact match per task on scenes that are not trained on, all tasks asked alike."""
        leaves = [
            x.to(torch.float32 if name.startswith("projector.") else self.adapted.dtype)
            for name, x in self.parameters.items()
        ]
        projector, lora = leaves[: len(Projector.NAMES)], leaves[len(Projector.NAMES) :]

        def answer(image: int) -> list[tuple[str, bool]]:
            with torch.no_grad():
                rng, scene = self._draw(PROBE, 0, image)
                asked = draw_questions(rng, scene, dict.fromkeys(TASKS, 1.0), self.tokenizer)
                features = self.projector(self.tower([scene])[0], projector)
                return right_answers(asked, self.adapted.losses(features, asked.questions, lora)[1])

        return accuracies([one for answers in self.pool.map(answer, range(images)) for one in answers])

    def run(self, steps: int | None, log_every: int, probe_every: int, probe_images: int, save_s: float) -> None:
        """Until ``steps`` of the second stage, the end of the decay, or `stop`."""
        end = self.recipe.naming_steps + steps if steps is not None else None
        saved = begun = time.monotonic()
        losses: list[float] = []
        answered: list[tuple[str, bool]] = []
        while not self.stopping and not self._finished(end):
            loss, answers = self.train_step()
            losses.append(loss)
            answered += answers
            if self.step % (100 if self.naming else log_every) == 0:
                now = time.monotonic()
                self._log(
                    {
                        "loss": round(float(np.mean(losses)), 4),
                        "step_s": round((now - begun) / len(losses), 2),
                        "rate": round(self.rate(), 7),
                        "train": accuracies(answered),
                    }
                )
                losses, answered, begun = [], [], now
            if not self.naming and self.step % probe_every == 0:
                self.log_probe(probe_images)
                begun = time.monotonic()
            if time.monotonic() - saved > save_s or self.step == self.recipe.naming_steps:
                self.save()
                saved = time.monotonic()
        self.save()
        self._log({"stopped": "finished" if self._finished(end) else "to be continued"})

    def _finished(self, end: int | None) -> bool:
        decayed = bool(self.decay) and self.step >= sum(self.decay)
        return decayed or (end is not None and self.step >= end)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """As a signal's handler: after this step the run is saved and ends."""
        self.stopping = True

    def log_probe(self, images: int) -> None:
        found = self.probe(images)
        self._log({"probe": found, "mean": round(float(np.mean(list(found.values()))), 4)})

    def begin_decay(self, steps: int) -> None:
        """Lets the rate fall to 0 from here on; a decay that has begun goes on as it was."""
        if self.decay:
            return
        if self.naming:
            raise SystemExit("nothing to decay: the projector still learns words alone")
        self.save()
        shutil.copyfile(self.checkpoint, self.out / "before-decay.pt")
        self.decay = [self.step, steps]

    def _log(self, values: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step - self.recipe.naming_steps, "time": round(time.time()), **values})
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        print(line, flush=True)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Atomically: a run that is killed meanwhile finds the one before."""
        state = {
            "recipe": asdict(self.recipe),
            "replanned": self.replanned,
            "step": self.step,
            "decay": self.decay,
            "accuracy": self.accuracy,
            "parameters": {name: x.detach() for name, x in self.parameters.items()},
            "stock_projector": self.stock_projector(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".tmp")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.checkpoint)

    def stock_projector(self) -> dict[str, Tensor]:
        trained = {name: self.parameters[f"projector.{name}"] for name in Projector.NAMES}
        return self.projector.stock(trained)

    def _read(self) -> dict[str, Any] | None:
        """The checkpoint's state, of which the step and the recipe's changes are taken at once."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        before, now = state["recipe"], asdict(self.recipe)
        changed = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
        if changed and (not self.replan or changed.keys() & {*FIXED}):
            raise SystemExit(
                f"{self.checkpoint} was made with another {', '.join(changed)}: give the same recipe, or "
                f"another --out; --replan allows changes other than to {', '.join(FIXED)}"
            )
        self.step, self.replanned = state["step"], list(state["replanned"])
        if changed:
            self.replanned.append({"step": self.step, "changed": changed})
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.decay, self.accuracy = list(state["decay"]), dict(state["accuracy"])
        for name, x in self.parameters.items():
            x.copy_(state["parameters"][name])
        shares = [group["share"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, share in zip(self.optimizer.param_groups, shares, strict=True):
            group["share"] = share
            group["betas"] = (0.9, self.recipe.beta2)


def accuracies(answers: list[tuple[str, bool]]) -> dict[str, float]:
    """The share of right answers of every task that was asked, in the order of TASKS."""
    asked: dict[str, list[bool]] = defaultdict(list)
    for task, right in answers:
        asked[task].append(right)
    return {task: round(float(np.mean(asked[task])), 3) for task in TASKS if task in asked}


def load_smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2's `LlamaModel` and tokenizer.

    In bfloat16 where the CPU multiplies in it; elsewhere that is emulated, and slower than float32.
    """
    model, tokenizer = load_pretrained(pretrained_file())
    capable = torch.cpu.get_capabilities()
    fast = capable.get("amx_bf16") or capable.get("avx512_bf16")
    for parameter in model.model.parameters() if fast else ():  # not the buffers: positions need float32
        parameter.data = parameter.data.bfloat16()
    return model.model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads, an image each")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--replan", action="store_true", help="resume with the changes given here")
    parser.add_argument("--steps", type=int, help="end after so many steps of the second stage")
    parser.add_argument("--decay", type=int, help="let the rate fall to 0 in so many steps, then end")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--probe-every", type=int, default=200)
    parser.add_argument("--probe-images", type=int, default=32)
    parser.add_argument("--save-seconds", type=float, default=300)
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default))
    given = vars(parser.parse_args())
    changed = {f.name: given[f.name] for f in fields(Recipe) if given[f.name] is not None}
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    language, tokenizer = load_smollm2()
    trainer = Trainer(
        replace(Recipe(), **changed), out, language, tokenizer, Tower(), given["workers"],
        not given["no_compile"], given["replan"],
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, trainer.stop)
    if given["decay"]:
        trainer.begin_decay(given["decay"])
    trainer.run(given["steps"], given["log_every"], given["probe_every"], given["probe_images"], given["save_seconds"])


if __name__ == "__main__":
    main()
