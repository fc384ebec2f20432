"""Faults that a reduction could have, planted into the library: what a check is there to find.

Each works on any model, and each leaves the rest of a pass as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thinsight.checking.reference import hide
from thinsight.runtime import call
from thinsight.runtime.reducer import Quotas, Reducer


def shifted_positions(patch: pytest.MonkeyPatch) -> None:
    """In layers that see fewer tokens, every token has the position of its neighbour."""
    right = Reducer._shrunk

    def shrunk(self: Any, run: Any, columns: Any, layer: int, states: Tensor, args: Any, kwargs: Any) -> Any:
        tables = tuple(table.roll(1, dims=-2) for table in kwargs["position_embeddings"])
        return right(self, run, columns, layer, states, args, {**kwargs, "position_embeddings": tables})

    patch.setattr(Reducer, "_shrunk", shrunk)


def shifted_answer(patch: pytest.MonkeyPatch) -> None:
    """Behind what was dropped, tokens of the answer stand half a turn away from where they are."""
    right = Reducer._whole

    def whole(self: Any, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        if self.local.run is None and layer >= self.quotas.starts[0] and kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            kwargs = {**kwargs, "position_embeddings": (cos.neg(), sin.neg())}
            return right(self, layer, module, args, kwargs) or (args, kwargs)
        return right(self, layer, module, args, kwargs)

    patch.setattr(Reducer, "_whole", whole)


def one_more_token(patch: pytest.MonkeyPatch) -> None:
    """Of every image from which tokens are dropped, one more is kept."""
    right = Quotas.count

    def count(self: Any, n: int, layer: int, level: int) -> int:
        found = right(self, n, layer, level)
        return found + 1 if found < n else n

    patch.setattr(Quotas, "count", count)


def whole_cache(patch: pytest.MonkeyPatch) -> None:
    """The prompt is reduced rightly, but by a mask: the cache keeps the keys of what was dropped."""

    def masked(self: Any, run: Any, columns: Any, layer: int, states: Tensor, args: Any, kwargs: Any) -> Any:
        run.take, run.spread, mask, rows = None, False, kwargs.get("attention_mask"), []
        for number, index in enumerate(columns.index):
            there = index if columns.valid is None else index[columns.valid[number]]
            one = None if mask is None else mask[number % len(mask)][None]
            rows.append(hide(one, {*range(states.shape[1])} - {*there.tolist()}, states[:1]))
        return args, {**kwargs, "attention_mask": torch.cat(rows)}

    patch.setattr(Reducer, "_shrunk", masked)
    patch.setattr(Reducer, "_spread_out", lambda *_: None)


def counted_padding(patch: pytest.MonkeyPatch) -> None:
    """Padding counts as text of the prompt."""

    def real(mask: Any, batch: int, seq: int, past: int, device: torch.device) -> Tensor:
        return torch.ones((batch, seq), dtype=torch.bool, device=device)

    patch.setattr(call, "_real", real)


def counted_twice(patch: pytest.MonkeyPatch) -> None:
    """Images and videos stand behind one token, and each vision token counts as both (Molmo 2)."""
    right = call.vision_placeholders

    def twice(*given: Any) -> dict[str, Tensor]:
        mask = torch.stack(list(right(*given).values())).any(0)
        return {"image": mask, "video": mask}

    patch.setattr(call, "vision_placeholders", twice)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "positions shifted by one": (shifted_positions, "one prompt"),
    "positions of the answer": (shifted_answer, "one prompt"),
    "one extra token kept": (one_more_token, "one prompt"),
    "a cache not cut": (whole_cache, "the cache holds what was kept"),
    "padding counted": (counted_padding, "ranked by text attention"),
    "each token counted twice": (counted_twice, "vision tokens are counted once"),
}
"""By name: what plants it, and a line of the check that must fail."""
