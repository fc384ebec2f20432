"""Trains a demo model in one command: `python -m training.train --model internvl --out runs/demo-internvl`.

Stages: the vision tower with its patch labels; then everything, with the answer, patch and attention losses.
Deterministic for a seed and a number of workers, resumable (a checkpoint every 50 steps), logged as JSON
lines. A run that is resumed with `--replan` may change what is still to come, its length above all; what was
changed, and at which step, stands in its recipe.json. Data-parallel over single-threaded processes, which on
CPUs beats one process with many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parameters_to_vector

from training.assets import load_assets
from training.model import ARCHITECTURES
from training.muon import Muon
from training.packed import AuxiliaryHead, Packed, make_batch
from training.questions import COARSE_WEIGHTS, FIRST_WEIGHTS, LAST_WEIGHTS, LATER_WEIGHTS, TASKS
from training.transplant import align, load_donor, transplant, transplant_tower

PROBE_SEED, PROBE_IMAGES = 7, 20  # scenes of the calibration material on which training is watched


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes. Losses join at steps counted from the joint stage."""

    model: str = "llava"
    seed: int = 0
    workers: int = 2
    batch: int = 32  # images a step, over all workers
    vision_steps: int = 500
    steps: int = 1950  # of the joint stage
    warmup: int = 60
    decay: float = 0.6  # the last share of the joint steps in which the rate falls linearly to 0
    muon_rate: float = 0.02
    adam_rate: float = 0.002
    weight_decay: float = 0.02
    vision_rate: float = 0.3  # factor on the vision tower's rate once the decoder trains too
    last_vision_rate: float = 1.0
    later: int = 700  # the step from which hard tasks prevail
    last: int = 1600  # the step from which the hardest do, and the vision tower has its last rate
    patch_weight: float = 1.0
    grounding_weight: float = 0.4
    naming: int = 700  # the step from which words must point at what they name
    naming_weight: float = 0.4
    reading: int = 900  # the step from which words must know what they name
    reading_weight: float = 0.5
    context: int = 1100  # the step from which they must know the question they stand in
    context_weight: float = 0.5
    comparing: int = 1600  # the step from which two things are compared in so many words
    comparing_weight: float = 0.5
    grounded_layers: int = 5  # drawn anew each step among the layers after the first
    layers: int = 12
    start_from: str = ""  # "demo": both stages start with that part of the embedded LLaVA demo


RECIPES = {
    "llava": Recipe(),
    "internvl": Recipe(
        model="internvl", layers=ARCHITECTURES["internvl"].layers, batch=16, vision_steps=120, steps=1000,
        muon_rate=0.01, adam_rate=0.0015, vision_rate=0.5, last_vision_rate=0.5, later=200, last=500,
        naming=0, reading=0, context=0, comparing=0, start_from="demo",
    ),
}  # fmt: skip
# How often each task is asked at first, from `later` on and from `last` on.
QUESTION_WEIGHTS = {
    "llava": (FIRST_WEIGHTS, LATER_WEIGHTS, LAST_WEIGHTS),
    "internvl": (FIRST_WEIGHTS, LATER_WEIGHTS, COARSE_WEIGHTS),
}
# What a run that has begun cannot change.
FIXED = ("model", "seed", "workers", "layers", "vision_steps", "start_from")


