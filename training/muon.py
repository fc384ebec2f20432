"""Muon for matrices, in float32 and shared out: every worker orthogonalises a part of them.

The update of `torch.optim.Muon` (Keller Jordan, 2024), which computes in bfloat16 and in every process alone:
on a CPU without bfloat16 instructions a step of the demo model takes it 14 s, this one under a second. Knows
nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix with its singular values pushed towards 1 by a quintic Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    All workers must hold equal gradients; momenta are kept by all, so that any of them can be saved.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.rank, self.workers = rank, workers

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        updates = torch.zeros(sum(p.numel() for _, p in work))
        slots = updates.split([p.numel() for _, p in work]) if work else ()
        for i, ((group, p), slot) in enumerate(zip(work, slots, strict=True)):
            state = self.state[p]
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            if i % self.workers == self.rank:
                slot.copy_(orthogonalise(p.grad.lerp(momentum, group["momentum"])).reshape(-1))
        if self.workers > 1:
            dist.all_reduce(updates)
        for (group, p), slot in zip(work, slots, strict=True):
            rate = group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(slot.view_as(p), alpha=rate)
