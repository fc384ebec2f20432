"""Trains the demo model in one command: `python -m training.train --out runs/demo`.

Stages: the vision tower with its patch labels; then everything, with the answer, patch and grounding losses.
Deterministic for a seed and a number of workers, resumable (a checkpoint every 100 steps), logged as JSON
lines. Data-parallel over single-threaded processes, which on CPUs beats one process with many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parameters_to_vector

from training.assets import load_assets
from training.model import build_model
from training.packed import AuxiliaryHead, Packed, make_batch
from training.questions import FIRST_WEIGHTS, LAST_WEIGHTS, LATER_WEIGHTS


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    workers: int = 2
    batch: int = 32  # images a step, over all workers
    vision_steps: int = 500
    steps: int = 1950
    warmup: int = 60
    later: int = 700  # the joint step from which hard tasks prevail and words must point at what they name
    decay: float = 0.6  # the last share of the steps in which the rate falls linearly to 0
    muon_rate: float = 0.02
    adam_rate: float = 0.002
    weight_decay: float = 0.02
    vision_rate: float = 0.3  # factor on the vision tower's rate once the decoder trains too
    patch_weight: float = 1.0
    grounding_weight: float = 0.4
    naming_weight: float = 0.4
    reading: int = 900  # the joint step from which words must know what they name
    reading_weight: float = 0.5
    context: int = 1100  # the joint step from which they must know the question they stand in
    context_weight: float = 0.5
    last: int = 1600  # the joint step of the last change: the hardest tasks, and comparing them step by step
    comparing_weight: float = 0.5
    last_vision_rate: float = 1.0
    grounded_layers: int = 5  # drawn anew each step among the layers after the first
    layers: int = 12


class Trainer:
    def __init__(self, recipe: Recipe, out: Path, rank: int, compiled: bool) -> None:
        self.recipe, self.out, self.rank = recipe, out, rank
        self.assets = load_assets("train")
        self.model = build_model(recipe.seed, recipe.layers)
        config = self.model.config
        self.head = AuxiliaryHead(config.text_config.hidden_size, config.vision_config.hidden_size)
        self.packed = Packed(self.model, self.head, compiled)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.step, self.started = 0, time.monotonic()
        self.optimizers = self._optimizers()
        self._load()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for module in (self.model, self.head):
            for name, parameter in module.named_parameters():
                matrix = parameter.ndim == 2 and "layers." in name
                groups.setdefault((matrix, "vision_tower" in name), []).append(parameter)
        muon = [{"params": p, "vision": vision} for (matrix, vision), p in groups.items() if matrix]
        adam = [{"params": p, "vision": vision} for (matrix, vision), p in groups.items() if not matrix]
        return [
            torch.optim.Muon(muon, lr=recipe.muon_rate, weight_decay=recipe.weight_decay),
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
        weights = (FIRST_WEIGHTS, LATER_WEIGHTS, LAST_WEIGHTS)[stage]
        batch = make_batch(rng, self.assets, recipe.batch // recipe.workers, weights, self._joint >= 0)
        with torch.autocast("cpu", torch.bfloat16):
            if self._joint < 0:
                features, cls = self.packed.vision(batch.pixels)
                return {"patch": self.head.patch_loss(features, cls, batch.patch_labels)}
            # All workers ground the same layers, so that their steps take equally long.
            shared = np.random.default_rng((recipe.seed, self.step))
            grounded = shared.choice(np.arange(1, recipe.layers), recipe.grounded_layers, replace=False)
            return self.packed.losses(batch, [int(i) for i in grounded])

    @property
    def _joint(self) -> int:
        """Steps since everything trains; negative while the vision tower trains alone."""
        return self.step - self.recipe.vision_steps

    def train_step(self) -> dict[str, float]:
        recipe = self.recipe
        self._set_rates()
        losses = self._losses()
        weights = {"answer": 1.0, "patch": recipe.patch_weight, "grounding": recipe.grounding_weight}
        if self._joint >= recipe.later:
            weights["naming"] = recipe.naming_weight
        if self._joint >= recipe.reading:
            weights["reading"] = recipe.reading_weight
        if self._joint >= recipe.context:
            weights["context"] = recipe.context_weight
        if self._joint >= recipe.last:
            weights["comparing"] = recipe.comparing_weight
        torch.stack(
            [weights[name] * loss for name, loss in losses.items() if name in weights]
        ).sum().backward()
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

    def run(self) -> None:
        total = self.recipe.vision_steps + self.recipe.steps
        sums: dict[str, list[float]] = {}
        while self.step < total:
            for name, value in self.train_step().items():
                sums.setdefault(name, []).append(value)
            if self.rank == 0 and self.step % 20 == 0:
                self._log({name: round(float(np.mean(values)), 4) for name, values in sums.items()})
                sums = {}
            if self.rank == 0 and (self.step % 100 == 0 or self.step == total):
                self.save()

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
        if state["recipe"] != asdict(self.recipe):
            before = state["recipe"]
            changed = [name for name, value in asdict(self.recipe).items() if before.get(name) != value]
            raise SystemExit(
                f"{self.checkpoint} was made with another {', '.join(changed)}: "
                "give the same recipe, or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def work(rank: int, recipe: Recipe, out: Path, compiled: bool) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{out.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.workers)
    Trainer(recipe, out, rank, compiled).run()
    dist.destroy_process_group()


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-compile", action="store_true")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out, compiled = arguments.pop("out"), not arguments.pop("no_compile")
    recipe = Recipe(**arguments)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    mp.spawn(work, (recipe, out, compiled), nprocs=recipe.workers)


if __name__ == "__main__":
    main()