class Trainer:
    def __init__(self, recipe: Recipe, out: Path, rank: int, compiled: bool, replan: bool) -> None:
        self.recipe, self.out, self.rank, self.replan = recipe, out, rank, replan
        self.assets = load_assets("train")
        self.architecture = ARCHITECTURES[recipe.model]
        self.model = self.architecture.build_model(recipe.seed, recipe.layers)
        config = self.model.config
        self.head = AuxiliaryHead(
            config.text_config.hidden_size, config.vision_config.hidden_size, self.architecture.side**2
        )
        self.packed = Packed(self.model, self.architecture, self.head, compiled)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.step, self.started = 0, time.monotonic()
        self.replanned: list[dict[str, Any]] = []
        self.optimizers = self._optimizers()
        self._load()
        if rank == 0:
            described = {**asdict(recipe), "replanned": self.replanned}
            (out / "recipe.json").write_text(json.dumps(described, indent=2))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for module in (self.model, self.head):
            for name, parameter in module.named_parameters():
                in_layer = ".layers." in name or ".layer." in name
                groups.setdefault((parameter.ndim == 2 and in_layer, "vision_tower" in name), []).append(parameter)
        muon = [{"params": p, "vision": vision} for (matrix, vision), p in groups.items() if matrix]
        adam = [{"params": p, "vision": vision} for (matrix, vision), p in groups.items() if not matrix]
        return [
            Muon(muon, recipe.muon_rate, recipe.weight_decay, rank=self.rank, workers=recipe.workers),
            torch.optim.AdamW(adam, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def _set_rates(self) -> None:
        recipe, joint = self.recipe, self._joint
        if joint < 0:
            factor = min(1.0, (self.step + 1) / recipe.warmup)
        else:
            left = (recipe.steps - joint) / (recipe.decay * recipe.steps)
            factor = min((joint + 1) / recipe.warmup, left, 1.0)
        vision = recipe.vision_rate if joint < recipe.last else recipe.last_vision_rate
        for optimizer, base in zip(self.optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor * (vision if group["vision"] and joint >= 0 else 1.0)

    def _losses(self) -> dict[str, torch.Tensor]:
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, self.step, self.rank))
        stage = (self._joint >= recipe.later) + (self._joint >= recipe.last)
        weights = QUESTION_WEIGHTS[recipe.model][stage]
        size = recipe.batch // recipe.workers
        batch = make_batch(rng, self.assets, size, weights, self.architecture, self._joint >= 0)
        with _precision():
            if self._joint < 0:
                return {"patch": self.packed.patch_loss(batch.pixels, batch.patch_labels)}
            # All workers ground the same layers, so that their steps take equally long.
            shared = np.random.default_rng((recipe.seed, self.step))
            grounded = shared.choice(np.arange(1, recipe.layers), recipe.grounded_layers, replace=False)
            return self.packed.losses(batch, [int(i) for i in grounded])

    @property
    def _joint(self) -> int:
        """Steps since everything trains; negative while the vision tower trains alone."""
        return self.step - self.recipe.vision_steps

    def _loss_weights(self) -> dict[str, float]:
        """The losses that have joined by now; in the first stage there is one."""
        recipe = self.recipe
        weights = {"answer": 1.0, "patch": recipe.patch_weight, "grounding": recipe.grounding_weight}
        for name in ("naming", "reading", "context", "comparing"):
            if self._joint >= getattr(recipe, name):
                weights[name] = getattr(recipe, f"{name}_weight")
        return weights

    def train_step(self) -> dict[str, float]:
        recipe, weights = self.recipe, self._loss_weights()
        if recipe.start_from == "demo":
            self._transplant()
        self._set_rates()
        losses = self._losses()
        torch.stack([weights[name] * loss for name, loss in losses.items() if name in weights]).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        values = torch.stack([losses[name].detach() for name in sorted(losses)])
        flat = torch.cat((parameters_to_vector(gradients), values))
        dist.all_reduce(flat)
        flat /= recipe.workers
        offset = 0
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return dict(zip(sorted(losses), flat[offset:].tolist(), strict=True))

    def _transplant(self) -> None:
        """The tower before the first step, the decoder before the first joint one, onto a tower that is ready
        for it."""
        if self.step == 0:
            share = transplant_tower(self.model, self.architecture, load_donor(), self.assets)
        elif self._joint == 0:
            transplant(self.model, self.architecture, load_donor())
            share = align(self.model, self.architecture, load_donor(), self.assets)
        else:
            return
        if self.rank == 0:
            self._log({"explained": round(share, 4)})

    def run(self) -> None:
        total = self.recipe.vision_steps + self.recipe.steps
        sums: dict[str, list[float]] = {}
        while self.step < total:
            for name, value in self.train_step().items():
                sums.setdefault(name, []).append(value)
            if self.rank == 0 and self.step % 20 == 0:
                self._log({name: round(float(np.mean(values)), 4) for name, values in sums.items()})
                sums = {}
            if self.step > self.recipe.vision_steps and (self.step % 100 == 0 or self.step == total):
                tasks = self.probe()
                if self.rank == 0:
                    self._log(tasks)
            if self.rank == 0 and (self.step % 50 == 0 or self.step == total):
                self.save()

    def probe(self) -> dict[str, float]:
        """Exact match per task on fixed scenes of the calibration material, shared out over the workers."""
        rng = np.random.default_rng((PROBE_SEED, self.rank))
        size, alike = PROBE_IMAGES // self.recipe.workers, dict.fromkeys(TASKS, 1.0)
        batch = make_batch(rng, load_assets("calibration"), size, alike, self.architecture)
        with _precision():
            exact = self.packed.exact(batch).float()
        asked = torch.nn.functional.one_hot(batch.tasks, len(TASKS)).float()  # (B, Q, tasks)
        counts = torch.stack((asked.sum((0, 1)), (asked * exact[..., None]).sum((0, 1))))
        dist.all_reduce(counts)
        return {task: round(float(right / n), 3) for task, n, right in zip(TASKS, *counts, strict=True)}

    def _log(self, values: dict[str, float]) -> None:
        line = json.dumps({"step": self.step, "seconds": round(time.monotonic() - self.started), **values})
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        print(line, flush=True)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "replanned": self.replanned,
            "step": self.step,
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)

    def _load(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        before, now = state["recipe"], asdict(self.recipe)
        changed = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
        self.replanned = list(state["replanned"])
        if changed and (not self.replan or changed.keys() & {*FIXED}):
            raise SystemExit(
                f"{self.checkpoint} was made with another {', '.join(changed)}: give the same recipe, or "
                f"another --out; --replan allows changes other than to {', '.join(sorted(FIXED))}"
            )
        if changed:
            self.replanned.append({"step": state["step"], "changed": changed})
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def _precision() -> Any:
    """bfloat16 where the CPU multiplies in it; elsewhere it is emulated, and slower than float32."""
    capable = torch.cpu.get_capabilities()
    if capable.get("amx_bf16") or capable.get("avx512_bf16"):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def work(rank: int, recipe: Recipe, out: Path, compiled: bool, replan: bool) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{out.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.workers)
    Trainer(recipe, out, rank, compiled, replan).run()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(RECIPES), default="llava")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--replan", action="store_true", help="resume with the changes given here")
    parser.add_argument("--start-from", choices=("", "demo"), help="demo: begin with its LLaVA")
    for field in fields(Recipe):
        if field.name not in ("model", "start_from"):
            kind = type(field.default)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help="as the model's recipe")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, compiled, replan = given.pop("out"), not given.pop("no_compile"), given.pop("replan")
    recipe = replace(RECIPES[given["model"]], **given)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    mp.spawn(work, (recipe, out, compiled, replan), nprocs=recipe.workers)


if __name__ == "__main__":
    main()
