"""A slow, independent way to run a LLaVA under a schedule: the whole sequence, no cache, no padding, eager
attention.

Nothing is taken out. From a layer on, dropped tokens are merely hidden from everyone as keys, and the ranking
is recomputed from plain attention weights. Shares no code with the library but `Schedule.counts`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from thinsight.schedule import Schedule

ROWS = 16  # of text that rank, evenly spaced, where there are more


class Reference:
    """One prompt (a row without padding), possibly continued by answers and later turns."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        schedule: Schedule,
        *,
        queries: str = "instruction",
        scores: list[float] | None = None,
    ) -> None:
        self.text = model.model.language_model
        assert self.text.config._attn_implementation == "eager"
        self.model = model
        self.schedule = schedule
        self.queries = queries
        self.scores = scores  # fixed scores per vision token of the turn, in place of attention
        self.embeds = torch.zeros(1, 0, self.text.config.hidden_size, dtype=model.dtype)
        self.vision: list[bool] = []
        self.hidden = [set() for _ in range(schedule.num_layers)]  # per layer, columns that nobody sees
        self.kept: list[list[int]] = []  # per layer, the turn's kept vision tokens, by number in the turn

    @torch.no_grad()
    def read(self, ids: Tensor, pixels: Tensor | None = None, images: list[int] | None = None) -> Tensor:
        """Read a turn: ids (seq,), pixels (images, 3, h, w), tokens of each image. Logits of its tokens (seq,
        vocab)."""
        start = len(self.vision)
        self._extend(ids, pixels)
        tokens = [start + i for i, id_ in enumerate(ids.tolist()) if id_ == self.model.config.image_token_id]
        images = images if images is not None else ([16] * (len(tokens) // 16))
        groups, first = [], 0
        for size in images:
            groups.append(tokens[first : first + size])
            first += size
        after = [c for c in range(start, len(self.vision)) if tokens and c > tokens[-1]]
        if len(after) > ROWS:
            after = [after[number * len(after) // ROWS - 1] for number in range(1, ROWS + 1)]
        rows = after if after and self.queries == "instruction" else [len(self.vision) - 1]
        alive = [list(group) for group in groups]
        self.kept = []

        def rank(layer: int, weights: Tensor | None) -> None:  # weights (heads, seq, seq) of the layer before
            for group, full in zip(alive, groups, strict=True):
                count = self.schedule.counts(len(full))[layer]
                if count < len(group):
                    if self.scores is None:
                        received = weights[:, rows].mean(dim=(0, 1))
                        value = {column: float(received[column]) for column in group}
                    else:
                        value = {column: self.scores[tokens.index(column)] for column in group}
                    best = sorted(group, key=lambda column: (-value[column], column))[:count]
                    group[:] = sorted(best)
            kept = {column for group in alive for column in group}
            self.hidden[layer] |= set(tokens) - kept
            self.kept.append(sorted(tokens.index(column) for column in kept))

        return self._run(rank)[start:]

    @torch.no_grad()
    def answer(self, token: int) -> Tensor:
        """Append one generated token; its logits (vocab,)."""
        self._extend(torch.tensor([token]), None)
        return self._run(None)[-1]

    def _extend(self, ids: Tensor, pixels: Tensor | None) -> None:
        embeds = self.model.get_input_embeddings()(ids[None])
        if pixels is not None:
            features = torch.cat(list(self.model.get_image_features(pixels).pooler_output))
            embeds[0, ids == self.model.config.image_token_id] = features.to(embeds.dtype)
        self.embeds = torch.cat([self.embeds, embeds], dim=1)
        self.vision += (ids == self.model.config.image_token_id).tolist()

    def _run(self, rank) -> Tensor:
        length = self.embeds.shape[1]
        positions = torch.arange(length)[None]
        rotary = self.text.rotary_emb(self.embeds, position_ids=positions)
        states, weights = self.embeds, None
        for number, layer in enumerate(self.text.layers):
            if rank is not None:
                rank(number, weights)
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            for column in self.hidden[number]:
                seen[:, column] = False
                seen[column, column] = True  # a hidden token still sees itself, so that its softmax is defined
            mask = torch.zeros(1, 1, length, length, dtype=states.dtype)
            mask.masked_fill_(~seen, torch.finfo(states.dtype).min)
            _, attention = layer.self_attn(
                hidden_states=layer.input_layernorm(states), position_embeddings=rotary, attention_mask=mask
            )
            weights = attention[0]
            states = layer(states, attention_mask=mask, position_embeddings=rotary)
        return self.model.lm_head(self.text.norm(states))[0]


def unpadded(batch: dict[str, Tensor], row: int) -> tuple[Tensor, Tensor | None]:
    """Ids (seq,) and pixels of one row of a padded batch of `tiny_inputs`."""
    real = batch["attention_mask"].bool()
    images = [(ids == 4).sum().item() // 16 for ids in batch["input_ids"]]
    first = sum(images[:row])
    pixels = batch["pixel_values"][first : first + images[row]] if images[row] else None
    return batch["input_ids"][row][real[row]], pixels
